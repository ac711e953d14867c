"""MMD² and its gradients: WAE's seven IMQ scales, and one Gaussian kernel as GeomLoss has it.

Every provider is what its users write. The oracle checks the value and up to 256 rows of each gradient in float64; of
the largest sizes the rows alone, since the value would take hours.
"""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Provider, Run, Work, tensors

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# (N, M, D, how many sides need a gradient)
GRID = {
    "demo": [(1024, 1024, 64, 2)],
    "quick": [(128, 128, 8, 1), (1024, 1024, 64, 2)],
    # KeOps and torch.compile take longer to compile for each of these than all timings together.
    "full": [(128, 128, 8, 1), (4096, 4096, 8, 2), *((n, n, 64, 2) for n in (100, 1000, 4096))],
}
GRID["huge"] = [
    *GRID["full"],
    *((n, n, d, 2) for n in (1000, 4096, 10_000) for d in (3, 8, 64, 512, 2048)),
    *((n, n, 64, 2) for n in (16_384, 32_768, 100_000, 200_000)),
    (4096, 4096, 64, 1),
    (100_000, 100_000, 3, 2),
]
GRID["huge"] = list(dict.fromkeys(GRID["huge"]))
GAUSSIAN = {"demo": [], "quick": [(1024, 1024, 64, 2)], "full": [(n, n, 64, 2) for n in (1000, 2048)]}
GAUSSIAN["huge"] = [(100, 100, 64, 2), *GAUSSIAN["full"], *((n, n, d, 2) for n in (10_000, 100_000) for d in (3, 64))]
SIDES = {0: "value alone", 1: "one gradient", 2: "both gradients"}
WHOLE = 12_000  # points of a sample up to which the oracle makes the value
ROWS = 256  # of each gradient that the oracle makes
Inputs = tuple[Tensor, Tensor]
Expected = tuple[Tensor | None, float, list[tuple[Tensor, Tensor]]]


def works(scale: str) -> list[Work]:
    # The small first: what they take tells which of the large are beyond anyone's patience.
    found = [_imq(*size) for size in GRID[scale]] + [_gaussian(*size) for size in GAUSSIAN[scale]]
    return sorted(found, key=lambda work: (work.series, work.operations))


def growing(series: str, n: int) -> Work:
    """For the search of the largest N."""
    return _imq(n, n, 64, 2)


GROWING = {"IMQ-7, both gradients, D = 64": 1024}  # series -> the N that the search begins with


def _work(series: str, n: int, m: int, d: int, sides: int, providers: Any, terms: int, **more: Any) -> Work:
    return Work(
        "mmd",
        f"{series}, {n} x {m} x {d}, {SIDES[sides]}",
        partial(gaussian, n, m, d, sides),
        providers,
        tolerance=2e-4,
        error=error,
        series=f"{series}, {SIDES[sides]}",
        size={"N": n, "M": m, "D": d},
        operations=operations(n, m, d, sides, terms),
        moved=4.0 * d * ((n + m) + (n if sides else 0) + (m if sides == 2 else 0)),
        once=n >= 30_000,
        **more,
    )


def _imq(n: int, m: int, d: int, sides: int) -> Work:
    providers: dict[str, Any] = {
        "fastgen": fastgen,
        "eager": eager(_mmd),
        "torch.compile": compiled(_mmd),
        "torch.compile, CUDA graph": Provider(compiled(_mmd, "reduce-overhead"), ("cuda",)),
    }
    if d <= 128:  # beyond, its compiler alone takes minutes
        providers["keops"] = Provider(keops, outside=True)
    return _work("IMQ-7", n, m, d, sides, providers, len(SCALES), oracle=partial(oracle, imq, "unbiased"))


def _gaussian(n: int, m: int, d: int, sides: int) -> Work:
    providers: dict[str, Any] = {
        "fastgen": fastgen_gaussian,
        "eager": eager(_mmd_gaussian),
        "torch.compile": compiled(_mmd_gaussian),
        "torch.compile, CUDA graph": Provider(compiled(_mmd_gaussian, "reduce-overhead"), ("cuda",)),
        "geomloss, tensorized": geomloss("tensorized"),
        "geomloss, online": Provider(geomloss("online"), outside=True),
    }
    return _work("Gaussian", n, m, d, sides, providers, 1, oracle=partial(oracle, rbf, "biased"))


def operations(n: int, m: int, d: int, sides: int, terms: int) -> float:
    """Each pair once: 2D for its distance, three for a term's value, two for its slope, 2D a point that gets a pull."""
    pairs = {"xx": n * (n - 1) / 2, "yy": m * (m - 1) / 2, "xy": float(n * m)}
    pulled = {"xx": 2 * min(sides, 1), "yy": 2 * (sides == 2), "xy": sides}
    return sum(c * (2 * d + 3 * terms + (2 * terms if pulled[p] else 0) + 2 * d * pulled[p]) for p, c in pairs.items())


def gaussian(n: int, m: int, d: int, sides: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, generator=generator, device=device).requires_grad_(sides > 0)
    y = (torch.randn(m, d, generator=generator, device=device) + 0.3).requires_grad_(sides == 2)
    return x, y


def imq(square: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Σ C/(C + d²) and −its derivative by d²."""
    value, slope = torch.zeros_like(square), torch.zeros_like(square)
    for scale in SCALES:
        q = 1 / (1 + square / (2 * d * scale))
        value += q
        slope += q.square_().mul_(1 / (2 * d * scale))
    return value, slope


def rbf(square: Tensor, d: int) -> tuple[Tensor, Tensor]:
    value = (square / (-2 * d)).exp_()
    return value, value / (2 * d)


def oracle(kernel: Callable[[Tensor, int], tuple[Tensor, Tensor]], estimator: str, inputs: Inputs) -> Expected:
    """(MMD² or None, k(0), (rows, their gradient) of each side that has one), in float64, block by block."""
    x, y = (t.detach().double() for t in inputs)
    d = x.shape[1]
    x, y = x - x[0], y - x[0]
    biased = estimator == "biased"
    a = {id(s): 1 / len(s) ** 2 if biased else 1 / (len(s) * (len(s) - 1)) for s in (x, y)}
    at_zero = float(kernel(x.new_zeros(1), d)[0])

    def block(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        square = torch.addmm(q.square().sum(1) + p.square().sum(1)[:, None], p, q.T, alpha=-2).clamp_(min=0)
        return kernel(square, d)

    total = None
    if max(len(x), len(y)) <= WHOLE:
        total = x.new_zeros(())
        for p, q, weight in ((x, x, a[id(x)]), (y, y, a[id(y)]), (x, y, -2 / (len(x) * len(y)))):
            part = sum((block(rows, q)[0].sum() for rows in p.split(128)), x.new_zeros(()))
            # Of a pair of equal points the expanded distance need not be 0: taken out as computed, put back exactly.
            if q is p:
                near = torch.cat([block(rows, rows)[0].diagonal() for rows in p.split(128)]).sum()
                part = part - near + (len(p) * at_zero if biased else 0)
            total = total + weight * part
    gradients = []
    for own, other, given in ((x, y, inputs[0]), (y, x, inputs[1])):
        if given.requires_grad:
            index = torch.linspace(0, len(own) - 1, min(ROWS, len(own)), device=own.device).round().long()
            gradient = own.new_zeros(len(index), d)
            for q, weight in ((own, 4 * a[id(own)]), (other, -4 / (len(x) * len(y)))):
                pull = torch.cat([block(own[rows], q)[1] for rows in index.split(128)])
                gradient -= weight * (pull.sum(1, keepdim=True) * own[index] - pull @ q)
            gradients.append((index, gradient))
    return total, at_zero, gradients


def error(result: Any, expected: Expected) -> float:
    value, *gradients = tensors(result)
    total, at_zero, rows = expected
    worst = 0.0
    if total is not None:
        worst = float((value.double() - total).abs() / total.abs().clamp_min(1e-3 * at_zero))
    for got, (index, want) in zip(gradients, rows, strict=True):
        worst = max(worst, float((got[index].double() - want).norm() / want.norm()))
        worst = max(worst, 0.0 if bool(got.isfinite().all()) else math.inf)
    return worst if math.isfinite(worst) and bool(value.isfinite()) else math.inf


def _square(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    """The port that WAE codes share."""
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = _square(x, x), _square(y, y), _square(x, y)
    off_x = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    off_y = 1 - torch.eye(m, dtype=x.dtype, device=x.device)
    total = x.new_zeros(())
    for scale in SCALES:
        c = 2 * d * scale
        total = total + (off_x * (c / (c + xx))).sum() / (n * (n - 1)) + (off_y * (c / (c + yy))).sum() / (m * (m - 1))
        total = total - 2 * (c / (c + xy)).mean()
    return total


def _mmd_gaussian(x: Tensor, y: Tensor) -> Tensor:
    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(_square(a, b) / (-2 * x.shape[1])).mean()

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def _with_gradients(function: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Run:
    wanted = [t for t in inputs if t.requires_grad]

    def run() -> tuple[Tensor, ...]:
        value = function(*inputs)
        if not wanted:
            return (value,)
        return value.detach(), *torch.autograd.grad(value, wanted)

    return run


def fastgen(inputs: Inputs) -> Run:
    from fastgen import functional as F

    return _with_gradients(F.mmd, inputs)


def fastgen_gaussian(inputs: Inputs) -> Run:
    from fastgen import functional as F

    kernel = F.RBF((math.sqrt(inputs[0].shape[1]),))
    return _with_gradients(lambda x, y: F.mmd(x, y, kernel=kernel, estimator="biased"), inputs)


def eager(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Run]:
    return partial(_with_gradients, function)


def compiled(function: Callable[[Tensor, Tensor], Tensor], mode: str = "default") -> Callable[[Inputs], Run]:
    def setup(inputs: Inputs) -> Run:
        return _with_gradients(torch.compile(function, mode=mode, dynamic=False), inputs)

    return setup


def keops(inputs: Inputs) -> Run:
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)

    def mean(a: Tensor, b: Tensor, same: bool) -> Tensor:
        square = ((LazyTensor(a[:, None]) - LazyTensor(b[None])) ** 2).sum(-1)
        total: Any = 0
        for scale in SCALES:
            c = 2 * a.shape[1] * scale
            total = total + 1 / (1 + square / c)
        n = len(a)
        summed = total.sum(1).sum()
        return (summed - len(SCALES) * n) / (n * (n - 1)) if same else summed / (n * len(b))

    return _with_gradients(lambda x, y: mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False), inputs)


def geomloss(backend: str) -> Callable[[Inputs], Run]:
    """Its loss is half of MMD²."""

    def setup(inputs: Inputs) -> Run:
        from geomloss import SamplesLoss

        with contextlib.suppress(ImportError):
            import pykeops

            pykeops.set_verbose(False)
        loss = SamplesLoss("gaussian", blur=math.sqrt(inputs[0].shape[1]), backend=backend)
        return _with_gradients(lambda x, y: 2 * loss(x, y), inputs)

    return setup
