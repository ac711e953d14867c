"""Exact nearest neighbours in plain torch: the meaning, and a search by matrix products that proves it found it.

The distance of two rows is float32 of Σ(q − b)², summed in float64 over eight interleaved partial sums that are then
halved; products and sums are rounded apart. The order is part of the definition: it makes the distance one number
whatever the block, the device or the kernel. The answer is the k smallest (distance, index).
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

ELEMENTS = 1 << 22  # of a float64 block: 32 MiB
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]  # `nearest_distance`, or a kernel for it


def direct(query: Tensor, database: Tensor) -> Tensor:
    """float32 distances of the rows [..., D] of two tensors that broadcast: [...]."""
    width = query.shape[-1]
    shape = torch.broadcast_shapes(query.shape[:-1], database.shape[:-1])
    partial = torch.zeros(*shape, 8, dtype=torch.float64, device=query.device)
    for start in range(0, width, 8):
        stop = min(start + 8, width)
        step = query[..., start:stop].double() - database[..., start:stop].double()
        partial[..., : stop - start] += step * step
    partial = partial[..., :4] + partial[..., 4:]
    partial = partial[..., :2] + partial[..., 2:]
    return (partial[..., 0] + partial[..., 1]).float()


def nearest_distance(query: Tensor, database: Tensor, index: Tensor) -> Tensor:
    """float32 distances [N, k] of each query to the rows `index` [N, k] of the database."""
    out = torch.empty(index.shape, dtype=torch.float32, device=query.device)
    block = max(1, ELEMENTS // (index.shape[1] * max(8, query.shape[1])))
    for start in range(0, len(query), block):
        rows = slice(start, start + block)
        out[rows] = direct(query[rows, None], database[index[rows]])
    return out


def exhaustive(query: Tensor, database: Tensor, allowed: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The meaning itself: distance and index [N, k] by looking at every pair; `allowed` is [M] or [N, M] bool."""
    n, m = len(query), len(database)
    distance = torch.full((n, k), torch.inf, dtype=torch.float32, device=query.device)
    index = torch.zeros(n, k, dtype=torch.int64, device=query.device)
    columns = min(m, 4096)
    rows = max(1, ELEMENTS // (8 * columns))
    for top in range(0, n, rows):
        here = slice(top, top + rows)
        for left in range(0, m, columns):
            there = slice(left, left + columns)
            block = direct(query[here, None], database[None, there])
            if allowed is not None:
                block = block.masked_fill(
                    ~allowed[..., there] if allowed.ndim == 1 else ~allowed[here, there], torch.inf
                )
            ids = torch.arange(left, left + block.shape[1], device=query.device).expand_as(block)
            # Indices ascend along the row, so a stable sort by distance sorts by (distance, index).
            best = torch.cat([distance[here], block], 1).sort(dim=1, stable=True)
            distance[here] = best.values[:, :k]
            index[here] = torch.cat([index[here], ids], 1).gather(1, best.indices[:, :k])
    return distance, index


def search(
    query: Tensor,
    database: Tensor,
    mask: Tensor | None,
    k: int,
    exclude_radius: float | None,
    precision: str,
    measure: Measure = nearest_distance,
) -> Tensor:
    """Index [N, k] of the answer; with a radius −1 where fewer than k rows are left."""
    rows = allowed_rows(mask, len(database), k)
    refuse_non_finite("query", query, None)
    refuse_non_finite("database", database, rows)
    if exclude_radius is not None:
        mask = ~rejected(query, database, mask, exclude_radius, measure) & (True if mask is None else mask)
        return remaining(query, database, mask, k, precision, measure)
    if precision == "certified":
        distance, index = certified(query, database, mask, k, measure)
    else:
        # What is not finite is masked: it must not meet the sums.
        hidden = database if rows is None else database.masked_fill(~_among(rows, len(database))[:, None], 0)
        distance, index = exhaustive(query, hidden, mask, k)
    refuse_overflow(distance)
    return index


def remaining(
    query: Tensor, database: Tensor, mask: Tensor, k: int, precision: str, measure: Measure = nearest_distance
) -> Tensor:
    """Index [N, k] among the rows that `mask` [M] or [N, M] leaves; −1 for queries that it leaves fewer than k."""
    enough = (mask.sum(-1) >= k).expand(len(query))
    index = torch.full((len(query), k), -1, device=query.device)
    if enough.any():
        left = mask if mask.ndim == 1 else mask[enough]
        index[enough] = search(query[enough], database, left, k, None, precision, measure)
    return index


def rejected(
    query: Tensor, database: Tensor, mask: Tensor | None, radius: float, measure: Measure = nearest_distance
) -> Tensor:
    """[M] bool: rows with a distance below radius² to some query that may choose them."""
    rows = allowed_rows(mask, len(database), 1)
    points = database if rows is None else database[rows]
    askers = None if mask is None or mask.ndim == 1 else (mask if rows is None else mask[:, rows]).T
    near = certified(points, query, askers, 1, measure)[0][:, 0].double() < radius * radius
    return near if rows is None else _among(rows[near], len(database))


def _among(rows: Tensor, m: int) -> Tensor:
    """[M] bool: is the row one of `rows`?"""
    return torch.zeros(m, dtype=torch.bool, device=rows.device).index_fill(0, rows, True)


def certified(
    query: Tensor, database: Tensor, mask: Tensor | None, k: int, measure: Measure = nearest_distance
) -> tuple[Tensor, Tensor]:
    """The same answer from float64 matrix products: candidates, their direct distances, and a proof or a second look.

    With c the mean and q' = q − c, b' = b − c, D = ‖q'‖² + 2 (‖b'‖²/2 − q'·b'). A dot product of length D in any order
    errs by at most D·u·‖q'‖‖b'‖ to first order (u = 2⁻⁵³), the norms by D·u of themselves and each centred coordinate
    by u of itself, so the expansion errs by less than (2 D + 16) u (‖q'‖ + max‖b'‖)²; twice that is allowed for. The
    k + 8 smallest are measured directly. A query is proved where the largest of them, less its error, lies above the
    k-th direct distance by more than float32 rounding can hide; the others are searched exhaustively.
    """
    rows = allowed_rows(mask, len(database), k)
    points = database if rows is None else database[rows]
    centre = points.mean(0, dtype=torch.float64)
    points_centred = points.double() - centre
    halved = points_centred.square().sum(1) / 2
    radius = (2 * halved.max()).sqrt()
    allowed = mask if mask is not None and mask.ndim == 2 else None
    if allowed is not None and rows is not None:
        allowed = allowed[:, rows]

    m, width = points.shape
    keep = min(m, k + 8)
    distance = torch.empty(len(query), k, dtype=torch.float32, device=query.device)
    index = torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    columns = min(m, 1 << 14)
    block = max(1, ELEMENTS // columns)
    for top in range(0, len(query), block):
        here = slice(top, top + block)
        centred = query[here].double() - centre
        score = torch.full((len(centred), 0), torch.inf, dtype=torch.float64, device=query.device)
        ids = torch.zeros(len(centred), 0, dtype=torch.int64, device=query.device)
        for left in range(0, m, columns):
            there = slice(left, left + columns)
            fresh = halved[there] - centred @ points_centred[there].T
            if allowed is not None:
                fresh = fresh.masked_fill(~allowed[here, there], torch.inf)
            new_ids = torch.arange(left, left + fresh.shape[1], device=query.device).expand_as(fresh)
            score, chosen = torch.cat([score, fresh], 1).topk(min(keep, left + fresh.shape[1]), dim=1, largest=False)
            ids = torch.cat([ids, new_ids], 1).gather(1, chosen)
        ids, order = ids.sort(dim=1)
        exact = measure(query[here], points, ids)
        exact = exact.masked_fill(score.gather(1, order).isposinf(), torch.inf)  # masked rows that filled up the list
        exact, order = exact.sort(dim=1, stable=True)
        distance[here], index[here] = exact[:, :k], ids.gather(1, order)[:, :k]
        if keep == m:
            continue
        norm = centred.square().sum(1)
        slack = (4 * width + 32) * 2.0**-53 * (norm.sqrt() + radius).square()
        dropped = norm + 2 * score.amax(1) - slack
        open_rows = (~(dropped > distance[here, -1].double() * (1 + 2.0**-22) + 2.0**-140)).nonzero()[:, 0]
        if len(open_rows):
            among = None if allowed is None else allowed[here][open_rows]
            found = exhaustive(query[here][open_rows], points, among, k)
            distance[open_rows + top], index[open_rows + top] = found
    return distance, index if rows is None else rows[index]


def allowed_rows(mask: Tensor | None, m: int, k: int) -> Tensor | None:
    """The rows that some query may choose, ascending; None means all."""
    if mask is None:
        return None
    refuse_small_mask(mask, k)
    rows = (mask if mask.ndim == 1 else mask.any(0)).nonzero()[:, 0]
    return None if len(rows) == m else rows


def refuse_small_mask(mask: Tensor, k: int) -> None:
    wide = torch.int64 if mask.shape[-1] >> 31 else torch.int32  # which sums eight times as fast on the CPU
    counts = mask.sum(-1, dtype=wide)
    least = int(counts.min())
    if least < k:
        where = "" if mask.ndim == 1 else f" for query {int(counts.argmin())}"
        raise ValueError(f"k: expected at most the number of rows that mask allows{where}, {least}, got {k}")


def refuse_non_finite(name: str, value: Tensor, rows: Tensor | None) -> None:
    bad = ~value.isfinite().all(1)
    if rows is not None:
        bad &= _among(rows, len(bad))
    if bad.any():
        non_finite(name, int(bad.nonzero()[0, 0]))


def non_finite(name: str, row: int) -> NoReturn:
    hint = "" if name == "query" else " (mask can leave rows out)"
    raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {row}{hint}")


def refuse_few(index: Tensor, exclude_radius: float) -> None:
    if (index < 0).any():
        query, k = int((index < 0).any(1).nonzero()[0, 0]), index.shape[1]
        raise ValueError(
            f"exclude_radius: expected a radius that leaves {k} rows of database for each query, but {exclude_radius} "
            f"leaves fewer for query {query}: take a lower radius or a larger database"
        )


def refuse_overflow(distance: Tensor) -> None:
    if not distance.isfinite().all():
        overflow()


def overflow() -> NoReturn:
    raise ValueError("query, database: expected squared distances within float32, below 3.4e38, got larger; scale both")
