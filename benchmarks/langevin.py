"""The Langevin step and its noise, and a whole chain on a small network.

`add` is torch.add(x, grad, out=...): two reads and a write, what a step costs at the least. Noise has no oracle: the
tests compare every bit.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Run, Work

STEP_SIZE, NOISE_SCALE, PRIOR_SCALE, CLAMP = 0.005, 0.1, 0.5, (-1.0, 1.0)
FULL = (1024, 3, 64, 64)
QUICK = (256, 3, 64, 64)
DEMO = (128, 3, 64, 64)
SMALL = (64, 3, 32, 32)


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return x, grad


def _update(x: Tensor, grad: Tensor) -> Tensor:
    drift = grad + x / PRIOR_SCALE**2
    return (x - STEP_SIZE * drift + NOISE_SCALE * torch.randn_like(x)).clamp(*CLAMP)


def _fastgen(inputs: tuple[Tensor, Tensor]) -> Run:
    from fastgen import functional as F

    x, grad = inputs[0].clone(), inputs[1]
    return lambda: F.langevin_step_(
        x, grad, step_size=STEP_SIZE, noise_scale=NOISE_SCALE, prior_scale=PRIOR_SCALE, clamp=CLAMP, seed=0
    )


def _eager(inputs: tuple[Tensor, Tensor]) -> Run:
    return lambda: _update(*inputs)


def _compiled(inputs: tuple[Tensor, Tensor]) -> Run:
    compiled = torch.compile(_update)
    return lambda: compiled(*inputs)


def _add(inputs: tuple[Tensor, Tensor]) -> Run:
    x, grad = inputs
    return partial(torch.add, x, grad, out=torch.empty_like(x))


def _noise_fastgen(inputs: tuple[Tensor, Tensor]) -> Run:
    from fastgen import functional as F

    return lambda: F.langevin_noise(inputs[0], seed=0)


def _noise_eager(inputs: tuple[Tensor, Tensor]) -> Run:
    return lambda: torch.randn_like(inputs[0])


class _Energy(nn.Module):
    """As small as energies of images come: what is left to gain where the network, too, takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 4, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2048, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)[:, 0]
        return out


def _energy(x: Tensor) -> _Energy:
    torch.manual_seed(0)
    return _Energy().to(x.device)


def _chain_fastgen(inputs: tuple[Tensor, Tensor]) -> Run:
    from fastgen.nn import LangevinSampler

    sampler = LangevinSampler(
        _energy(inputs[0]),
        step_size=STEP_SIZE,
        n_steps=20,
        noise_scale=NOISE_SCALE,
        prior_scale=PRIOR_SCALE,
        clamp=CLAMP,
    )
    return lambda: sampler(inputs[0], seed=0)


def _chain_eager(inputs: tuple[Tensor, Tensor]) -> Run:
    energy = _energy(inputs[0])

    def run() -> Tensor:
        x = inputs[0]
        for _ in range(20):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(energy(x).sum(), x)
            x = _update(x.detach(), grad)
        return x

    return run


def works(scale: str) -> list[Work]:
    step: dict[str, Any] = {"fastgen": _fastgen, "eager": _eager, "torch.compile": _compiled, "add": _add}
    noise: dict[str, Any] = {"fastgen": _noise_fastgen, "eager": _noise_eager}
    chain: dict[str, Any] = {"fastgen": _chain_fastgen, "eager": _chain_eager}
    shape = {"demo": DEMO, "quick": QUICK, "full": FULL}[scale]

    def work(name: str, shape: tuple[int, ...], dtype: torch.dtype, providers: dict[str, Any]) -> Work:
        size = "×".join(map(str, shape))
        return Work("langevin", f"{name}, {size}", partial(_inputs, shape, dtype), providers, None)

    found = [
        work("step, noise and prior, fp32", shape, torch.float32, step),
        work("step, noise and prior, fp32", SMALL, torch.float32, step),
        work("chain of 20 steps, small network", SMALL, torch.float32, chain),
    ]
    if scale != "demo":
        found += [
            work("step, noise and prior, bf16", shape, torch.bfloat16, step),
            work("noise, fp32", shape, torch.float32, noise),
        ]
    return found
