"""Weights of F.mmd against the float64 oracle, and what they mean."""

import itertools
from types import ModuleType

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fastgen import functional as F
from fastgen.ops import backend

KERNELS = {
    "imq": F.IMQ(),
    "imq_two": F.IMQ(scales=(0.3, 4.0), base=1.5),
    "rbf": F.RBF((1.3, 0.6)),
    "laplacian": F.Laplacian((0.8,)),
    "energy": F.Energy(),
    "rational_quadratic": F.RationalQuadratic((0.5, 2.0)),
    "polynomial": F.Polynomial(),
}
RUNS = ["cpp", "reference"]


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    # The gradient of few points may vanish: what is left of a relative error then is rounding.
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * (want.norm() + 0.01)


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u_statistic"])
@pytest.mark.parametrize("name", KERNELS)
def test_against_the_oracle(name: str, estimator: str, oracle: ModuleType) -> None:
    shapes = [(2, 3, 1), (33, 50, 5), (140, 131, 18)]
    for (n, m, d), dtype, sides in itertools.product(shapes, (torch.float64, torch.float32), ("xy", "x", "y")):
        m = n if estimator == "u_statistic" else m
        x, y = torch.randn(n, d, dtype=dtype) / d**0.5, torch.randn(m, d, dtype=dtype) * (1.3 / d**0.5) + 0.1
        p, q = torch.rand(n) + 0.1 if "x" in sides else None, torch.rand(m) + 0.1 if "y" in sides else None
        if p is not None and n > 2:
            p[1] = 0
        kind, parameters = KERNELS[name]._op(d)
        value, gx, gy = oracle.mmd(x, y, kind, tuple(parameters), estimator, p, q)
        relative, absolute = (1e-11, 1e-12) if dtype == torch.float64 else (2e-4, 3e-6)
        for run in RUNS:
            with backend.force(run):
                a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
                got = F.mmd(a, b, kernel=KERNELS[name], estimator=estimator, x_weight=p, y_weight=q)
                got.backward()
                assert abs(float(got.detach()) - float(value)) <= absolute * max(1, abs(float(value))), (run, n, m, d)
                assert a.grad is not None
                assert b.grad is not None
                close(a.grad, gx, relative)
                close(b.grad, gy, relative)
                for one, gradient in ((0, gx), (1, gy)):
                    leaf = (x, y)[one].clone().requires_grad_()
                    pair = (leaf, y) if one == 0 else (x, leaf)
                    F.mmd(*pair, kernel=KERNELS[name], estimator=estimator, x_weight=p, y_weight=q).backward()
                    assert leaf.grad is not None
                    close(leaf.grad, gradient, relative)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u_statistic"])
def test_what_weights_mean(estimator: str, run: str) -> None:
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64) + 0.5
    with backend.force(run):
        plain = F.mmd(x, y, estimator=estimator)
        equal = F.mmd(x, y, estimator=estimator, x_weight=torch.full((30,), 7.0))
        torch.testing.assert_close(equal, plain, rtol=1e-12, atol=1e-13)
        w = torch.ones(30)
        w[::3] = 0
        out = F.mmd(x, y, estimator=estimator, x_weight=w, y_weight=w)
        kept = F.mmd(x[w > 0], y[w > 0], estimator=estimator)
        torch.testing.assert_close(out, kept, rtol=1e-12, atol=1e-13)
        if estimator == "biased":  # a point twice as heavy is that point twice
            heavy = torch.ones(30)
            heavy[4] = 2
            twice = F.mmd(torch.cat([x, x[4:5]]), y, estimator=estimator)
            torch.testing.assert_close(F.mmd(x, y, estimator=estimator, x_weight=heavy), twice, rtol=1e-12, atol=1e-13)
        if estimator == "unbiased":
            single = torch.zeros(30)
            single[3] = 1
            assert F.mmd(x, y, x_weight=single).isnan()


@pytest.mark.parametrize("run", RUNS)
def test_batches(run: str, oracle: ModuleType) -> None:
    x, y = torch.randn(3, 20, 4, dtype=torch.float64), torch.randn(3, 17, 4, dtype=torch.float64)
    p, q = torch.rand(3, 20), torch.rand(17)
    x.requires_grad_()
    with backend.force(run):
        got = F.mmd(x, y, x_weight=p, y_weight=q)
        got.sum().backward()
    value, gx, _ = oracle.mmd(x, y, *map(_tuple, F.IMQ()._op(4)), "unbiased", p, q)
    close(got.detach(), value, 1e-12)
    assert x.grad is not None
    close(x.grad, gx, 1e-11)


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.filterwarnings("ignore:.*TF32.*")
def test_compiled_and_invalid_weights_are_nan() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y, w: F.mmd(x, y, x_weight=w), fullgraph=True, backend="aot_eager")
    x, y, w = torch.randn(9, 3), torch.randn(8, 3), torch.rand(9)
    assert torch.equal(compiled(x, y, w), F.mmd(x, y, x_weight=w))
    assert compiled(x, y, torch.tensor([-1.0] + [1.0] * 8)).isnan()
    assert compiled(x, y, torch.zeros(9)).isnan()


@pytest.mark.parametrize("learnt", [False, True])
def test_weights_are_compiled_once_for_every_n(learnt: bool) -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, y, p, q: F.mmd(x * 2, y, x_weight=p, y_weight=q), fullgraph=True, backend=count)
    for n in (10, 23, 57):
        given = [torch.randn(n, 4), torch.randn(n + 1, 4), torch.rand(n), torch.rand(n + 1).requires_grad_(learnt)]
        for t in given:
            torch._dynamo.mark_dynamic(t, 0)
        x, y, p, q = given
        torch.testing.assert_close(compiled(*given), F.mmd(x * 2, y, x_weight=p, y_weight=q))
    assert count.frame_count == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_give_nan(bad: float) -> None:
    w = torch.ones(9)
    w[2] = bad
    assert F.mmd(torch.randn(9, 3), torch.randn(8, 3), x_weight=w).isnan()


@pytest.mark.parametrize("run", RUNS)
def test_far_padding_of_no_weight_does_not_count(run: str) -> None:
    x, y = torch.randn(2, 9, 3), torch.randn(2, 7, 3)
    far = torch.cat([x, torch.full((2, 3, 3), 1e6)], 1).requires_grad_()
    weight = torch.cat([torch.ones(2, 9), torch.zeros(2, 3)], 1)
    with backend.force(run):
        got = F.mmd(far, y, x_weight=weight)
        got.sum().backward()
        want = F.mmd(x, y)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
    assert far.grad is not None
    assert (far.grad[:, 9:] == 0).all()
    assert (far.grad[:, :9] != 0).any()


def test_weights_of_any_size() -> None:
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    p = torch.rand(6, dtype=torch.float64)
    for estimator in ("unbiased", "biased", "u_statistic"):
        want = F.mmd(x, y, estimator=estimator, x_weight=p)
        assert torch.allclose(F.mmd(x, y, estimator=estimator, x_weight=p * 1e308), want, rtol=1e-12)
    # One point has nearly all the weight: the pairs apart are that one with each of the others.
    k = torch.zeros(2, dtype=torch.float64)
    for i, tiny in enumerate((1e-8, 1e-18)):
        weight = torch.tensor([1.0, tiny, tiny, tiny, tiny, tiny], dtype=torch.float64)
        k[i] = F.mmd(x, y, x_weight=weight)
    assert abs(float(k[0] - k[1])) < 1e-6


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u_statistic"])
@pytest.mark.parametrize("name", KERNELS)
def test_gradients_in_weights(name: str, estimator: str, run: str, oracle: ModuleType) -> None:
    """Of either side, alone or with the points', in a batch and of a point without weight; far from the origin too."""
    kind, parameters = KERNELS[name]._op(5)
    for dtype, shift, batch in ((torch.float64, 0, ()), (torch.float32, 0, (2,)), (torch.float32, 100, ())):
        if shift and kind == "polynomial":  # which is not of differences
            continue
        n, m = 33, 33 if estimator == "u_statistic" else 50
        x = torch.randn(*batch, n, 5).to(dtype) / 5**0.5 + shift
        y = torch.randn(*batch, m, 5).to(dtype) * (1.3 / 5**0.5) + (0.1 + shift)
        p, q = torch.rand(*batch, n, dtype=dtype) + 0.1, torch.rand(m, dtype=dtype) + 0.1
        p[..., 1] = 0
        leaves = [t.double().clone().requires_grad_() for t in (x, y, p, q)]
        value = oracle.value(*leaves[:2], kind, tuple(parameters), estimator, *leaves[2:])
        wanted = torch.autograd.grad(value.sum(), leaves)
        for asked in ((0, 1, 2, 3), (2,), (3,), (1, 2)):
            given = [t.clone().requires_grad_(i in asked) for i, t in enumerate((x, y, p, q))]
            with backend.force(run):
                got = F.mmd(*given[:2], kernel=KERNELS[name], estimator=estimator, x_weight=given[2], y_weight=given[3])
                assert got.dtype == dtype
                gradients = torch.autograd.grad(got.sum() * -2, [given[i] for i in asked])
            assert ((got.detach().double() - value.detach()).abs() <= (1e-12 if dtype == torch.float64 else 5e-6)).all()
            for i, gradient in zip(asked, gradients, strict=True):
                assert gradient.dtype == dtype
                error = (gradient.double() / -2 - wanted[i]).norm()
                assert error <= (1e-11 if dtype == torch.float64 else 1e-4) * wanted[i].norm(), (asked, i, dtype, shift)


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u_statistic"])
def test_gradcheck_of_weights(estimator: str) -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    # One has most of the weight: what is left of it is a sum of the others.
    p, q = torch.rand(5, dtype=torch.float64) + 0.1, torch.tensor([9.0, 1, 2, 0.5, 0.1], dtype=torch.float64)

    def loss(*given: Tensor) -> Tensor:
        return F.mmd(*given[:2], estimator=estimator, x_weight=given[2], y_weight=given[3])

    leaves = [t.requires_grad_() for t in (x, y, p, q)]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
    (first,) = torch.autograd.grad(loss(*leaves), p, create_graph=True)
    assert abs(float(first.detach() @ p.detach())) < 1e-14  # weights times a number are the same weights
    (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="third-order gradients are not built"):
        torch.autograd.grad(second.sum(), x)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u_statistic"])
@pytest.mark.parametrize("name", KERNELS)
def test_second_derivatives_through_weights(name: str, estimator: str, run: str, oracle: ModuleType) -> None:
    """Of points and weights in every mixture, in batches too, and through what comes from above."""
    kind, parameters = KERNELS[name]._op(3)
    for dtype, batch in ((torch.float64, ()), (torch.float64, (2,)), (torch.float32, ())):
        n, m = 7, 7 if estimator == "u_statistic" else 5
        x, y = torch.randn(*batch, n, 3, dtype=dtype), torch.randn(*batch, m, 3, dtype=dtype) * 1.2 + 0.3
        given = (x, y, torch.rand(n, dtype=dtype) + 0.1, torch.rand(*batch, m, dtype=dtype) + 0.1)
        directions = [torch.randn_like(t) for t in given]

        def ours(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
            return F.mmd(x, y, kernel=KERNELS[name], estimator=estimator, x_weight=p, y_weight=q)

        def naive(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
            result: Tensor = oracle.value(x, y, kind, tuple(parameters), estimator, p, q)
            return result

        for asked in ((0, 1, 2, 3), (0, 2), (1, 2), (2, 3), (3,)):
            found = []
            for function, wide in ((ours, dtype), (naive, torch.float64)):
                leaves = [t.to(wide, copy=True).requires_grad_(i in asked) for i, t in enumerate(given)]
                above = torch.ones(batch, dtype=wide, requires_grad=True)
                with backend.force(run):
                    at = [leaves[i] for i in asked]
                    first = torch.autograd.grad(function(*leaves), at, above, create_graph=True)
                    along = [(g * directions[i]).sum() for i, g in zip(asked, first, strict=True)]
                    found.append(torch.autograd.grad(torch.stack(along).sum(), [*at, above]))
            for got, want in zip(*found, strict=True):
                assert got.dtype == dtype
                error = (got.double() - want).norm()
                assert error <= (1e-10 if dtype == torch.float64 else 2e-4) * (want.norm() + 0.1), (asked, dtype, batch)


@pytest.mark.filterwarnings("ignore:.*TF32.*")
def test_gradients_in_weights_compiled() -> None:
    torch._dynamo.reset()
    x, y = torch.randn(9, 3), torch.randn(8, 3)
    gradients = []
    for function in (F.mmd, torch.compile(F.mmd, fullgraph=True, backend="aot_eager")):
        w = torch.linspace(0.1, 1, 9).requires_grad_()
        gradients.append(torch.autograd.grad(function(x, y, x_weight=w), w)[0])
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-9)


def test_weights_are_learnt() -> None:
    """Of points drawn too far to one side, those weights come out that undo it."""
    x = torch.randn(200, 1, dtype=torch.float64) + 1
    y = torch.randn(300, 1, dtype=torch.float64)
    logits = torch.zeros(200, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], 0.1)
    for _ in range(100):
        optimiser.zero_grad()
        F.mmd(x, y, estimator="biased", x_weight=logits.softmax(0)).backward()
        optimiser.step()
    assert abs(float(logits.detach().softmax(0) @ x - y.mean())) < 0.1 < abs(float(x.mean() - y.mean()))
