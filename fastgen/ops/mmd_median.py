"""fastgen::mmd_median: the rank-th largest squared distance of all pairs, and the pair that has it."""

import torch
from torch import Tensor

from fastgen import check
from fastgen.ops import backend
from fastgen.reference import mmd_median as reference

torch.library.define("fastgen::mmd_median", "(Tensor x, Tensor y, SymInt rank, bool same) -> (Tensor, Tensor)")


def _median(x: Tensor, y: Tensor, rank: int, same: bool) -> tuple[Tensor, Tensor]:
    """x, y: float32 or float64; `rank` is among the N·M pairs, or the N² (less the diagonal: N² − N) where `same`."""
    diagonal = False
    if same:
        rank, diagonal = reference.strict(len(x), rank)
    if x.device.type == "cpu" and backend.choose("mmd", x.device) == "cpp":
        value, pair = _cpp(x, y, rank, same)
    else:
        value, pair = reference.select(x, y, rank, same)
    # Zero, unless a distance that is not finite has made it NaN.
    return (value * 0, pair * 0) if diagonal else (value, pair)


def _cpp(x: Tensor, y: Tensor, rank: int, same: bool) -> tuple[Tensor, Tensor]:
    extension = backend.extension()
    assert extension is not None
    x, y = x.contiguous(), y.contiguous()
    value, pair = x.new_empty(()), torch.empty(2, dtype=torch.int64, device="cpu")
    kernel = extension.mmd_median_f64 if x.dtype == torch.float64 else extension.mmd_median_f32
    shape = (len(x), len(y), x.shape[1])
    kernel(x.data_ptr(), y.data_ptr(), value.data_ptr(), pair.data_ptr(), *shape, rank, same, torch.get_num_threads())
    return value, pair


for _device in ("CPU", "CUDA"):
    torch.library.impl("fastgen::mmd_median", _device)(_median)
torch.library.register_vmap("fastgen::mmd_median", check.no_vmap("mmd_median", "one pair of samples a call"))


@torch.library.register_fake("fastgen::mmd_median")
def _fake(x: Tensor, y: Tensor, rank: int, same: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(()), x.new_empty(2, dtype=torch.int64)


median = torch.ops.fastgen.mmd_median.default
