"""Checks name the argument, what was expected and what came."""

import enum

import numpy as np
import pytest
import torch

from fastgen import check
from fastgen.ops import backend


def test_tensor() -> None:
    x = torch.zeros(2, 3)
    assert check.tensor("x", x, ndim=(2,)) is x
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        check.tensor("x", [1.0])
    with pytest.raises(TypeError, match=r"x: expected float64 or .* got int64"):
        check.tensor("x", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: expected 1 or 3 dimensions, got shape \[2, 3\]"):
        check.tensor("x", x, ndim=(1, 3))
    with pytest.raises(TypeError, match="dense"):
        check.tensor("x", x.to_sparse())


def test_same() -> None:
    with pytest.raises(TypeError, match="y: expected the dtype of x, float32, got float64"):
        check.same("y", torch.zeros(1, dtype=torch.float64), "x", torch.zeros(1))
    with pytest.raises(ValueError, match="y: expected the device of x, cpu, got meta"):
        check.same("y", torch.zeros(1, device="meta"), "x", torch.zeros(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0, 3.0])
def test_number_out_of_range(bad: float) -> None:
    with pytest.raises(ValueError, match=r"s: expected a finite number > 0 and <= 2, got"):
        check.number("s", bad, above=0, most=2)


def test_number_and_integer() -> None:
    assert check.number("s", 1) == 1.0
    assert check.integer("k", 3, least=1) == 3
    for bad in (True, "1", None, torch.tensor(1), np.bool_(True), np.timedelta64(1), np.array([1]), 1j):
        with pytest.raises(TypeError, match="s: expected a number"):
            check.number("s", bad)
        with pytest.raises(TypeError, match="k: expected an integer"):
            check.integer("k", bad)
    with pytest.raises(ValueError, match="k: expected an integer >= 1 and <= 4, got 5"):
        check.integer("k", 5, least=1, most=4)


class Third(enum.IntEnum):
    THREE = 3


class Index:
    def __index__(self) -> int:
        return 3


@pytest.mark.parametrize(
    "value", [np.int8(3), np.uint64(3), np.array(3), Third.THREE, Index()], ids=lambda value: type(value).__name__
)
def test_whatever_is_an_index(value: object) -> None:
    found = check.integer("k", value, least=3, most=3)
    assert (found, type(found)) == (3, int)
    with pytest.raises(ValueError, match=r"k: expected an integer >= 4, got 3$"):
        check.integer("k", value, least=4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, np.int8, np.uint64])
def test_numbers_of_numpy(dtype: type[np.number]) -> None:
    found = check.number("s", dtype(3.25), above=3 - 1e-12, dtype=torch.float64)
    assert (found, type(found)) == (float(dtype(3.25)), float)
    with pytest.raises(ValueError, match=r"s: expected a finite number <= 2\.9, got 3(\.25)?$"):
        check.number("s", dtype(3.25), most=2.9)


def test_numbers_of_numpy_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="s: expected a finite number, got nan"):
        check.number("s", np.float32("nan"))
    with pytest.raises(ValueError, match=r"s: expected a number finite in float16, got 70000\.0"):
        check.number("s", np.float32(70000), dtype=torch.float16)
    for bad in (3.0, np.float64(3)):
        with pytest.raises(TypeError, match="k: expected an integer, got float"):
            check.integer("k", bad)


def test_choice_and_not_built() -> None:
    assert check.choice("kernel", "imq", ("imq", "rbf")) == "imq"
    with pytest.raises(ValueError, match="kernel: expected one of 'imq', 'rbf', got 'x'"):
        check.choice("kernel", "x", ("imq", "rbf"))
    with pytest.raises(NotImplementedError, match="group='g' is not built yet; what works: None"):
        check.not_built("group", "g", "None")


@pytest.mark.parametrize("family", sorted(backend.CPP))
def test_the_forced_cpp_kernels_take_no_address_of_a_gpu(family):
    with backend.force("cpp"):
        assert backend.choose(family, "cpu") == "cpp"
        with pytest.raises(ValueError, match=f"{family}: expected tensors on the CPU, .* got cuda"):
            backend.choose(family, torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 3, 1, 4), (6, 0), (0, 4)])
def test_finite_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Among them rows whose sums alone are beyond the dtype, of either sign."""
    x = torch.full(shape, 250).to(dtype)
    if dtype.is_floating_point and x.numel():
        x.fill_(torch.finfo(dtype).max)
        for row, bad in ((1, torch.inf), (2, torch.nan), (4, -torch.inf)):
            x[row].view(-1)[-1] = bad
        x[3] = -x[3]
        x[5].view(-1)[:1] = torch.finfo(dtype).smallest_normal / 2
    expected = torch.tensor([bool(row.isfinite().all()) for row in x], dtype=torch.bool)
    assert torch.equal(check.finite_rows(x), expected)
