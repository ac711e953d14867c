"""The Triton kernels that end a MALA step, under the interpreter and on a GPU. test_langevin.py reads their code."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.ops import langevin_mala as ops
from fastgen.reference import langevin as stream
from fastgen.reference import langevin_mala as reference

pytest.importorskip("triton")
assert ops

INF = float("inf")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def problem(shape: tuple[int, ...], dtype: torch.dtype, precision: float, clip: float, step: int) -> list[Tensor]:
    """x, grad, energy, proposal, its grad, its energy of a quadratic, with a few bad energies."""
    x = torch.randn(shape, dtype=dtype)
    y = x.clone()
    scalars = (0.02, 0.2, precision, clip, -INF, INF, False)
    stream.step_(y, x * 1.5, torch.arange(shape[0]), *scalars, 2**63 + 5, step)
    energies = [0.75 * v.flatten(1).square().sum(1) for v in (x, y)]
    energies[1][0] -= 100  # surely accepted
    energies[1][1], energies[1][2], energies[1][3] = INF, -INF, float("nan")
    return [x, x * 1.5, energies[0], y, y * 1.5, energies[1]]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 2), (5, 129), (4, 2048), (4, 2500)])
def test_is_the_references_decision(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from fastgen.kernels import langevin_mala as kernels

    ids = torch.arange(shape[0])
    for precision, clip, everything in ((0.0, INF, False), (0.4, 1.0, True)):
        x, grad, energy, y, y_grad, y_energy = problem(shape, dtype, precision, clip, 3)
        log_alpha = torch.zeros(shape[0], dtype=torch.float64)
        accepted = torch.zeros(shape[0], dtype=torch.bool)
        per_chain = [torch.full((shape[0],), v, dtype=dtype) if everything else None for v in (0.02, 0.2)]
        key = [torch.tensor(-(2**63) + 5), torch.tensor(3 + 2**28)] if everything else [None, None]
        state, slope, energies = x.clone(), grad.clone(), (energy.double(), y_energy.double())
        kernels.accept_(
            state, slope, y, y_grad, *energies, ids if everything else None, *per_chain, *key,
            0.02, 0.2, precision, clip, -(2**63) + 5, 3, log_alpha, accepted,
        )  # fmt: skip
        wanted, decided = reference.accept(
            x, grad, energy, y, y_grad, y_energy, ids, 0.02, 0.2, precision, clip, 2**63 + 5, 3
        )
        torch.testing.assert_close(log_alpha, wanted, rtol=1e-10, atol=1e-9, equal_nan=True)
        assert torch.equal(accepted, decided)
        assert not accepted[1:4].any()
        assert accepted[0]
        rows = decided[:, None]
        assert torch.equal(state, torch.where(rows, y, x))
        assert torch.equal(slope, torch.where(rows, y_grad, grad))


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("shape", [(1000, 2), (64, 3, 32, 32), (3, 50_003)])
def test_gpu_decides_as_the_cpu(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        given = problem((max(shape[0], 4), *shape[1:]), dtype, 0.4, 1.0, 3)
        scalars: tuple[Any, ...] = (None, None, None, None, None, 0.02, 0.2, 0.4, 1.0, -(2**63) + 5, 3)
        on_gpu = [t.cuda() for t in given]
        found = [torch.ops.fastgen.langevin_accept_(*tensors, *scalars) for tensors in (given, on_gpu)]
        torch.testing.assert_close(found[1][0].cpu(), found[0][0], rtol=1e-9, atol=1e-8, equal_nan=True)
        assert torch.equal(found[1][1].cpu(), found[0][1])
        for cpu, gpu in zip(given[:3], on_gpu[:3], strict=True):
            assert torch.equal(gpu.cpu(), cpu)
