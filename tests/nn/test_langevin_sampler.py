"""LangevinSampler's MALA, schedules, trajectories, persistence, divergences and graphs."""

import math
import re
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgen import functional as F
from fastgen.nn import Divergence, LangevinSampler


def quadratic(x: Tensor) -> Tensor:
    return (x**2).flatten(1).sum(1) / 2


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))


def test_mala_is_the_naive_loop(oracle: ModuleType) -> None:
    """Propose, compare the two densities, decide by the published word: in float64, step by step."""
    energy, h, seed = network().double(), 0.4, 17
    start = torch.randn(30, 3, 4, dtype=torch.float64)
    sampler = LangevinSampler(energy, step_size=h, n_steps=6, prior_scale=1.3, grad_clip=0.2, method="mala")
    run = sampler.run(start, seed=seed, step=5, return_trajectory=True)
    x, kept = start.flatten(1).numpy(), np.zeros(30)

    def at(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        leaf = torch.tensor(x).view(-1, 3, 4).requires_grad_()
        value = energy(leaf)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach().numpy(), grad.flatten(1).numpy()

    for k in range(6):
        value, grad = at(x)
        np.testing.assert_allclose(run.energy[:, k], value, rtol=1e-6, atol=1e-7)  # the normals are float32's
        noise = oracle.normals(12, list(range(30)), seed, 5 + k)
        y = oracle.step(x, grad, noise, h, math.sqrt(2 * h), 1.3, 0.2)
        y_value, y_grad = at(y)
        ratio = oracle.log_alpha(x, grad, y, y_grad, y_value - value, h, math.sqrt(2 * h), 1.3, 0.2)
        u = [(oracle.philox((0, 2**28 + 5 + k, c, 0), seed)[0] + 0.5) / 2**32 for c in range(30)]
        accepted = np.log(u) < ratio
        x, kept = np.where(accepted[:, None], y, x), kept + accepted
        np.testing.assert_allclose(run.trajectory[:, k].flatten(1), x, atol=1e-5)  # type: ignore[index]
    assert run.acceptance_rate is not None
    assert run.acceptance_rate.tolist() == (kept / 6).tolist()
    assert 0.2 < kept.mean() / 6 < 0.98
    assert run.next_step == 11


@pytest.mark.parametrize("method", ["ula", "mala"])
def test_schedules(method: str) -> None:
    """Numbers for each step, from a list or a function, are that step's numbers."""
    start, energy = torch.randn(6, 3, 4), network()
    sizes, scales = [0.3 / (k + 1) for k in range(5)], [0.5, 0.4, 0.3, 0.2, 0.1]

    def chain(**given: Any) -> Tensor:
        return LangevinSampler(energy, n_steps=5, method=method, **given)(start, seed=3)

    by_list = chain(step_size=sizes, noise_scale=tuple(scales))
    assert torch.equal(chain(step_size=lambda k: 0.3 / (k + 1), noise_scale=lambda k: scales[k]), by_list)
    x = start
    for k in range(5):
        sampler = LangevinSampler(energy, step_size=sizes[k], noise_scale=scales[k], n_steps=1, method=method)
        x = sampler(x, seed=3, step=k)
    assert torch.equal(x, by_list)
    default = chain(step_size=sizes)
    assert torch.equal(default, chain(step_size=sizes, noise_scale=[math.sqrt(2 * h) for h in sizes]))
    assert not torch.equal(default, by_list)


@pytest.mark.parametrize("method", ["ula", "mala"])
def test_scales_as_tensors(method: str) -> None:
    """One number, or one for each chain; nothing else changes."""
    start, energy = torch.randn(6, 3, 4), network()

    def chain(step_size: Any, noise_scale: Any = None) -> Tensor:
        sampler = LangevinSampler(energy, step_size=step_size, noise_scale=noise_scale, n_steps=4, method=method)
        return sampler(start, seed=3)

    expected = chain(0.25)
    assert torch.equal(chain(torch.tensor(0.25)), expected)
    assert torch.equal(chain(torch.full((6,), 0.25)), expected)
    assert torch.equal(chain(torch.tensor(0.25), 0.5), chain(0.25, torch.full((6,), 0.5)))
    each = chain(torch.tensor([0.25] * 3 + [0.5] * 3), torch.tensor(0.5))
    assert torch.equal(each[:3], chain(0.25, 0.5)[:3])
    assert torch.equal(each[3:], chain(0.5, 0.5)[3:])


@pytest.mark.parametrize("method", ["ula", "mala"])
def test_chains_persist_and_split(method: str) -> None:
    sampler = LangevinSampler(quadratic, step_size=0.3, n_steps=8, method=method)
    whole = LangevinSampler(quadratic, step_size=0.3, n_steps=16, method=method)
    start = torch.randn(12, 5)
    first = sampler.run(start, seed=2**64 - 1)
    second = sampler.run(first.x, seed=2**64 - 1, step=first.next_step)
    expected = whole.run(start, seed=2**64 - 1)
    assert torch.equal(second.x, expected.x)
    assert torch.equal(torch.cat((first.energy, second.energy), dim=1), expected.energy)
    order = torch.randperm(12)
    assert torch.equal(whole(start[order], seed=2**64 - 1, chain_id=order), expected.x[order])
    parts = [whole(start[a:b], seed=2**64 - 1, chain_id=torch.arange(a, b)) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert torch.equal(torch.cat(parts), expected.x)


def test_trajectories_are_what_arviz_takes() -> None:
    start = torch.randn(4, 2, 3)
    every = LangevinSampler(quadratic, step_size=0.2, n_steps=11)(start, seed=1, return_trajectory=True)
    assert every.shape == (4, 11, 2, 3)  # chain, draw, shape
    assert every.grad_fn is None
    thinned = LangevinSampler(quadratic, step_size=0.2, n_steps=11, burn_in=3, thin=3)
    run = thinned.run(start, seed=1, return_trajectory=True)
    assert run.trajectory is not None
    assert torch.equal(run.trajectory, every[:, [5, 8]])
    assert torch.equal(run.x, every[:, -1])
    assert torch.equal(thinned(start, seed=1), run.x)
    assert run.energy.shape == (4, 11)
    torch.testing.assert_close(run.energy[:, 1:], quadratic(every[:, :-1].flatten(0, 1)).view(4, 10))
    assert run.acceptance_rate is None
    empty = LangevinSampler(quadratic, step_size=0.2, n_steps=2, burn_in=2).run(start, seed=1, return_trajectory=True)
    assert empty.trajectory is not None
    assert empty.trajectory.shape == (4, 0, 2, 3)


def cliff(x: Tensor) -> Tensor:
    """Finite within |x| < 1.5."""
    inside = (x.abs() < 1.5).all(1)
    return torch.where(inside, quadratic(x), math.nan)


def test_a_diverging_chain_is_reset_and_reported() -> None:
    start = torch.zeros(400, 1)
    plain = LangevinSampler(cliff, step_size=0.1, n_steps=20)
    with pytest.raises(FloatingPointError, match=r"energy at step \d+ is not finite in chain \d+ and \d+ more: nan$"):
        plain(start, seed=0)
    sampler = LangevinSampler(cliff, step_size=0.1, n_steps=20, on_divergence="reset")
    with pytest.warns(
        UserWarning, match=r"LangevinSampler: chain \d+ was reset at step \d+ \(energy nan\), and \d+ more"
    ):
        run = sampler.run(start, seed=0, step=7, return_trajectory=True)
    assert run.trajectory is not None
    assert run.trajectory.isfinite().all()
    assert (
        cliff(run.trajectory[:, :-1]).isfinite().all()
    )  # a state off the cliff is not kept: what it was put back to is
    assert torch.equal(run.trajectory[:, -1], run.x)
    # Naively: a state off the cliff is replaced by the one before it, then that one's step is taken with new noise.
    x, resets, first = start.clone(), torch.zeros(400, dtype=torch.int64), {}
    good = x.clone()
    for k in range(20):
        bad = cliff(x).isnan()
        for c in bad.nonzero().flatten().tolist():
            first.setdefault(c, 7 + k)
        resets += bad
        x[bad] = good[bad]
        good = x.clone()
        F.langevin_step_(x, x.clone(), step_size=0.1, seed=0, step=7 + k)
    assert torch.equal(run.x, x)
    assert torch.equal(run.resets, resets)
    assert resets.max() > 1
    assert [(d.step, d.chain) for d in run.divergences] == sorted((step, chain) for chain, step in first.items())
    assert isinstance(run.divergences[0], Divergence)
    assert math.isnan(run.divergences[0].energy)
    assert (run.resets > 0).sum() == len(run.divergences)


def test_reset_looks_at_gradients_and_the_last_state() -> None:
    def steep(x: Tensor) -> Tensor:  # finite, with an infinite gradient at 0
        return x.abs().sqrt().sum(1)

    start = torch.ones(3, 2)
    start[1] = 0
    with pytest.raises(FloatingPointError, match=r"the energy at step 0 is not finite in chain 1: 0\.0"):
        LangevinSampler(steep, step_size=0.1, n_steps=3, on_divergence="reset")(start, seed=0)
    burst = LangevinSampler(
        lambda x: x.sum(1) * 3e38, step_size=3e38, noise_scale=0.0, n_steps=1, on_divergence="reset"
    )
    with pytest.warns(UserWarning, match="was reset at step 1"):
        assert torch.equal(burst(start / 2, seed=0), start / 2)


def test_a_trajectory_keeps_what_a_reset_restores() -> None:
    sampler = LangevinSampler(
        lambda x: x.sum(1) * 3e38, step_size=3e38, noise_scale=0.0, n_steps=3, thin=2, burn_in=1, on_divergence="reset"
    )
    start = torch.full((2, 1), 0.5)
    with pytest.warns(UserWarning, match="was reset"):
        run = sampler.run(start, seed=0, return_trajectory=True)
    assert run.trajectory is not None
    assert torch.equal(run.trajectory, run.x[:, None])
    assert torch.equal(run.x, start)


@pytest.mark.parametrize("reset", ["raise", "reset"])
def test_an_energy_that_is_a_view_of_the_state(reset: str) -> None:
    run = LangevinSampler(lambda x: x[:, 0], step_size=0.5, noise_scale=0.0, n_steps=3, on_divergence=reset).run(
        torch.zeros(2, 1, dtype=torch.float64), seed=0
    )
    assert run.energy.tolist() == [[0.0, -0.5, -1.0]] * 2


def test_mala_leaves_the_gradient_of_the_energy_alone() -> None:
    kept = torch.full((50, 1), 0.25)

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 0.25 * x.sum(1)

        @staticmethod
        def backward(ctx: Any, *slope: Tensor) -> Tensor:
            return kept if bool((seen[-1] == 0).all()) else seen[-1] * 0 + 0.5

    seen: list[Tensor] = []

    def energy(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return Linear.apply(x)

    LangevinSampler(energy, step_size=0.1, n_steps=2, method="mala")(torch.zeros(50, 1), seed=0)
    assert (kept == 0.25).all()


def test_mala_and_energies_without_a_meaning() -> None:
    def wall(x: Tensor) -> Tensor:
        return torch.where((x > 0).all(1), quadratic(x), math.inf)

    x = LangevinSampler(wall, step_size=0.5, n_steps=30, method="mala")(torch.ones(500, 2), seed=0)
    assert (x > 0).all()
    with pytest.raises(FloatingPointError, match=r"energy at step \d+ is not finite in chain \d+.*: nan$"):
        LangevinSampler(cliff, step_size=0.5, n_steps=30, method="mala")(torch.zeros(500, 1), seed=0)
    sampler = LangevinSampler(cliff, step_size=0.5, n_steps=30, method="mala", on_divergence="reset")
    with pytest.warns(UserWarning, match="was reset"):
        run = sampler.run(torch.zeros(500, 1), seed=0)
    assert cliff(run.x).isfinite().all()
    assert run.resets.sum() > 0
    for reset in ("raise", "reset"):
        with pytest.raises(FloatingPointError, match=r"energy at step 4 is not finite in chain 1"):
            LangevinSampler(cliff, step_size=0.5, n_steps=3, method="mala", on_divergence=reset)(
                torch.tensor([[0.0], [2.0]]), seed=0, step=4
            )


def test_a_start_that_is_not_finite_is_named() -> None:
    start = torch.zeros(5, 2)
    start[3, 1] = math.nan
    for given in ({}, {"on_divergence": "reset"}, {"method": "mala"}):
        sampler = LangevinSampler(lambda x: x[:, 0] ** 2, step_size=0.1, n_steps=2, **given)  # type: ignore[arg-type]
        with pytest.raises(FloatingPointError, match=r"x, the state before step 9, is not finite in chain 3$"):
            sampler(start, seed=0, step=9)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"step_size": 0.0}, ValueError, "step_size: expected a finite number > 0.0, got 0.0"),
        ({"step_size": -1.0}, ValueError, "step_size: expected a finite number > 0.0, got -1.0"),
        ({"step_size": [0.1, 0.0, 0.1]}, ValueError, "step_size[1]: expected a finite number > 0.0, got 0.0"),
        ({"step_size": [0.1, 0.1]}, ValueError, "step_size: expected one number for each of 3 steps, got 2"),
        ({"step_size": lambda k: torch.tensor(0.1)}, TypeError, "step_size[0]: expected a number, got float32 []"),
        ({"step_size": torch.tensor([1, -0.5])}, ValueError, "step_size: expected finite numbers > 0, got -0.5 for"),
        ({"noise_scale": torch.tensor(-0.5)}, ValueError, "noise_scale: expected finite numbers >= 0, got -0.5"),
        ({"step_size": 10**400}, ValueError, "step_size: expected a number finite in float64, got an integer of 1329"),
        ({"noise_scale": -0.1}, ValueError, "noise_scale: expected a finite number >= 0.0, got -0.1"),
        ({"noise_scale": lambda k: 0.1 - k}, ValueError, "noise_scale[1]: expected a finite number >= 0.0, got -0.9"),
        ({"noise_scale": 0.0, "method": "mala"}, ValueError, "noise_scale: expected a finite number > 0.0, got 0.0"),
        ({"clamp": (1.0, -1.0)}, ValueError, "clamp: expected low <= high, got (1.0, -1.0)"),
        ({"clamp": (-1.0, 1.0), "method": "mala"}, ValueError, "clamp: expected None for method='mala'"),
        ({"on_divergence": "stop"}, ValueError, "on_divergence: expected one of 'raise', 'reset', got 'stop'"),
        ({"thin": 0}, ValueError, "thin: expected an integer >= 1, got 0"),
        ({"burn_in": 4}, ValueError, "burn_in: expected an integer >= 0 and <= 3, got 4"),
        ({"cuda_graph": "yes"}, ValueError, "cuda_graph: expected 'auto', True or False, got 'yes'"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_bad_options(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        LangevinSampler(quadratic, **{"step_size": 0.1, "n_steps": 3, **given})


def test_bad_energies_and_calls() -> None:
    def sampler(energy: Any, **given: Any) -> LangevinSampler:
        return LangevinSampler(energy, step_size=0.1, n_steps=3, **given)

    start = torch.zeros(2, 3)
    for method in ("ula", "mala"):
        for energy in (lambda x: x.detach().sum(1), lambda x: torch.ones(len(x), requires_grad=True)):
            with pytest.raises(ValueError, match=r"energy\(x\): expected a function differentiable in x"):
                sampler(energy, method=method)(start)
        for energy, got in ((lambda x: x.sum(), r"float32 \[\]"), (lambda x: x[:, :1], r"float32 \[2, 1\]")):
            with pytest.raises(ValueError, match=r"energy\(x\): expected shape \[2\], .* got " + got):
                sampler(energy, method=method)(start)
        with pytest.raises(ValueError, match=r"energy\(x\): expected shape \[2\], .* got float 1\.0"):
            sampler(lambda x: 1.0, method=method)(start)
    with pytest.raises(TypeError, match="x: expected float64 or float32, got bfloat16"):
        sampler(quadratic, method="mala")(start.bfloat16())
    with pytest.raises(ValueError, match="cuda_graph: expected x on a CUDA device for cuda_graph=True, got it on cpu"):
        sampler(quadratic, cuda_graph=True)(start)
    with pytest.raises(ValueError, match=f"step: expected an integer >= 0 and <= {2**28 - 3}, got {2**28}"):
        sampler(quadratic)(start, step=2**28)
    with pytest.raises(ValueError, match=r"chain_id: expected one for each chain, \[2\], got \[3\]"):
        sampler(quadratic)(start, chain_id=torch.arange(3))
    with pytest.raises(ValueError, match=r"step_size: expected one for each chain, \[2\], got \[3\]"):
        LangevinSampler(quadratic, step_size=torch.full((3,), 0.1), n_steps=1)(start)


def test_bad_calls_and_modules_of_inference_mode() -> None:
    sampler = LangevinSampler(quadratic, step_size=1e39, n_steps=1)  # fit for float64
    with pytest.raises(ValueError, match=r"step_size: expected a number finite in float32, got 1e\+39"):
        sampler(torch.zeros(2, 3), seed=0)
    with pytest.raises(TypeError, match=r"chain_id: expected a torch.Tensor, got list"):
        sampler(torch.zeros(2, 3), seed=0, chain_id=[0, 1])
    with torch.inference_mode():
        energy = network()
    with pytest.raises(ValueError, match=r"energy: expected parameters .* got 1.weight"):
        LangevinSampler(energy, step_size=0.1, n_steps=1)(torch.zeros(2, 3, 4), seed=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("options", [{}, {"on_divergence": "reset"}, {"method": "mala"}], ids=lambda o: "-".join(o))
@pytest.mark.parametrize("schedule", [False, True])
def test_a_graph_gives_the_numbers_of_the_loop(options: dict[str, Any], schedule: bool) -> None:
    energy, start = network().cuda(), torch.randn(50, 3, 4, device="cuda")
    given: dict[str, Any] = {"step_size": (lambda k: 0.1 / (k + 1)) if schedule else 0.1, "prior_scale": 1.0, **options}
    runs = []
    for graph in (False, True, "auto"):
        sampler = LangevinSampler(energy, n_steps=12, cuda_graph=graph, thin=2, **given)
        with warnings.catch_warnings():
            # "auto" must not have fallen back. Torch warns of the context that a first backward pass by cuBLAS makes.
            warnings.filterwarnings("error", ".*cannot be captured")
            runs.append(sampler.run(start, seed=5, step=3, return_trajectory=True))
    for run in runs[1:]:
        for got, expected in zip(run[:5], runs[0][:5], strict=True):
            assert (got is None and expected is None) or torch.equal(got, expected)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
def test_an_energy_that_waits_for_the_device_falls_back() -> None:
    start = torch.randn(5, 4, device="cuda")

    def waits(x: Tensor) -> Tensor:
        return quadratic(x) * (2.0 if float(x.abs().max()) > 1e9 else 1.0)

    with pytest.warns(UserWarning, match="cannot be captured, the plain loop runs"):
        found = LangevinSampler(waits, step_size=0.1, n_steps=8)(start, seed=0)
    assert torch.equal(found, LangevinSampler(quadratic, step_size=0.1, n_steps=8, cuda_graph=False)(start, seed=0))
    with pytest.raises(RuntimeError):
        LangevinSampler(waits, step_size=0.1, n_steps=8, cuda_graph=True)(start, seed=0)
    torch.randn(3, device="cuda")  # torch's generator does not take itself for captured
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before  # nor does its allocator take a capture to be under way


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return tuple(2 * g for g in found) if func is torch.autograd.grad else found


def test_a_function_mode_sees_the_gradient_taken() -> None:
    x = torch.randn(3, 2)
    with Doubling():
        doubled = LangevinSampler(lambda x: x.square().sum(1), step_size=0.01, n_steps=3)(x, seed=1)
    expected = LangevinSampler(lambda x: 2 * x.square().sum(1), step_size=0.01, n_steps=3)(x, seed=1)
    assert torch.equal(doubled, expected)


def test_dynamo_meets_no_cached_function() -> None:
    sampler, x = LangevinSampler(quadratic, step_size=0.1, n_steps=3), torch.randn(4, 6)
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = torch.compile(sampler, backend="eager")(x, seed=1)
    assert torch.equal(found, sampler(x, seed=1))
    assert not [w for w in told if "cache" in str(w.message)]


def test_a_step_leaves_no_graph() -> None:
    energies: list[Tensor] = []

    def energy(x: Tensor) -> Tensor:
        energies.append(quadratic(x))
        return energies[-1]

    LangevinSampler(energy, step_size=0.1, n_steps=2)(torch.randn(4, 6), seed=1)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        energies[0].sum().backward()


def test_an_energy_that_changes_the_options_changes_the_next_call() -> None:
    x = torch.randn(20, 6)
    for method in ("ula", "mala"):
        sampler = LangevinSampler(quadratic, step_size=0.5, n_steps=4, prior_scale=0.5, method=method)
        expected = sampler(x, seed=1)

        def energy(x: Tensor, of: LangevinSampler = sampler) -> Tensor:
            of.prior_scale, of.grad_clip = 5.0, 1e-3
            return quadratic(x)

        sampler.energy = energy
        assert torch.equal(sampler(x, seed=1), expected)
        assert not torch.equal(sampler(x, seed=1), expected)
