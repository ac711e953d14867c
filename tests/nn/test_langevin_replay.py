"""ReplayBuffer: which chains, how many begun anew, what is kept, and going on after a break."""

import copy
import io
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.nn import LangevinSampler, ReplayBuffer
from fastgen.ops import backend


def test_draws_distinct_chains_evenly() -> None:
    buffer = ReplayBuffer(50, (2,), reinit_probability=0.0, seed=1)
    buffer.update(torch.arange(50), torch.arange(50.0)[:, None].repeat(1, 2))
    counts, first = torch.zeros(50), torch.zeros(50)
    for _ in range(2000):
        x, index = buffer.sample(10)
        assert len(set(index.tolist())) == 10
        assert torch.equal(x[:, 0], index.float())
        counts[index] += 1
        first[index[0]] += 1
    # Inclusion is binomial (2000, 1/5) in each slot, the first place (2000, 1/50).
    for found, p in ((counts, 0.2), (first, 0.02)):
        chi_square = float(((found - 2000 * p) ** 2 / (2000 * p * (1 - p))).sum())
        assert abs(chi_square - 50) < 5 * math.sqrt(2 * 50)
        assert (found - 2000 * p).abs().max() < 5 * math.sqrt(2000 * p * (1 - p))


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 1.0])
def test_reinitialisation_is_bernoulli(probability: float) -> None:
    buffer = ReplayBuffer(400, (3,), reinit_probability=probability, seed=3)
    marked = torch.full((400, 3), 7.0)  # outside the range of fresh chains
    fresh, per_place, pairs, seen = [], torch.zeros(200), 0, []
    for _ in range(300):
        buffer.update(torch.arange(400), marked)
        x, _ = buffer.sample(200)
        renewed = (x != 7).all(1)
        assert torch.equal(renewed, (x != 7).any(1))
        fresh.append(x[renewed])
        per_place += renewed
        pairs += int((renewed[1:] & renewed[:-1]).sum())
        seen.append(int(renewed.sum()))
    n = 300 * 200
    spread = math.sqrt(probability * (1 - probability))
    assert abs(sum(seen) - n * probability) <= 4.5 * spread * math.sqrt(n)
    assert (per_place - 300 * probability).abs().max() <= 5 * spread * math.sqrt(300)
    q = probability**2  # neighbours are independent
    assert abs(pairs - 300 * 199 * q) <= 6 * math.sqrt(300 * 199 * q) * (0 < probability < 1)
    values = torch.cat(fresh).flatten()
    assert values.numel() == 3 * sum(seen)
    if len(values):
        assert values.abs().max() < 1
        assert len(values.unique()) > 0.9 * len(values)
        assert abs(float(values.mean())) < 4.5 / math.sqrt(3 * len(values))
        assert abs(float(values.var()) - 1 / 3) < 4.5 * math.sqrt(4 / 45 / len(values))


def test_fresh_normals_and_the_first_fill() -> None:
    buffer = ReplayBuffer(1500, (8,), init="normal", reinit_probability=1.0, seed=2)
    x, index = buffer.sample(1500)
    for values in (buffer.storage, x):
        assert abs(float(values.mean())) < 4.5 / math.sqrt(12_000)
        assert abs(float(values.var()) - 1) < 4.5 * math.sqrt(2 / 12_000)
    assert abs(float((buffer.storage[index] * x).mean())) < 4.5 / math.sqrt(12_000)
    assert len(buffer.storage.unique()) > 11_000
    ranged = ReplayBuffer(100, (9,), value_range=(2.0, 5.0))
    assert 2 < float(ranged.storage.min()) < 2.1
    assert 4.9 < float(ranged.storage.max()) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_storage(dtype: torch.dtype) -> None:
    buffer = ReplayBuffer(20, (1, 4, 4), dtype=dtype, reinit_probability=0.0, value_range=(-2.0, 2.0))
    x, index = torch.rand(7, 1, 4, 4) * 4 - 2, torch.randperm(20)[:7]
    before = buffer.storage.clone()
    buffer.update(index, x)
    others = torch.ones(20, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(buffer.storage[others], before[others])
    found, order = buffer.sample(20)
    back = found[order.argsort()][index]
    assert back.dtype == torch.float32
    limit = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.uint8: 2 / 255 + 1e-6}[dtype]
    assert (back - x).abs().max() <= limit * (1 if dtype == torch.uint8 else 2)
    buffer.update(order, found)  # what was read is written back without loss
    again, places = buffer.sample(20)
    assert torch.equal(again[places.argsort()], found[order.argsort()])
    if dtype == torch.uint8:
        buffer.update(torch.tensor([0, 1]), torch.tensor([9.0, -9.0])[:, None, None, None].expand(2, 1, 4, 4))
        assert buffer.storage[:2].flatten(1).tolist() == [[255] * 16, [0] * 16]
    assert buffer.half().storage.dtype == dtype
    assert copy.deepcopy(buffer).double().storage.dtype == dtype
    assert buffer.key.dtype == torch.int64


def test_words_come_from_the_same_stream_on_every_kernel() -> None:
    found = []
    for kernel in ("cpp", "reference"):
        with backend.force(kernel):
            for init in ("uniform", "normal"):
                buffer = ReplayBuffer(70, (5,), init=init, reinit_probability=0.3, seed=2**64 - 1)
                buffer.sample(9)
                found.append((buffer.storage, *buffer.sample(40)))
    for got, expected in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, got, expected))
    # The first uniform of slot 0, from the published words: purpose 3, the step of the first fill.
    from fastgen.reference import langevin as reference

    word = int(reference.words(1, torch.tensor([0]), 2**64 - 1, 2**28 - 1, 3)[0, 0, 0])
    assert float(found[0][0][0, 0]) == pytest.approx(((word >> 9) + 0.5) * 2**-22 - 1, abs=2e-7)


def energy(x: Tensor) -> Tensor:
    return (x**4 / 4 - x**2).flatten(1).sum(1)


def train(buffer: ReplayBuffer, iterations: range) -> Tensor:
    sampler = LangevinSampler(energy, step_size=0.05, n_steps=3)
    x = torch.zeros(0)
    for iteration in iterations:
        start, index = buffer.sample(8)
        x = sampler(start, seed=iteration, chain_id=index)
        buffer.update(index, x)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_resumed_run_goes_on_identically(dtype: torch.dtype) -> None:
    def made(seed: int) -> ReplayBuffer:
        return ReplayBuffer(30, (4, 4), dtype=dtype, reinit_probability=0.2, seed=seed, value_range=(-3.0, 3.0))

    whole = made(5)
    expected = train(whole, range(12))
    first = made(5)
    train(first, range(7))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    torch.manual_seed(999)  # nothing depends on torch's generators
    resumed = made(1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(train(resumed, range(7, 12)), expected)
    assert torch.equal(resumed.storage, whole.storage)
    assert torch.equal(resumed.key, whole.key)
    assert not torch.equal(made(6).storage, made(5).storage)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity: expected an integer >= 1, got 0"),
        ({"shape": (3, -1)}, ValueError, "shape[1]: expected an integer >= 1, got -1"),
        ({"reinit_probability": 1.5}, ValueError, "reinit_probability: expected a finite number >= 0.0 and <= 1.0"),
        ({"init": "data"}, ValueError, "init: expected one of 'uniform', 'normal', got 'data'"),
        ({"value_range": (1.0, 1.0)}, ValueError, "value_range: expected low < high, got (1.0, 1.0)"),
        (
            {"value_range": (1.0, 1 + 1e-12)},
            ValueError,
            "value_range: expected low < high in float32, got (1.0, 1.0000",
        ),
        ({"value_range": (0.0, 1e-50)}, ValueError, "value_range: expected low < high in float32, got (0.0, 1e-50)"),
        ({"value_range": (0.0, 1e-40)}, ValueError, "value_range: expected low < high in float32, got (0.0, 1e-40)"),
        ({"shape": 3}, TypeError, "shape: expected a tuple of sizes, got int 3"),
        ({"value_range": 1.0}, TypeError, "value_range: expected a tuple of (low, high), got float 1.0"),
        ({"value_range": (1.0,)}, ValueError, "value_range: expected (low, high), got (1.0,)"),
        ({"value_range": (0.0, 1e39)}, ValueError, "value_range[1]: expected a number finite in float32, got 1e+39"),
        ({"value_range": (-3e38, 3e38)}, ValueError, "value_range: high - low: expected a number finite in float32"),
        ({"dtype": torch.float16}, TypeError, "dtype: expected float32, bfloat16 or uint8, got torch.float16"),
        ({"dtype": torch.uint8, "init": "normal"}, ValueError, "dtype: expected float32 or bfloat16 for init='normal'"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_options(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ReplayBuffer(**{"capacity": 4, "shape": (3,), **given})


def test_bad_calls() -> None:
    buffer = ReplayBuffer(4, (3,))
    with pytest.raises(ValueError, match="n: expected an integer >= 0 and <= 4, got 5"):
        buffer.sample(5)
    with pytest.raises(ValueError, match=r"x: expected shape \[2, 3\], got \[2, 4\]"):
        buffer.update(torch.arange(2), torch.zeros(2, 4))
    with pytest.raises(TypeError, match="index: expected int64, got float32"):
        buffer.update(torch.zeros(2), torch.zeros(2, 3))
    before = buffer.storage.clone()
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"index: expected numbers >= 0 and <= 3, got {wrong}"):
            buffer.update(torch.tensor([0, wrong]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="x: expected finite numbers, got NaN or infinity in row 0, as float32"):
        buffer.update(torch.arange(1), torch.full((1, 3), 1e300, dtype=torch.float64))
    for bad in (math.nan, math.inf):
        x = torch.zeros(2, 3)
        x[1, 2] = bad
        with pytest.raises(ValueError, match="x: expected finite numbers, got NaN or infinity in row 1"):
            buffer.update(torch.arange(2), x)
    assert torch.equal(buffer.storage, before)


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
def test_gpu_draws_what_the_cpu_draws() -> None:
    for init in ("uniform", "normal"):
        on_cpu = ReplayBuffer(300, (3, 5), init=init, reinit_probability=0.3, seed=9)
        on_gpu = ReplayBuffer(300, (3, 5), init=init, reinit_probability=0.3, seed=9, device="cuda")
        assert torch.equal(on_gpu.storage.cpu(), on_cpu.storage)
        for _ in range(3):
            (x, index), (gx, gindex) = on_cpu.sample(64), on_gpu.sample(64)
            assert torch.equal(gindex.cpu(), index)
            assert torch.equal(gx.cpu(), x)
            on_cpu.update(index, x / 2)
            on_gpu.update(gindex, gx / 2)


def test_a_cast_keeps_the_contents() -> None:
    buffer = ReplayBuffer(4, (3,))
    before = buffer.storage.clone()
    for cast in (buffer.half(), buffer.to(torch.bfloat16), buffer.double()):
        assert torch.equal(cast.storage, before)


def test_a_state_of_another_meaning_is_refused() -> None:
    codes, plain = ReplayBuffer(4, (3,), dtype=torch.uint8), ReplayBuffer(4, (3,))
    before = plain.storage.clone()
    with pytest.raises(TypeError, match="storage: expected float32, got uint8"):
        plain.load_state_dict(codes.state_dict())
    with pytest.raises(ValueError, match=r"expected the value_range \[-1.0, 1.0\], got \[-2.0, 1.0\]"):
        plain.load_state_dict(ReplayBuffer(4, (3,), value_range=(-2.0, 1.0), seed=1).state_dict())
    assert torch.equal(plain.storage, before)
    old = ReplayBuffer(4, (3,), seed=1).state_dict()
    del old["_extra_state"]
    plain.load_state_dict(old)
    assert torch.equal(plain.storage, old["storage"])


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        buffer = ReplayBuffer(4, (3,))
    x, index = buffer.sample(2)
    buffer.update(index, x + 1)
    assert torch.equal(buffer.storage[index], x + 1)
