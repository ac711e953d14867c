"""One Langevin step with noise and prior: memory traffic is all there is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Run, Work

STEP, SIGMA = 0.005, 2.0
SIZES = {
    "demo": [(64, 3 * 128 * 128)],
    "quick": [(64, 3 * 32 * 32), (64, 3 * 128 * 128)],
    "full": [(64, 3 * 32 * 32), (256, 3 * 128 * 128)],
}
Inputs = tuple[Tensor, Tensor]


def works(scale: str) -> list[Work]:
    # `add` writes one sum of the two tensors over the first: the least that a step could move.
    providers: dict[str, Callable[[Any], Run]] = {
        "fastgen": fastgen,
        "eager": eager,
        "torch.compile": compiled,
        "add": add,
    }
    return [
        Work("langevin", f"step of {chains} x {size}, noise and prior", partial(state, chains, size), providers, None)
        for chains, size in SIZES[scale]
    ]


def state(chains: int, size: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(chains, size, generator=generator).to(device) for _ in range(2))
    return x, grad


def _step(x: Tensor, grad: Tensor) -> Tensor:
    """As FRAME codes write it."""
    return x - STEP * (grad + x / SIGMA**2) + (2 * STEP) ** 0.5 * torch.randn_like(x)


def fastgen(inputs: Inputs) -> Run:
    from fastgen import functional as F

    x, grad = inputs[0].clone(), inputs[1]
    return lambda: F.langevin_step_(x, grad, step_size=STEP, prior_scale=SIGMA, seed=1)


def eager(inputs: Inputs) -> Run:
    return lambda: _step(*inputs)


def compiled(inputs: Inputs) -> Run:
    step = torch.compile(_step)
    return lambda: step(*inputs)


def add(inputs: Inputs) -> Run:
    out = torch.empty_like(inputs[0])
    return lambda: torch.add(*inputs, out=out)
