"""One order statistic of all pairs' squared distances, exactly, in blocks of rows.

A squared distance is Σ_c (x_c − y_c)², every difference, square and sum rounded to float64 and the sums made in the
order of the coordinates; it is then rounded once to float32, unless the points are float64. No fused multiply-add: the
C++ kernel gives the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 20  # pairs of a block: 8 MiB of float64
BITS = 11  # found in each pass over the pairs


def strict(n: int, rank: int) -> tuple[int, bool]:
    """A rank among the N² ordered pairs, or N² − N without the diagonal, as one among the pairs i < j.

    -> (rank, whether it falls on the diagonal's zeros, which come last)
    """
    pairs = n * (n - 1) // 2
    return min((rank + 1) // 2, pairs), rank > 2 * pairs


def select(x: Tensor, y: Tensor, rank: int, same: bool) -> tuple[Tensor, Tensor]:
    """The rank-th largest squared distance, [], and its first pair (i, j) in row order, int64 [2].

    x, y: [N, D] and [M, D] float32 or float64; where `same`, y is x and the pairs are those with i < j. NaN and (0, 0)
    where any distance is not finite. Nothing is read back from a GPU.
    """
    double = x.dtype == torch.float64
    integer = torch.int64 if double else torch.int32
    high = 63 if double else 31
    found = torch.zeros((), dtype=torch.int64, device=x.device)
    left = torch.full_like(found, rank)
    bad = torch.zeros((), dtype=torch.bool, device=x.device)
    # Not-negative floats are ordered as their bits: each pass finds the next few of the answer's, from the top.
    while high > 0:
        shift = max(0, high - BITS)
        counts = torch.zeros(1 << (high - shift), dtype=torch.int64, device=x.device)
        for _, distance, counted in _blocks(x, y, same):
            bad |= ~(distance.isfinite() | ~counted).all()
            key = distance.view(integer).long()
            chosen = counted & (key >> high == found >> high)
            counts.scatter_add_(0, (key >> shift & (len(counts) - 1)).flatten(), chosen.flatten().long())
        above = counts.flip(0).cumsum(0).flip(0)  # with the bin's own
        bin = (above >= left).sum() - 1
        left = left - (above - counts).gather(0, bin.clamp_min(0)[None])[0]
        found |= bin << shift
        high = shift
    m = len(y)
    first = torch.full_like(found, len(x) * m)
    for start, distance, counted in _blocks(x, y, same):
        place = torch.arange(distance.numel(), device=x.device).view_as(distance) + start * m
        match = counted & (distance.view(integer) == found)
        first = torch.minimum(first, torch.where(match, place, len(x) * m).amin())
    value = found.to(integer).view(x.dtype)
    first = torch.where(bad, 0, first)
    return torch.where(bad, torch.nan, value), torch.stack([first // m, first % m])


def _blocks(x: Tensor, y: Tensor, same: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, distances [rows, M], which pairs count) of each block."""
    rows = max(1, BLOCK // len(y))
    a, b = x.double(), y.double().mT.contiguous()
    for start in range(0, len(x), rows):
        part = a[start : start + rows]
        total = torch.zeros(len(part), len(y), dtype=torch.float64, device=x.device)
        for c in range(x.shape[1]):
            difference = part[:, c, None] - b[c]
            total += difference.mul_(difference)
        counted = torch.ones_like(total, dtype=torch.bool)
        yield start, total.to(x.dtype), counted.triu_(start + 1) if same else counted
