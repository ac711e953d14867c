"""Gradients of many coordinates and the Hessian's product, through slabs of slopes: the Triton kernels, interpreted."""

from types import ModuleType
from typing import Any

import pytest
import torch
from fastgen.kernels import mmd_launch
from torch import Tensor

from fastgen import functional as F
from fastgen.ops import backend
from fastgen.ops.mmd import inverse_pairs

KERNELS = {
    "imq_pairs": F.IMQ(),
    "imq": F.IMQ((0.3, 1.0, 4.0)),
    "rbf": F.RBF((1.3, 0.6)),
    "rational_quadratic": F.RationalQuadratic((0.5, 2.0)),
    "laplacian": F.Laplacian((0.8, 2.0)),
    "energy": F.Energy(),
    "polynomial": F.Polynomial(),
    "linear": F.Polynomial(degree=1),
    "square": F.Polynomial(degree=2, coef=0.0),
}
SMOOTH = [name for name in KERNELS if name not in ("imq_pairs", "laplacian", "energy")]


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile: every pair of tiles is a slab, and sums go on from one to the next."""
    monkeypatch.setattr(mmd_launch, "SLAB", mmd_launch.ROWS**2)


def points(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d) / d**0.5, torch.randn(m, d) * (1.3 / d**0.5) + 0.3 / d**0.5


def run(x: Tensor, y: Tensor, name: str, estimator: str, sides: int, **more: Any) -> tuple[Tensor, ...]:
    kind, parameters = KERNELS[name]._op(x.shape[-1])
    pairs = inverse_pairs(parameters) if kind == "imq" else None
    return mmd_launch.mmd(x, y, sides, "ieee", pairs, kind, parameters, estimator, **more)


def products(x: Tensor, y: Tensor, value: Tensor, vx: Tensor, vy: Tensor) -> tuple[Tensor, ...]:
    gx, gy = torch.autograd.grad(value, (x, y), create_graph=True)
    return torch.autograd.grad((gx * vx).sum() + (gy * vy).sum(), (x, y))


def close(got: Tensor, want: Tensor, relative: float = 5e-6) -> None:
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= relative * want.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_many_coordinates(name: str, oracle: ModuleType) -> None:
    kernel = KERNELS[name]
    for (n, m, d), estimator, sides in (((3, 5, 129), "biased", 2), ((20, 20, 300), "u_statistic", 1)):
        x, y = points(n, m, d)
        kind, parameters = kernel._op(d)
        want = oracle.mmd(x, y, kind, tuple(parameters), estimator)
        got = run(x, y, name, estimator, sides)
        assert len(got) == sides + 1
        size = max(len(parameters), 1) + abs(float(want[0]))
        assert abs(float(got[0]) - float(want[0])) <= 4e-7 * size
        assert abs(float(run(x, y, name, estimator, 0)[0]) - float(want[0])) <= 4e-7 * size
        for g, w in zip(got[1:], want[1:], strict=False):
            close(g, w)


@pytest.mark.parametrize("name", ["imq_pairs", "energy", "polynomial"])
def test_slabs_add_up(name: str, oracle: ModuleType, small_slabs: None) -> None:
    """Two tiles of rows and three of columns, weighted, in a batch; then term by term."""
    x, y = (torch.stack([p, p.flip(0) * 1.1]) for p in points(140, 9, 131))
    p, q = torch.rand(140, dtype=torch.float64), torch.rand(2, 9, dtype=torch.float64)
    p, q = p / p.sum(), q / q.sum(-1, keepdim=True)
    kind, parameters = KERNELS[name]._op(131)
    want = oracle.mmd(x, y, kind, tuple(parameters), "biased", p, q)
    more = {"x_weight": p.float(), "y_weight": q.float(), "coefficients": torch.ones(3, dtype=torch.float64)}
    got = run(x, y, name, "biased", 2, **more)
    assert (got[0].double() - want[0]).abs().max() <= 4e-7 * max(len(parameters), 1)
    for g, w in zip(got[1:], want[1:], strict=True):
        close(g, w)
    parts = [run(x[0], y[0], name, "unbiased", 2, terms=1 << i) for i in range(3)]
    for g, w in zip(run(x[0], y[0], name, "unbiased", 2), zip(*parts, strict=True), strict=True):
        assert (g - sum(w)).norm() <= 2e-6 * sum(part.norm() for part in w)
    assert not parts[0][2].any()  # XX alone pulls at no y, YY at no x
    assert not parts[1][1].any()


@pytest.mark.parametrize("name", ["laplacian", "energy"])
def test_close_pairs_of_many_coordinates(name: str, oracle: ModuleType) -> None:
    centre = torch.randn(3, 130)
    x = (centre[:, None] + 1e-3 * torch.randn(3, 4, 130)).flatten(0, 1)
    y = (centre[:, None] + 1e-3 * torch.randn(3, 5, 130)).flatten(0, 1)
    y[:2] = x[:2]
    kind, parameters = KERNELS[name]._op(130)
    value, gx, _ = oracle.mmd(x, y, kind, tuple(parameters), "unbiased")
    got = run(x, y, name, "unbiased", 1)
    assert abs(float(got[0]) - float(value)) <= 2e-6 * abs(float(value)) + 1e-6
    close(got[1], gx, 2e-3)


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u_statistic"])
@pytest.mark.parametrize("name", SMOOTH)
def test_hessian_products(name: str, estimator: str, oracle: ModuleType) -> None:
    shapes = {"unbiased": (7, 130, 5), "biased": (3, 2, 1), "u_statistic": (9, 9, 130)}
    n, m, d = shapes[estimator]
    x, y = points(n, m, d)
    vx, vy = torch.randn(n, d), torch.randn(m, d)
    p, q = (torch.rand(n) + 0.1, torch.rand(m) + 0.1) if estimator == "unbiased" else (None, None)
    a, b = x.double().requires_grad_(), y.double().requires_grad_()
    kind, parameters = KERNELS[name]._op(d)
    want = products(a, b, oracle.value(a, b, kind, tuple(parameters), estimator, p, q), vx.double(), vy.double())
    a, b = x.requires_grad_(), y.requires_grad_()
    with backend.force("triton"):
        value = F.mmd(a, b, kernel=KERNELS[name], estimator=estimator, x_weight=p, y_weight=q, precision="ieee")
        got = products(a, b, value, vx, vy)
    for g, w in zip(got, want, strict=True):
        close(g, w)


def test_batches_beyond_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, parameters = KERNELS["rbf"]._op(2)
    x, y, vx, vy = torch.randn(3, 3, 2), torch.randn(3, 4, 2), torch.randn(3, 3, 2), torch.randn(3, 4, 2)
    p, q, a = torch.rand(3), torch.rand(3, 4), torch.rand(3, 3, dtype=torch.float64)
    for directions in ((vx, vy), (vx, None)):
        given = (x, y, *directions, "ieee", kind, parameters, "biased", p, q, a)
        monkeypatch.setattr(mmd_launch, "LARGEST_BATCH", 3)
        whole = mmd_launch.hessian_product(*given)
        monkeypatch.setattr(mmd_launch, "LARGEST_BATCH", 2)
        for got, want in zip(mmd_launch.hessian_product(*given), whole, strict=True):
            assert torch.equal(got, want)


def test_hessian_products_of_one_side(oracle: ModuleType, small_slabs: None) -> None:
    kind, parameters = F.IMQ()._op(4)
    x, y, v = torch.randn(2, 130, 4), torch.randn(2, 5, 4), torch.randn(2, 130, 4)
    a = x.double().requires_grad_()
    value = oracle.value(a, y.double(), kind, tuple(parameters), "unbiased").sum()
    (first,) = torch.autograd.grad(value, a, create_graph=True)
    (want,) = torch.autograd.grad((first * v).sum(), a)
    hx, hy = mmd_launch.hessian_product(x, y, v, None, "ieee", kind, parameters, "unbiased")
    close(hx, want)
    assert hy.shape == (0,)
    again, _ = mmd_launch.hessian_product(x.bfloat16(), y.bfloat16(), v, None, "ieee", kind, parameters, "unbiased")
    assert (again - hx).norm() <= 0.02 * hx.norm()


@pytest.mark.parametrize("name", ["imq", "polynomial", "energy"])
def test_what_is_not_finite_gives_nan(name: str) -> None:
    kind, parameters = KERNELS[name]._op(130)
    for bad in (float("nan"), float("inf")):
        x, y = points(5, 4, 130)
        y[2, 129] = bad
        value, gx = run(x, y, name, "unbiased", 1)
        assert value.isnan()
        assert gx.isnan().any()
        if name != "energy":
            product = mmd_launch.hessian_product(x, y, x, None, "ieee", kind, parameters, "unbiased")[0]
            assert product.isnan().any()


def test_memory_is_bounded() -> None:
    """A slab has a fixed number of slopes, whatever the samples: but for a batch of so many that a tile is more."""

    def slab(items: int, n: int, m: int) -> int:
        packed = object.__new__(mmd_launch._Packed)
        packed.items, packed.padded_n, packed.padded = items, n, n + m
        rows, columns = packed.slab
        assert rows % mmd_launch.ROWS == columns % mmd_launch.ROWS == 0
        return items * rows * columns

    for shape in ((1, 1 << 20, 1 << 20), (1, 128, 1 << 21), (1, 1 << 21, 128), (7, 4096, 8192), (1000, 128, 256)):
        assert slab(*shape) <= mmd_launch.SLAB, shape
    assert slab(1, 128, 128) == 128 * 256


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
@pytest.mark.parametrize("name", KERNELS)
def test_on_the_gpu(name: str, precision: str, oracle: ModuleType) -> None:
    """Compiled: weights, a batch, many coordinates and Hessian products."""
    for batch, (n, m, d) in (((), (300, 257, 129)), ((3,), (70, 200, 784)), ((), (500, 300, 20)), ((), (1, 2, 1))):
        x, y = (torch.stack([p] * batch[0]) if batch else p for p in points(n, m, d))
        p, q = torch.rand(n) + 0.1, torch.rand(m) + 0.1
        kind, parameters = KERNELS[name]._op(d)
        a, b = x.double().requires_grad_(), y.double().requires_grad_()
        wanted = oracle.value(a, b, kind, tuple(parameters), "biased", p, q)
        vx, vy = torch.randn(x.shape), torch.randn(y.shape)
        gradients = torch.autograd.grad(wanted.sum(), (a, b), retain_graph=True)
        second = products(a, b, wanted.sum(), vx.double(), vy.double())
        a, b = x.cuda().requires_grad_(), y.cuda().requires_grad_()
        options: Any = {"kernel": KERNELS[name], "estimator": "biased", "precision": precision}
        value = F.mmd(a, b, x_weight=p.cuda(), y_weight=q.cuda(), **options)
        size = max(len(parameters), 1) + float(wanted.detach().abs().max())
        assert (value.detach().cpu().double() - wanted.detach()).abs().max() <= 1e-5 * size
        for g, w in zip(torch.autograd.grad(value.sum(), (a, b), retain_graph=True), gradients, strict=True):
            close(g.cpu(), w, 1e-4)
        for g, w in zip(products(a, b, value.sum(), vx.cuda(), vy.cuda()), second, strict=True):
            assert (g.cpu().double() - w).norm() <= 3e-4 * w.norm() + 1e-6
