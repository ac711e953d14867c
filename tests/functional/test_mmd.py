"""F.mmd and F.wae_mmd against the float64 oracle: values, gradients, estimators, layouts, bad input."""

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
    "rbf": F.RBF(),
    "rbf_one": F.RBF((1.3,)),
    "laplacian": F.Laplacian(),
    "energy": F.Energy(),
    "rational_quadratic": F.RationalQuadratic(),
    "rational_quadratic_two": F.RationalQuadratic(alphas=(0.3, 7.0), lengthscale=1.7),
    "polynomial": F.Polynomial(),
    "polynomial_linear": F.Polynomial(degree=1, gamma=0.5, coef=0.0),
}
ESTIMATORS = ("unbiased", "biased", "u_statistic")
# (N, M, D): one point short of a register block, one more, one coordinate, more than one tile, D of several vectors
SHAPES = [(2, 2, 1), (3, 2, 5), (31, 8, 16), (33, 33, 17), (130, 67, 3), (257, 280, 8), (40, 33, 290)]
RUNS = ["cpp", "reference"]


def points(n: int, m: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Points whose squared distances are of order one for any D, so that no gradient is a vanishing difference."""
    scale = d**-0.5
    return (torch.randn(n, d) * scale).to(dtype), ((torch.randn(m, d) * 1.3 + 0.4) * scale).to(dtype)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).norm()
    assert error <= tolerance * want.norm(), f"relative error {float(error / want.norm()):.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_learnt_bandwidth_divides_the_points(dtype: torch.dtype, oracle: ModuleType) -> None:
    """As the README has it: the value, and its gradient in b, are those of a kernel of bandwidth b."""
    x, y = points(31, 18, 3, dtype)
    b = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    value = F.mmd(x / b, y / b, kernel=F.RBF((1.0,)))
    value.backward()

    def naive(bandwidth: float) -> Tensor:
        found: Tensor = oracle.value(x.double(), y.double(), "rbf", (0.5 / bandwidth**2,), "unbiased", None, None)
        return found

    tight = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(value.double(), naive(0.7), **tight)
    assert b.grad is not None
    torch.testing.assert_close(b.grad.double(), (naive(0.7 + 1e-5) - naive(0.7 - 1e-5)) / 2e-5, **tight)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", KERNELS)
def test_value_and_gradients(name: str, estimator: str, oracle: ModuleType) -> None:
    for (n, m, d), dtype in itertools.product(SHAPES, (torch.float64, torch.float32)):
        x, y = points(n, n if estimator == "u_statistic" else m, d, dtype)
        kind, parameters = KERNELS[name]._op(d)
        value, gx, gy = oracle.mmd(x, y, kind, tuple(parameters), estimator)
        scale = float(sum(p for p in parameters)) if kind == "polynomial" else float(len(parameters) or 1)
        # MMD² is a difference of sums of this order: the relative error of the sums is what can be asked for.
        absolute = (1e-13 if dtype == torch.float64 else 1e-6) * max(scale, abs(float(value)))
        for run in RUNS:
            # Where a gradient is a small difference of its XX and XY parts, the reference's float32 sums show it more.
            relative = 1e-11 if dtype == torch.float64 else 2e-5 if run == "cpp" else 2e-4
            with backend.force(run):
                got = F.mmd(x, y, kernel=KERNELS[name], estimator=estimator)
                assert got.dtype == dtype
                assert abs(float(got) - float(value)) <= absolute, (run, n, m, d)
                for for_x, for_y in ((True, True), (True, False), (False, True)):
                    a, b = x.clone().requires_grad_(for_x), y.clone().requires_grad_(for_y)
                    result = F.mmd(a, b, kernel=KERNELS[name], estimator=estimator)
                    assert abs(float(result.detach()) - float(value)) <= absolute, (run, n, m, d)
                    (result * -2.5).backward()
                    for leaf, gradient, asked in ((a, gx, for_x), (b, gy, for_y)):
                        if not asked:
                            assert leaf.grad is None
                            continue
                        assert leaf.grad is not None
                        close(leaf.grad, gradient * -2.5, relative)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["imq", "rbf", "laplacian", "energy", "rational_quadratic", "polynomial"])
def test_batched(name: str, run: str, oracle: ModuleType) -> None:
    for b in (0, 1, 2, 5):
        x = torch.randn(b, 37, 6, dtype=torch.float64, requires_grad=True)
        y = torch.randn(b, 41, 6, dtype=torch.float64, requires_grad=True)
        with backend.force(run):
            result = F.mmd(x, y, kernel=name)
            assert result.shape == (b,)
            upstream = torch.arange(1.0, b + 1, dtype=torch.float64)
            result.backward(upstream)
        if b == 0:
            continue
        kind, parameters = KERNELS[name]._op(6)
        value, gx, gy = oracle.mmd(x, y, kind, tuple(parameters), "unbiased")
        close(result, value, 1e-11)
        assert x.grad is not None
        assert y.grad is not None
        close(x.grad, gx * upstream[:, None, None], 1e-11)
        close(y.grad, gy * upstream[:, None, None], 1e-11)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", KERNELS)
def test_low_precision_points_are_summed_in_float32(name: str, estimator: str, run: str, oracle: ModuleType) -> None:
    """Values, gradients and Hessian products of either side: the error of a result is that of rounding it once."""
    for dtype, (n, m, d) in itertools.product((torch.bfloat16, torch.float16), [(2, 3, 1), (33, 40, 17)]):
        m = n if estimator == "u_statistic" else m
        given = points(n, m, d, dtype)
        directions = [torch.randn_like(p) for p in given]
        kind, parameters = KERNELS[name]._op(d)
        leaves = [p.double().requires_grad_() for p in given]
        value = oracle.value(*leaves, kind, tuple(parameters), estimator)
        for asked in ((0, 1), (0,), (1,)):
            a = [p.clone().requires_grad_(i in asked) for i, p in enumerate(given)]
            with backend.force(run):
                result = F.mmd(*a, kernel=KERNELS[name], estimator=estimator)
                got = torch.autograd.grad(result, [a[i] for i in asked], create_graph=True)
                along = [(g * directions[i]).sum() for i, g in zip(asked, got, strict=True)]
                got_second = torch.autograd.grad(sum(along), [a[i] for i in asked])
            assert result.dtype == torch.float32
            size = max(1, len(parameters), abs(float(value.detach())))
            assert abs(float(result.detach() - value.detach())) <= 1e-6 * size
            wanted = torch.autograd.grad(value, [leaves[i] for i in asked], create_graph=True)
            along = [(g * directions[i].double()).sum() for i, g in zip(asked, wanted, strict=True)]
            second = torch.autograd.grad(
                sum(along), [leaves[i] for i in asked], retain_graph=True, materialize_grads=True
            )
            eps = torch.finfo(dtype).eps
            for g, w in zip((*got, *got_second), (*wanted, *second), strict=True):
                assert g.dtype == dtype
                # Float16's least number; and the energy kernel has no curvature on a line.
                assert (g.detach().double() - w).norm() <= eps * w.norm() + 1e-6, (n, m, d, dtype, asked)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["imq", "rbf", "laplacian", "energy", "rational_quadratic"])
def test_far_from_the_origin(name: str, estimator: str, run: str, oracle: ModuleType) -> None:
    """Mean 100, from 1 to 4096 coordinates: float32 loses nothing, and a common shift pulls nowhere."""
    for n, m, d in [(50, 37, 1), (129, 100, 64), (20, 13, 784), (5, 4, 4096)]:
        x, y = points(n, n if estimator == "u_statistic" else m, d, torch.float32)
        x, y = (x * d**0.5 + 100).requires_grad_(), (y * d**0.5 + 100).requires_grad_()
        kernel = KERNELS[name] if name != "rational_quadratic" else F.RationalQuadratic(lengthscale=d**0.5)
        kind, parameters = kernel._op(d)
        value, *wanted = oracle.mmd(x, y, kind, tuple(parameters), estimator)
        size = d**0.5 if kind == "energy" else len(parameters) - (kind == "rational_quadratic")  # k(0), or a distance
        with backend.force(run):
            result = F.mmd(x, y, kernel=kernel, estimator=estimator)
            gradients = torch.autograd.grad(result, (x, y))
        assert abs(float(result.detach()) - float(value)) <= 1e-5 * abs(float(value)) + 2e-7 * size, d
        for g, w in zip(gradients, wanted, strict=True):
            close(g, w, 1e-4)
        total = sum(g.double().sum(0) for g in gradients)
        assert total.norm() <= 1e-4 * sum(g.norm() for g in gradients), d


@pytest.mark.parametrize("run", RUNS)
def test_layouts(run: str) -> None:
    base = torch.randn(2, 11, 60, dtype=torch.float64)
    x, y = base[0].T, base[1].T[::2]
    with backend.force(run):
        assert torch.equal(F.mmd(x, y), F.mmd(x.contiguous(), y.contiguous()))


def test_gradients_of_a_strided_view() -> None:
    base = torch.randn(11, 60, dtype=torch.float64, requires_grad=True)
    y = torch.randn(9, 11, dtype=torch.float64)
    copy = base.detach().T.contiguous().requires_grad_()
    F.mmd(base.T, y).backward()
    F.mmd(copy, y).backward()
    assert base.grad is not None
    assert copy.grad is not None
    assert torch.equal(base.grad.T, copy.grad)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", KERNELS)
def test_gradcheck(name: str, run: str) -> None:
    x, y = (p.requires_grad_() for p in points(5, 4, 3))
    with backend.force(run):
        assert torch.autograd.gradcheck(lambda a, b: F.mmd(a, b, kernel=KERNELS[name]), (x, y))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_points_give_nan(bad: float, name: str, run: str) -> None:
    for where in (0, 1):
        pair = list(points(40, 30, 4, torch.float32))
        pair[where][7, 2] = bad
        with backend.force(run):
            assert F.mmd(*pair, kernel=KERNELS[name]).isnan()
            pair[0].requires_grad_()
            result = F.mmd(*pair, kernel=KERNELS[name])
            result.backward()
            assert result.isnan()
            assert pair[0].grad is not None
            assert not pair[0].grad.isfinite().all()


@pytest.mark.parametrize("run", [*RUNS, "triton"])
@pytest.mark.parametrize("name", KERNELS)
def test_points_whose_squares_overflow_give_nan(name: str, run: str) -> None:
    """And not what is known of points out of each other's reach: all at one place out there, they are near."""
    single, double = torch.float32, torch.float64
    for dtype, where in ((single, 1e20), (single, 1e25), (single, 3e38), (double, 1e155), (double, 1e300)):
        for rows in (slice(3, 4), slice(None)):
            x, y = points(12, 9, 4, dtype)
            x[rows, 1] = where
            with backend.force(run):
                result = F.mmd(x.requires_grad_(), y, kernel=KERNELS[name], precision="ieee")
                result.backward()
            assert result.isnan(), (dtype, where, rows)
            assert x.grad is not None
            # The slope of a linear kernel is 1 everywhere.
            assert name == "polynomial_linear" or not x.grad.isfinite().all(), (dtype, where, rows)


@pytest.mark.parametrize("run", [*RUNS, "triton"])
@pytest.mark.parametrize(
    "kernel",
    [
        F.IMQ((1e-12, 1.0)),
        F.IMQ((1.0, 1e6, 1e12)),
        F.RBF((1e-12, 1.0)),
        F.RBF((1.0, 1e6, 1e12)),
        F.Laplacian((1e-12, 1.0)),
        F.Laplacian((1.0, 1e12)),
        F.RationalQuadratic((1e-12, 1.0)),
        F.RationalQuadratic((1e4, 1e8)),
        F.RationalQuadratic((1.0, 1e12)),
    ],
)
def test_parameters_far_apart(kernel: F.IMQ, run: str, oracle: ModuleType) -> None:
    x, y = points(20, 15, 3, torch.float32)
    kind, parameters = kernel._op(3)
    if kind == "rational_quadratic":  # 1 + a float64 would lose what a large power asks for
        at_infinity = [0.5 / parameters[0] ** 2] * sum(p > 1e6 for p in parameters[1:])
        small = [p for p in parameters[1:] if p <= 1e6]
        wanted = [oracle.mmd(x, y, kind, (parameters[0], *small), "unbiased")] if small else []
        wanted += [oracle.mmd(x, y, "rbf", tuple(at_infinity), "unbiased")] if at_infinity else []
        value, gx, _ = (sum(parts) for parts in zip(*wanted, strict=True))
    else:
        value, gx, _ = oracle.mmd(x, y, kind, tuple(parameters), "unbiased")
    x.requires_grad_()
    with backend.force(run):
        got = F.mmd(x, y, kernel=kernel, precision="ieee")
        got.backward()
    assert abs(float(got.detach()) - float(value)) <= 2e-6
    close(x.grad, gx, 1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_far_apart_and_far_from_the_origin(run: str, oracle: ModuleType) -> None:
    # A shift common to both costs nothing; one of the samples against the other costs digits of the distances within.
    x, y = points(50, 60, 8, torch.float32)
    kind, parameters = F.IMQ()._op(8)
    cases = ((x + 1024, y + 1024, 2e-6), (x, y + 20, 2e-5), (x * 1e6, y * 1e6, 2e-6), (x * 1e-6, y * 1e-6, 2e-6))
    for a, b, tolerance in cases:
        value, gx, _ = oracle.mmd(a, b, kind, tuple(parameters), "unbiased")
        a = a.clone().requires_grad_()
        with backend.force(run):
            result = F.mmd(a, b)
            result.backward()
        assert abs(float(result.detach()) - float(value)) < tolerance
        assert a.grad is not None
        if a.abs().max() > 1e-3:
            close(a.grad, gx, 2e-4)
    wide = F.RBF((1e-3,))
    with backend.force(run):
        assert float(F.mmd(x, y, kernel=wide, estimator="biased")) == pytest.approx(1 / 50 + 1 / 60, rel=1e-6)
        assert float(F.mmd(x, y, kernel=wide)) == 0.0


@pytest.mark.parametrize(("n", "m", "d"), [(700, 650, 9), (150, 300, 9), (20, 31, 3)])
def test_same_bits_for_any_number_of_threads(n: int, m: int, d: int) -> None:
    before = torch.get_num_threads()
    x, y = points(n, m, d, torch.float32)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            value = F.mmd(a, b)
            value.backward()
            stacked = F.mmd(torch.stack([x] * 3), torch.stack([y] * 3))
            assert torch.equal(stacked, F.mmd(x, y).expand(3))
            assert a.grad is not None
            assert b.grad is not None
            results.append((value.detach(), a.grad, b.grad, stacked[0]))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("prior", "scale"), [("normal", 1.0), ("normal", 0.7), ("sphere", 1.0), ("uniform", 1.0)])
def test_wae_is_the_authors_formula(prior: str, scale: float, oracle: ModuleType) -> None:
    qz, pz = points(100, 100, 8)
    base = {"normal": 2 * 8 * scale**2, "sphere": 2.0, "uniform": 8.0}[prior]
    copy = qz.clone().requires_grad_()
    expected = oracle.wae_penalty(copy, pz, base)
    (gradient,) = torch.autograd.grad(expected, copy)
    qz.requires_grad_()
    got = F.wae_mmd(qz, pz, prior=prior, prior_scale=scale)
    got.backward()
    assert float(got.detach()) == pytest.approx(float(expected.detach()), abs=2e-14)
    assert qz.grad is not None
    close(qz.grad, gradient, 1e-12)


@pytest.mark.filterwarnings("ignore:.*TF32.*")
def test_compiles_whole_and_once_for_every_n() -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.mmd(x * 2, y) + F.wae_mmd(x, x.detach() * 0.5) + F.mmd(x, y, kernel=F.RBF((1.0, 2.0)))

    for n in (10, 23, 57):
        x, y = points(n, n + 1, 4)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch._dynamo.mark_dynamic(a, 0)
        got = loss(a, y)
        got.backward()
        want = F.mmd(b * 2, y) + F.wae_mmd(b, b.detach() * 0.5) + F.mmd(b, y, kernel=F.RBF((1.0, 2.0)))
        want.backward()
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(a.grad, b.grad)
    assert count.frame_count == 1


@pytest.mark.parametrize("name", ["imq", "polynomial"])
@pytest.mark.parametrize("run", RUNS)
def test_autocast_sums_in_float32(name: str, run: str) -> None:
    x, y = points(60, 50, 8, torch.float32)
    with backend.force(run):
        plain = F.mmd(x, y, kernel=name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(F.mmd(x, y, kernel=name), plain)
            mixed = F.mmd(x.bfloat16(), y, kernel=name)
        assert torch.equal(mixed, F.mmd(x.bfloat16().float(), y, kernel=name))


@pytest.mark.parametrize("grad", [True, False])
def test_points_kept_from_a_transform_that_is_over(grad: bool) -> None:
    x, y, kept = torch.randn(9, 3), torch.randn(8, 3), []
    torch.func.grad(lambda a: (kept.append(2 * a), a.sum())[1])(x)
    assert torch._C._functorch.is_functorch_wrapped_tensor(kept[0])
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(F.mmd(kept[0], y), F.mmd(2 * x, y), rtol=0, atol=2e-6)
        torch.testing.assert_close(F.mmd(y, kept[0]), F.mmd(y, 2 * x), rtol=0, atol=2e-6)


def test_vmap_raises() -> None:
    x = torch.randn(3, 5, 2, requires_grad=True)
    for points in (x, x.detach()):
        with pytest.raises(NotImplementedError, match=r"vmap is not built; what works: points of shape \[B, N, D\]"):
            torch.vmap(F.mmd)(points, torch.randn(3, 4, 2))


ok = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((ok, torch.zeros(4, 2)), ValueError, r"y: expected shape \[M, 3\] .* got \[4, 2\]"),
        ((ok, torch.zeros(2, 4, 3)), ValueError, r"y: expected shape \[M, 3\]"),
        ((torch.zeros(2, 4, 3), torch.zeros(3, 4, 3)), ValueError, r"y: expected shape \[2, M, 3\]"),
        ((ok[0], ok), ValueError, "x: expected 2 or 3 dimensions"),
        ((ok, ok.double()), TypeError, "y: expected the dtype of x, float32, got float64"),
        ((ok.int(), ok.int()), TypeError, "x: expected float64 or float32"),
        ((ok.tolist(), ok), TypeError, "x: expected a torch.Tensor, got list"),
        ((ok, ok.to_sparse()), TypeError, "y: expected a dense tensor"),
        ((ok, ok.to("meta")), ValueError, "y: expected the device of x, cpu, got meta"),
        ((ok[:0], ok), ValueError, "x: expected at least 2 points"),
        ((ok, ok[:1]), ValueError, "y: expected at least 2 points"),
        ((ok[:, :0], ok[:, :0]), ValueError, "x: expected at least 1 coordinate"),
    ],
)
def test_bad_points(arguments: tuple, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        F.mmd(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"kernel": "gauss"}, ValueError, "kernel: expected one of 'imq'.* got 'gauss'"),
        ({"kernel": 3}, TypeError, "kernel: expected IMQ, RBF, .*, Polynomial or a name, got int 3"),
        ({"estimator": "jackknife"}, ValueError, "estimator: expected one of"),
        ({"precision": "fp8"}, ValueError, "precision: expected one of"),
        ({"x_weight": [1.0] * 4}, TypeError, "x_weight: expected a torch.Tensor, got list"),
        ({"x_weight": torch.ones(4, dtype=torch.int64)}, TypeError, "x_weight: expected float64 or float32"),
        ({"y_weight": torch.ones(4)}, ValueError, r"y_weight: expected shape \[5\] to go with y, got \[4\]"),
        ({"x_weight": torch.ones(2, 4)}, ValueError, r"x_weight: expected shape \[4\] to go with x, got \[2, 4\]"),
        ({"x_weight": torch.tensor([1, 1, -0.5, 1])}, ValueError, "x_weight: expected no negative weight, got -0.5"),
        ({"y_weight": torch.zeros(5)}, ValueError, "y_weight: expected weights that do not sum to zero"),
        ({"y_weight": torch.ones(5, device="meta")}, ValueError, "y_weight: expected the device of y, cpu, got meta"),
        ({"estimator": "u_statistic"}, ValueError, "y: expected as many points as x"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        F.mmd(ok, torch.zeros(5, 3), **options)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: F.IMQ(scales=(1.0, 0.0)), ValueError, "scales: expected a finite number > 0"),
        (lambda: F.IMQ(scales=()), ValueError, "scales: expected at least one"),
        (lambda: F.IMQ(scales="1"), TypeError, "scales: expected a tuple of numbers"),
        (lambda: F.IMQ(base=-1.0), ValueError, "base: expected a finite number > 0"),
        (lambda: F.RBF((float("nan"),)), ValueError, "bandwidths: expected a finite number > 0"),
        (lambda: F.Laplacian((1.0, -1.0)), ValueError, "bandwidths: expected a finite number > 0"),
        (lambda: F.RationalQuadratic(alphas=(0.0,)), ValueError, "alphas: expected a finite number > 0"),
        (
            lambda: F.IMQ(scales=(1.0, 1e-30)),
            ValueError,
            r"scales: expected numbers within a factor of 1e\+12, got 1e-30",
        ),
        (lambda: F.RBF((1.0, 1e13)), ValueError, "bandwidths: expected numbers within a factor of"),
        (lambda: F.Laplacian((1e-30, 1.0)), ValueError, "bandwidths: expected numbers within a factor of"),
        (lambda: F.RationalQuadratic(alphas=(1e13,)), ValueError, "alphas: expected a finite number > 0 .* got 1"),
        (lambda: F.RationalQuadratic(lengthscale=0), ValueError, "lengthscale: expected a finite number > 0"),
        (lambda: F.Polynomial(degree=0), ValueError, "degree: expected an integer >= 1"),
        (lambda: F.Polynomial(gamma=0), ValueError, "gamma: expected a finite number > 0"),
        (lambda: F.Polynomial(coef=-1), ValueError, "coef: expected a finite number >= 0"),
        (lambda: F.wae_mmd(ok, ok[:3]), ValueError, "sample_pz: expected sample_qz's shape"),
        (lambda: F.wae_mmd(ok, ok, prior="cauchy"), ValueError, "prior: expected one of"),
        (lambda: F.wae_mmd(ok, ok, prior_scale=0), ValueError, "prior_scale: expected a finite number > 0"),
    ],
)
def test_bad_kernels_and_wae(make: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()  # type: ignore[operator]


def test_the_biased_estimator_takes_single_points_and_equal_samples_are_at_zero() -> None:
    x = torch.randn(1, 3, dtype=torch.float64)
    assert float(F.mmd(x, x, estimator="biased")) == pytest.approx(0, abs=1e-12)
    y = torch.randn(20, 3, dtype=torch.float64)
    assert float(F.mmd(y, y, estimator="biased")) == pytest.approx(0, abs=1e-12)
    assert float(F.mmd(y, y, estimator="u_statistic")) == pytest.approx(0, abs=1e-12)
    assert float(F.mmd(y, y)) < 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_on_the_gpu(name: str, estimator: str, precision: str, oracle: ModuleType) -> None:
    for n, m, d in [*SHAPES, (300, 257, 128), (1000, 700, 64)]:
        x, y = points(n, n if estimator == "u_statistic" else m, d, torch.float32)
        kind, parameters = KERNELS[name]._op(d)
        value, gx, gy = oracle.mmd(x, y, kind, tuple(parameters), estimator)
        a, b = x.cuda().requires_grad_(), y.cuda().requires_grad_()
        result = F.mmd(a, b, kernel=KERNELS[name], estimator=estimator, precision=precision)
        result.backward()
        scale = max(float(len(parameters) or 1), abs(float(value)))
        assert abs(float(result.detach()) - float(value)) <= 1e-5 * scale, (n, m, d)
        assert a.grad is not None
        assert b.grad is not None
        close(a.grad.cpu(), gx, 1e-4)
        close(b.grad.cpu(), gy, 1e-4)
        again = F.mmd(x.cuda(), y.cuda(), kernel=KERNELS[name], estimator=estimator, precision=precision)
        assert abs(float(again) - float(value)) <= 1e-5 * scale
        c = x.cuda().requires_grad_()
        F.mmd(c, y.cuda(), kernel=KERNELS[name], estimator=estimator, precision=precision).backward()
        assert c.grad is not None
        close(c.grad.cpu(), gx, 1e-4)


def test_forward_mode_is_refused() -> None:
    x, y = torch.randn(10, 3), torch.randn(10, 3)
    for call in (F.mmd, F.energy_distance, F.wae_mmd, F.median_squared_distance):
        with pytest.raises(NotImplementedError, match="forward-mode AD is not built"):
            torch.func.jvp(lambda a, call=call: call(a, y), (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            call(x, y)  # without a tangent there is nothing to lose


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: F.RBF((1e-200,)), "bandwidths"),
        (lambda: F.IMQ(base=10**400), "base"),
        (lambda: F.RationalQuadratic(lengthscale=1e200), "lengthscale"),
        (lambda: F.wae_mmd(torch.randn(4, 2), torch.randn(4, 2), prior_scale=1e200), "prior_scale"),
    ],
)
def test_parameters_out_of_range_are_named(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
