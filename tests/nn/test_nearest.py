"""The vector quantiser against a naive float64 one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen import nn


def naive_indices(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    return ((x[:, None] - codebook[None]) ** 2).sum(2).argmin(1)


class Naive:
    """Row by row, in float64, as the paper's appendix has it."""

    def __init__(self, codebook: Tensor, decay: float, eps: float) -> None:
        self.codebook, self.decay, self.eps = codebook.double().numpy().copy(), decay, eps
        self.count, self.sum = np.ones(len(codebook)), self.codebook.copy()

    def step(self, x: np.ndarray) -> np.ndarray:
        chosen = naive_indices(x, self.codebook)
        for k in range(len(self.codebook)):
            mine = x[chosen == k]
            self.count[k] = self.decay * self.count[k] + (1 - self.decay) * len(mine)
            self.sum[k] = self.decay * self.sum[k] + (1 - self.decay) * mine.sum(0)
        total, size = self.count.sum(), len(self.codebook)
        for k in range(size):
            self.codebook[k] = self.sum[k] / ((self.count[k] + self.eps) / (total + size * self.eps) * total)
        return chosen


@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (37, 3, 7), (211, 16, 64)])
def test_averaging_codebook(n: int, d: int, k: int) -> None:
    layer = nn.VectorQuantizer(d, k, decay=0.7, eps=1e-3, commitment_weight=0.25)
    naive = Naive(layer.codebook, 0.7, 1e-3)
    for _ in range(4):
        x = torch.randn(n, d, requires_grad=True)
        before = naive.codebook.copy()
        out = layer(x)
        wide = x.detach().double().numpy()
        chosen = naive.step(wide)
        assert out.indices.tolist() == chosen.tolist()
        np.testing.assert_allclose(out.quantized.detach().numpy(), before[chosen], rtol=1e-5, atol=1e-6)
        assert float(out.loss.detach()) == pytest.approx(0.25 * ((wide - before[chosen]) ** 2).mean(), rel=1e-5)
        weight = torch.randn(n, d)
        ((out.quantized * weight).sum() + out.loss).backward()
        expected = weight.double().numpy() + 0.25 * 2 * (wide - before[chosen]) / wide.size
        assert x.grad is not None
        np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.codebook.numpy(), naive.codebook, rtol=1e-4, atol=1e-5)


def test_compiled_gradient_is_that_of_the_entries_before_they_moved() -> None:
    """Inductor would take them from the codebook again in the backward."""
    torch._dynamo.reset()
    layer = nn.VectorQuantizer(3, 7, decay=0.5)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (12, 31):
            twin, x = copy.deepcopy(layer), torch.randn(n, 3, requires_grad=True)
            before = layer.codebook.clone()
            out, plain = compiled(x), twin(x)
            assert torch.equal(out.indices, plain.indices)
            torch.testing.assert_close(layer.codebook, twin.codebook)
            (got,) = torch.autograd.grad(out.loss, x)
            torch.testing.assert_close(got, 2 * (x.detach() - before[out.indices]) / x.numel())


def test_learnable_codebook() -> None:
    layer = nn.VectorQuantizer(5, 9, learnable_codebook=True, commitment_weight=0.5)
    assert [name for name, _ in layer.named_parameters()] == ["codebook"]
    x = torch.randn(4, 6, 5, requires_grad=True)
    out = layer(x)
    assert out.indices.shape == (4, 6)
    out.loss.backward()
    flat, entries = x.detach().double().flatten(0, 1).numpy(), layer.codebook.detach().double().numpy()
    chosen = naive_indices(flat, entries)
    assert out.indices.flatten().tolist() == chosen.tolist()
    expected = np.zeros_like(entries)
    for row, k in zip(flat, chosen, strict=True):
        expected[k] += 2 * (entries[k] - row) / flat.size
    assert layer.codebook.grad is not None
    np.testing.assert_allclose(layer.codebook.grad.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert x.grad is not None
    np.testing.assert_allclose(
        x.grad.flatten(0, 1).numpy(), 0.5 * 2 * (flat - entries[chosen]) / flat.size, rtol=1e-4, atol=1e-6
    )


def test_eval_mode_and_freeze_change_nothing() -> None:
    layer = nn.VectorQuantizer(3, 8)
    x = torch.randn(20, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(x, freeze_codebook=True)
    assert layer.eval()(x).loss == 0
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    layer.train()(x)
    assert not torch.equal(layer.codebook, before["codebook"])


def test_maps_and_layouts() -> None:
    layer = nn.VectorQuantizer(4, 10, accept_image_fmap=True).eval()
    x = torch.randn(2, 4, 3, 5)
    out = layer(x)
    assert out.quantized.shape == x.shape
    assert out.indices.shape == (2, 3, 5)
    flat = x.movedim(1, -1).reshape(-1, 4).double().numpy()
    assert out.indices.flatten().tolist() == naive_indices(flat, layer.codebook.double().numpy()).tolist()
    torch.testing.assert_close(layer.get_output_from_indices(out.indices), out.quantized)
    other = layer(x.to(memory_format=torch.channels_last))
    assert torch.equal(other.indices, out.indices)
    assert layer(x[:0]).indices.shape == (0, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = nn.VectorQuantizer(6, 12)
    x = torch.randn(30, 6).to(dtype)
    expected = naive_indices(x.double().numpy(), layer.codebook.double().numpy())
    out = layer(x)
    assert out.quantized.dtype == dtype
    assert out.loss.dtype == torch.float32
    assert out.indices.tolist() == expected.tolist()
    assert layer.codebook.dtype == torch.float32


def test_a_tie_goes_to_the_lowest() -> None:
    layer = nn.VectorQuantizer(2, 3).eval()
    layer.codebook.copy_(torch.tensor([[5.0, 5], [1, 0], [-1, 0]]))
    assert layer(torch.tensor([[0.0, 3.0]])).indices.tolist() == [1]


def test_dead_entries_are_replaced_by_vectors_of_the_batch() -> None:
    layer = nn.VectorQuantizer(2, 4, decay=0.5, threshold_ema_dead_code=0.6)
    layer.codebook.copy_(torch.tensor([[0.0, 0], [100, 0], [0, 100], [100, 100]]))
    layer.embed_avg.copy_(layer.codebook)
    x = torch.randn(50, 2)
    layer(x)  # counts of the far ones fall to 0.5
    assert (layer.codebook[1:, None] == x).all(2).any(1).all()
    torch.testing.assert_close(layer.cluster_size, torch.tensor([25.5, 0.6, 0.6, 0.6]))
    torch.testing.assert_close(layer.embed_avg[1:], layer.codebook[1:] * 0.6)
    assert not (layer.codebook[0] == x).all(1).any()
    again = nn.VectorQuantizer(2, 4, decay=0.5, threshold_ema_dead_code=0.6)
    again.load_state_dict(layer.state_dict())
    y = torch.randn(9, 2)
    for one, two in zip(layer(y), again(y), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(layer.codebook, again.codebook)


def test_straight_through_twice() -> None:
    layer = nn.VectorQuantizer(3, 5).double().eval()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((layer(x).quantized ** 2).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 2 * layer(x).quantized)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))


APART = """
import copy, torch, torch.distributed as dist
from fastgen import nn
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
pair = dist.new_group([1, 2])
try:
    nn.VectorQuantizer(3, 6, group=pair)(torch.randn(4, 3)) if rank == 0 else None
    assert rank
except RuntimeError as error:
    assert "group: expected a group that this process is in" in str(error), error
start, x = torch.load("problem.pt")
for name, group in (("all", None), ("pair", pair)):
    layer = copy.deepcopy(nn.VectorQuantizer(3, 6, threshold_ema_dead_code=1.5, group=group))
    assert layer.group is group
    layer.load_state_dict(start)
    for batch in x if group is None or rank else ():
        layer(batch[rank])
    torch.save(layer.state_dict(), f"{name}{rank}.pt")
dist.destroy_process_group()
"""


def test_processes_average_together(tmp_path: Path, run_apart: Callable[..., list[Any]]) -> None:
    """As one process with all batches, of which some are empty; dead entries become the same vectors, whose batch
    ever it is. A group of two of three leaves the third out."""
    start = nn.VectorQuantizer(3, 6).state_dict()
    x = [[torch.randn(n, 3) for n in sizes] for sizes in ((20, 30, 10), (0, 7, 0), (9, 0, 5), (0, 0, 0), (4, 0, 1))]
    torch.save((start, x), tmp_path / "problem.pt")
    for done in run_apart(APART, 3, tmp_path):
        assert done.returncode == 0, done.stderr
    for name, ranks in (("all", (0, 1, 2)), ("pair", (1, 2))):
        alone = nn.VectorQuantizer(3, 6, threshold_ema_dead_code=1.5)
        alone.load_state_dict(start)
        revived = 0
        for batches in x:
            alone(torch.cat([batches[rank] for rank in ranks]))
            revived += int((alone.cluster_size == 1.5).sum())
        assert revived > 5
        states = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in ranks]
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(states[0][key], value, rtol=1e-5, atol=1e-6)
            assert all(torch.equal(state[key], states[0][key]) for state in states), key


REFUSED = """
import torch, torch.distributed as dist
from fastgen import nn
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
layer = nn.VectorQuantizer(3, 6).to(dtype)
layer(torch.randn(4, 3))
before = layer.codebook.clone()
for bad, says in ((torch.full((4, 3), torch.nan), "NaN or infinity in row 0"), (torch.zeros(4, 5), "vectors of 3")):
    try:
        layer(bad if rank == 1 else torch.randn(4 * rank, 3))
        raise SystemExit(1)
    except ValueError as error:
        assert rank == 1 and says in str(error), error
    except RuntimeError as error:
        assert rank != 1 and "x: another process of the group was refused" in str(error), error
    assert torch.equal(layer.codebook, before)
    if rank != 1:
        layer(torch.zeros(4, 3), freeze_codebook=True)  # asks nobody
layer(torch.randn(4, 3))  # they go on together
assert not torch.equal(layer.codebook, before)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_process_s_bad_batch_is_an_error_in_all(
    dtype: torch.dtype, tmp_path: Path, run_apart: Callable[..., list[Any]]
) -> None:
    """Also in one whose batch is empty, and within seconds."""
    for done in run_apart(REFUSED, 3, tmp_path, seconds=60, dtype=dtype):
        assert done.returncode == 0, done.stderr


def test_averaging_together_needs_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"sync_codebook: expected torch\.distributed to be initialised"):
        nn.VectorQuantizer(3, 4, sync_codebook=True)(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.VectorQuantizer(0, 4), "dim: expected"),
        (lambda: nn.VectorQuantizer(3, 4, decay=1.5), "decay: expected"),
        (lambda: nn.VectorQuantizer(3, 4)(torch.randn(2, 5)), r"x: expected vectors of 3, got shape \[2, 5\]"),
        (lambda: nn.VectorQuantizer(3, 4, accept_image_fmap=True)(torch.randn(2, 3)), r"x: expected \[B, 3, H, W\]"),
        (lambda: nn.VectorQuantizer(3, 4)(torch.full((2, 3), torch.nan)), "x: expected finite"),
        (lambda: nn.VectorQuantizer(3, 4).get_output_from_indices(torch.tensor([1, 4])), "indices: .* 0 to 3, got 4"),
        (
            lambda: nn.VectorQuantizer(3, 4, accept_image_fmap=True).get_output_from_indices(torch.tensor([1])),
            r"indices: expected \[B, H, W\], got shape \[1\]",
        ),
        (lambda: nn.VectorQuantizer(3, 4)(torch.full((2, 3), 1e30)), "^x: expected squared distances .* float32"),
        (lambda: nn.VectorQuantizer(3, 4, learnable_codebook=True, threshold_ema_dead_code=2), "threshold_ema"),
    ],
)
def test_bad_input_is_named(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("learnable", [False, True])
def test_an_empty_batch_changes_nothing(learnable: bool) -> None:
    quantizer = nn.VectorQuantizer(3, 4, decay=0.0, learnable_codebook=learnable)
    before = quantizer.codebook.detach().clone()
    x = torch.empty(0, 3, requires_grad=True)
    for _ in range(2):
        loss = quantizer(x).loss
        loss.backward()
        assert float(loss.detach()) == 0
    assert torch.equal(quantizer.codebook, before)


def test_what_the_quantizer_refuses_when_made() -> None:
    with pytest.raises(ValueError, match="seed"):
        nn.VectorQuantizer(3, 4, seed=2**62)
    with pytest.raises(ValueError, match="eps"):
        nn.VectorQuantizer(3, 4, eps=1e-50)
    for name in ("learnable_codebook", "accept_image_fmap", "sync_codebook"):
        with pytest.raises(TypeError, match=name):
            nn.VectorQuantizer(3, 4, **{name: 1})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_as_the_callers(bad: float) -> None:
    with pytest.raises(ValueError, match=r"^x: expected finite values, .* in row 1"):
        nn.VectorQuantizer(3, 4)(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, bad]]))
    layer = nn.VectorQuantizer(3, 4)
    layer.codebook[2] = bad
    with pytest.raises(ValueError, match=r"^codebook: expected finite values, .* in row 2$"):
        layer(torch.randn(5, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_entry_itself_comes_out(dtype: torch.dtype, training: bool) -> None:
    """However far x is from it: no rounding to the precision of x."""
    layer = nn.VectorQuantizer(3, 5).train(training)
    before = layer.codebook.clone()
    out = layer(1e7 * torch.randn(40, 3).to(dtype))
    assert torch.equal(out.quantized, before[out.indices].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_averages_of_a_half_module_stay_in_float32(dtype: torch.dtype) -> None:
    """In float16 the counts of a large batch overflow, in bfloat16 the last steps of a slow average are lost."""
    layer = nn.VectorQuantizer(2, 4, decay=0.999, eps=1e-3)
    half = torch.nn.Sequential(nn.VectorQuantizer(2, 4, decay=0.999, eps=1e-3)).to(dtype)
    layer.load_state_dict(half[0].state_dict())
    for n in (200_000, *[64] * 50):
        x = torch.randn(n, 2).to(dtype)
        half(x)
        layer.codebook.copy_(layer.codebook.to(dtype))
        layer(x)
    assert half[0].codebook.dtype == dtype
    torch.testing.assert_close(half[0].cluster_size, layer.cluster_size, rtol=1e-5, atol=0)
    torch.testing.assert_close(half[0].codebook, layer.codebook.to(dtype))


def test_the_codebook_s_gradient_adds_in_a_fixed_order_on_a_gpu_too() -> None:
    """Where index_add is atomic."""
    layer = nn.VectorQuantizer(3, 4, learnable_codebook=True)
    loss = layer(torch.randn(50, 3)).loss
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        loss.backward()
    ran = {event.key for event in found.key_averages()}
    assert "aten::embedding_dense_backward" in ran
    assert not any("index_add" in name for name in ran)
