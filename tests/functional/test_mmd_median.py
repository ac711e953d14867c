"""The median squared distance is the very element that sorting the whole matrix gives, and moves with its pair."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from benchmarks import memory
from fastgen import functional as F
from fastgen.ops import backend
from fastgen.ops import mmd_median as ops
from fastgen.reference import mmd_median as reference

RUNS = ["cpp", "reference"]


def matrix(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances as defined: float64, coordinate by coordinate, rounded once."""
    total = torch.zeros(len(x), len(y), dtype=torch.float64)
    for c in range(x.shape[1]):
        total = total + (x[:, c, None].double() - y[:, c].double()) ** 2
    return total.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def largest(distances: Tensor, rank: int) -> Tensor:
    return torch.topk(distances.flatten(), rank).values[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (2, 3, 1), (31, 67, 5), (100, 100, 8), (613, 521, 3)])
def test_two_samples_to_the_bit(isa: str, n: int, m: int, d: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(n, d, dtype=dtype) * 3 + 100, torch.randn(m, d, dtype=dtype) + 100
    distances = matrix(x, y)
    for rank in {1, max(1, n * m // 9), max(1, n * m // 2), n * m}:
        assert torch.equal(F.median_squared_distance(x, y, rank=rank), largest(distances, rank)), rank
    assert torch.equal(F.median_squared_distance(x, y), largest(distances, max(1, n * m // 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 4), (17, 1), (130, 7), (561, 2)])
def test_one_sample_to_the_bit(isa: str, n: int, d: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, d, dtype=dtype)
    distances = matrix(x, x)
    off = distances[~torch.eye(n, dtype=torch.bool)]
    for rank in {1, 2, (n * n - n + 1) // 2, n * n - n}:
        assert torch.equal(F.median_squared_distance(x, rank=rank), largest(off, rank)), rank
        assert torch.equal(F.median_squared_distance(x, rank=rank, diagonal=True), largest(distances, rank)), rank
    assert float(F.median_squared_distance(x, rank=n * n - n + 1, diagonal=True)) == 0
    assert torch.equal(F.median_squared_distance(x), largest(off, (n * n - n) // 2))
    assert torch.equal(F.median_squared_distance(x, diagonal=True), largest(distances, n * n // 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_gives_the_same_bits_and_pair(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK", 1000)  # several blocks
    x, y = torch.randn(90, 6, dtype=dtype), torch.randn(70, 6, dtype=dtype)
    x[30:40] = x[20:30]  # distances that several pairs have: the first counts
    for a, b, same in ((x, y, False), (x, x, True)):
        distances = matrix(a, b)
        if same:
            distances = distances.tril().clone().where(torch.zeros(90, 90, dtype=torch.bool), distances)
        for rank in (1, 2, 1777, 3151, 6300):
            fast = ops.median(a, b, rank, same)
            with backend.force("reference"):
                slow = ops.median(a, b, rank, same)
            assert torch.equal(fast[0], slow[0]), rank
            assert fast[1].tolist() == slow[1].tolist(), rank
            everywhere = (distances == fast[0]).nonzero().tolist()
            counted = [[i, j] for i, j in everywhere if not same or i < j]
            assert fast[1].tolist() == min(counted), rank


def test_threads_and_layouts_change_nothing() -> None:
    x, y = torch.randn(9, 700).T, torch.randn(1400, 9)[::2]
    want = F.median_squared_distance(x, y)
    assert torch.equal(want, largest(matrix(x, y), 700 * 700 // 2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(F.median_squared_distance(x, y), want)
        assert torch.equal(F.median_squared_distance(x.contiguous(), y.contiguous()), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_points_have_float32_distances(dtype: torch.dtype) -> None:
    x, y = torch.randn(50, 4).to(dtype), torch.randn(40, 4).to(dtype)
    got = F.median_squared_distance(x, y)
    assert got.dtype == torch.float32
    assert torch.equal(got, F.median_squared_distance(x.float(), y.float()))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("same", [False, True])
def test_gradients_are_those_of_topk(run: str, same: bool) -> None:
    torch.manual_seed(2)
    x = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    y = x if same else torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x,) if same else (x, y)
    with backend.force(run):
        got = F.median_squared_distance(*inputs)
    squared = (x[:, None] - y).square().sum(-1)
    row, column = torch.isclose(squared, got, rtol=1e-13).nonzero()[0].tolist()
    assert row != column  # else the wrong row of y would do as well
    want = largest(squared[~torch.eye(11, dtype=torch.bool)] if same else squared, 55 if same else 44)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    with backend.force(run):
        assert torch.autograd.gradcheck(F.median_squared_distance, inputs)
        assert torch.autograd.gradgradcheck(F.median_squared_distance, inputs)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("rank", [1, 20, 72])
def test_what_is_not_finite_is_nan(run: str, bad: float, rank: int) -> None:
    x, y = torch.randn(8, 3, requires_grad=True), torch.randn(9, 3)
    with torch.no_grad():
        x[4, 1] = bad  # 1e30: its square is beyond float32
    with backend.force(run):
        result = F.median_squared_distance(x, y, rank=rank)
        assert result.isnan()
        result.backward()
        assert x.grad is not None
        assert x.grad.isnan().any()
        assert F.median_squared_distance(x, rank=64, diagonal=True).isnan()


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.float64):
        x, y = torch.randn(5, 9, dtype=dtype).T, torch.randn(7, 5, dtype=dtype)
        torch.library.opcheck(ops.median, (x, y, 10, False))
        torch.library.opcheck(ops.median, (y, y, 10, True))
    with pytest.raises(NotImplementedError, match="vmap is not built"):
        torch.vmap(F.median_squared_distance)(torch.randn(3, 5, 2))


def test_compiles_whole_and_once_for_every_n() -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def median(x: Tensor, y: Tensor) -> Tensor:
        return F.median_squared_distance(x * 2, y)

    for n in (10, 23, 57):
        a = torch.randn(n, 4, requires_grad=True)
        b, y = a.detach().clone().requires_grad_(), torch.randn(n + 1, 4)
        got, want = median(a, y), F.median_squared_distance(b * 2, y)
        assert torch.equal(got, want)
        got.backward()
        want.backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert count.frame_count == 1


def test_memory_does_not_grow_with_the_pairs() -> None:
    x = torch.randn(12_000, 2)
    peak, _, _ = memory.peak_of(lambda: F.median_squared_distance(x))
    assert peak < 60e6  # the matrix would be 576 MB


ok = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((ok.int(),), {}, TypeError, "x: expected float64 or float32"),
        ((ok[:1],), {}, ValueError, "x: expected at least 2 points"),
        ((ok, ok[:0]), {}, ValueError, "y: expected at least 1 point"),
        ((ok[:, :0],), {}, ValueError, "x: expected at least 1 coordinate"),
        ((ok, ok[:, :2]), {}, ValueError, r"y: expected shape \[M, 3\]"),
        ((ok, ok.double()), {}, TypeError, "y: expected the dtype of x"),
        ((ok[None],), {}, ValueError, "x: expected 2 dimensions"),
        ((ok,), {"rank": 13}, ValueError, "rank: expected an integer >= 1 and <= 12, got 13"),
        ((ok,), {"rank": 0}, ValueError, "rank: expected"),
        ((ok,), {"rank": 2.0}, TypeError, "rank: expected an integer"),
        ((ok, ok), {"diagonal": True}, ValueError, "diagonal: expected False where y is given"),
        ((ok,), {"diagonal": 1}, TypeError, "diagonal: expected True or False"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        F.median_squared_distance(*arguments, **options)


@pytest.mark.gpu
def test_on_the_gpu_without_synchronisation() -> None:
    x, y = torch.randn(700, 5), torch.randn(300, 5)
    a, b = x.cuda(), y.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, own = F.median_squared_distance(a, b), F.median_squared_distance(a, diagonal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), F.median_squared_distance(x, y))
    assert torch.equal(own.cpu(), F.median_squared_distance(x, diagonal=True))
