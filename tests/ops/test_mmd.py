"""The registered ops: schema, fakes, and the choice of what they run."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import functional as F
from fastgen.functional.mmd_plain import prepared
from fastgen.ops import backend
from fastgen.ops import mmd as ops
from fastgen.reference import mmd as reference

PARAMETERS = {
    "imq": [0.5, 2.0],
    "rbf": [0.25],
    "laplacian": [0.25],
    "energy": [],
    "rational_quadratic": [1.0, 0.5, 2.0],
    "polynomial": [3.0, 0.2, 1.0],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    wide = torch.randn(5, 9, dtype=torch.float32).to(dtype)
    pairs = [
        (wide[:, :5], wide[:4, 4:]),
        (wide.T, wide.T[:4]),
        (torch.randn(2, 6, 3).to(dtype), torch.randn(3, 5, 2).to(dtype).permute(2, 1, 0)),
    ]
    for x, y in pairs:
        options = (kind, PARAMETERS[kind], "unbiased", "bf16x3")
        for op in (ops.value, ops.value_grad_x, ops.value_grad):
            torch.library.opcheck(op, (x, y, *options))
    weights = (torch.rand(x.shape[:-1]), torch.rand(y.shape[:-1]), torch.ones(3, dtype=torch.float64), 7)
    torch.library.opcheck(ops.value_grad, (x, y, *options, *weights))
    for vy in (None, y):
        torch.library.opcheck(ops.hessian_product, (x, y, x, vy, *options, *weights))
    torch.library.opcheck(ops.row_sums, (x, y, *options[:3], *weights[:2]))


def test_fakes_give_shapes_and_dtypes() -> None:
    x, y = torch.empty(2, 3, 5, device="meta", dtype=torch.bfloat16), torch.empty(2, 4, 5, device="meta")
    value, gx, gy = ops.value_grad(x, y.bfloat16(), "imq", [1.0], "unbiased", "ieee")
    assert (value.shape, gx.shape, gy.shape) == ((2,), (2, 3, 5), (2, 4, 5))
    assert {value.dtype, gx.dtype, gy.dtype} == {torch.float32}
    assert ops.value(x.double(), y.double(), "imq", [1.0], "unbiased", "ieee").dtype == torch.float64


def test_the_reference_never_holds_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(300, 5, dtype=torch.float64), torch.randn(200, 5, dtype=torch.float64)
    options = reference.Options("rbf", [0.3, 0.1], "unbiased")
    weighted = options._replace(x_weight=torch.rand(300).double(), y_weight=torch.rand(200).double())

    def everything() -> tuple[torch.Tensor, ...]:
        of_points = *reference.value_grad(x, y, options), *reference.hessian_product(x, y, x, y, options)
        return *of_points, *reference.row_sums(x, y, weighted)

    whole = everything()
    largest = 0
    kernel = reference._kernel

    def watched(q: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal largest
        largest = max(largest, q.numel())
        return kernel(q, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "_kernel", watched)
    monkeypatch.setattr(reference, "BLOCK", 1000)
    blocked = everything()
    assert largest <= 1000
    for a, b in zip(whole, blocked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_seven_inverse_scales_are_found_and_others_are_not() -> None:
    scales = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    for base in (1.0, 16.0, 2 * 784 * 0.7**2):
        found = ops.inverse_pairs([s * base for s in scales])
        assert found is not None
        assert found == pytest.approx((base, 8.1, 3.2, 0.5), rel=1e-14)
    assert ops.inverse_pairs([s * 3 for s in reversed(scales)]) is not None
    assert ops.inverse_pairs([0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.001]) is None
    assert ops.inverse_pairs(scales[:6]) is None
    assert ops.inverse_pairs([1 / 65, 0.2, 0.5, 1.0, 2.0, 5.0, 65.0]) is None


def test_the_kernel_is_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(reference, "value", lambda *a: called.append("reference") or torch.zeros(()))
    x = torch.randn(4, 2)
    ops.value(x, x, "imq", [1.0], "unbiased", "ieee")
    assert called == []
    with backend.force("reference"):
        ops.value(x, x, "imq", [1.0], "unbiased", "ieee")
    assert called == ["reference"]


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("cpp", torch.float32), ("cpp", torch.float64), ("triton", torch.float32), ("triton", torch.bfloat16)],
)
@pytest.mark.parametrize("batch", [[], [3]])
def test_a_direct_call_makes_the_numbers_of_the_op(kernel: str, dtype: torch.dtype, batch: list[int]) -> None:
    x, y = torch.randn(*batch, 9, 3).to(dtype), torch.randn(*batch, 7, 3).to(dtype)
    with backend.force(kernel):
        for kind, parameters in (("imq", (0.5, 2.0)), ("imq", (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)), ("energy", ())):
            options = (kind, parameters, "unbiased", "ieee" if kind == "imq" else "tf32x3")
            direct = ops.direct(options, dtype, "cpu", kernel)
            assert direct is not None
            for sides, op in enumerate((ops.value, ops.value_grad_x, ops.value_grad)):
                found = op(x, y, *options)
                found = found if isinstance(found, tuple) else (found,)
                for got, want in zip(direct(sides, x, y, options), found, strict=True):
                    assert torch.equal(got, want)


@pytest.mark.parametrize("kernel", ["cpp", "triton"])
def test_what_does_not_run_directly(kernel: str) -> None:
    class Another(torch.Tensor):
        pass

    x, y = torch.randn(9, 3), torch.randn(7, 3)
    others = {
        "columns first": x.T.contiguous().T,
        "every second row": x[::2],
        "a lazy minus": torch._neg_view(x),
        "no memory": x.to("meta"),
        "a subclass": x.as_subclass(Another),
    }

    def short(a: Tensor, b: Tensor, kernel: Any = "imq") -> bool:
        found = prepared(a, b, kernel, "unbiased", "ieee")
        return found is not None and found[1] is not ops.call

    with backend.force(kernel):
        assert short(x, y)
        assert short(torch.nn.Parameter(x), y)
        for what, other in others.items():
            assert not short(other, y), what
            assert not short(y, other), what
        assert short(x.half(), y.half()) == (kernel == "triton")
        assert short(x.double(), y.double()) == (kernel == "cpp")
        assert short(x, y, F.Polynomial(degree=17)) == (kernel == "cpp")
    with backend.force("reference"):
        assert not short(x, y)


def test_a_lazy_minus_is_seen() -> None:
    x, y = torch.randn(9, 3), torch.randn(7, 3)
    for a, b, want in ((torch._neg_view(x), y, F.mmd(-x, y)), (x, torch._neg_view(y), F.mmd(x, -y))):
        assert a.is_neg() or b.is_neg()
        assert torch.equal(F.mmd(a, b), want)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and used
def test_what_watches_ops_sees_them() -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, y = torch.randn(9, 3, requires_grad=True), torch.randn(7, 3)
    with Watch():
        F.mmd(x, y)
    assert "fastgen.mmd_value_grad_x.default" in seen
    x = x.detach()
    mode = FakeTensorMode()
    assert isinstance(F.mmd(mode.from_tensor(x), mode.from_tensor(y)), FakeTensor)
    traced = torch.jit.trace(lambda a: F.mmd(a, y), (x,), check_trace=False)
    assert "fastgen::mmd_value" in str(traced.graph)


def test_a_default_device_is_of_no_account() -> None:
    x, y = torch.randn(9, 3), torch.randn(7, 3)
    weight = torch.rand(9)
    with torch.device("meta"):
        value, weighted = F.mmd(x, y), F.mmd(x, y, x_weight=weight)
    assert torch.equal(value, F.mmd(x, y))
    assert torch.equal(weighted, F.mmd(x, y, x_weight=weight))
