"""The public functions: numbers, invariances, statistics, errors."""

import math
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import functional as F
from fastgen.ops import backend


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"step_size": 0.3}, {"step_size": 0.3, "noise_scale": math.sqrt(0.6)}),
        ({"step_size": 1e-9, "noise_scale": 2.0}, {"step_size": 1e-9, "noise_scale": 2.0}),
        ({"step_size": 0.3, "noise_scale": 0}, {"step_size": 0.3, "noise_scale": 0.0}),
        (same := {"step_size": 0.02, "noise_scale": 0.2, "prior_scale": 0.5}, same),
        (same := {"step_size": 1, "noise_scale": 0.1, "grad_clip": 0.2}, same),
        ({"step_size": 0.5, "clamp": (-1, 0.5)}, {"step_size": 0.5, "noise_scale": 1.0, "low": -1.0, "high": 0.5}),
        ({"step_size": 0.5, "clamp": (None, 0.5)}, {"step_size": 0.5, "noise_scale": 1.0, "high": 0.5}),
        (
            {"step_size": 0.5, "clamp": (-0.3, None), "noise_first": True, "prior_scale": 2},
            {"step_size": 0.5, "noise_scale": 1.0, "low": -0.3, "noise_first": True, "prior_scale": 2.0},
        ),
    ],
)  # fmt: skip
def test_against_float64(oracle: ModuleType, given: dict[str, Any], meant: dict[str, Any]) -> None:
    for shape in ((5, 3, 7), (3, 1100), (6,)):
        for dtype, tolerance in ((torch.float64, 2e-6), (torch.float32, 3e-6)):
            x, grad = draw(*shape, dtype=dtype)
            noise = oracle.normals(x[0].numel(), list(range(shape[0])), 11, 2).reshape(shape)
            expected = oracle.step(x.double().numpy(), grad.double().numpy(), noise, **meant)
            result = F.langevin_step_(x, grad, seed=11, step=2, **given)
            assert result is x
            assert np.abs(x.double().numpy() - expected).max() < tolerance


def test_tensors_for_each_chain(oracle: ModuleType) -> None:
    x, grad = draw(4, 10)
    h, s = torch.tensor([0.1, 0.0, 0.5, 1.0]), torch.tensor([1.0, 0.5, 0.0, 0.1])
    noise, start = oracle.normals(10, [0, 1, 2, 3], 1, 0), x.clone()
    columns = h[:, None].double().numpy(), s[:, None].double().numpy()
    expected = oracle.step(x.double().numpy(), grad.double().numpy(), noise, *columns)
    assert (
        np.abs(F.langevin_step_(x, grad, step_size=h, noise_scale=s, seed=1).double().numpy() - expected).max() < 3e-6
    )
    by_default = oracle.step(start.double().numpy(), grad.double().numpy(), noise, columns[0], np.sqrt(2 * columns[0]))
    assert np.abs(F.langevin_step_(start, grad, step_size=h, seed=1).double().numpy() - by_default).max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_tensors_of_one_number(dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    h, s = torch.tensor(0.1, dtype=compute), torch.tensor(0.3, dtype=compute)
    x, grad = draw(3, 7, dtype=dtype)
    for given in ({"noise_scale": s}, {"noise_scale": 0.3}, {}):
        expected = F.langevin_step_(
            x.clone(), grad, seed=1, step_size=float(h), **{k: float(v) for k, v in given.items()}
        )
        assert torch.equal(F.langevin_step_(x.clone(), grad, seed=1, step_size=h, **given), expected)
    mixed = F.langevin_step_(x.clone(), grad, seed=1, step_size=h.expand(3), noise_scale=s)
    assert torch.equal(mixed, F.langevin_step_(x.clone(), grad, seed=1, step_size=h, noise_scale=s))
    with pytest.raises(TypeError, match="noise_scale: expected float"):
        F.langevin_step_(x, grad, seed=1, step_size=h, noise_scale=torch.tensor(1))
    with pytest.raises(ValueError, match="step_size: expected the device of x, cpu, got meta"):
        F.langevin_step_(x, grad, seed=1, step_size=h.to("meta"))


def test_the_noise_of_tensors_is_the_nearest_root() -> None:
    """torch's own float32 root need not be: s = √(2η) must have one value on every device."""
    h = torch.rand(5000) + 2.0**-20
    found = F.langevin_step_(torch.zeros(5000, 1), torch.zeros(5000, 1), step_size=h, seed=1)
    exact = np.sqrt(2 * h.double().numpy()).astype(np.float32)
    assert torch.equal(found, torch.from_numpy(exact)[:, None] * F.langevin_noise((5000, 1), seed=1))


def test_lookahead_is_a_step_without_noise_from_the_old_state() -> None:
    x, grad = draw(5, 33)
    start, out = x.clone(), torch.empty_like(x)
    F.langevin_step_(x, grad, step_size=0.1, prior_scale=0.5, grad_clip=0.5, seed=0, lookahead=(0.25, out))
    F.langevin_step_(start, grad, step_size=0.25, noise_scale=0.0, prior_scale=0.5, grad_clip=0.5, seed=0)
    assert torch.equal(out, start)
    assert not torch.equal(x, start)


@pytest.mark.parametrize("kernel", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (5, 3, 7), (3, 1100), (2, 8193)])
def test_statistics_in_the_same_pass(oracle: ModuleType, kernel: str, shape: tuple[int, ...]) -> None:
    size = shape[1:] or (1,)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for noise_first in (False, True):
            x, grad = draw(*shape, dtype=dtype)
            plain, stats = x.clone(), torch.full((shape[0], 3), -1.0, dtype=torch.float64)
            options: dict[str, Any] = {"step_size": 0.5, "noise_scale": 0.25, "clamp": (-1.0, 1.5), "seed": 11}
            with backend.force(kernel):
                F.langevin_step_(plain, grad, noise_first=noise_first, **options)
                before = x.double().clone().reshape(shape[0], *size).numpy()
                F.langevin_step_(x, grad, noise_first=noise_first, stats=stats, **options)
            assert torch.equal(x, plain)
            slope = grad.double().reshape(before.shape).numpy()
            noise = oracle.normals(math.prod(size), list(range(shape[0])), 11, 0).reshape(before.shape)
            expected = oracle.statistics(before, slope, noise, 0.5, 0.25, -1.0, 1.5, noise_first)
            np.testing.assert_allclose(stats[:, 0], expected[:, 0], rtol=1e-13)
            assert (stats[:, 1:].numpy() == expected[:, 1:]).all()
            assert dtype == torch.float64 or shape[-1] < 1000 or stats[:, 1].min() > 0.02 * math.prod(size)


def test_statistics_count_what_is_not_finite() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, grad = torch.zeros(6, 1300, dtype=dtype), torch.zeros(6, 1300, dtype=dtype)
        x[1, 5], grad[2, 7], grad[3, :3], x[4, 9] = math.nan, math.nan, math.inf, -math.inf
        grad[5] = torch.finfo(dtype).max
        for clamp, stats in ((None, torch.zeros(6, 3)), ((-1, 1), torch.zeros(6, 6)[:, ::2])):
            F.langevin_step_(x.clone(), grad, step_size=1.5, noise_scale=0.1, clamp=clamp, seed=0, stats=stats)
            # 1.5 times the largest is infinite before the clamp; float16's in float32 is not, and may be clamped.
            overflow = 1300 if clamp is None or dtype in (torch.float64, torch.float32, torch.bfloat16) else 0
            assert stats[:, 2].tolist() == [0, 1, 1, 3, 1, overflow]
            assert stats[:2, 0].tolist() == [0, 0]
            assert stats[2, 0].isnan()
            assert stats[3, 0] == math.inf
            assert stats[3, 1] == (0 if clamp is None else 3)
    empty = torch.ones(2, 3)
    F.langevin_step_(torch.zeros(2, 0), torch.zeros(2, 0), step_size=0.1, seed=0, stats=empty)
    assert torch.equal(empty, torch.zeros(2, 3))


def test_statistics_do_not_depend_on_threads_or_split() -> None:
    x, grad = draw(9, 20_001)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.zeros(9, 3, dtype=torch.float64))
            F.langevin_step_(x.clone(), grad, step_size=0.1, seed=0, stats=found[-1])
    finally:
        torch.set_num_threads(before)
    part = torch.zeros(4, 3, dtype=torch.float64)
    F.langevin_step_(x[5:].clone(), grad[5:], step_size=0.1, seed=0, stats=part)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][5:], part)


def test_noise_first_closes_one_step_and_opens_the_next() -> None:
    """The loop of UvA's tutorial and IGEBM: noise, clamp, gradient there, step, clamp."""
    h, s = 0.2, 0.3
    plain, _ = draw(6, 20)
    fused = plain.clone()
    for k in range(4):
        plain = (plain + s * F.langevin_noise(plain, seed=5, step=k)).clamp(-1, 1)
        plain = (plain - h * plain.sin()).clamp(-1, 1)
    fused = (fused + s * F.langevin_noise(fused, seed=5, step=0)).clamp(-1, 1)
    for k in range(4):
        last = k == 3
        F.langevin_step_(
            fused,
            fused.sin(),
            step_size=h,
            noise_scale=0 if last else s,
            clamp=(-1, 1),
            noise_first=True,
            seed=5,
            step=k + 1,
        )
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-6)


def test_noise_is_what_a_step_adds() -> None:
    x = torch.zeros(7, 3, 5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        state = x.clone().to(dtype)
        F.langevin_step_(state, state.clone(), step_size=0.5, noise_scale=1.0, seed=9, step=3)
        assert torch.equal(state, F.langevin_noise(state, seed=9, step=3))
        assert torch.equal(state, F.langevin_noise((7, 3, 5), seed=9, step=3).to(dtype))
    assert F.langevin_noise([2, 2], seed=0, dtype=torch.float64).dtype == torch.float64


def test_noise_knows_neither_order_nor_split_of_chains() -> None:
    whole = F.langevin_noise((40, 9), seed=1)
    order = torch.randperm(40)
    assert torch.equal(F.langevin_noise((40, 9), seed=1, chain_id=order), whole[order])
    parts = [
        F.langevin_noise((n, 9), seed=1, chain_id=torch.arange(first, first + n)) for first, n in ((0, 7), (7, 33))
    ]
    assert torch.equal(torch.cat(parts), whole)
    one = F.langevin_noise((1, 9), seed=1, chain_id=torch.tensor([13]))
    assert torch.equal(one[0], whole[13])
    assert torch.equal(F.langevin_noise((40, 5), seed=1), whole[:, :5])


@pytest.mark.parametrize("kernel", ["cpp", "triton", "reference"])
def test_negative_chain_ids_are_their_64_bits(oracle: ModuleType, kernel: str) -> None:
    ids = torch.tensor([-1, -(2**63), -(2**32), -5])
    noise = F.langevin_noise((4, 9), seed=1, step=3, chain_id=ids)
    assert np.abs(noise.double().numpy() - oracle.normals(9, [int(i) % 2**64 for i in ids], 1, 3)).max() < 3e-6
    x, grad = draw(4, 9)
    expected = x - grad * 0.25 + noise
    with backend.force(kernel):
        F.langevin_step_(x, grad, step_size=0.25, noise_scale=1.0, seed=1, step=3, chain_id=ids)
    assert torch.equal(x, expected)


def test_seed_and_step_as_tensors() -> None:
    for seed in (0, 5, 2**63, 2**64 - 1):
        as_tensor = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
        expected = F.langevin_noise((3, 8), seed=seed, step=17)
        assert torch.equal(F.langevin_noise((3, 8), seed=as_tensor, step=torch.tensor(17)), expected)
    all_seeds = {F.langevin_noise((1, 4), seed=s).sum().item() for s in (0, 1, 2**32, 2**63, 2**64 - 1)}
    all_steps = {F.langevin_noise((1, 4), seed=0, step=s).sum().item() for s in (0, 1, 2**27, 2**28 - 1)}
    assert (len(all_seeds), len(all_steps)) == (5, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(bad: float) -> None:
    for into in (0, 1):
        pair = draw(2, 70)
        pair[into][1, 33] = bad
        x = F.langevin_step_(*pair, step_size=0.1, seed=0, clamp=(-1, 1), grad_clip=1.0, noise_first=True)
        if math.isnan(bad):
            assert x[1, 33].isnan()
        else:
            assert x[1, 33].abs() <= 1.0
        assert x.isfinite().sum() == x.numel() - math.isnan(bad)
    x, grad = draw(2, 4)
    x[0, 0] = grad[1, 1] = bad
    F.langevin_step_(x, grad, step_size=0.1, seed=0, prior_scale=1.0)
    assert not x[0, 0].isfinite()
    assert not x[1, 1].isfinite()


def test_statistics_of_the_noise() -> None:
    n = 2**22
    z = F.langevin_noise((64, n // 64), seed=2024).double()
    flat = z.flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)):
        assert abs(float((flat**power).mean()) - moment) < 4.5 * math.sqrt(variance / n)
    ordered = flat.sort().values
    cdf = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    rank = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = max(float((rank - cdf).max()), float((cdf - rank + 1 / n).max()))
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov–Smirnov, p = 0.001
    counts = torch.histc(cdf, 1024, 0, 1)
    chi_square = float(((counts - n / 1024) ** 2 / (n / 1024)).sum())
    assert abs(chi_square - 1023) < 4 * math.sqrt(2 * 1023)
    for threshold in (3.0, 4.0, 4.5):
        expected = n * math.erfc(threshold / math.sqrt(2))
        assert abs(int((flat.abs() > threshold).sum()) - expected) < 4.5 * math.sqrt(expected) + 1
    assert flat.abs().max() <= 6.5555415


def test_normals_are_uncorrelated() -> None:
    noise = F.langevin_noise((256, 4096), seed=3)
    bound = 4.5 / math.sqrt(noise.numel())
    for lag in range(1, 9):  # within a group, across its pairs and between groups
        for f in (lambda z: z, lambda z: (z**2 - 1) / math.sqrt(2)):
            assert abs(float((f(noise[:, lag:]) * f(noise[:, :-lag])).mean())) < bound
    for other in (
        F.langevin_noise((256, 4096), seed=4),
        F.langevin_noise((256, 4096), seed=3, step=1),
        F.langevin_noise((256, 4096), seed=3, chain_id=torch.arange(1, 257) * 2**32),
        noise.roll(1, 0),
    ):
        assert abs(float((noise * other).mean())) < bound


def test_neighbours_share_nothing() -> None:
    """Seeds, steps and chains that differ by one: neither a normal in common nor a correlation, whatever the shift."""
    n = 2**16
    base = F.langevin_noise((1, n), seed=100, step=50, chain_id=torch.tensor([7]))[0]
    known = set(base.view(torch.int32).tolist())
    spectrum = torch.fft.rfft(base.double())
    for seed, step, chain in ((99, 50, 7), (101, 50, 7), (100, 49, 7), (100, 51, 7), (100, 50, 6), (100, 50, 8)):
        other = F.langevin_noise((1, n), seed=seed, step=step, chain_id=torch.tensor([chain]))[0]
        # By chance some 60, for float32 is coarse in the tails; a shared counter word would give a quarter of n.
        assert len(known & set(other.view(torch.int32).tolist())) < 150
        shifted = torch.fft.irfft(spectrum * torch.fft.rfft(other.double()).conj(), n=n)  # every circular shift at once
        assert shifted.abs().max() < 6.5 * math.sqrt(n)


def test_chains_and_steps_are_normal_too() -> None:
    """Moments across chains and across steps at a fixed element, where a weak counter would show first."""
    across_chains = F.langevin_noise((2**18, 1), seed=6).flatten().double()
    across_steps = torch.cat([F.langevin_noise((256, 1), seed=6, step=k).flatten() for k in range(1024)]).double()
    across_seeds = torch.cat([F.langevin_noise((256, 1), seed=k).flatten() for k in range(1024)]).double()
    for z in (across_chains, across_steps, across_seeds):
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(float((z**power).mean()) - moment) < 4.5 * math.sqrt(variance / len(z))
        for lag in (1, 2, 255, 256, 257):
            assert abs(float((z[lag:] * z[:-lag]).mean())) < 4.5 / math.sqrt(len(z))


def test_no_gradients() -> None:
    x, grad = draw(2, 3)
    with pytest.raises(RuntimeError, match=r"^x: langevin_step_ is not differentiable"):
        F.langevin_step_(x.clone().requires_grad_(), grad, step_size=0.1, seed=0)
    with pytest.raises(RuntimeError, match=r"^grad: langevin_step_ is not differentiable"):
        F.langevin_step_(x, grad.clone().requires_grad_(), step_size=0.1, seed=0)
    with pytest.raises(RuntimeError, match=r"^lookahead\[1\]: langevin_step_ is not differentiable"):
        F.langevin_step_(x, grad, step_size=0.1, seed=0, lookahead=(0.1, torch.zeros(2, 3, requires_grad=True)))
    with torch.no_grad():
        leaf = x.clone().requires_grad_()
        F.langevin_step_(leaf, grad, step_size=0.1, seed=0)
    assert torch.equal(leaf, F.langevin_step_(x, grad, step_size=0.1, seed=0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": torch.zeros(2, 3).int()}, TypeError, "x: expected float64 or float32 or bfloat16 or float16, got int32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected [C, ...] with chains in dimension 0, got a 0-d tensor"),
        ({"grad": torch.zeros(2, 4)}, ValueError, "grad: expected the shape of x, [2, 3], got [2, 4]"),
        ({"grad": torch.zeros(2, 3).double()}, TypeError, "grad: expected float32, got float64"),
        ({"grad": torch.zeros(2, 3, device="meta")}, ValueError, "grad: expected the device of x, cpu, got meta"),
        ({"step_size": -0.1}, ValueError, "step_size: expected a finite number > 0.0, got -0.1"),
        ({"step_size": 0}, ValueError, "step_size: expected a finite number > 0.0, got 0"),
        ({"step_size": "a"}, TypeError, "step_size: expected a number, got str 'a'"),
        ({"step_size": torch.zeros(3)}, ValueError, "step_size: expected one for each chain, [2], got [3]"),
        ({"step_size": torch.zeros(2).half()}, TypeError, "step_size: expected float32, got float16"),
        ({"noise_scale": math.nan}, ValueError, "noise_scale: expected a finite number >= 0.0, got nan"),
        ({"prior_scale": 0.0}, ValueError, "prior_scale: expected a finite number > 0.0, got 0.0"),
        ({"grad_clip": -1}, ValueError, "grad_clip: expected a finite number > 0.0, got -1"),
        ({"clamp": 1.0}, TypeError, "clamp: expected None or (low, high), got float 1.0"),
        ({"clamp": (1, -1)}, ValueError, "clamp: expected low <= high, got (1, -1)"),
        ({"clamp": (math.nan, 1)}, ValueError, "clamp[0]: expected a finite number, got nan"),
        ({"seed": -1}, ValueError, f"seed: expected an integer >= 0 and <= {2**64 - 1}, got -1"),
        ({"seed": 2**64}, ValueError, f"seed: expected an integer >= 0 and <= {2**64 - 1}, got {2**64}"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer, got float 1.5"),
        ({"seed": torch.tensor(1.5)}, TypeError, "seed: expected int64, got float32"),
        ({"seed": torch.tensor([1])}, ValueError, "seed: expected 0 dimensions, got shape [1]"),
        ({"step": 2**28}, ValueError, f"step: expected an integer >= 0 and <= {2**28 - 1}, got {2**28}"),
        ({"chain_id": torch.arange(3)}, ValueError, "chain_id: expected one for each chain, [2], got [3]"),
        ({"chain_id": torch.zeros(2)}, TypeError, "chain_id: expected int64, got float32"),
        ({"step_size": 10**400}, ValueError, "step_size: expected a number finite in float32, got an integer of 1329"),
        ({"step_size": 1e39}, ValueError, "step_size: expected a number finite in float32, got 1e+39"),
        ({"noise_scale": 1e39}, ValueError, "noise_scale: expected a number finite in float32, got 1e+39"),
        ({"clamp": (0, 10**400)}, ValueError, "clamp[1]: expected a number finite in float64, got an integer of 1329"),
        ({"prior_scale": 1e-200}, ValueError, "prior_scale: expected 1/σ² and step_size/σ² finite in float32, got"),
        ({"prior_scale": 1e-30}, ValueError, "prior_scale: expected 1/σ² and step_size/σ² finite in float32"),
        ({"prior_scale": 1e-15, "step_size": 1e10}, ValueError, "prior_scale: expected 1/σ² and step_size/σ² finite"),
        ({"lookahead": 0.1}, TypeError, "lookahead: expected (beta, out), got float 0.1"),
        ({"lookahead": (0.1, torch.zeros(2, 4))}, ValueError, "lookahead[1]: expected the shape of x, [2, 3], got"),
        ({"stats": torch.zeros(2, 2)}, ValueError, "stats: expected shape [2, 3], got [2, 2]"),
        ({"stats": torch.zeros(2, 3).half()}, TypeError, "stats: expected float32 or float64, got float16"),
        ({"stats": torch.zeros(2, 3, device="meta")}, ValueError, "stats: expected the device of x, cpu, got meta"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)  # fmt: skip
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.ones(2, 3)
    given = {"x": x, "grad": torch.ones(2, 3), "step_size": 0.1, "seed": 0, **change}
    with pytest.raises(error, match=re.escape(message)):
        F.langevin_step_(given.pop("x"), given.pop("grad"), **given)
    assert torch.equal(x, torch.ones(2, 3))


def test_numbers_seen_before_are_told_apart() -> None:
    """What was checked once is kept: a later call with what merely equals it is a call of its own."""
    x, grad = draw(2, 3)
    low = torch.full_like(x, -2.0)
    for clamp in ((0.0, 1.0), (-0.0, 1.0), [0, 1]):
        got = F.langevin_step_(low.clone(), grad * 0, step_size=1.0, noise_scale=0.0, seed=0, clamp=clamp)
        assert torch.equal(got, torch.zeros(2, 3))
        assert not got.signbit().any()
    with pytest.raises(TypeError, match=r"^clamp\[1\]: expected a number, got bool True"):
        F.langevin_step_(x, grad, step_size=1.0, noise_scale=0.0, seed=0, clamp=(0.0, True))
    with pytest.raises(TypeError, match=r"^clamp: expected None or \(low, high\), got tuple \(0.0, 1.0, 1.0\)"):
        F.langevin_step_(x, grad, step_size=1.0, noise_scale=0.0, seed=0, clamp=(0.0, 1.0, 1.0))
    with pytest.raises(TypeError, match=r"^step_size: expected a number, got bool True"):
        F.langevin_step_(x, grad, step_size=True, noise_scale=0.0, seed=0, clamp=(0.0, 1.0))


def test_lookahead_needs_a_tensor_of_its_own() -> None:
    x, grad = draw(2, 3)
    with pytest.raises(ValueError, match=r"^lookahead\[1\]: expected memory of its own"):
        F.langevin_step_(x, grad, step_size=0.1, seed=0, lookahead=(0.1, x[:]))
    with pytest.raises(TypeError, match=r"^dtype: expected .* got torch.int64"):
        F.langevin_noise((2, 3), seed=0, dtype=torch.int64)


def test_memory_is_not_shared() -> None:
    buffer = torch.arange(200.0)
    x = buffer[:40].view(4, 10)
    options: dict[str, Any] = {"step_size": 0.1, "seed": 0}
    other = torch.ones(4, 10)
    cases: list[tuple[str, str, Tensor, dict[str, Any]]] = [
        ("x", "grad", buffer[10:50].view(4, 10), {}),
        ("x", "grad", torch.zeros(0), {}),
        ("lookahead[1]", "x", other, {"lookahead": (0.1, buffer[1:41].view(4, 10))}),
        ("lookahead[1]", "grad", other, {"lookahead": (0.1, other)}),
        ("stats", "x", other, {"stats": buffer[39:51].view(4, 3)}),
        ("stats", "grad", other, {"stats": other.flatten()[:12].view(4, 3)}),
    ]
    square = torch.ones(4, 4)
    for one, two, grad, given in cases:
        before = buffer.clone()
        state, slope = (square, square.t()) if not grad.numel() else (x, grad)
        with pytest.raises(ValueError, match=re.escape(f"{one}: expected memory of its own, got some of {two}'s")):
            F.langevin_step_(state, slope, **options, **given)
        assert torch.equal(buffer, before)
    expected = F.langevin_step_(x.clone(), x.clone(), **options)
    assert torch.equal(F.langevin_step_(x, x[:], **options), expected)
    columns = torch.ones(4, 2, 10)  # interleaved, but apart
    F.langevin_step_(columns[:, 0], columns[:, 1], **options)
    assert (columns[:, 1] == 1).all()


def test_what_is_written_has_its_own_signs() -> None:
    """Torch's dispatcher would write to a copy, or fail in words of its own; what is only read may be such a view."""
    x, turned = torch.ones(4, 3), torch.ones(4, 3, dtype=torch.complex64).conj().imag
    options: dict[str, Any] = {"step_size": 0.1, "seed": 1}
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("x", lambda: F.langevin_step_(turned, x, **options)),
        ("stats", lambda: F.langevin_step_(x, x, stats=turned, **options)),
        ("lookahead[1]", lambda: F.langevin_step_(x, x, lookahead=(0.1, turned), **options)),
        ("x", lambda: F.langevin_accept_(turned, x, x[:, 0], x, x, x[:, 0], **options)),
        ("grad", lambda: F.langevin_accept_(x, turned, x[:, 0], x, x, x[:, 0], **options)),
        ("energy", lambda: F.langevin_accept_(x, x, turned[:, 0], x, x, x[:, 0], **options)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=re.escape(f"{name}: expected a tensor to write to, got a view")):
            call()
    assert (x == 1).all()
    read = F.langevin_step_(x.clone(), turned, **options)
    assert torch.equal(read, F.langevin_step_(x.clone(), turned.resolve_neg(), **options))


def test_a_prior_too_wide_to_matter_is_none() -> None:
    x, grad = draw(2, 3)
    wide = F.langevin_step_(x.clone(), grad, step_size=0.1, seed=0, prior_scale=1e300)
    assert torch.equal(wide, F.langevin_step_(x.clone(), grad, step_size=0.1, seed=0))


def test_bad_shapes_of_noise() -> None:
    with pytest.raises(ValueError, match=r"like\[0\]: expected an integer >= 0, got -1"):
        F.langevin_noise((-1, 2), seed=0)
    with pytest.raises(TypeError, match="like: expected a tensor or a shape, got int 3"):
        F.langevin_noise(3, seed=0)  # type: ignore[arg-type]


def test_one_graph_for_any_number_of_chains() -> None:
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def both(x: Tensor, grad: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
        moved = F.langevin_step_(x, grad, step_size=0.1, prior_scale=2.0, clamp=(-1, 1), seed=seed, step=step)
        return moved * 2, F.langevin_noise(grad, seed=seed, step=step)

    for n, step in ((5, 2), (8, 3), (13, 4), (21, 500)):
        x, grad = draw(n, 6)
        eager = x.clone()
        moved, noise = both(x, grad, 2**62 + n, step)
        F.langevin_step_(eager, grad, step_size=0.1, prior_scale=2.0, clamp=(-1, 1), seed=2**62 + n, step=step)
        assert torch.equal(x, eager)
        assert torch.equal(moved, 2 * x)
        assert torch.equal(noise, F.langevin_noise(grad, seed=2**62 + n, step=step))
    assert counter.frame_count == 1


def test_vmap_is_refused() -> None:
    with pytest.raises(RuntimeError, match="langevin_step_"):
        torch.vmap(lambda x: F.langevin_step_(x, x.clone(), step_size=0.1, seed=0))(torch.zeros(2, 3, 4))


def test_the_short_way_is_seen_by_autograd_and_by_who_watches() -> None:
    """The update goes past torch's dispatcher: but its writes are counted, and a mode or a lazy minus sees the op."""
    x, grad = draw(3, 5)
    weight, out = torch.ones(5, 1, requires_grad=True), torch.ones(3, 5)
    for written in (x, out):
        loss = (written @ weight).sum()
        F.langevin_step_(x, grad, step_size=0.1, seed=0, lookahead=(0.1, out))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    before = x._version
    with torch.inference_mode():
        F.langevin_step_(x, grad, step_size=0.1, seed=0)
        F.langevin_step_(x + 0, grad, step_size=0.1, seed=0)  # which has no version
    assert x._version == before + 1
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    plain = F.langevin_step_(x.clone(), -grad, step_size=0.1, seed=0)
    with Watching():
        assert torch.equal(F.langevin_step_(x.clone(), -grad, step_size=0.1, seed=0), plain)
    assert torch.ops.fastgen.langevin_step_.default in seen
    assert torch.equal(F.langevin_step_(x.clone(), torch._neg_view(grad), step_size=0.1, seed=0), plain)


def test_numbers_of_another_type_are_not_taken_for_known_ones() -> None:
    x, grad = draw(3, 5)
    known = F.langevin_step_(x.clone(), grad, step_size=1.0, noise_scale=1.0, prior_scale=1.0, seed=0)
    assert torch.equal(F.langevin_step_(x.clone(), grad, step_size=1, noise_scale=1, prior_scale=1, seed=0), known)
    for name in ("step_size", "noise_scale", "prior_scale"):
        with pytest.raises(TypeError, match=f"^{name}: expected a number, got bool True"):
            F.langevin_step_(x, grad, **{"step_size": 1.0, "noise_scale": 1.0, "seed": 0, name: True})
    F.langevin_step_(x.double(), grad.double(), step_size=1e39, seed=0)
    with pytest.raises(ValueError, match="step_size: expected a number finite in float32"):
        F.langevin_step_(x, grad, step_size=1e39, seed=0)


def test_autocast_changes_nothing() -> None:
    x, grad = draw(3, 50)
    expected = F.langevin_step_(x.clone(), grad, step_size=0.1, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.langevin_step_(x, grad, step_size=0.1, seed=0), expected)
