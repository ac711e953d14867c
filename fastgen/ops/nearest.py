"""fastgen::nearest, fastgen::nearest_distance and fastgen::nearest_rows.

The search returns indices alone: they carry no gradient, so the op is whole without one, and the distances of the
chosen are made anew by the second op, which costs a k/M-th of the search. The third gives the rows themselves, to a
compiled graph that changes the database afterwards.
"""

from typing import Any

import torch
from torch import Tensor

from fastgen import check
from fastgen.ops import backend
from fastgen.reference import nearest as reference

_ARGUMENTS = "(Tensor query, Tensor database, Tensor? mask, int k, float? exclude_radius, str precision)"
torch.library.define("fastgen::nearest", f"{_ARGUMENTS} -> Tensor")
torch.library.define("fastgen::nearest_distance", "(Tensor query, Tensor database, Tensor index) -> Tensor")
torch.library.define("fastgen::nearest_rows", "(Tensor database, Tensor index) -> Tensor")


WIDEST = 1 << 20  # columns for which the C++ filter's integers provably fit


def search(
    query: Tensor, database: Tensor, mask: Tensor | None, k: int, exclude_radius: float | None, precision: str
) -> Tensor:
    """Index [N, k]; with an exclude_radius −1 where fewer than k rows are left."""
    if _runs_on_triton(query, mask, k, exclude_radius, precision):
        return search_triton(query, database, mask)[1]
    chosen = backend.choose("nearest", query.device)
    module = backend.extension()
    if chosen == "cpp" and module is not None and query.shape[1] <= WIDEST:
        index = search_cpp(module, query, database, mask, k, exclude_radius, precision == "ieee")
        if index is not None:
            return index
    return reference.search(query, database, mask, k, exclude_radius, precision, _measure(chosen))


def _measure(chosen: str) -> reference.Measure:
    """`nearest_distance` of the kernels that run."""
    if chosen != "triton":
        return reference.nearest_distance
    from fastgen.kernels import nearest_launch

    return nearest_launch.distance


def _runs_on_triton(query: Tensor, mask: Tensor | None, k: int, exclude_radius: float | None, precision: str) -> bool:
    if k != 1 or exclude_radius is not None or precision != "certified":
        return False
    if backend.choose("nearest", query.device) != "triton":
        return False
    from fastgen.kernels import nearest_launch

    return nearest_launch.fits(query, mask)


def search_triton(query: Tensor, database: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distance and index [N, 1] by the Triton kernels; what their bound does not prove is searched again with float64
    products."""
    from fastgen.kernels import nearest_launch

    found = nearest_launch.search(query, database, mask)
    distance, index = found.distance[:, None], found.index[:, None]
    rows = found.open.nonzero()[:, 0]  # the one wait for the device
    if len(rows):  # nor is anything of points that are not finite, or too far apart for float32, or all hidden
        reference.refuse_non_finite("query", query, None)
        some = query[rows]
        again = reference.search(some, database, mask, 1, None, "certified", nearest_launch.distance)
        index[rows] = again
        distance[rows] = nearest_launch.distance(some, database, again)
    return distance, index


def search_cpp(
    module: Any,
    query: Tensor,
    database: Tensor,
    mask: Tensor | None,
    k: int,
    exclude_radius: float | None = None,
    every_pair: bool = False,
    **more: Any,
) -> Tensor | None:
    """The C++ kernel, or None where magnitudes are beyond its integers' scales: float64 may still hold them.
    `more`: for tests. vnni=False keeps to the instructions that every processor of its set has; few: the number of
    queries up to which the database is scanned without packing it."""
    if mask is not None:
        mask = mask.contiguous()
        reference.refuse_small_mask(mask, k)
    n, (m, d) = len(query), database.shape
    # The kernel writes through addresses: no default dtype or device of torch's may decide what lies there.
    index = torch.full((n, k), -1, dtype=torch.int64, device="cpu")
    distance = torch.zeros(n, k, dtype=torch.float32, device="cpu")
    rejected = None if exclude_radius is None else torch.zeros(m, dtype=torch.bool, device="cpu")
    wide_query, wide_database = _wide(query), _wide(database)
    outcome, row = module.nearest(
        wide_query.data_ptr(),
        wide_database.data_ptr(),
        wide_query.dtype == torch.float64,
        n,
        m,
        d,
        k,
        0 if mask is None else mask.data_ptr(),
        mask is not None and mask.ndim == 2,
        index.data_ptr(),
        distance.data_ptr(),
        torch.get_num_threads(),
        every_pair=every_pair,
        reach=0.0 if exclude_radius is None else exclude_radius * exclude_radius,
        rejected=0 if rejected is None else rejected.data_ptr(),
        **more,
    )
    if outcome == "overflow":
        return None
    if outcome != "ok":
        reference.non_finite(outcome, row)
    if rejected is None:
        return index
    # Of the answers outside a query's own radius, others may have rejected some: those queries look again.
    again = (rejected[index] | (index < 0)).any(1).nonzero()[:, 0]
    if len(again) == 0:
        return index
    left = ~rejected if mask is None else ~rejected & (mask if mask.ndim == 1 else mask[again])
    enough = (left.sum(-1) >= k).expand(len(again))
    index[again] = -1
    again, left = again[enough], left if left.ndim == 1 else left[enough]
    if len(again):
        found = search_cpp(module, wide_query[again], wide_database, left, k, None, every_pair, **more)
        if found is None:
            return None
        index[again] = found
    return index


def call(
    query: Tensor, database: Tensor, mask: Tensor | None, k: int, exclude_radius: float | None, precision: str
) -> tuple[Tensor, Tensor]:
    """Distance and index [N, k], by the two ops."""
    index = torch.ops.fastgen.nearest(query, database, mask, k, exclude_radius, precision)
    return torch.ops.fastgen.nearest_distance(query, database, index), index


def direct(
    query: Tensor, database: Tensor, mask: Tensor | None, k: int, exclude_radius: float | None, precision: str
) -> tuple[Tensor, Tensor]:
    """`call` without torch's dispatcher, where `backend.runs_directly`. A GPU's search has its distances already."""
    if _runs_on_triton(query, mask, k, exclude_radius, precision):
        return search_triton(query, database, mask)
    index = _nearest(query, database, mask, k, exclude_radius, precision)
    return _nearest_distance(query, database, index), index


def _nearest(
    query: Tensor, database: Tensor, mask: Tensor | None, k: int, exclude_radius: float | None, precision: str
) -> Tensor:
    index = search(query, database, mask, k, exclude_radius, precision)
    if exclude_radius is not None:
        reference.refuse_few(index, exclude_radius)
    return index


def _nearest_distance(query: Tensor, database: Tensor, index: Tensor) -> Tensor:
    module = backend.extension()
    chosen = backend.choose("nearest", query.device)
    if chosen != "cpp" or module is None:
        return _measure(chosen)(query, database, index)
    distance = torch.empty(index.shape, dtype=torch.float32, device="cpu")
    if database.element_size() == 2 and index.numel() < len(database):  # the rows that are asked for, widened
        database, index = database[index.flatten()], torch.arange(index.numel(), device="cpu").view(index.shape)
    wide_query, wide_database, index = _wide(query), _wide(database), index.contiguous()
    module.nearest_distance(
        wide_query.data_ptr(),
        wide_database.data_ptr(),
        wide_query.dtype == torch.float64,
        *wide_query.shape[:1],
        *wide_database.shape,
        index.shape[1],
        index.data_ptr(),
        distance.data_ptr(),
        torch.get_num_threads(),
    )
    return distance


def _nearest_rows(database: Tensor, index: Tensor) -> Tensor:
    return database.index_select(0, index)


def _wide(points: Tensor) -> Tensor:
    """Contiguous float32 or float64; the half types widen exactly."""
    dtype = torch.promote_types(points.dtype, torch.float32)
    if points.dtype == dtype:
        return points.contiguous()
    module = backend.extension()
    assert module is not None
    wide = torch.empty(points.shape, dtype=dtype, device="cpu")
    module.large_pages(wide.data_ptr(), wide.nbytes)
    return wide.copy_(points)


torch.library.impl("fastgen::nearest", "CPU", _nearest)
torch.library.impl("fastgen::nearest", "CUDA", _nearest)
torch.library.impl("fastgen::nearest_distance", "CPU", _nearest_distance)
torch.library.impl("fastgen::nearest_distance", "CUDA", _nearest_distance)
torch.library.impl("fastgen::nearest_rows", "CPU", _nearest_rows)
torch.library.impl("fastgen::nearest_rows", "CUDA", _nearest_rows)


no_vmap = check.no_vmap("nearest", "one query and database a call")


torch.library.register_vmap("fastgen::nearest", no_vmap)
torch.library.register_vmap("fastgen::nearest_distance", no_vmap)
torch.library.register_vmap("fastgen::nearest_rows", no_vmap)


@torch.library.register_fake("fastgen::nearest")
def _nearest_fake(
    query: Tensor, database: Tensor, mask: Tensor | None, k: int, exclude_radius: float | None, precision: str
) -> Tensor:
    torch._check(query.ndim == 2 and database.ndim == 2)
    return query.new_empty((query.shape[0], k), dtype=torch.int64)


@torch.library.register_fake("fastgen::nearest_distance")
def _nearest_distance_fake(query: Tensor, database: Tensor, index: Tensor) -> Tensor:
    return torch.empty(index.shape, dtype=torch.float32, device=query.device)


@torch.library.register_fake("fastgen::nearest_rows")
def _nearest_rows_fake(database: Tensor, index: Tensor) -> Tensor:
    return database.new_empty((index.shape[0], database.shape[1]))
