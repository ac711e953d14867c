"""IMLE's pool of samples: made by number, searched as they come, never stored."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.functional import langevin_noise, nearest
from fastgen.models import processes
from fastgen.search import StreamingNearest

NONE = torch.iinfo(torch.int64).max


def codes(ids: Tensor, dim: int, seed: int) -> Tensor:
    """Standard normal latents [n, dim] of the samples `ids` [n] int64: a function of (seed, id) alone (stream v1)."""
    return langevin_noise((len(ids), dim), seed=seed, chain_id=ids, device=ids.device)


def key(seed: int, use: int) -> int:
    """The noise's seed: 0 for the pools of training, 1 for samples drawn afterwards."""
    return 2 * seed + use


class Found(NamedTuple):
    """Of each datum: squared distance float32 [N] to the nearest sample, and its id int64 [N]."""

    distance: Tensor
    id: Tensor


def spans(first: int, count: int, chunk: int) -> list[range]:
    """The ids first … first + count − 1 in chunks: the same ones for any number of processes, since what a network
    gives for a sample may depend in its last bit on the batch around it."""
    return [range(i, min(i + chunk, first + count)) for i in range(first, first + count, chunk)]


def own_spans(all_spans: list[range]) -> list[range]:
    """This process's share: neighbouring chunks."""
    rank, size = processes.rank(), processes.size()
    return all_spans[len(all_spans) * rank // size : len(all_spans) * (rank + 1) // size]


def search_pool(
    blocks: Callable[[], Iterable[Tensor]],
    make: Callable[[Tensor], Tensor],
    *,
    first: int,
    count: int,
    chunk: int,
    radius: float = 0.0,
    tick: Callable[[int], object] = lambda n: None,
) -> Found:
    """The nearest of the samples first … first + count − 1 to each datum, min over (distance, id).

    blocks: gives the data [n, D] block by block, from the start at each call
    make: ids int64 [m] -> the samples' points [m, D]; called once a chunk for each block, and once more under a radius
    chunk: samples held at a time
    radius: RS-IMLE's ε: a sample nearer than this (in distance, not squared) to any datum is no candidate
    tick: is told how many samples were just made

    Memory: a block, a chunk and 12 bytes a datum; under a radius also one bit (a bool) a sample. The pool is made anew
    for each block: a block is worth many chunks, and searching it many times dearer than making them.
    In several processes each takes its share of the chunks, and the answer is the same to the bit.
    """
    mine = own_spans(spans(first, count, chunk))
    keep: Sequence[Tensor | None] = [None] * len(mine)
    if radius > 0:
        keep = _outside(blocks, make, mine, radius, tick)
    distance, ids = [], []
    for block in blocks():
        search, taken = StreamingNearest(block), 0
        for span, kept in zip(mine, keep, strict=True):
            points = make(torch.arange(span.start, span.stop, device=block.device))
            tick(len(span))
            if kept is not None:
                points = points[kept.to(points.device)]
            # Those that are left are counted through: their order is the ids' order.
            search.update(points, first_id=taken)
            taken += len(points)
        if taken:
            found = search.result()
            distance.append(found.distance[:, 0])
            ids.append(_numbers(mine, keep, found.index[:, 0]))
        else:
            distance.append(torch.full((len(block),), torch.inf, device=block.device))
            ids.append(torch.full((len(block),), NONE, device=block.device))
    return Found(*processes.smallest(torch.cat(distance), torch.cat(ids)))


def _outside(
    blocks: Callable[[], Iterable[Tensor]],
    make: Callable[[Tensor], Tensor],
    mine: list[range],
    radius: float,
    tick: Callable[[int], object],
) -> list[Tensor]:
    """For each span, bool [m]: which samples lie at least `radius` from every datum."""
    keep = [torch.ones(len(span), dtype=torch.bool) for span in mine]
    for block in blocks():
        for span, kept in zip(mine, keep, strict=True):
            points = make(torch.arange(span.start, span.stop, device=block.device))
            tick(len(span))
            kept &= (nearest(points, block).distance[:, 0] >= radius**2).cpu()
    return keep


def _numbers(mine: list[range], keep: Sequence[Tensor | None], position: Tensor) -> Tensor:
    """ids of the samples that were counted through."""
    if all(kept is None for kept in keep):
        return position + mine[0].start
    whole = torch.cat([kept for kept in keep if kept is not None])
    return whole.nonzero()[:, 0].to(position.device)[position] + mine[0].start


def search_own(
    blocks: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    make: Callable[[Tensor, Tensor], Tensor],
    *,
    first: int,
    pool: int,
    chunk: int,
    tick: Callable[[int], object] = lambda n: None,
) -> Found:
    """Where each datum has samples of its own: datum number r chooses among first + r·pool … first + (r + 1)·pool − 1.

    blocks: gives (rows int64 [n], points [n, D])
    make: (ids [m], rows [m]) -> points [m, D], `rows` being the data whose samples these are

    Distances as `functional.nearest` has them. The data are shared out over the processes in groups of chunk / pool.
    """
    group = max(1, chunk // pool)
    distance, ids = [], []
    for rows, points in blocks():
        near = torch.full((len(rows),), torch.inf, device=points.device)
        who = torch.full((len(rows),), NONE, device=points.device)
        for span in own_spans(spans(0, len(rows), group)):
            part = slice(span.start, span.stop)
            number = rows[part, None] * pool + torch.arange(pool, device=rows.device) + first
            made = make(number.flatten(), rows[part].repeat_interleave(pool)).unflatten(0, (-1, pool))
            tick(number.numel())
            found = [nearest(q[None], own) for q, own in zip(points[part], made, strict=True)]
            near[part] = torch.cat([f.distance[:, 0] for f in found])
            who[part] = number.gather(1, torch.cat([f.index for f in found]))[:, 0]
        distance.append(near)
        ids.append(who)
    return Found(*processes.smallest(torch.cat(distance), torch.cat(ids)))
