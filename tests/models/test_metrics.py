"""The metrics against naive float64 definitions."""

import numpy as np
import pytest
import torch

from fastgen import metrics
from fastgen.data import Images
from fastgen.models.evaluation import Gaussian


def naive_kid(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    return float(
        (xx.sum() - np.trace(xx)) / n / (n - 1) + (yy.sum() - np.trace(yy)) / m / (m - 1) - 2 * kernel(x, y).mean()
    )


def naive_manifold(real: np.ndarray, fake: np.ndarray, k: int) -> list[float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))

    real_radius = np.sort(distances(real, real), 1)[:, k]
    fake_radius = np.sort(distances(fake, fake), 1)[:, k]
    between = distances(real, fake)
    inside = between < real_radius[:, None]
    return [
        inside.any(0).mean(),
        (between < fake_radius[None]).any(1).mean(),
        inside.sum(0).mean() / k,
        inside.any(1).mean(),
    ]


@pytest.mark.parametrize(("n", "m", "d"), [(40, 31, 5), (13, 64, 16)])
def test_against_definitions(n: int, m: int, d: int) -> None:
    random = np.random.default_rng(n)
    real, fake = random.normal(size=(n, d)).astype(np.float32), random.normal(0.4, 1.3, (m, d)).astype(np.float32)
    x, y = torch.from_numpy(real), torch.from_numpy(fake)
    assert metrics.kid(x, y) == pytest.approx(naive_kid(real.astype(float), fake.astype(float)), rel=1e-5, abs=1e-6)
    expected = naive_manifold(real.astype(float), fake.astype(float), 5)
    assert list(metrics.manifold(x, y, 5)) == pytest.approx(expected, abs=1e-12)
    assert metrics.manifold(x, y, 5, block=7) == metrics.manifold(x, y, 5)


def test_same_points_and_far_points() -> None:
    x = torch.randn(50, 4)
    same = metrics.manifold(x, x.clone())
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == pytest.approx(1)  # its own ball's centre, and k − 1 nearer than the k-th
    assert metrics.manifold(x, x + 1000) == (0, 0, 0, 0)


def test_a_tie_is_outside_the_ball() -> None:
    """Bytes as features: every other squared distance lies half-way between two float32 numbers."""
    x = torch.randint(0, 256, (60, 2500)).float()
    assert (x[0] - x[1]).double().square().sum() > 2**24
    copies = metrics.manifold(x, x[torch.randperm(60)], 3)
    assert copies == (1, 1, 1, 1)  # the third neighbour lies on the ball, not in it: k points in each


@pytest.mark.parametrize("k", [1, 3, 7])
def test_two_sample_accuracy(k: int) -> None:
    random = np.random.default_rng(k)
    real, fake = (random.normal(m, 1, (60, 3)).astype(np.float32) for m in (0, 0.7))
    fake[:9] = real[:9]  # ties with the other kind
    both = np.concatenate([real, fake]).astype(float)
    right = []
    for i, point in enumerate(both):
        others = [j for j in range(120) if j != i]
        # The other kind first among equals.
        others.sort(key=lambda j: (((both[j] - point) ** 2).sum(), (j < 60) == (i < 60)))
        right.append(sum((j < 60) == (i < 60) for j in others[:k]) > k / 2)
    got = metrics.two_sample(torch.from_numpy(real), torch.from_numpy(fake), k)
    assert got.real == pytest.approx(np.mean(right[:60]))
    assert got.fake == pytest.approx(np.mean(right[60:]))
    assert got.accuracy == pytest.approx(np.mean(right))


def test_two_sample_accuracy_of_copies_and_strangers() -> None:
    x = torch.randn(50, 4)
    assert metrics.two_sample(x, x.clone()) == (0, 0, 0)
    assert metrics.two_sample(x, x + 100) == (1, 1, 1)
    with pytest.raises(ValueError, match="k: expected an odd number, got 2"):
        metrics.two_sample(x, x, 2)
    with pytest.raises(ValueError, match="fake: expected as many points as real"):
        metrics.two_sample(x, x[:9])


def test_certainty() -> None:
    logits = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0, 9.0, 0], [0.1, 0, 0.2]])
    assert metrics.certainty(logits) == (0.75, 0.25)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="fake: expected more than k = 5 points, got 5"):
        metrics.manifold(torch.randn(9, 2), torch.randn(5, 2))
    with pytest.raises(TypeError, match="fake"):
        metrics.manifold(torch.randn(9, 2), torch.randn(9, 2).double())


def test_gaussian_baseline_has_the_datas_moments() -> None:
    x = torch.rand(300, 1, 2, 3) * 0.1 + 0.45
    drawn = Gaussian(x, rank=6).sample(40_000, seed=0)
    torch.testing.assert_close(drawn.mean(0), x.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn.flatten(1).T.cov(), x.flatten(1).T.cov(), atol=3e-5, rtol=0)


def test_evaluation_without_labels_says_so(tmp_path: object) -> None:
    from fastgen.check import UserError
    from fastgen.models.evaluation import evaluate

    images = Images("x.npy", torch.rand(10, 1, 8, 8), torch.rand(4, 1, 8, 8))
    with pytest.raises(UserError, match=r"needs labels, x\.npy has none"):
        evaluate(None, None, images, Gaussian(images.train, 1), name="glann")  # type: ignore[arg-type]


def test_manifold_of_ties_and_far_from_the_origin() -> None:
    real = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    fake = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]])
    assert metrics.manifold(real, fake, 1).precision == 0  # at the radius itself, √3, is not inside
    points, other = torch.randn(40, 4).double(), torch.randn(30, 4).double()
    offset = 1e8
    moved, there = points + offset, other + offset
    assert metrics.manifold(moved, there, 3) == metrics.manifold(moved - offset, there - offset, 3)


def test_bad_arguments_are_named() -> None:
    x = torch.randn(9, 3)
    for arguments, says in (((x, x, 0), "k:"), ((x, x[:, :2]), "fake:")):
        with pytest.raises(ValueError, match=says):
            metrics.manifold(*arguments)
    with pytest.raises(ValueError, match="block:"):
        metrics.manifold(x, x, 2, block=0)
    bad = torch.cat([x[:8], torch.full((1, 3), torch.nan)])
    for metric in (metrics.kid, lambda real, fake: metrics.manifold(real, fake, 2), metrics.two_sample):
        for real, fake, says in (
            (x, x[:, :2], "fake: expected shape"),
            (x[:, :0], x[:, :0], "real: expected shape"),
            (x[None], x[None], "real: expected 2 dimensions"),
            (x, x[:1], "fake: expected"),
        ):
            with pytest.raises(ValueError, match=says):
                metric(real, fake)
        with pytest.raises(TypeError, match="fake: expected the dtype of real"):
            metric(x, x.double())
        if metric is metrics.kid:  # NaN in, NaN out
            assert np.isnan(metric(x, bad))
            continue
        with pytest.raises(ValueError, match="real: expected finite values, got NaN or infinity in row 8"):
            metric(bad, x)
        with pytest.raises(ValueError, match="fake: expected finite values, got NaN or infinity in row 8"):
            metric(x, bad)
        with pytest.raises(ValueError, match="real, fake: expected squared distances within float32"):
            metric(1e25 * x, 1e25 * x)
    for logits in (x[0], x * torch.nan, x[:0]):
        with pytest.raises(ValueError, match="logits:"):
            metrics.certainty(logits)
    with pytest.raises(TypeError, match="logits:"):
        metrics.certainty(x.long())


@pytest.mark.filterwarnings("error")
def test_features_that_require_gradients_give_the_same_kid() -> None:
    x, y = torch.randn(20, 3), torch.randn(15, 3)
    assert metrics.kid(x.clone().requires_grad_(), y) == pytest.approx(metrics.kid(x, y), abs=1e-6)
