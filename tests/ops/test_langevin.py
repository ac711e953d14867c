"""The ops: what the reference means, layouts, registration, compilation."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.ops import backend
from fastgen.ops import langevin as ops
from fastgen.reference import langevin as reference

INF = float("inf")
assert ops  # it registers them
STEP, NOISE = torch.ops.fastgen.langevin_step_, torch.ops.fastgen.langevin_noise_


def arguments(x: Tensor, grad: Tensor, **given: Any) -> dict[str, Any]:
    return {
        "x": x, "grad": grad, "chain_id": None, "step_sizes": None, "noise_scales": None, "seed_tensor": None,
        "step_tensor": None, "lookahead_out": None, "stats": None, "step_size": 0.02, "noise_scale": 0.2,
        "precision": 0.5, "grad_clip": 1.0, "low": -2.0, "high": INF, "lookahead": 0.0, "noise_first": False,
        "seed": 3, "step": 4,
        **given,
    }  # fmt: skip


def test_reference_words(oracle: ModuleType) -> None:
    chains, seed, step = [0, 5, 2**32 - 1, 2**32 + 9, 2**63 - 1], 2**64 - 7, 2**28 - 1
    found = reference.words(21, torch.tensor(chains), seed, step).numpy()
    assert (found == np.stack([oracle.words(21, chain, seed, step) for chain in chains])).all()
    assert (reference.words(4, torch.tensor([0]), 1, 2**28 + 3) == reference.words(4, torch.tensor([0]), 1, 3)).all()


def test_reference_normals_are_box_muller(oracle: ModuleType) -> None:
    words = torch.randint(2**32, (2, 400_000))
    edges = torch.tensor([0, 1, 2, 3, 2**31 - 1, 2**31, 2**30, 2**30 - 1, 2**29, 3 * 2**29, 2**32 - 2, 2**32 - 1])
    a = torch.cat((words[0], edges.repeat(len(edges))))
    b = torch.cat((words[1], edges.repeat_interleave(len(edges))))
    found = torch.stack(reference.pair(a, b), dim=-1).double().numpy()
    expected = oracle.pair(a.numpy().astype(np.uint32), b.numpy().astype(np.uint32))
    some = expected != 0  # u rounds to 1 for the largest words
    assert np.abs(found[some] / expected[some] - 1).max() < 3.5e-7
    assert (found[~some] == 0).all()
    assert np.abs(found).max() == pytest.approx(6.5555415, abs=1e-7)


@pytest.mark.parametrize("kernel", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 1031)])
def test_against_float64(oracle: ModuleType, kernel: str, shape: tuple[int, ...]) -> None:
    for dtype, tolerance in (
        (torch.float64, 1e-7),
        (torch.float32, 1e-6),
        (torch.bfloat16, 2**-7),
        (torch.float16, 2**-10),
    ):
        x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        chains = list(range(10, 10 + shape[0]))
        noise = oracle.normals(x[0].numel(), chains, 3, 4).reshape(shape)
        expected = oracle.step(
            x.double().numpy(), grad.double().numpy(), noise, 0.02, 0.2, 2**0.5, 1.0, -2.0, 0.8, True
        )
        with backend.force(kernel):
            STEP(**arguments(x, grad, chain_id=torch.tensor(chains), high=0.8, noise_first=True))
        assert np.abs(x.double().numpy() - expected).max() < tolerance * 3


KERNELS = ("cpp", "triton", "reference")  # on a CPU Triton's is interpreted


@pytest.mark.parametrize("kernel", KERNELS)
def test_extremes_of_the_key(oracle: ModuleType, kernel: str) -> None:
    """Chain ids of 64 bits whatever their sign, seeds of 64, steps modulo 2²⁸."""
    ids = torch.tensor([-1, -(2**63), 0, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1])
    for seed, step in ((2**64 - 1, 2**33 + 7), (2**32, -1), (2**63, 2**28)):
        expected = oracle.normals(21, [int(i) % 2**64 for i in ids], seed, step % 2**28)
        exact = reference.normals(21, ids, seed, step)
        assert np.abs(exact.double().numpy() - expected).max() < 3e-6
        for tensors, numbers in (
            ((None, None), (seed, step)),
            ((torch.tensor(signed(seed)), torch.tensor(step)), (0, 0)),
        ):
            found = torch.full((7, 21), float("nan"))
            with backend.force(kernel):
                NOISE(found, ids, *tensors, *map(signed, numbers))
            assert torch.equal(found, exact)


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("noise_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_options_at_once(oracle: ModuleType, kernel: str, noise_first: bool, dtype: torch.dtype) -> None:
    """Against float64, and to the bit against the reference."""
    compute = ops.compute_dtype(dtype)
    for shape in ((1, 1), (5, 3, 3, 7), (3, 2, 5, 120)):
        given = [torch.randn(shape).to(dtype) for _ in range(2)]
        if len(shape) == 4:
            given = [t.to(memory_format=torch.channels_last) for t in given]
        chains = shape[0]
        ids, scales = torch.arange(chains) * 2**33 - 2**34, torch.rand(chains, 2, dtype=compute) + 0.1
        runs = []
        for chosen in (kernel, "reference"):
            x, ahead, stats = given[0].clone(), torch.full_like(given[0], 9.0), torch.zeros(chains, 3)
            options = {
                "chain_id": ids, "step_sizes": scales[:, 0], "noise_scales": scales[:, 1], "lookahead_out": ahead,
                "stats": stats, "precision": 0.25, "grad_clip": 0.75, "low": -0.5, "high": 1.0, "lookahead": 0.375,
                "noise_first": noise_first, "seed": -5,
            }  # fmt: skip
            with backend.force(chosen):
                STEP(**arguments(x, given[1], **options))
            runs.append((x, ahead, stats))
        for got, exact in zip(runs[0][:2], runs[1][:2], strict=True):
            assert torch.equal(got, exact)
        torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-7, atol=0)
        before, grad = (t.double().contiguous().numpy() for t in given)
        noise = oracle.normals(before[0].size, [int(i) % 2**64 for i in ids], 2**64 - 5, 4).reshape(shape)
        h, s = (scales[:, i].double().view(-1, *[1] * (len(shape) - 1)).numpy() for i in (0, 1))
        expected = oracle.step(before, grad, noise, h, s, 2.0, 0.75, -0.5, 1.0, noise_first)
        looked = oracle.step(before, grad, noise, 0.375, 0.0, 2.0, 0.75)
        x, ahead, stats = runs[0]
        tolerance = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        assert np.abs(x.double().numpy() - expected).max() < tolerance
        assert np.abs(ahead.double().numpy() - looked).max() < 2 * tolerance
        # The counts are exact but for a value within rounding of a bound; the norm is of the gradient as given.
        norm = np.sqrt((grad.reshape(chains, -1) ** 2).sum(1))
        np.testing.assert_allclose(stats[:, 0].numpy(), norm, rtol=1e-6)
        drift = np.clip(grad, -0.75, 0.75) + before / 4
        for chain in range(chains):
            of_chain = (a[chain : chain + 1] for a in (before, drift, noise))
            wanted = oracle.statistics(*of_chain, h.flat[chain], s.flat[chain], -0.5, 1.0, noise_first)
            assert stats[chain, 1:].tolist() == wanted[0, 1:].tolist()
        assert before[0].size == 1 or 0 < stats[:, 1].min() < stats[:, 1].max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,)])
def test_nothing_to_do(kernel: str, shape: tuple[int, ...]) -> None:
    x, stats = torch.zeros(shape), torch.full((shape[0], 3), 7.0)
    with backend.force(kernel):
        STEP(**arguments(x, x.clone(), stats=stats, lookahead_out=x.clone()))
        NOISE(x, None, None, None, 3, 4)
    assert (stats == 0).all()


def layouts(shape: tuple[int, ...]) -> dict[str, Tensor]:
    n, c, h, w = shape
    return {
        "channels_last": torch.randn(shape).to(memory_format=torch.channels_last),
        "transposed": torch.randn(w, h, c, n).permute(3, 2, 1, 0),
        "strided": torch.randn(n, c, h, 2 * w)[..., ::2],
        "shifted": torch.randn(n * c * h * w + 1)[1:].view(shape),
    }


@pytest.mark.parametrize("name", ["channels_last", "transposed", "strided", "shifted"])
def test_layouts_in_place(name: str) -> None:
    x, grad, ahead = (layouts((5, 3, 6, 7))[name] for _ in range(3))
    plain, plain_ahead = x.clone(memory_format=torch.contiguous_format), torch.zeros(5, 3, 6, 7)
    STEP(**arguments(plain, grad.contiguous(), lookahead_out=plain_ahead, lookahead=0.3))
    pointer = x.data_ptr()
    STEP(**arguments(x, grad, lookahead_out=ahead, lookahead=0.3))
    assert x.data_ptr() == pointer
    assert torch.equal(x, plain)
    assert torch.equal(ahead, plain_ahead)
    NOISE(x, None, None, None, 3, 4)
    assert torch.equal(x, reference.normals(126, torch.arange(5), 3, 4).view(x.shape))


def test_strided_tensors_of_scalars() -> None:
    x, grad = torch.randn(6, 9), torch.randn(6, 9)
    scales, ids = torch.rand(6, 2), torch.randint(2**40, (6, 3))
    dense, strided = x.clone(), x.clone()
    STEP(**arguments(strided, grad, chain_id=ids[:, 1], step_sizes=scales[:, 0], noise_scales=scales[:, 1]))
    columns = [scales[:, 0].clone(), scales[:, 1].clone()]
    STEP(**arguments(dense, grad, chain_id=ids[:, 1].clone(), step_sizes=columns[0], noise_scales=columns[1]))
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4, 5)])
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    opcheck(STEP, (), arguments(x, grad))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    everything = {
        "chain_id": torch.arange(shape[0]) * 7, "step_sizes": torch.rand(shape[0], dtype=compute),
        "noise_scales": torch.rand(shape[0], dtype=compute), "seed_tensor": torch.tensor(5),
        "step_tensor": torch.tensor(6), "lookahead_out": torch.zeros_like(x), "lookahead": 0.1,
        "stats": torch.zeros(shape[0], 3),
    }  # fmt: skip
    opcheck(STEP, (), arguments(x, grad, **everything))
    opcheck(NOISE, (x, None, None, None, 3, 4))
    if len(shape) == 4:
        opcheck(STEP, (), arguments(x.transpose(1, 2), grad.transpose(1, 2)))


def test_schema_says_what_is_written() -> None:
    written = [a.name for a in STEP.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["x", "lookahead_out", "stats"]


def test_writes_are_seen_by_autograd() -> None:
    """A backward that needs the old values raises, as it does after `add_`."""
    x, out, stats = torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 3)
    weight = torch.ones(4, 1, requires_grad=True)
    loss = (out @ weight).sum()
    STEP(**arguments(x, torch.ones(3, 4), lookahead_out=out, stats=stats))
    assert all(t._version > 0 for t in (x, out, stats))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = x._version
    NOISE(x, None, None, None, 3, 4)
    assert x._version > version
    with torch.inference_mode():
        inferred = torch.ones(3, 4)
    STEP(**arguments(inferred, torch.ones(3, 4)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_direct_call_does_what_the_op_does(kernel: str) -> None:
    for shape, layout in (((5, 3, 4, 6), torch.channels_last), ((4, 7), torch.contiguous_format)):
        grad, start = torch.randn(shape), torch.randn(shape).to(memory_format=layout)
        made = []
        for run in (ops.step_, ops.direct):
            given = arguments(
                start.clone(), grad, chain_id=torch.arange(shape[0]) + 3, step_sizes=torch.full((shape[0],), 0.25),
                seed_tensor=torch.tensor(8), lookahead_out=torch.zeros(shape), lookahead=0.5,
                stats=torch.zeros(shape[0], 3),
            )  # fmt: skip
            tensors = [v for v in given.values() if isinstance(v, Tensor)]
            assert ops.runs_directly(*tensors)
            before = [t._version for t in tensors]
            with backend.force(kernel):
                run(*given.values())
            written = [after._version > version for after, version in zip(tensors, before, strict=True)]
            made.append((given["x"], given["lookahead_out"], given["stats"], written))
        assert made[0][3] == made[1][3] == [True, False, False, False, False, True, True]
        for got, want in zip(made[0][:3], made[1][:3], strict=True):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_does_not_run_directly() -> None:
    class Another(torch.Tensor):
        pass

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 3)
    assert ops.runs_directly(x, None, torch.nn.Parameter(x), x[::2], torch.tensor(3))
    others = {"a lazy minus": torch._neg_view(x), "no memory": x.to("meta"), "a subclass": x.as_subclass(Another)}
    for what, other in others.items():
        assert not ops.runs_directly(x, None, other), what
    with Watching():
        assert not ops.runs_directly(x)
    seen = []
    torch.vmap(lambda row: (seen.append(ops.runs_directly(x)), row)[1])(x)
    torch.jit.trace(lambda row: (seen.append(ops.runs_directly(x)), row + 1)[1], x, check_trace=False)
    assert seen == [False, False]
