"""A small classifier of the training labels: the space that samples are judged in, independent of any model's loss."""

from typing import Any

import torch
import torch.nn.functional as tf
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fastgen.data import Images
from fastgen.models.networks import ConvClassifier, in_batches
from fastgen.models.run import EpochBatches, generator, seeded


class Classifier(LightningModule):
    """A ConvClassifier trained by cross entropy on randomly shifted images.

    `features(images)` are its penultimate activations, standardised by those of the test set: unstandardised, a few
    strong units would decide every distance.
    """

    def __init__(self, images: Images, *, lr: float = 2e-3, seed: int = 0) -> None:
        super().__init__()
        assert images.train_label is not None
        self.lr, self.seed = lr, seed
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
        return tf.cross_entropy(self.net(images), self._held["label"][rows])

    def logits(self, images: Tensor) -> Tensor:
        return in_batches(self.net, images, 512)

    def features(self, images: Tensor) -> Tensor:
        """[N, 64] float32, standardised."""
        return (in_batches(self.net.body, images, 512) - self.mean) / self.std


def fit_classifier(images: Images, *, epochs: int = 8, seed: int = 0) -> Classifier:
    """Train on `images.train`; standardise by `images.test`."""
    with seeded(seed):
        classifier = Classifier(images, seed=seed)
    unseen: Any = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
    )
    trainer = Trainer(max_epochs=epochs, **unseen)
    trainer.fit(classifier, EpochBatches(len(images.train), 64, seed))
    classifier.cpu().eval()
    raw = in_batches(classifier.net.body, images.test, 512)
    classifier.mean, classifier.std = raw.mean(0), raw.std(0).clamp_min(1e-6)
    return classifier
