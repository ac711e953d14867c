"""Second derivatives of F.mmd: the analytic Hessian-vector product against double autograd of the float64 oracle."""

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastgen import functional as F
from fastgen.ops import backend

KERNELS = {
    "imq": F.IMQ(),
    "rbf": F.RBF((1.3, 0.6)),
    "laplacian": F.Laplacian((0.8, 2.0)),
    "energy": F.Energy(),
    "rational_quadratic": F.RationalQuadratic((0.5, 2.0)),
    "polynomial": F.Polynomial(),
    "polynomial_linear": F.Polynomial(degree=1),
    "polynomial_square": F.Polynomial(degree=2, coef=0.0),
}


def products(x: Tensor, y: Tensor, value: Tensor, vx: Tensor, vy: Tensor) -> tuple[Tensor, ...]:
    gx, gy = torch.autograd.grad(value, (x, y), create_graph=True)
    return torch.autograd.grad((gx * vx).sum() + (gy * vy).sum(), (x, y))


@pytest.mark.parametrize("run", ["cpp", "reference"])
@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u_statistic"])
@pytest.mark.parametrize("name", KERNELS)
def test_hessian_products(name: str, estimator: str, run: str, oracle: ModuleType) -> None:
    shapes = ((2, 3, 1), (41, 33, 5), (70, 60, 40))
    for (n, m, d), dtype, weighted in itertools.product(shapes, (torch.float64, torch.float32), (False, True)):
        m = n if estimator == "u_statistic" else m
        x, y = torch.randn(n, d) / d**0.5, torch.randn(m, d) * (1.3 / d**0.5) + 0.2
        vx, vy = torch.randn(n, d), torch.randn(m, d)
        p, q = (torch.rand(n) + 0.1, torch.rand(m) + 0.1) if weighted else (None, None)
        kind, parameters = KERNELS[name]._op(d)
        a, b = x.double().requires_grad_(), y.double().requires_grad_()
        value = oracle.value(a, b, kind, tuple(parameters), estimator, p, q)
        want = products(a, b, value, vx.double(), vy.double())
        a, b = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        with backend.force(run):
            value = F.mmd(a, b, kernel=KERNELS[name], estimator=estimator, x_weight=p, y_weight=q)
            got = products(a, b, value, vx.to(dtype), vy.to(dtype))
            value = F.mmd(a.detach(), b, kernel=KERNELS[name], estimator=estimator, x_weight=p, y_weight=q)
            (gradient,) = torch.autograd.grad(value, b, create_graph=True)
            (alone,) = torch.autograd.grad(gradient, b, vy.to(dtype))
        c = y.double().requires_grad_()
        value = oracle.value(x.double(), c, kind, tuple(parameters), estimator, p, q)
        (gradient,) = torch.autograd.grad(value, c, create_graph=True)
        want = (*want, *torch.autograd.grad(gradient, c, vy.double(), materialize_grads=True))
        for g, w in zip((*got, alone), want, strict=True):
            assert g.dtype == dtype
            # The energy kernel has no curvature in one dimension: there only rounding is left to compare.
            relative, absolute = (1e-10, 1e-13) if dtype == torch.float64 else (3e-4, 1e-6)
            assert (g.double() - w).norm() <= relative * w.norm() + absolute, (n, m, d, dtype, weighted)


@pytest.mark.parametrize("name", KERNELS)
def test_gradgradcheck(name: str) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = (torch.randn(4, 3, dtype=torch.float64) + 0.3).requires_grad_()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return F.mmd(a, b, kernel=KERNELS[name])

    # Also the derivative along what comes from above: gradgradcheck draws it at random and differentiates in it.
    assert torch.autograd.gradgradcheck(loss, (x, y))
    assert torch.autograd.gradgradcheck(lambda a: loss(a, y.detach()), (x,))
    assert torch.autograd.gradgradcheck(lambda b: loss(x.detach(), b), (y,))
    assert torch.autograd.gradgradcheck(lambda a, b: loss(a, b) ** 2, (x, y))


def test_batches_and_coinciding_points() -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(F.mmd, (x, y))
    z = torch.randn(7, 3, dtype=torch.float64)
    for kernel in ("laplacian", "energy"):
        a = torch.cat([z, z[:2]]).requires_grad_()
        (gradient,) = torch.autograd.grad(F.mmd(a, z, kernel=kernel), a, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), a)
        assert second.isfinite().all()


def test_low_precision_and_mixed_sides() -> None:
    x = torch.randn(30, 4).bfloat16().requires_grad_()
    y = torch.randn(20, 4).bfloat16()
    (gradient,) = torch.autograd.grad(F.mmd(x, y), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.float().sum(0).square().sum(), x)
    assert second.dtype == torch.bfloat16
    a = x.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.mmd(a, y.double()), a, create_graph=True)
    (want,) = torch.autograd.grad(gradient.sum(0).square().sum(), a)
    assert (second.double() - want).norm() <= 0.02 * want.norm()


def test_a_third_derivative_raises() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F.mmd(x, torch.randn(4, 3, dtype=torch.float64)), x, create_graph=True)
    for of_first in (first.square().sum(), first.sum()):
        (second,) = torch.autograd.grad(of_first, x, create_graph=True)
        with pytest.raises(NotImplementedError, match="third-order gradients are not built"):
            torch.autograd.grad(second.sum(), x)


@pytest.mark.parametrize("run", ["cpp", "reference"])
def test_non_finite_points_give_nan(run: str) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    x[2, 1] = float("nan")
    x.requires_grad_()
    with backend.force(run):
        (first,) = torch.autograd.grad(F.mmd(x, torch.randn(4, 3, dtype=torch.float64)), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert second.isnan().any()


@pytest.mark.parametrize("kernel", [F.Energy(), F.Laplacian((1.0,))])
def test_rooted_kernels_of_close_points(kernel: F.Energy | F.Laplacian) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0001], [-2.0]])  # on a line −d has no second derivative
        x, y = x.to(dtype).requires_grad_(), y.to(dtype)
        (gradient,) = torch.autograd.grad(F.mmd(x, y, kernel=kernel), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.sum(), x)[0].double())
    assert torch.allclose(*found, rtol=1e-6, atol=1e-6)
