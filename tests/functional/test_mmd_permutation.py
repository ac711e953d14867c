"""The permutation test against brute force, and its level and power; the energy distance against its definition."""

import itertools
import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from fastgen import functional as F
from fastgen.ops import backend
from fastgen.reference import mmd_permutation as reference

KERNELS = {
    "imq": F.IMQ(),
    "rbf": F.RBF((0.5, 2.0)),
    "laplacian": F.Laplacian((1.0,)),
    "energy": F.Energy(),
    "rational_quadratic": F.RationalQuadratic(),
    "polynomial": F.Polynomial(),
}


def matrix(z: Tensor, name: str) -> Tensor:
    """The kernel of every two rows of z, as its formula reads."""
    d = z.shape[1]
    squared = (z[:, None] - z).square().sum(-1)
    if name == "imq":
        return sum(2 * d * s / (2 * d * s + squared) for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0))  # type: ignore[return-value]
    if name == "rbf":
        return torch.exp(-squared / 0.5) + torch.exp(-squared / 8)
    if name == "laplacian":
        return torch.exp(-squared.sqrt())
    if name == "energy":
        return -squared.sqrt()
    if name == "polynomial":
        return (z @ z.T / d + 1) ** 3
    alphas = F.RationalQuadratic()._op(d)[1]
    return sum((1 + squared / (2 * a * alphas[0] ** 2)) ** -a for a in alphas[1:])  # type: ignore[return-value]


def brute(k: Tensor, members: list[int], estimator: str) -> float:
    """MMD² of the rows in `members` and the others, out of the whole kernel matrix."""
    others = [i for i in range(len(k)) if i not in set(members)]
    xx, yy, xy = k[members][:, members], k[others][:, others], k[members][:, others]
    if estimator == "biased":
        return float(xx.mean() + yy.mean() - 2 * xy.mean())
    n, m = len(xx), len(yy)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * xy.mean())


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("n", "m", "d"), [(13, 22, 3), (31, 7, 1)])
def test_every_permutation_is_brute_forces(
    name: str, estimator: str, n: int, m: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "BLOCK", 500)  # several slabs
    x, y = torch.randn(n, d, dtype=torch.float64) + 3, 1.2 * torch.randn(m, d, dtype=torch.float64) + 3
    got = F.mmd_permutation_test(x, y, kernel=KERNELS[name], n_permutations=40, seed=5, estimator=estimator)
    k = matrix(torch.cat([x, y]), name)
    random = torch.Generator().manual_seed(5)
    null = [brute(k, torch.randperm(n + m, generator=random)[:n].tolist(), estimator) for _ in range(40)]
    statistic = brute(k, list(range(n)), estimator)
    scale = float(k.abs().max())
    assert float(got.statistic) == pytest.approx(statistic, abs=1e-13 * scale)
    assert got.null.tolist() == pytest.approx(null, abs=1e-13 * scale)
    assert float(got.p_value) == pytest.approx((1 + sum(v >= statistic for v in null)) / 41, abs=1e-15)
    assert float(F.mmd(x, y, kernel=KERNELS[name], estimator=estimator)) == pytest.approx(statistic, abs=1e-12 * scale)


def test_the_p_value_is_the_exact_one_in_the_limit() -> None:
    """With seven points all 35 splits can be tried; ties, among them the split itself, count."""
    x, y = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64) + 1
    k = matrix(torch.cat([x, y]), "imq")
    values = [brute(k, list(members), "unbiased") for members in itertools.combinations(range(7), 3)]
    exact = sum(v >= values[0] - 1e-12 for v in values) / 35
    got = float(F.mmd_permutation_test(x, y, kernel="imq", n_permutations=4000).p_value)
    assert abs(got - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000) + 1 / 4000
    # As many points on either side: the split and its mirror image are one, and never below the statistic.
    both = F.mmd_permutation_test(x, y[:3], kernel="imq", n_permutations=4000)
    assert float(both.p_value) >= 0.1 * 0.85


def rejections(draw_y: object, trials: int, **options: object) -> int:
    rejected = 0
    for trial in range(trials):
        random = torch.Generator().manual_seed(trial)
        x = torch.randn(40, 2, generator=random)
        y = draw_y(torch.randn(30, 2, generator=random))  # type: ignore[operator]
        p = F.mmd_permutation_test(x, y, n_permutations=99, seed=trial, **options).p_value  # type: ignore[arg-type]
        rejected += bool(p <= 0.1)
    return rejected


@pytest.mark.parametrize("kernel", ["rbf", "median", "energy"])
def test_the_level_is_kept(kernel: str) -> None:
    """p <= 0.1 in a tenth of trials where nothing differs: a binomial of 300, within 3.3 standard deviations."""
    assert abs(rejections(lambda y: y, 300, kernel=kernel) - 30) < 3.3 * math.sqrt(300 * 0.1 * 0.9)


@pytest.mark.parametrize("kernel", ["rbf", "median"])
def test_it_has_power_against_shift_and_spread(kernel: str) -> None:
    assert rejections(lambda y: y + 1.0, 40, kernel=kernel) >= 38
    assert rejections(lambda y: y * 3.0, 40, kernel=kernel) >= 36


def test_the_median_kernel_knows_no_scale() -> None:
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64) + 0.4
    plain, scaled = (F.mmd_permutation_test(s * x, s * y, kernel="median", n_permutations=50) for s in (1.0, 1e4))
    assert scaled.null.tolist() == pytest.approx(plain.null.tolist(), abs=1e-11)
    median = F.median_squared_distance(torch.cat([x, y]))
    width = float(median / 2) ** 0.5
    assert float(plain.statistic) == pytest.approx(float(F.mmd(x, y, kernel=F.RBF((width,)))), abs=1e-12)


def test_seeds_dtypes_and_layouts() -> None:
    x, y = torch.randn(5, 20).T, torch.randn(60, 5)[::2]
    first = F.mmd_permutation_test(x, y, n_permutations=30)
    assert first.null.shape == (30,)
    assert {t.dtype for t in first} == {torch.float64}
    assert torch.equal(first.null, F.mmd_permutation_test(x, y, n_permutations=30).null)
    assert not torch.equal(first.null, F.mmd_permutation_test(x, y, n_permutations=30, seed=1).null)
    wide = F.mmd_permutation_test(x.double(), y.double(), n_permutations=30)
    assert torch.equal(first.null, wide.null)
    half = F.mmd_permutation_test(x.bfloat16(), y.bfloat16(), n_permutations=30)
    assert torch.equal(
        half.null, F.mmd_permutation_test(x.bfloat16().float(), y.bfloat16().float(), n_permutations=30).null
    )
    assert not F.mmd_permutation_test(x.requires_grad_(), y).statistic.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", [*KERNELS, "median"])
def test_what_is_not_finite_is_nan(kernel: str, bad: float) -> None:
    x, y = torch.randn(10, 2), torch.randn(9, 2)
    x[3, 1] = bad
    result = F.mmd_permutation_test(x, y, kernel=kernel, n_permutations=5)
    assert result.statistic.isnan()
    assert result.p_value.isnan()
    assert result.null.isnan().all()


ok = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((ok, ok[:, :2]), {}, ValueError, r"y: expected shape \[M, 3\]"),
        ((ok, ok.double()), {}, TypeError, "y: expected the dtype of x"),
        ((ok[:1], ok), {}, ValueError, "x: expected at least 2 points"),
        ((ok.int(), ok.int()), {}, TypeError, "x: expected float64"),
        ((ok, ok), {"n_permutations": 0}, ValueError, "n_permutations: expected an integer >= 1"),
        ((ok, ok), {"seed": -1}, ValueError, "seed: expected"),
        ((ok, ok), {"kernel": "gauss"}, ValueError, "kernel: expected one of"),
        ((ok, ok), {"estimator": "u_statistic"}, ValueError, "estimator: expected one of 'unbiased', 'biased'"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        F.mmd_permutation_test(*arguments, **options)


@pytest.mark.parametrize("run", ["cpp", "reference"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased", "u_statistic"])
def test_energy_distance_is_its_definition(estimator: str, run: str) -> None:
    x = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    m = 40 if estimator == "u_statistic" else 23
    y = (1.5 * torch.randn(m, 5, dtype=torch.float64)).requires_grad_()

    def mean(a: Tensor, b: Tensor, off_diagonal: bool) -> Tensor:
        squared = (a[:, None] - b).square().sum(-1)
        distance = torch.where(squared == 0, 0.0, squared.clamp_min(1e-300)).sqrt()
        keep = ~torch.eye(len(a), len(b), dtype=torch.bool) if off_diagonal else torch.ones_like(squared).bool()
        return distance[keep].sum() / keep.sum()

    masked = estimator != "biased"
    xx, yy = ((p[:, None] - p + torch.eye(len(p))[:, :, None]).square().sum(-1).sqrt() for p in (x, y))
    within = sum(
        (d * (1 - torch.eye(len(d)))).sum() / (len(d) * (len(d) - 1) if masked else len(d) ** 2) for d in (xx, yy)
    )
    want = 2 * mean(x, y, estimator == "u_statistic") - within
    with backend.force(run):
        got = F.energy_distance(x, y, estimator=estimator)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    for a, b in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_energy_distance_in_one_dimension_is_scipys() -> None:
    x, y = torch.randn(50, 1, dtype=torch.float64), torch.randn(31, 1, dtype=torch.float64) + 1
    want = scipy.stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert float(F.energy_distance(x, y)) == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match="estimator: expected one of"):
        F.energy_distance(x, y, estimator="mean")
