"""The end of a MALA step: the Metropolis ratio from the densities themselves, decisions, layouts, registration."""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastgen import functional as F
from fastgen.ops import backend
from fastgen.ops import langevin_mala as ops

assert ops
ACCEPT = torch.ops.fastgen.langevin_accept_
H, S, SIGMA, SEED, STEP = 0.03, 0.22, 1.7, 2**63 + 11, 6


def energy_of(x: Tensor) -> Tensor:
    return (x.flatten(1).square() * 0.6 + x.flatten(1).cos()).sum(1)


def slope_of(x: Tensor) -> Tensor:
    return 1.2 * x - x.sin()


def proposed(shape: tuple[int, ...], dtype: torch.dtype, clip: float | None, **key: Any) -> list[Tensor]:
    x = torch.randn(shape, dtype=dtype)
    options = {"step_size": H, "noise_scale": S, "prior_scale": SIGMA, "grad_clip": clip, "seed": SEED, "step": STEP}
    y = F.langevin_step_(x.clone(), slope_of(x), **options, **key)  # type: ignore[arg-type]
    return [x, slope_of(x), energy_of(x), y, slope_of(y), energy_of(y)]


def arguments(tensors: list[Tensor], clip: float | None, **given: Any) -> dict[str, Any]:
    names = ("x", "grad", "energy", "proposal", "proposal_grad", "proposal_energy")
    return {
        **dict(zip(names, tensors, strict=True)), "chain_id": None, "step_sizes": None, "noise_scales": None,
        "seed_tensor": None, "step_tensor": None, "step_size": H, "noise_scale": S, "precision": 1 / SIGMA**2,
        "grad_clip": math.inf if clip is None else clip, "seed": SEED - 2**64, "step": STEP, **given,
    }  # fmt: skip


@pytest.fixture(params=["baseline", "avx2", "avx512", "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    module = backend.extension()
    if request.param == "reference" or module is None:
        yield "reference"
        return
    before = module.isa()
    try:
        module.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield "cpp"
    module.set_isa(before)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("shape", [(200, 1), (60, 7), (9, 3, 5), (4, 1031), (3, 4097)])
def test_ratio_and_decision(oracle: ModuleType, kernel: str, shape: tuple[int, ...], clip: float | None) -> None:
    for dtype, tolerance in ((torch.float64, 3e-6), (torch.float32, 4e-3)):
        chain_id = torch.randint(-(2**63), 2**63 - 1, (shape[0],))
        before = proposed(shape, dtype, clip, chain_id=chain_id)
        tensors = [t.clone() for t in before]
        with backend.force(kernel):
            log_alpha, accepted = ACCEPT(**arguments(tensors, clip, chain_id=chain_id))
        x, grad, energy, y, y_grad, y_energy = (t.double().flatten(1).numpy() for t in (t[:, None] for t in before))
        expected = oracle.log_alpha(x, grad, y, y_grad, (y_energy - energy)[:, 0], H, S, SIGMA, clip)
        # The float32 proposal is rounded where the noise is not: 2⁻²⁴·|y|/s in each element.
        assert np.abs(log_alpha.numpy() - expected).max() < tolerance
        u = [
            (oracle.philox((0, 2**28 + STEP, c % 2**32, c % 2**64 // 2**32), SEED)[0] + 0.5) / 2**32
            for c in chain_id.tolist()
        ]
        assert accepted.tolist() == (np.log(u) < log_alpha.numpy()).tolist()
        for old, new, result in zip(before[:3], before[3:], tensors[:3], strict=True):
            rows = accepted.view([-1] + [1] * (old.ndim - 1))
            assert torch.equal(result, torch.where(rows, new, old))
        assert all(map(torch.equal, tensors[3:], before[3:]))


def test_instruction_sets_give_the_same_bits(kernel: str) -> None:
    for shape in ((60, 7), (3, 4097)):
        for dtype in (torch.float32, torch.float64):
            before = proposed(shape, dtype, 0.7)
            found = []
            for chosen in (kernel, "cpp"):
                tensors = [t.clone() for t in before]
                with backend.force(chosen):
                    found.append((*ACCEPT(**arguments(tensors, 0.7)), *tensors[:3]))
                if kernel == "cpp":
                    backend.extension().set_isa("baseline")  # type: ignore[union-attr]
            for got, expected in zip(*found, strict=True):
                if kernel == "cpp":
                    assert torch.equal(got, expected)
                else:
                    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-10)


def test_energies_without_a_meaning(kernel: str) -> None:
    tensors = proposed((6, 40), torch.float32, None)
    start = [t.clone() for t in tensors[:3]]
    tensors[5][:4] = torch.tensor([math.inf, -math.inf, math.nan, -1e30])
    tensors[4][0] = math.nan  # outside the support no gradient is asked for
    tensors[4][4, 7] = math.inf
    with backend.force(kernel):
        log_alpha, accepted = ACCEPT(**arguments(tensors, None))
    assert log_alpha[0] == -math.inf
    assert log_alpha[1:3].isnan().all()
    assert not log_alpha[4].isfinite()
    assert accepted[:5].tolist() == [False, False, False, True, False]
    for i in (0, 1, 2, 4):
        assert all(torch.equal(now[i], then[i]) for now, then in zip(tensors, start, strict=False))


def test_neither_order_nor_split_of_chains_matters() -> None:
    before = proposed((40, 33), torch.float32, None)
    whole = [t.clone() for t in before]
    log_alpha, accepted = ACCEPT(**arguments(whole, None))
    part = [t[7:12].clone() for t in before]
    some = ACCEPT(**arguments(part, None, chain_id=torch.arange(7, 12)))
    assert torch.equal(some[0], log_alpha[7:12])
    assert torch.equal(some[1], accepted[7:12])
    assert torch.equal(part[0], whole[0][7:12])


def test_layouts_and_tensors_of_scalars() -> None:
    before = proposed((5, 3, 4, 6), torch.float32, None)
    plain = [t.clone() for t in before]
    expected = ACCEPT(**arguments(plain, None))
    strided = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t.clone() for t in before]
    each = {"step_sizes": torch.full((5, 2), H)[:, 0], "noise_scales": torch.full((5,), S)}
    key = {"seed_tensor": torch.tensor(SEED - 2**64), "step_tensor": torch.tensor(STEP)}
    found = ACCEPT(**arguments(strided, None, **each, **key, step_size=0.0, noise_scale=0.0, seed=0, step=0))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert all(map(torch.equal, strided[:3], plain[:3]))


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.float64):
        tensors = proposed((3, 5), dtype, None)
        opcheck(ACCEPT, (), arguments(tensors, None))
        everything = {"chain_id": torch.arange(3), "step_tensor": torch.tensor(2), "seed_tensor": torch.tensor(1)}
        scales = {"step_sizes": torch.rand(3, dtype=dtype), "noise_scales": torch.rand(3, dtype=dtype) + 0.1}
        opcheck(ACCEPT, (), arguments(tensors, None, **everything, **scales))
    written = [a.name for a in ACCEPT.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["x", "grad", "energy"]


def test_writes_are_seen_by_autograd() -> None:
    tensors = [t.clone() for t in proposed((3, 4), torch.float32, None)]
    ACCEPT(**arguments(tensors, None))
    assert [t._version > 0 for t in tensors] == [True] * 3 + [False] * 3
