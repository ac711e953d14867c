"""MMD² with WAE's seven IMQ scales, value and gradients, as WAE codes write it and as fastgen computes it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Run, Work

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# (N, M, D, how many sides need a gradient)
SIZES = {
    "demo": [(1024, 1024, 64, 2)],
    "quick": [(128, 128, 8, 1), (1024, 1024, 64, 2)],
    "full": [(128, 128, 8, 1), (4096, 4096, 8, 2), (4096, 4096, 64, 1), (4096, 4096, 64, 2), (1000, 1000, 784, 2)],
}
SIDES = {1: "one gradient", 2: "both gradients"}
Inputs = tuple[Tensor, Tensor]


def works(scale: str) -> list[Work]:
    providers: dict[str, Callable[[Any], Run]] = {
        "fastgen": fastgen,
        "eager": eager,
        "torch.compile": compiled,
        "keops": keops,
    }
    return [
        Work(
            "mmd", f"IMQ-7, {n} x {m} x {d}, {SIDES[sides]}", partial(gaussian, n, m, d, sides), providers, oracle, 2e-4
        )
        for n, m, d, sides in SIZES[scale]
    ]


def gaussian(n: int, m: int, d: int, sides: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator).to(device).requires_grad_()
    y = (torch.randn(m, d, generator=generator) + 0.3).to(device).requires_grad_(sides == 2)
    return x, y


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    """The port that WAE codes share."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)

    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = distance(x, x), distance(y, y), distance(x, y)
    off_x = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    off_y = 1 - torch.eye(m, dtype=x.dtype, device=x.device)
    total = x.new_zeros(())
    for scale in SCALES:
        c = 2 * d * scale
        total = total + (off_x * (c / (c + xx))).sum() / (n * (n - 1)) + (off_y * (c / (c + yy))).sum() / (m * (m - 1))
        total = total - 2 * (c / (c + xy)).mean()
    return total


def _with_gradients(function: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Run:
    wanted = [t for t in inputs if t.requires_grad]

    def run() -> tuple[Tensor, ...]:
        value = function(*inputs)
        return value.detach(), *torch.autograd.grad(value, wanted)

    return run


def oracle(inputs: Inputs) -> tuple[Tensor, ...]:
    x, y = (t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
    result: tuple[Tensor, ...] = _with_gradients(_mmd, (x, y))()
    return result


def fastgen(inputs: Inputs) -> Run:
    from fastgen import functional as F

    return _with_gradients(F.mmd, inputs)


def eager(inputs: Inputs) -> Run:
    return _with_gradients(_mmd, inputs)


def compiled(inputs: Inputs) -> Run:
    return _with_gradients(torch.compile(_mmd), inputs)


def keops(inputs: Inputs) -> Run:
    from pykeops.torch import LazyTensor

    def mean(a: Tensor, b: Tensor, same: bool) -> Tensor:
        square = ((LazyTensor(a[:, None]) - LazyTensor(b[None])) ** 2).sum(-1)
        total: Any = 0
        for scale in SCALES:
            c = 2 * a.shape[1] * scale
            total = total + (1 + square / c).inv()
        n = len(a)
        summed = total.sum(1).sum()
        return (summed - len(SCALES) * n) / (n * (n - 1)) if same else summed / (n * len(b))

    return _with_gradients(lambda x, y: mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False), inputs)
