"""The figures of a trained model, beside those of real data (the floor) and of a Gaussian (the baseline)."""

import time
from typing import Any

import torch
from torch import Tensor

from fastgen import metrics
from fastgen.check import UserError
from fastgen.data import Images
from fastgen.functional import nearest
from fastgen.models.classifier import Classifier, fit_classifier
from fastgen.models.run import Run, write_json

SEEDS = (0, 1, 2)


class Gaussian:
    """The baseline: a Gaussian fitted to the first `rank` principal components of the training images."""

    def __init__(self, images: Tensor, rank: int = 50) -> None:
        self.shape = images.shape[1:]
        flat = images.flatten(1).double()
        self.mean = flat.mean(0)
        value, vector = torch.linalg.eigh((flat - self.mean).T @ (flat - self.mean) / (len(flat) - 1))
        self.factor = vector[:, -rank:] * value[-rank:].clamp_min(0).sqrt()

    def sample(self, n: int, *, seed: int) -> Tensor:
        noise = torch.randn(n, self.factor.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (self.mean + noise @ self.factor.T).clamp(0, 1).float().unflatten(1, self.shape)


class _Real:
    """Real training images as if they were samples."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def sample(self, n: int, *, seed: int) -> Tensor:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        return self.images[order[:n]]


def figures(samples: Tensor, reference: Tensor, classifier: Classifier) -> dict[str, float]:
    """The figures of `samples` against test features, as `report.FIGURES` names them."""
    features = classifier.features(samples)
    return {
        "kid": metrics.kid(reference, features),
        **metrics.manifold(reference, features)._asdict(),
        "two_sample": metrics.two_sample(reference, features).accuracy,
        **metrics.certainty(classifier.logits(samples))._asdict(),
    }


def evaluate(run: Run, model: Any, images: Images, baseline: Gaussian, *, name: str) -> dict[str, Any]:
    """Measure and write `metrics.json`: the mean over three sampling seeds and, under `spread`, least and most.

    baseline: of the training images. As many samples as there are test images are drawn for each seed. Needs labels.
    """
    if images.train_label is None or images.test_label is None:
        raise UserError(f"data: evaluation needs labels, {images.name} has none")
    start = time.perf_counter()
    classifier = fit_classifier(images)
    right = classifier.logits(images.test).argmax(1) == images.test_label
    trained = time.perf_counter()
    reference = classifier.features(images.test)
    result: dict[str, Any] = {}
    for who, source in {"real": _Real(images.train), "gaussian": baseline, name: model}.items():
        rows = [figures(source.sample(len(images.test), seed=seed), reference, classifier) for seed in SEEDS]
        result[who] = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        result[who]["spread"] = {key: [min(row[key] for row in rows), max(row[key] for row in rows)] for key in rows[0]}
    result["classifier_accuracy"] = float(right.double().mean())
    result["samples"] = len(images.test)
    return _kept(run, result, {"classifier": trained - start, "metrics": time.perf_counter() - trained})


def measure(run: Run, model: Any, images: Images) -> dict[str, Any]:
    """Measure and write `metrics.json` without a classifier: by the model's own `measure`, else in pixels."""
    start = time.perf_counter()
    result = model.measure(images) if hasattr(model, "measure") else measure_pixels(model, images)
    return _kept(run, result, {"metrics": time.perf_counter() - start})


def _kept(run: Run, result: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    run.note_peak("evaluate")
    # Replaced, not summed: a second evaluation is not a longer one.
    result |= {"seconds": {**run.seconds(), **seconds}, "peak_rss": run.read("peak_rss.json")}
    write_json(run.path / "metrics.json", result)
    return result


def measure_pixels(model: Any, images: Images) -> dict[str, Any]:
    """For data without labels: the figures in pixels, of as many samples as there are test images (5,000 at most).

    kid, precision, recall, density, coverage and two_sample as `metrics` defines them; nearest: mean squared distance
    from a test image to its nearest sample. Pixels judge shapes badly: compare runs by them, not models.
    """
    if len(images.test) <= 5:
        raise UserError(f"data: evaluation needs 30 images or more, {images.name} has {len(images.train)} to train on")
    real = images.test[:5000].flatten(1)
    fake = model.sample(len(real), seed=0).flatten(1)
    return {
        "kid": metrics.kid(real, fake),
        **metrics.manifold(real, fake)._asdict(),
        "two_sample": metrics.two_sample(real, fake).accuracy,
        "nearest": float(nearest(real, fake).distance.mean()),
        "samples": len(fake),
    }
