"""Chains on energies whose answer is known: stationary moments, and the same bits from any number of processes."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.nn import LangevinSampler


def sums(values: Tensor, expected: float) -> float:
    """How many standard errors the mean of independent values lies from what is expected."""
    values = values.double()
    return abs(float(values.mean()) - expected) / float(values.std() / math.sqrt(len(values)))


@pytest.mark.parametrize(("curvature", "sigma", "eta"), [(1.0, None, 0.3), (2.0, 0.8, 0.25)])
def test_ula_has_its_closed_form_variance(curvature: float, sigma: float | None, eta: float) -> None:
    """For U = a·x²/2 with prior the chain is an AR(1) process: variance 1/λ(1 − ηλ/2), λ = a + 1/σ²."""
    rate = curvature + (0 if sigma is None else 1 / sigma**2)
    sampler = LangevinSampler(lambda x: curvature * x.square().sum(1) / 2, step_size=eta, n_steps=40, prior_scale=sigma)
    x = sampler(torch.zeros(1000, 1000), seed=4)
    expected = 1 / (rate * (1 - eta * rate / 2))
    assert abs(float(x.double().var()) / expected - 1) < 0.01
    assert abs(1 / rate / expected - 1) > 0.1  # the bias that the formula is about


@pytest.mark.parametrize(
    "options", [{}, {"grad_clip": 0.8}, {"noise_scale": 0.6}, {"prior_scale": 1.5}], ids=lambda o: "-".join(o)
)
def test_mala_on_a_correlated_gaussian(options: dict[str, float]) -> None:
    covariance = torch.tensor([[1.0, 0.7, 0.2], [0.7, 0.9, -0.1], [0.2, -0.1, 0.5]], dtype=torch.float64)
    precision, mean = covariance.inverse(), torch.tensor([0.5, -1.0, 0.25])

    def energy(x: Tensor) -> Tensor:
        centred = x - mean
        return (centred @ precision.float() * centred).sum(1) / 2

    h = 0.25
    total, shift = precision, precision @ mean.double()
    if "prior_scale" in options:
        total = precision + torch.eye(3) / options["prior_scale"] ** 2
    temperature = options["noise_scale"] ** 2 / (2 * h) if "noise_scale" in options else 1.0
    centre, expected = torch.linalg.solve(total, shift), total.inverse() * temperature
    runs = {}
    for method in ("mala", "ula"):
        sampler = LangevinSampler(energy, step_size=h, n_steps=150, method=method, **options)  # type: ignore[arg-type]
        runs[method] = sampler.run(mean.repeat(20_000, 1), seed=8)
    rate = runs["mala"].acceptance_rate
    assert rate is not None
    assert 0.3 < float(rate.mean()) < 0.95
    worst = {}
    for method, run in runs.items():
        z = run.x.double() - centre
        errors = [sums(run.x[:, i], float(centre[i])) for i in range(3)]
        errors += [sums(z[:, i] * z[:, j], float(expected[i, j])) for i in range(3) for j in range(i, 3)]
        worst[method] = max(errors)
    assert worst["mala"] < 4.5
    assert worst["ula"] > 8  # what the acceptance step mends is far beyond the noise


def test_mala_on_a_mixture() -> None:
    weights, means, widths = torch.tensor([0.3, 0.7]), torch.tensor([-1.5, 1.2]), torch.tensor([0.6, 0.8])

    def energy(x: Tensor) -> Tensor:
        z = (x - means) / widths
        return -torch.logsumexp(weights.log() - widths.log() - z.square() / 2, dim=1)

    start = torch.zeros(20_000, 1)
    x = LangevinSampler(energy, step_size=0.5, n_steps=250, method="mala")(start, seed=12)[:, 0]
    moments = weights.double(), means.double(), widths.double()
    mean = float((moments[0] * moments[1]).sum())
    second = float((moments[0] * (moments[1] ** 2 + moments[2] ** 2)).sum())
    below = float((moments[0] * 0.5 * torch.erfc(moments[1] / moments[2] / math.sqrt(2))).sum())
    assert sums(x, mean) < 4.5
    assert sums(x.square(), second) < 4.5
    assert sums((x < 0).double(), below) < 4.5
    assert sums((x < -1.5).double(), float(0.3 * 0.5 + 0.7 * 0.5 * math.erfc(2.7 / 0.8 / math.sqrt(2)))) < 4.5


WORKER = """
import torch
from fastgen.nn import LangevinSampler
def energy(x):
    x = x.flatten(1)
    return (x.square().square() / 4 - x.square() + x.cos()).sum(1)
start = torch.linspace(-1, 1, 24 * 1100).view(24, 11, 100)
found = {}
for world in (2, 4):
    if rank < world:
        ids = torch.arange(rank * 24 // world, (rank + 1) * 24 // world)
        for method in ("ula", "mala"):
            sampler = LangevinSampler(energy, step_size=0.02, n_steps=30, method=method)
            found[f"{world} {method}"] = sampler(start[ids], seed=77, chain_id=ids)
torch.save(found, f"{rank}.pt")
"""


def test_the_same_bits_from_one_two_and_four_processes(tmp_path: Path, run_apart: Callable[..., list[Any]]) -> None:
    assert [done.returncode for done in run_apart(WORKER, 4, tmp_path)] == [0] * 4
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]

    def energy(x: Tensor) -> Tensor:
        x = x.flatten(1)
        return (x.square().square() / 4 - x.square() + x.cos()).sum(1)

    start = torch.linspace(-1, 1, 24 * 1100).view(24, 11, 100)
    for method in ("ula", "mala"):
        sampler = LangevinSampler(energy, step_size=0.02, n_steps=30, method=method)
        whole = sampler(start, seed=77)
        for world in (2, 4):
            assert torch.equal(torch.cat([found[rank][f"{world} {method}"] for rank in range(world)]), whole)
        for cuts in ((0, 1, 24), (0, 5, 6, 17, 24)):
            ids = [torch.arange(a, b) for a, b in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat([sampler(start[i], seed=77, chain_id=i) for i in ids]), whole)
        order = torch.randperm(24)
        assert torch.equal(sampler(start[order], seed=77, chain_id=order), whole[order])
        assert not torch.equal(sampler(start[order], seed=77), whole[order])
