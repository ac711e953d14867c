"""MMD² with WAE's seven IMQ scales: value and gradients, against the port that users copy, compiled and not, and KeOps.

GeomLoss is not here: it has no IMQ kernel, and its biased ½‖·‖² is another number."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Run, Work
from fastgen import functional as F

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
Loss = Callable[[Tensor, Tensor], Tensor]


def wae_port(qz: Tensor, pz: Tensor) -> Tensor:
    """mmd_penalty of tolstikhin/wae in torch, as its ports have it."""
    n = qz.shape[0]
    norms_pz = pz.square().sum(1, keepdim=True)
    distances_pz = norms_pz + norms_pz.T - 2.0 * (pz @ pz.T)
    norms_qz = qz.square().sum(1, keepdim=True)
    distances_qz = norms_qz + norms_qz.T - 2.0 * (qz @ qz.T)
    distances = norms_qz + norms_pz.T - 2.0 * (qz @ pz.T)
    stat = torch.zeros((), device=qz.device, dtype=qz.dtype)
    for scale in SCALES:
        c = 2.0 * qz.shape[1] * scale
        res1 = c / (c + distances_qz) + c / (c + distances_pz)
        res1 = (res1 * (1.0 - torch.eye(n, device=qz.device, dtype=qz.dtype))).sum() / (n * n - n)
        res2 = (c / (c + distances)).sum() * 2.0 / (n * n)
        stat = stat + res1 - res2
    return stat


def rbf_port(x: Tensor, y: Tensor) -> Tensor:
    """The Gaussian ladder of `F.RBF()` on `torch.cdist`'s squared distances, unbiased."""
    n, m = len(x), len(y)

    def total(a: Tensor, b: Tensor) -> Tensor:
        squared = torch.cdist(a, b).square()
        return sum(((squared * (-0.5 / (a.shape[1] * s * s))).exp() for s in (0.25, 0.5, 1.0, 2.0, 4.0)), start=zero)

    zero = torch.zeros((), device=x.device, dtype=x.dtype)
    xx, yy, xy = total(x, x), total(y, y), total(x, y)
    return (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.sum() / (n * m)


def keops(x: Tensor, y: Tensor) -> Tensor:
    """The same IMQ sums as a KeOps formula: O(N) memory, differences instead of expanded distances."""
    from pykeops.torch import LazyTensor

    n, m, base = len(x), len(y), 2.0 * x.shape[1]

    def total(a: Tensor, b: Tensor) -> Tensor:
        squared = ((LazyTensor(a[:, None, :]) - LazyTensor(b[None, :, :])) ** 2).sum(-1)
        k = sum((s * base) / (squared + s * base) for s in SCALES)
        return k.sum(1).sum()

    within = (total(x, x) - 7 * n) / (n * (n - 1)) + (total(y, y) - 7 * m) / (m * (m - 1))
    return within - 2 * total(x, y) / (n * m)


def _provider(loss: Loss, compiled: bool = False) -> Callable[[Any], Run]:
    """Value and the gradients of whichever inputs ask for one."""

    def setup(inputs: tuple[Tensor, Tensor]) -> Run:
        if loss is keops:
            import pykeops.torch  # noqa: F401
        function = torch.compile(loss) if compiled else loss
        wanted = [p for p in inputs if p.requires_grad]

        def run() -> tuple[Tensor, ...]:
            value = function(*inputs)
            return (value.detach(), *(torch.autograd.grad(value, wanted) if wanted else ()))

        return run

    return setup


def _oracle(loss: Loss) -> Callable[[Any], Any]:
    def run(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        # No rows of blocks and no float32: the port itself in float64 (autograd over all pairs).
        x, y = (p.detach().double().requires_grad_(p.requires_grad) for p in inputs)
        wanted = [p for p in (x, y) if p.requires_grad]
        value = loss(x, y)
        return (value.detach(), *(torch.autograd.grad(value, wanted) if wanted else ()))

    return run


def _inputs(n: int, d: int, sides: int) -> Callable[[torch.device], tuple[Tensor, Tensor]]:
    def make(device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(n + d)
        x = torch.randn(n, d, generator=generator) * 0.8 + 0.1
        y = torch.randn(n, d, generator=generator)
        return x.to(device).requires_grad_(sides > 0), y.to(device).requires_grad_(sides > 1)

    return make


def _work(n: int, d: int, sides: int, kernel: str = "imq", eager: bool = True) -> Work:
    port: Loss = wae_port if kernel == "imq" else rbf_port
    providers = {"fastgen": _provider(lambda x, y: F.mmd(x, y, kernel=kernel))}
    if eager:
        providers |= {"eager": _provider(port), "torch.compile": _provider(port, compiled=True)}
        if kernel == "imq":
            providers["keops"] = _provider(keops)
    what = ("value", "value + grad x", "value + grad x, y")[sides]
    oracle = _oracle(port) if n <= 4096 else None  # float64 of all pairs: 16 buffers of 128 MiB at 4096
    return Work("mmd", f"{kernel} {what} N={n} D={d}", _inputs(n, d, sides), providers, oracle, tolerance=1e-3)


def works(scale: str) -> list[Work]:
    """What is measured at a scale; the memory of the eager port, some 15 N² floats saved, sets the largest N."""
    if scale == "demo":
        return [_work(128, 8, 1), _work(1024, 64, 1)]
    if scale == "quick":
        return [_work(128, 8, 1), _work(1024, 64, 1), _work(1024, 64, 2), _work(1024, 64, 1, "rbf")]
    sizes = [(128, 8), (512, 64), (4096, 8), (4096, 64), (1024, 784)]
    listed = [_work(n, d, sides) for n, d in sizes for sides in (1, 2)]
    listed += [_work(4096, 64, 0), _work(4096, 64, 1, "rbf")]
    if torch.cuda.is_available():
        listed += [_work(n, 64, 1, eager=n <= 16384) for n in (16384, 65536, 262144)]
    return listed
