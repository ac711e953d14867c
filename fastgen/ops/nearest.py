"""fastgen::nearest and fastgen::nearest_distance.

The search returns indices alone: they carry no gradient, so the op is whole without one, and the distances of the
chosen are made anew by the second op, which costs a k/M-th of the search.
"""

from typing import Any

import torch
from torch import Tensor

from fastgen.ops import backend
from fastgen.reference import nearest as reference

torch.library.define("fastgen::nearest", "(Tensor query, Tensor database, Tensor? mask, int k) -> Tensor")
torch.library.define("fastgen::nearest_distance", "(Tensor query, Tensor database, Tensor index) -> Tensor")


WIDEST = 1 << 20  # columns for which the C++ filter's integers provably fit


def _nearest(query: Tensor, database: Tensor, mask: Tensor | None, k: int) -> Tensor:
    return reference.certified(query, database, mask, k)[1]


def _nearest_cpu(query: Tensor, database: Tensor, mask: Tensor | None, k: int) -> Tensor:
    module = backend.extension()
    if backend.choose("nearest", query.device) != "cpp" or module is None or query.shape[1] > WIDEST:
        return _nearest(query, database, mask, k)
    return search(module, query, database, mask, k)


def search(module: Any, query: Tensor, database: Tensor, mask: Tensor | None, k: int, vnni: bool = True) -> Tensor:
    """The C++ kernel; `vnni` False keeps to the instructions that every processor of its set has (tests)."""
    if mask is not None:
        mask = mask.contiguous()
        reference.refuse_small_mask(mask, k)
    index = torch.empty(query.shape[0], k, dtype=torch.int64)
    distance = torch.empty(query.shape[0], k)
    wide_query, wide_database = _wide(query), _wide(database)
    outcome, row = module.nearest(
        wide_query.data_ptr(),
        wide_database.data_ptr(),
        wide_query.dtype == torch.float64,
        *wide_query.shape[:1],
        *wide_database.shape,
        k,
        0 if mask is None else mask.data_ptr(),
        mask is not None and mask.ndim == 2,
        index.data_ptr(),
        distance.data_ptr(),
        torch.get_num_threads(),
        vnni,
    )
    if outcome == "overflow":  # magnitudes beyond its integers' scales: float64 may still hold them
        return _nearest(query, database, mask, k)
    if outcome != "ok":
        reference.non_finite(outcome, row)
    return index


def _nearest_distance_cpu(query: Tensor, database: Tensor, index: Tensor) -> Tensor:
    module = backend.extension()
    if backend.choose("nearest", query.device) != "cpp" or module is None:
        return reference.nearest_distance(query, database, index)
    distance = torch.empty(index.shape)
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


def _wide(points: Tensor) -> Tensor:
    """Contiguous float32 or float64; the half types widen exactly."""
    return points.to(torch.promote_types(points.dtype, torch.float32)).contiguous()


torch.library.impl("fastgen::nearest", "CPU", _nearest_cpu)
torch.library.impl("fastgen::nearest", "CUDA", _nearest)
torch.library.impl("fastgen::nearest_distance", "CPU", _nearest_distance_cpu)
torch.library.impl("fastgen::nearest_distance", "CUDA", reference.nearest_distance)


@torch.library.register_fake("fastgen::nearest")
def _nearest_fake(query: Tensor, database: Tensor, mask: Tensor | None, k: int) -> Tensor:
    torch._check(query.ndim == 2 and database.ndim == 2)
    return query.new_empty((query.shape[0], k), dtype=torch.int64)


@torch.library.register_fake("fastgen::nearest_distance")
def _nearest_distance_fake(query: Tensor, database: Tensor, index: Tensor) -> Tensor:
    return torch.empty(index.shape, dtype=torch.float32, device=query.device)
