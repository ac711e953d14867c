"""The C++ kernel on every instruction set: Philox's known answers, and the reference's bits."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen.ops import backend
from fastgen.ops import langevin as ops
from fastgen.reference import langevin as reference

INF = float("inf")
ISAS = ("baseline", "avx2", "avx512")
RANDOM123 = [
    ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.fixture
def extension(isa: str) -> ModuleType:
    module = backend.extension()
    assert module is not None
    return module


def hexadecimal(words: Any) -> str:
    return " ".join(f"{int(w) & 0xFFFFFFFF:08x}" for w in words)


def cpp_words(extension: ModuleType, counters: np.ndarray, seed: int) -> np.ndarray:
    counters = np.ascontiguousarray(counters, dtype=np.uint32)
    words = np.empty_like(counters)
    extension.philox(counters.ctypes.data, len(counters), seed, words.ctypes.data)
    return words


@pytest.mark.parametrize(("counter", "seed", "answer"), RANDOM123)
def test_philox_gives_the_published_vectors(
    extension: ModuleType, oracle: ModuleType, counter: tuple[int, ...], seed: int, answer: str
) -> None:
    assert hexadecimal(cpp_words(extension, np.array([counter]), seed)[0]) == answer
    assert hexadecimal(oracle.philox(counter, seed)) == answer
    assert hexadecimal(torch.cat(reference.philox(*torch.tensor(counter)[:, None], seed))) == answer


@pytest.mark.parametrize("count", [1, 15, 16, 17, 103])
def test_words_in_every_lane(extension: ModuleType, oracle: ModuleType, count: int) -> None:
    rng = np.random.default_rng(count)
    counters, seed = rng.integers(0, 2**32, (count, 4)), int(rng.integers(2**63)) * 2 + 1
    expected = np.array([oracle.philox(tuple(map(int, counter)), seed) for counter in counters])
    assert (cpp_words(extension, counters, seed) == expected).all()


@pytest.mark.parametrize("key", reference.KNOWN_ANSWERS)
def test_known_answers(extension: ModuleType, key: tuple[int, int, int]) -> None:
    seed, step, chain = key
    words, bits = reference.KNOWN_ANSWERS[key]
    assert hexadecimal(reference.words(8, torch.tensor([chain]), seed, step).flatten()) == words
    for noise in (
        cpp_noise((1, 8), torch.tensor([chain]), seed, step),
        reference.normals(8, torch.tensor([chain]), seed, step),
    ):
        assert hexadecimal(noise.view(torch.int32).flatten()) == bits


def test_the_stream_is_frozen(extension: ModuleType) -> None:
    bits = cpp_noise((1, 2**16), None, 0, 0).view(torch.int32).long()
    assert int(bits.sum()) % 2**32 == reference.KNOWN_CHECKSUM


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def cpp_noise(
    shape: tuple[int, ...], chain_id: Tensor | None, seed: int, step: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    out = torch.full(shape, float("nan"), dtype=dtype)
    with backend.force("cpp"):
        torch.ops.fastgen.langevin_noise_(out, chain_id, None, None, signed(seed), step)
    return out


# Around the widths of batches and blocks (64 and 4096 elements), chains shorter than a group or a batch.
SHORT = [(1, 1), (5, 3), (37, 4), (301, 7), (3, 63), (9, 64), (41, 100), (7, 784), (2, 1023)]


@pytest.mark.parametrize("shape", [*SHORT, (2, 1024), (3, 4097), (1, 12289), (0, 5), (4, 0)])
def test_normals_are_the_references_bits(extension: ModuleType, shape: tuple[int, int]) -> None:
    chain_id = torch.randint(2**62, (shape[0],))
    seed, step = 2**63 + 12345, 2**28 - 2
    expected = reference.normals(shape[1], chain_id, seed, step)
    assert torch.equal(cpp_noise(shape, chain_id, seed, step), expected)
    counted = reference.normals(shape[1], torch.arange(shape[0]), seed, step)
    assert torch.equal(cpp_noise(shape, None, seed, step), counted)


def test_a_million_normals(extension: ModuleType) -> None:
    assert torch.equal(cpp_noise((2, 2**19), None, 7, 1), reference.normals(2**19, torch.arange(2), 7, 1))


@pytest.mark.parametrize("shape", [(1, 1), (37, 4), (301, 7), (2, 1023), (3, 4097), (0, 5), (4, 0)])
def test_raw_words_are_the_references(extension: ModuleType, shape: tuple[int, int]) -> None:
    out, chain_id = torch.full(shape, -1, dtype=torch.int32), torch.randint(2**62, (shape[0],))
    for purpose in (0, 3):
        with backend.force("cpp"):
            torch.ops.fastgen.langevin_noise_(out, chain_id, None, None, 77, 5, purpose)
        expected = reference.words(shape[1], chain_id, 77, 5, purpose).flatten(1)[:, : shape[1]]
        assert torch.equal(out.long() % 2**32, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(41, 7), (3, 1023), (2, 9001)])
def test_statistics_are_the_same_on_every_instruction_set(
    extension: ModuleType, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """To the bit: the sums go in a fixed number of lanes. The baseline is the measure, the reference the meaning."""
    x, grad, wide = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), extension.isa()
    options = {"low": -0.5, "high": 1.0, "noise_first": True, "precision": 0.3}
    found = []
    for isa, kernel in ((wide, "cpp"), ("baseline", "cpp"), (wide, "reference")):
        extension.set_isa(isa)
        found.append(torch.zeros(shape[0], 3, dtype=torch.float64))
        call(kernel, x.clone(), grad, None, options, found[-1])
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-14, atol=0)
    assert found[0][:, 1].sum() > 0.1 * x.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_noise_is_widened_or_rounded_to_nearest(extension: ModuleType, dtype: torch.dtype) -> None:
    assert torch.equal(
        cpp_noise((3, 5001), None, 7, 1, dtype), reference.normals(5001, torch.arange(3), 7, 1).to(dtype)
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"precision": 4.0},
    {"noise_scale": 0.0, "precision": 1 / 0.3**2},
    {"low": -0.5, "high": 0.25, "precision": 0.7},
    {"low": -0.5, "noise_first": True},
    {"grad_clip": 0.3, "high": 0.7, "noise_first": True},
    {"lookahead": 0.37, "precision": 0.1},
    {"step_size": "chain", "noise_scale": "chain", "lookahead": 0.01, "grad_clip": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_updates_are_the_references_bits(extension: ModuleType, dtype: torch.dtype, options: dict[str, Any]) -> None:
    for shape in ((41, 7), (3, 8, 9), (2, 4099)):
        x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        x.view(-1)[3], grad.view(-1)[-2], x.view(-1)[5], grad.view(-1)[1] = float("nan"), float("nan"), INF, -INF
        results = []
        for kernel in ("cpp", "reference"):
            state, ahead = x.clone(), torch.zeros_like(x)
            call(kernel, state, grad, ahead if "lookahead" in options else None, options)
            results.append((state, ahead))
        for got, expected in zip(*results, strict=True):
            assert same_but_nan(got, expected)
        assert results[0][0].isnan().sum() >= 2


def same_but_nan(a: Tensor, b: Tensor) -> bool:
    """Equal bits where not NaN; which NaN is left open."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.view(integers)[~a.isnan()], b.view(integers)[~b.isnan()])


def call(
    kernel: str, x: Tensor, grad: Tensor, ahead: Tensor | None, options: dict[str, Any], stats: Tensor | None = None
) -> None:
    chosen = {
        "step_size": 0.013, "noise_scale": 0.11, "precision": 0.0, "grad_clip": INF, "low": -INF, "high": INF,
        "lookahead": 0.0, "noise_first": False, **options,
    }  # fmt: skip
    compute = ops.compute_dtype(x.dtype)
    per_chain: list[Tensor | None] = [None, None]
    for i, name in enumerate(("step_size", "noise_scale")):
        if chosen[name] == "chain":
            chosen[name], per_chain[i] = 0.0, torch.linspace(0.01, 0.4, len(x), dtype=compute) * (i + 1)
    with backend.force(kernel):
        torch.ops.fastgen.langevin_step_(x, grad, None, *per_chain, None, None, ahead, stats, *chosen.values(), 99, 5)


def test_every_half_is_read_and_written_exactly(extension: ModuleType) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[None]
        state = every.clone()
        call("cpp", state, torch.zeros_like(state), None, {"noise_scale": 0.0})
        assert same_but_nan(state, (every.float() - 0.0).to(dtype))
        # A sum that must be rounded: half-way cases, overflow and subnormals among them.
        state, grad = every.clone(), every.flip(1) * 0.5
        expected = (every.float() - torch.tensor(0.75) * grad.float()).to(dtype)
        call("cpp", state, grad, None, {"noise_scale": 0.0, "step_size": 0.75})
        assert same_but_nan(state, expected)


def test_threads_do_not_matter(extension: ModuleType) -> None:
    x, grad = torch.randn(90, 999), torch.randn(90, 999)
    before, states = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            state = x.clone()
            call("cpp", state, grad, None, {"precision": 1.0})
            states.append(state)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
