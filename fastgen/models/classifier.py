"""A small classifier of the training labels: the space that samples are judged in, independent of any model's loss."""

from typing import Any

import torch
import torch.nn.functional as tf
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fastgen.data import Images
from fastgen.models.networks import ConvClassifier, in_batches
from fastgen.models.run import generator, row_loader


class Classifier(LightningModule):
    """A ConvClassifier trained by cross entropy on randomly shifted images.

    `features(images)` are its penultimate activations, standardised by those of the test set: unstandardised, a few
    strong units would decide every distance.
    """

    def __init__(self, images: Images, *, epochs: int, lr: float = 2e-3, seed: int = 0) -> None:
        super().__init__()
        assert images.train_label is not None
        self.epochs, self.lr, self.seed = epochs, lr, seed
        self.net = ConvClassifier(images.shape, int(images.train_label.max()) + 1)
        self._held = {"x": images.train, "label": images.train_label}
        self.mean = self.std = torch.ones(())

    def on_fit_start(self) -> None:
        self._held = {name: value.to(self.device) for name, value in self._held.items()}

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.Adam(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.lr, total_steps=steps)
        return [optimiser], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, rows: Tensor, batch_number: int) -> Tensor:
        random = generator(self.seed, self.current_epoch * 10_000 + batch_number, 3)
        shift = torch.randint(-1, 2, (2,), generator=random).tolist()
        images = self._held["x"][rows].roll(shift, (2, 3))
        return tf.cross_entropy(self.net(images)[0], self._held["label"][rows])

    def logits(self, images: Tensor) -> Tensor:
        return in_batches(_Part(self.net, 0), images, 512)

    def features(self, images: Tensor) -> Tensor:
        """[N, 64] float32, standardised."""
        return (in_batches(_Part(self.net, 1), images, 512) - self.mean) / self.std


class _Part(torch.nn.Module):
    def __init__(self, net: torch.nn.Module, part: int) -> None:
        super().__init__()
        self.net, self.part = net, part

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.net(images)[self.part]
        return result


def fit_classifier(
    images: Images, *, epochs: int = 8, seed: int = 0, trainer: dict[str, Any] | None = None
) -> Classifier:
    """Train on `images.train`; standardise by `images.test`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(images, epochs=epochs, seed=seed)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    Trainer(max_epochs=epochs, **{**(trainer or {}), **quiet}).fit(classifier, row_loader(len(images.train), 64, seed))
    classifier.cpu().eval()
    raw = in_batches(_Part(classifier.net, 1), images.test, 512)
    classifier.mean, classifier.std = raw.mean(0), raw.std(0).clamp_min(1e-6)
    return classifier
