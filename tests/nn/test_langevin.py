"""LangevinSampler: the loop, what it leaves behind, and how it fails."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastgen import functional as F
from fastgen.nn import LangevinSampler


def quadratic(x: Tensor) -> Tensor:
    return (x**2).flatten(1).sum(1) / 2


def test_is_the_loop_of_steps() -> None:
    options = {"noise_scale": 0.05, "prior_scale": 0.7, "grad_clip": 0.4, "clamp": (-2.0, 2.0)}
    energy = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))
    start = torch.randn(5, 3, 4)
    sampler = LangevinSampler(energy, step_size=0.1, n_steps=6, **options)  # type: ignore[arg-type]
    trajectory = sampler(start, seed=21, return_trajectory=True)
    x, states = start.clone(), [start]
    for k in range(6):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        x = F.langevin_step_(x, grad, step_size=0.1, seed=21, step=k, **options)  # type: ignore[arg-type]
        states.append(x.clone())
    assert torch.equal(trajectory, torch.stack(states[1:], dim=1))
    assert torch.equal(sampler(start, seed=21), x)
    assert not x.requires_grad


def test_reaches_the_stationary_distribution() -> None:
    """For U = x²/2 the chain is an AR(1) process: variance 1 / (1 − η/2) for s = √(2η)."""
    eta, chains = 0.2, 4_000
    x = LangevinSampler(quadratic, step_size=eta, n_steps=60)(torch.zeros(chains, 2), seed=1)
    expected = (1 - (1 - eta) ** 120) / (1 - eta / 2)
    assert abs(float(x.var()) - expected) < 4.5 * expected * math.sqrt(2 / (2 * chains))
    assert abs(float(x.mean())) < 4.5 * math.sqrt(expected / (2 * chains))


def test_seed_none_draws_from_torch() -> None:
    sampler, start = LangevinSampler(quadratic, step_size=0.1, n_steps=2), torch.zeros(3, 4)
    torch.manual_seed(5)
    first, second = sampler(start), sampler(start)
    torch.manual_seed(5)
    assert torch.equal(sampler(start), first)
    assert not torch.equal(first, second)


def test_leaves_everything_as_it_was() -> None:
    energy = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Flatten(0))
    energy[0].bias.requires_grad_(False)
    seen = []

    def watched(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(any(p.requires_grad for p in energy.parameters()))

    energy.register_forward_pre_hook(watched)
    flags = [p.requires_grad for p in energy.parameters()]
    start = torch.randn(3, 4, requires_grad=True)
    before = start.detach().clone()
    result = LangevinSampler(energy, step_size=0.1, n_steps=3)(start, seed=0)
    assert seen == [False] * 3
    assert [p.requires_grad for p in energy.parameters()] == flags == [True, False, True, True]
    assert all(p.grad is None for p in [*energy.parameters(), start])
    assert result.grad_fn is None
    assert torch.equal(start, before)


def test_parameters_are_restored_after_an_error() -> None:
    energy = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    energy.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LangevinSampler(energy, step_size=0.1, n_steps=3)(torch.zeros(3, 4))
    assert all(p.requires_grad for p in energy.parameters())


def test_works_under_no_grad_and_inference_mode() -> None:
    sampler, start = LangevinSampler(quadratic, step_size=0.1, n_steps=3), torch.ones(2, 5)
    expected = sampler(start, seed=3)
    with torch.no_grad():
        assert torch.equal(sampler(start, seed=3), expected)
    with torch.inference_mode():
        assert torch.equal(sampler(start + 0, seed=3), expected)


def test_any_layout_dtype_and_no_steps() -> None:
    start = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    sampler = LangevinSampler(quadratic, step_size=0.1, n_steps=2)
    assert torch.equal(sampler(start, seed=1), sampler(start.contiguous(), seed=1))
    for dtype in (torch.float64, torch.bfloat16):
        assert sampler(start.to(dtype), seed=1).dtype == dtype
    assert torch.equal(LangevinSampler(quadratic, step_size=0.1, n_steps=0)(start, seed=1), start)
    assert sampler(torch.zeros(0, 7), seed=1).shape == (0, 7)
    assert sampler(torch.zeros(3, 7), seed=1, return_trajectory=True).shape == (3, 2, 7)
    each = LangevinSampler(quadratic, step_size=torch.tensor([1e-9, 0.1]), noise_scale=torch.zeros(2), n_steps=1)(
        torch.ones(2, 3), seed=1
    )
    assert torch.equal(each[0], torch.ones(3))
    assert not torch.equal(each[1], torch.ones(3))


def test_a_bad_energy_is_named() -> None:
    def diverging(x: Tensor) -> Tensor:
        energy = quadratic(x)
        return energy.masked_fill((torch.arange(len(x)) >= 3) & (energy > 8), math.nan)

    start = torch.zeros(6, 2)
    start[3], start[5] = 2.5, 3.0  # energies 6.25 and 9
    with pytest.raises(FloatingPointError, match=r"the energy at step 0 is not finite in chain 5: nan$"):
        LangevinSampler(diverging, step_size=0.1, noise_scale=0.0, n_steps=3)(start)
    start[5] = 0
    with pytest.raises(FloatingPointError, match=r"the energy at step 2 is not finite in chain 3: nan$"):
        LangevinSampler(lambda x: diverging(x) - 2 * quadratic(x), step_size=0.1, noise_scale=0.0, n_steps=9)(start)
    with pytest.raises(FloatingPointError, match=r"the energy at step 0 is not finite in chain 0 and 5 more: inf$"):
        LangevinSampler(lambda x: quadratic(x) / 0, step_size=0.1, n_steps=3)(start + 1)
    with pytest.raises(
        FloatingPointError, match=r"the state after the last step, 1, is not finite in chain 0 and 5 more"
    ):
        LangevinSampler(lambda x: x.abs().sqrt().sum(1), step_size=0.1, n_steps=1)(torch.zeros(6, 2))


def test_options() -> None:
    with pytest.raises(ValueError, match="method: expected one of 'ula', 'mala', got 'hmc'"):
        LangevinSampler(quadratic, step_size=0.1, n_steps=1, method="hmc")
    with pytest.raises(ValueError, match="n_steps: expected an integer >= 0 and <= 268435456, got -1"):
        LangevinSampler(quadratic, step_size=0.1, n_steps=-1)
    with pytest.raises(ValueError, match=r"prior_scale: expected a finite number > 0\.0"):
        LangevinSampler(quadratic, step_size=0.1, n_steps=1, prior_scale=-1)
    with pytest.raises(TypeError, match="energy: expected a callable, got int 3"):
        LangevinSampler(3, step_size=0.1, n_steps=1)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"energy\(x\): expected shape \[2\], one for each chain, got float32 \[2, 3\]"
    ):
        LangevinSampler(lambda x: x**2, step_size=0.1, n_steps=1)(torch.zeros(2, 3))
