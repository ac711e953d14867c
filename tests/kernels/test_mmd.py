"""What the Triton kernels compute, interpreted: the large samples' and the one launch of small ones, same tests."""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from fastgen.kernels import mmd_launch, mmd_small
from torch import Tensor

from fastgen.ops.mmd import coefficients, inverse_pairs

KERNELS = {
    "imq_pairs": ("imq", [s * 9.0 for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]),
    "imq": ("imq", [0.9, 3.0, 20.0]),
    "rbf": ("rbf", [0.01, 0.1, 1.0]),
    "rational_quadratic": ("rational_quadratic", [2.0, 0.2, 1.0, 5.0]),
    "laplacian": ("laplacian", [0.2, 1.0]),
    "energy": ("energy", []),
    "polynomial": ("polynomial", [3.0, 0.1, 1.0]),
    "linear": ("polynomial", [1.0, 0.3, 0.0]),
}
TERMS = (mmd_launch.XX, mmd_launch.YY, mmd_launch.XY)


ROUNDED = [name for name, (kind, _) in KERNELS.items() if kind not in mmd_launch.EXACT]


@pytest.fixture(params=["large", "small"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Samples of any size by the large ones' kernels; or by the small ones', which leave their counters at zero."""
    if request.param == "large":
        monkeypatch.setattr(mmd_small, "MOST", 0)
    yield request.param
    for _, made in mmd_small._kept.values():
        assert not made.any()


def run(x: Tensor, y: Tensor, name: str, estimator: str, sides: int, *args: Any, **more: Any) -> tuple[Tensor, ...]:
    kind, parameters = KERNELS[name]
    pairs = inverse_pairs(parameters) if kind == "imq" else None
    assert (pairs is not None) == (name == "imq_pairs")
    assert mmd_small.fits(x, y) == (mmd_small.MOST > 0)
    precision = more.pop("precision", "ieee")
    return mmd_launch.mmd(x, y, sides, precision, pairs, kind, parameters, estimator, *args, **more)


def holds(got: tuple[Tensor, ...], want: tuple[Tensor, ...], parameters: list[float], relative: float = 5e-6) -> None:
    assert [g.dtype for g in got] == [torch.float32] * len(got)
    size = max(len(parameters), 1) + want[0].abs().max()
    assert (got[0].double() - want[0]).abs().max() <= 4e-7 * size
    for g, w in zip(got[1:], want[1:], strict=False):
        assert g.shape == w.shape
        assert (g.double() - w).norm() <= relative * w.norm()


# (N, M, D): less than a tile, one tile and one more, two tiles of X, D below the least and no power of two
SHAPES = {
    "large": ((5, 3, 1), (128, 129, 16), (140, 130, 33)),
    "small": ((5, 3, 1), (64, 65, 16), (70, 130, 33)),
}


@pytest.mark.parametrize("size", range(3))
@pytest.mark.parametrize("name", KERNELS)
def test_against_the_oracle(name: str, size: int, way: str, oracle: ModuleType) -> None:
    kind, parameters = KERNELS[name]
    n, m, d = SHAPES[way][size]
    # Together every estimator with every side, on the small shape and on large ones.
    cases = {
        1: [("unbiased", 0), ("unbiased", 1), ("biased", 2), ("u_statistic", 2)],
        16: [("biased", 0), ("biased", 1), ("unbiased", 2)],
        33: [("u_statistic", 0), ("u_statistic", 1), ("u_statistic", 2), ("unbiased", 1)],
    }
    for estimator, sides in cases[d]:
        x, y = torch.randn(n, d), torch.randn(n if estimator == "u_statistic" else m, d) * 1.2 + 0.3
        got = run(x, y, name, estimator, sides)
        assert len(got) == sides + 1
        # On a line there are close points, which pull at each other by w z_j − w z_i with a large w.
        relative = 5e-5 if d == 1 and kind in mmd_launch.ROOTED else 5e-6
        holds(got, oracle.mmd(x, y, kind, tuple(parameters), estimator), parameters, relative)


@pytest.mark.parametrize("way", ["large"], indirect=True)
@pytest.mark.parametrize("name", ROUNDED)
def test_halves(name: str, way: str, oracle: ModuleType) -> None:
    """In the default precision points are pairs of bfloat16: held to what is asked of it, far from the origin, of
    several tiles of rows and columns, weighted, of one side and in a batch."""
    kind, parameters = KERNELS[name]
    # Within X, between the two, and within Y tiles meet from both sides, and a tile itself.
    n, m, d = 140, 270, 20
    x, y = torch.randn(n, d) + 10, torch.randn(m, d) * 1.2 + 10.3
    p = torch.rand(n, dtype=torch.float64) + 0.1
    p /= p.sum()
    q = torch.full((m,), 1 / m, dtype=torch.float64)
    more = {"x_weight": p.float(), "y_weight": q.float(), "coefficients": torch.ones(3, dtype=torch.float64)}
    cases: list[tuple[str, int, dict[str, Any]]] = [("unbiased", 2, {}), ("unbiased", 1, {}), ("biased", 2, more)]
    for estimator, sides, options in cases:
        want = oracle.mmd(x, y, kind, tuple(parameters), estimator, *((p, q) if options else ()))
        got = run(x, y, name, estimator, sides, precision="bf16x3", **options)
        assert abs(float(got[0]) - float(want[0])) <= 1e-5 * abs(float(want[0])) + 2e-7 * len(parameters)
        for g, w in zip(got[1:], want[1:], strict=False):
            assert (g.double() - w).norm() <= 1e-4 * w.norm()
    batch = run(torch.stack([y[:3], x[:3]]), torch.stack([x[:4], y[:4]]), name, "unbiased", 0, precision="bf16x3")[0]
    alone = [run(a, b, name, "unbiased", 0, precision="bf16x3")[0] for a, b in ((y[:3], x[:4]), (x[:3], y[:4]))]
    assert torch.equal(batch, torch.stack(alone))


@pytest.mark.parametrize("name", ROUNDED)
def test_in_the_default_precision(name: str, way: str, oracle: ModuleType) -> None:
    """Products of halves in bfloat16, far from the origin; on a line every pair is close, and there are few of them."""
    kind, parameters = KERNELS[name]
    for items, n, m, d, estimator in ((8, 5, 3, 1, "biased"), (1, 40, 30, 8, "unbiased"), (1, 70, 40, 64, "biased")):
        x, y = torch.randn(items, n, d) + 100, torch.randn(items, m, d) * 1.2 + 100.3
        want = oracle.mmd(x, y, kind, tuple(parameters), estimator)
        got = run(x, y, name, estimator, 2, precision="bf16x3")
        bound = 1e-5 * want[0].abs() + 1e-6 * len(parameters)
        assert ((got[0].double() - want[0]).abs() <= bound).all()
        for g, w in zip(got[1:], want[1:], strict=True):
            assert (g.double() - w).norm() <= 1e-4 * w.norm()


@pytest.mark.parametrize("name", ["imq_pairs", "rbf"])
def test_clusters_in_the_default_precision(name: str, way: str, oracle: ModuleType) -> None:
    """Points of a cluster have nearly equal high halves: what their low ones make together is as large in all pairs."""
    kind, parameters = KERNELS[name]
    centre = torch.randn(4, 8) * 3
    x = (centre[:, None] + 0.1 * torch.randn(4, 10, 8)).flatten(0, 1)
    y = (centre[:, None] + 0.12 * torch.randn(4, 8, 8)).flatten(0, 1)
    want = oracle.mmd(x, y, kind, tuple(parameters), "unbiased")
    got = run(x, y, name, "unbiased", 2, precision="bf16x3")
    assert abs(float(got[0]) - float(want[0])) <= 1e-5 * abs(float(want[0])) + 2e-7 * len(parameters)
    for g, w in zip(got[1:], want[1:], strict=True):
        assert (g.double() - w).norm() <= 3e-4 * w.norm()


def test_what_halves_are_not_exact_enough_for() -> None:
    """Roots and polynomials take better products where these are asked for."""
    for kind in ("energy", "laplacian", "polynomial"):
        got = [mmd_launch.product_precision(kind, p) for p in ("tf32", "bf16x3", "tf32x3", "ieee")]
        assert got == ["bf16x6", "bf16x6", "tf32x3", "ieee"]
    assert mmd_launch.product_precision("imq", "bf16x3") == "bf16x3"


@pytest.mark.parametrize("name", ["imq_pairs", "rbf"])
def test_halves_keep_what_is_no_number_and_what_is_far(name: str, way: str) -> None:
    for bad in (float("nan"), float("inf"), 1e18):
        x, y = torch.randn(20, 3), torch.randn(22, 3)
        y[7, 1] = bad
        for sides in (0, 1):
            assert run(x, y, name, "unbiased", sides, precision="bf16x3")[0].isnan()
    far = run(x[:9], torch.cat([y[8:9], y[8:9] + 1e12]), name, "unbiased", 1, precision="bf16x3")
    assert all(part.isfinite().all() for part in far)


@pytest.mark.parametrize("name", KERNELS)
def test_weights(name: str, way: str, oracle: ModuleType) -> None:
    """Those of `F.mmd` sum to one, and the coefficients are of what is left of them."""
    kind, parameters = KERNELS[name]
    x, y = torch.randn(2, 21, 3), torch.randn(2, 70, 3) * 1.2
    p = torch.rand(21, dtype=torch.float64)  # the same for each of a batch
    q = torch.rand(2, 70, dtype=torch.float64)
    q[..., 3] = 0
    p, q = p / p.sum(), q / q.sum(-1, keepdim=True)
    want = oracle.mmd(x, y, kind, tuple(parameters), "biased", p, q)
    more = {"x_weight": p.float(), "y_weight": q.float(), "coefficients": torch.ones(3, dtype=torch.float64)}
    for sides in (1, 2):
        holds(run(x, y, name, "biased", sides, **more), want, parameters)
    want = oracle.mmd(x, y, kind, tuple(parameters), "biased", None, q)
    more = {"y_weight": q.float(), "coefficients": torch.tensor([1 / 21**2, 1, 1 / 21], dtype=torch.float64)}
    holds(run(x[0], y[0], name, "biased", 0, **{**more, "y_weight": q[0].float()}), (want[0][0],), parameters)


@pytest.mark.parametrize("name", ["imq_pairs", "energy", "polynomial"])
def test_terms_and_coefficients(name: str, way: str, oracle: ModuleType) -> None:
    """Each of the three sums alone, times a coefficient that is given; together they are the whole."""
    kind, parameters = KERNELS[name]
    n, m = 70, 15
    x, y = torch.randn(n, 3), torch.randn(m, 3) + 0.5
    a = torch.tensor([0.007, 0.002, 0.004], dtype=torch.float64)
    for estimator, sides in (("unbiased", 0), ("biased", 1), ("biased", 0), ("unbiased", 2)):
        own = torch.tensor(coefficients(n, m, estimator), dtype=torch.float64)
        whole = run(x, y, name, estimator, sides)
        parts = [run(x, y, name, estimator, sides, terms=t) for t in TERMS]
        for g, w in zip(whole, zip(*parts, strict=True), strict=True):
            assert (g - sum(w)).norm() <= 2e-6 * sum(part.norm() for part in w)
        scaled = run(x, y, name, estimator, sides, coefficients=a)
        for g, w in zip(scaled, zip(*parts, strict=True), strict=True):
            w = [part * float(f) for part, f in zip(w, a / own, strict=True)]
            assert (g - sum(w)).norm() <= 2e-6 * sum(part.norm() for part in w)
    b, c = x.double().requires_grad_(), y.double().requires_grad_()
    between = (oracle.kernel_matrix(b, c, kind, parameters) * (-2 / (n * m))).sum()
    want = (between.detach(), *torch.autograd.grad(between, (b, c)))
    holds(run(x, y, name, "unbiased", 2, terms=mmd_launch.XY), want, parameters)


def test_batches_and_dtypes(way: str, oracle: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(3, 70, 6).bfloat16(), torch.randn(3, 33, 6).bfloat16()
    want = oracle.mmd(x, y, *KERNELS["imq_pairs"], "unbiased")
    whole = run(x.mT.contiguous().mT, y, "imq_pairs", "unbiased", 2)
    assert whole[0].shape == (3,)
    holds(whole, want, KERNELS["imq_pairs"][1])
    for item in range(3):
        for a, b in zip(whole, run(x[item], y[item], "imq_pairs", "unbiased", 2), strict=True):
            assert torch.equal(a[item], b)
    monkeypatch.setattr(mmd_launch, "LARGEST_BATCH", 2)  # one too many for a launch
    for a, b in zip(whole, run(x, y, "imq_pairs", "unbiased", 2), strict=True):
        assert torch.equal(a, b)
    x, y = x.half(), y.half()
    holds(run(x, y, "energy", "unbiased", 2), oracle.mmd(x, y, "energy", (), "unbiased"), [])
    assert run(x[:0], y[:0], "energy", "unbiased", 1)[1].shape == (0, 70, 6)


@pytest.mark.parametrize(("name", "precision"), [(k, "ieee") for k in KERNELS] + [(k, "bf16x3") for k in ROUNDED])
@pytest.mark.parametrize(("bad", "places"), [(math.nan, ((0, 0), (1, 7))), (math.inf, ((0, 7), (1, 21)))])
def test_non_finite_points_give_nan(
    name: str, bad: float, places: tuple[tuple[int, int], ...], precision: str, way: str
) -> None:
    for where, row in places:
        pair = [torch.randn(20, 3), torch.randn(22, 3)]
        pair[where][row, 1] = bad
        value, gx = run(*pair, name, "unbiased", 1, precision=precision)
        assert value.isnan(), (where, row)
        assert not gx.isfinite().all()  # of a linear kernel it is a sum of points, and may be infinite
    assert run(*pair, name, "unbiased", 0, precision=precision)[0].isnan()


def test_points_out_of_reach_vanish(way: str) -> None:
    x, y = torch.randn(10, 2), torch.randn(12, 2) + 1e12
    for name in ("imq_pairs", "imq", "rbf", "rational_quadratic", "laplacian"):
        within_x = run(x, x[:2], name, "unbiased", 0)[0]
        assert within_x.isfinite()
        value, gx = run(x, y, name, "unbiased", 1)
        assert value.isfinite()
        assert gx.isfinite().all()
    for name in ("energy", "polynomial"):  # which do not: what overflows, points or pairs, is no number
        assert not run(x, y * 1e8, name, "unbiased", 0)[0].isfinite()
    apart = torch.eye(2) * 1.45e19  # whose distance alone overflows
    assert run(torch.zeros(2, 2), apart, "energy", "unbiased", 0)[0].isnan()
    flat = ("rational_quadratic", (2.0**-0.5, 0.01))  # a hundredth power: not small even there
    assert mmd_launch.mmd(torch.zeros(2, 2), apart, 0, "ieee", None, *flat, "unbiased")[0].isnan()


def test_close_pairs_keep_their_distance(way: str, oracle: ModuleType) -> None:
    """Clusters far from the centre: expanded, their distances would be rounding alone; equal points pull nowhere."""
    centre = torch.randn(4, 20) * 3
    x = (centre[:, None] + 1e-3 * torch.randn(4, 20, 20)).flatten(0, 1)
    y = (centre[:, None] + 1e-3 * torch.randn(4, 8, 20)).flatten(0, 1)
    y[:5] = x[:5]
    for name in ("laplacian", "energy"):
        kind, parameters = KERNELS[name]
        x64, y64 = x.double(), y.double()
        value, gx, gy = oracle.mmd(x64, y64, kind, tuple(parameters), "unbiased")
        got = run(x, y, name, "unbiased", 2)
        assert abs(float(got[0]) - float(value)) <= 2e-6 * abs(float(value)) + 1e-6
        assert (got[1].double() - gx).norm() <= 3e-3 * gx.norm()
        assert (got[2].double() - gy).norm() <= 3e-3 * gy.norm()
    same = torch.zeros(2, 3)
    value, gx, gy = run(same, same, "energy", "biased", 2)
    assert float(value) == 0
    assert not gx.any()
    assert not gy.any()


def test_the_same_bits_every_time(way: str) -> None:
    x, y = torch.randn(140, 5), torch.randn(9, 5)
    first, second = (run(x, y, "imq_pairs", "unbiased", 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
@pytest.mark.parametrize("name", KERNELS)
def test_on_the_gpu(name: str, precision: str, way: str, oracle: ModuleType) -> None:
    """Compiled: sides, weights, dtypes and odd shapes."""
    kind, parameters = KERNELS[name]
    pairs = inverse_pairs(parameters) if kind == "imq" else None
    for n, m, d, dtype in ((5, 3, 1, torch.float32), (128, 128, 8, torch.float32), (500, 300, 64, torch.bfloat16)):
        x, y = torch.randn(2, n, d).to(dtype), (torch.randn(2, m, d) * 1.2 + 0.3).to(dtype)
        p, q = (torch.rand(2, k, dtype=torch.float64) for k in (n, m))
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        ones = torch.ones(3, dtype=torch.float64)
        cuda = [t.cuda() for t in (x, y, p.float(), q.float(), ones)]
        for sides in (0, 1, 2):
            for weights in ((), (p, q)):
                want = oracle.mmd(x, y, kind, tuple(parameters), "biased", *weights)
                given = cuda[2:] if weights else []
                got = mmd_launch.mmd(*cuda[:2], sides, precision, pairs, kind, parameters, "biased", *given)
                size = max(len(parameters), 1) + float(want[0].abs().max())
                assert (got[0].cpu().double() - want[0]).abs().max() <= 1e-5 * size
                for g, w in zip(got[1:], want[1:], strict=False):
                    assert (g.cpu().double() - w).norm() <= 1e-4 * w.norm()
