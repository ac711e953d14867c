"""How good samples are, by our own kernels: KID, precision, recall, density, coverage, two-sample accuracy, and a
classifier's view.

All of them compare features; none is called FID or Inception anything, since the features are not Inception's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgen import check
from fastgen.functional import Polynomial, mmd, nearest
from fastgen.functional.nearest import distances


def _features(real: Tensor, fake: Tensor, *, least: int = 1, finite: bool = False) -> None:
    check.tensor("real", real, ndim=(2,))
    check.tensor("fake", fake, ndim=(2,))
    check.same("fake", fake, "real", real)
    if real.shape[1] == 0:
        raise ValueError(f"real: expected shape [N, D >= 1], got {list(real.shape)}")
    if fake.shape[1] != real.shape[1]:
        raise ValueError(f"fake: expected shape [M, {real.shape[1]}] to go with real, got {list(fake.shape)}")
    for name, points in (("real", real), ("fake", fake)):
        if len(points) < least:
            raise ValueError(f"{name}: expected at least {least} points, got {len(points)}")
        if finite:
            check.finite(name, points)


@torch.no_grad()
def kid(real: Tensor, fake: Tensor) -> float:
    """Kernel distance: the unbiased MMD² with the kernel (⟨x, y⟩/D + 1)³ over all pairs, without subsets.

    real, fake: [N, D] and [M, D] float32 features. May be slightly negative for equal distributions.

    Source: Bińkowski et al., Demystifying MMD GANs, ICLR 2018; the original averages over subsets of 1,000.
    """
    _features(real, fake, least=2)
    return float(mmd(real, fake, kernel=Polynomial(degree=3, gamma=None, coef=1.0), estimator="unbiased"))


class Manifold(NamedTuple):
    """precision and recall (shares), density (may exceed 1), coverage (share)."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: Tensor, fake: Tensor, k: int = 5, *, block: int = 1024) -> Manifold:
    """Improved precision and recall, density and coverage from balls to the k-th nearest neighbour.

    real, fake: [N, D] and [M, D] features; k: the neighbour, itself not counted, that a point's ball reaches to; memory
    O(block²) beside the features.

    precision: share of fake points inside some real ball; recall: the other way round; density: real balls that hold a
    fake point, over k; coverage: share of real balls that hold a fake point.

    Source: Kynkäänniemi et al., NeurIPS 2019; Naeem et al., ICML 2020.
    """
    _features(real, fake, finite=True)
    k = check.integer("k", k, least=1)
    block = check.integer("block", block, least=1)
    for name, points in (("real", real), ("fake", fake)):
        if len(points) <= k:
            raise ValueError(f"{name}: expected more than k = {k} points, got {len(points)}")
    real_radius, fake_radius = _radius(real, k), _radius(fake, k)
    hits = torch.zeros(len(fake), dtype=torch.int64, device=real.device)
    inside_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for start in range(0, len(real), block):
        part = slice(start, start + block)
        for left in range(0, len(fake), block):
            other = slice(left, left + block)
            distance = distances(real[part], fake[other])  # rounded as the radii are: a tie there is one here
            hits[other] += (distance < real_radius[part, None]).sum(0)
            inside_fake[part] |= (distance < fake_radius[other]).any(1)
    covered = _nearest(real, fake, 1)[:, 0] < real_radius
    return Manifold(
        precision=float((hits > 0).double().mean()),
        recall=float(inside_fake.double().mean()),
        density=float(hits.double().mean() / k),
        coverage=float(covered.double().mean()),
    )


def _radius(points: Tensor, k: int) -> Tensor:
    """Squared distance to the k-th neighbour; the nearest of the k + 1 is the point itself or its double."""
    return _nearest(points, points, k + 1)[:, k]


def _nearest(query: Tensor, database: Tensor, k: int) -> Tensor:
    """Squared distances; an error of `nearest` in the names of here."""
    try:
        return nearest(query, database, k).distance
    except ValueError as error:
        raise ValueError(str(error).replace("query, database", "real, fake")) from None


class TwoSample(NamedTuple):
    """accuracy: of the vote, over all points; real, fake: over the points of one kind. 0.5 says indistinguishable."""

    accuracy: float
    real: float
    fake: float


def two_sample(real: Tensor, fake: Tensor, k: int = 1) -> TwoSample:
    """Leave-one-out accuracy of the k-nearest-neighbour classifier that tells real points from fake ones.

    real, fake: [N, D] and [N, D] features, as many of each: else the larger side wins votes by its number; k: odd. Of a
    real and a fake point equally near, the one of the other kind counts. Memory O(N·k), no matrix of distances.

    Well above 0.5: they differ; on `real` alone: fake points leave parts of the data out; on `fake` alone: they are off
    the data. Well below 0.5: fake points are copies of real ones.

    Source: Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, ICLR 2017; Xu et al., An empirical study on
    evaluation metrics of generative adversarial networks, 2018.
    """
    _features(real, fake, finite=True)
    k = check.integer("k", k, least=1)
    if k % 2 == 0:
        raise ValueError(f"k: expected an odd number, got {k}")
    if len(fake) != len(real) or len(real) <= k:
        raise ValueError(f"fake: expected as many points as real, and more than {k}: got {len(fake)} and {len(real)}")
    shares = [float(_votes(own, other, k).double().mean()) for own, other in ((real, fake), (fake, real))]
    return TwoSample((shares[0] + shares[1]) / 2, *shares)


def _votes(own: Tensor, other: Tensor, k: int) -> Tensor:
    """Whether more than half of the k nearest to each point of `own`, itself not counted, are of its kind."""
    near = _nearest(own, own, k + 1)[:, 1:]  # of the k + 1 the first is the point itself or its double
    both = torch.cat([_nearest(own, other, k), near], 1)
    kind = torch.arange(2 * k, device=own.device) >= k
    first = both.sort(dim=1, stable=True).indices[:, :k]
    return kind[first].sum(1) * 2 > k


class Certainty(NamedTuple):
    """confident: share of images with softmax above 0.9; rarest_class: the smallest share that a class gets."""

    confident: float
    rarest_class: float


def certainty(logits: Tensor) -> Certainty:
    """logits: [N, classes] of a classifier of the data's own classes."""
    check.tensor("logits", logits, ndim=(2,))
    if logits.numel() == 0:
        raise ValueError(f"logits: expected shape [N >= 1, classes >= 1], got {list(logits.shape)}")
    if not logits.isfinite().all():
        raise ValueError("logits: expected finite values, got NaN or infinity")
    probability = logits.softmax(1)
    share = probability.argmax(1).bincount(minlength=logits.shape[1]) / len(logits)
    return Certainty(float((probability.amax(1) > 0.9).double().mean()), float(share.min()))
