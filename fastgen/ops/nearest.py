"""fastgen::nearest and fastgen::nearest_distance.

The search returns indices alone: they carry no gradient, so the op is whole without one, and the distances of the chosen
are made anew by the second op, which costs a k/M-th of the search.
"""

import torch
from torch import Tensor

from fastgen.ops import backend
from fastgen.reference import nearest as reference

torch.library.define("fastgen::nearest", "(Tensor query, Tensor database, Tensor? mask, int k) -> Tensor")
torch.library.define("fastgen::nearest_distance", "(Tensor query, Tensor database, Tensor index) -> Tensor")


def _nearest(query: Tensor, database: Tensor, mask: Tensor | None, k: int) -> Tensor:
    return reference.certified(query, database, mask, k)[1]


def _nearest_cpu(query: Tensor, database: Tensor, mask: Tensor | None, k: int) -> Tensor:
    return _nearest(query, database, mask, k)


torch.library.impl("fastgen::nearest", "CPU", _nearest_cpu)
torch.library.impl("fastgen::nearest", "CUDA", _nearest)
torch.library.impl("fastgen::nearest_distance", ("CPU", "CUDA"), reference.nearest_distance)


@torch.library.register_fake("fastgen::nearest")
def _nearest_fake(query: Tensor, database: Tensor, mask: Tensor | None, k: int) -> Tensor:
    torch._check(query.ndim == 2 and database.ndim == 2)
    return query.new_empty((query.shape[0], k), dtype=torch.int64)


@torch.library.register_fake("fastgen::nearest_distance")
def _nearest_distance_fake(query: Tensor, database: Tensor, index: Tensor) -> Tensor:
    return torch.empty(index.shape, dtype=torch.float32, device=query.device)
