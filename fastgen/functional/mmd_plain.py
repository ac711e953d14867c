"""The short way of the calls of `F.mmd` that need nothing more: of a hundred points checks are a third of the time."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgen import check
from fastgen.functional.mmd_kernels import Kernel, resolve
from fastgen.ops import backend
from fastgen.ops import mmd as ops

ESTIMATORS = ("unbiased", "biased", "u_statistic")
PRECISIONS = ("ieee", "bf16x6", "tf32x3", "bf16x3", "tf32")
Prepared = tuple[tuple[Any, ...], ops.Call]  # options, and what evaluates them


@functools.lru_cache(maxsize=256)
def _prepared(kernel: Kernel | str, d: int, estimator: str, precision: str, *where: Any) -> Prepared | None:
    """None where one of them is wrong; `where` is the points' dtype, their type of device and what is forced there."""
    if estimator not in ESTIMATORS or precision not in PRECISIONS:
        return None
    kind, parameters = resolve(kernel)._op(d)
    options = kind, tuple(parameters), estimator, precision
    return options, (ops.direct(options, *where) if where else None) or ops.call


def prepared(x: Any, y: Any, kernel: Any, estimator: Any, precision: Any) -> Prepared | None:
    """How to evaluate a call with nothing to say about it, or None: `mmd` then says it."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    n, m, dtype, strided, on_cpu = x.shape, y.shape, x.dtype, torch.strided, x.is_cpu
    if not (
        dtype is y.dtype
        and dtype in check.FLOATS
        and x.layout is strided
        and y.layout is strided
        and (y.is_cpu if on_cpu else x.device == y.device)
        and len(n) == len(m)
        and (len(n) == 2 or (len(n) == 3 and n[0] == m[0]))
        and n[-1] == m[-1] > 0
        and n[-2] > 1
        and m[-2] > 1
        and (estimator != "u_statistic" or n == m)
        and forward_ad._current_level < 0
        and type(estimator) is type(precision) is str
        and (type(kernel) is str or isinstance(kernel, Kernel))
    ):
        return None
    if x.is_contiguous() and y.is_contiguous() and backend.runs_directly(x, y):
        return _prepared(kernel, n[-1], estimator, precision, dtype, "cpu" if on_cpu else "cuda", backend.forced)
    return _prepared(kernel, n[-1], estimator, precision)
