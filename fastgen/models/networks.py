"""The small networks of the models: image generator, noise mapper, classifier."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from fastgen.check import UserError
from fastgen.nn import PerceptualLoss


class Generator(nn.Module):
    """Latent [N, latent_dim] -> image [N, C, H, W] in (0, 1).

    A linear layer to 4·width channels at a quarter of the size, two transposed convolutions of stride 2, BatchNorm and
    ReLU between, a sigmoid at the end; the InfoGAN shape of the GLO and GLANN papers, scaled by `width`.
    """

    def __init__(self, latent_dim: int, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.base = (4 * width, -(-self.height // 4), -(-self.width // 4))
        size = self.base[0] * self.base[1] * self.base[2]
        self.project = nn.Sequential(nn.Linear(latent_dim, size, bias=False), nn.BatchNorm1d(size), nn.ReLU())
        self.grow = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.grow(self.project(latent).unflatten(1, self.base))
        return image[..., : self.height, : self.width].sigmoid()


class Mapper(nn.Module):
    """Noise [N, noise_dim] -> latent [N, latent_dim] on the unit sphere: hidden layers with BatchNorm and ReLU."""

    def __init__(self, noise_dim: int, latent_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [noise_dim] + [hidden] * layers
        self.body = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.body += nn.Sequential(nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU())
        self.body.append(nn.Linear(widths[-1], latent_dim))

    def forward(self, noise: Tensor) -> Tensor:
        return tf.normalize(self.body(noise), dim=1)


class ImageMLP(nn.Module):
    """Code [N, code_dim] -> image [N, C, H, W] in (0, 1): hidden layers with LayerNorm and ReLU, a sigmoid at the end.

    No layer looks at the rest of the batch: an image is a function of its code alone, in training as in a search.
    """

    def __init__(self, code_dim: int, shape: tuple[int, int, int], hidden: int, layers: int) -> None:
        super().__init__()
        self.shape = shape
        self.body = nn.Sequential()
        for before, after in itertools.pairwise([code_dim] + [hidden] * layers):
            self.body += nn.Sequential(nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU())
        self.body.append(nn.Linear(hidden, math.prod(shape)))

    def forward(self, code: Tensor) -> Tensor:
        image: Tensor = self.body(code).sigmoid().unflatten(1, self.shape)
        return image


class ConvClassifier(nn.Module):
    """Image [N, C, H, W] -> logits [N, classes]; `body` gives the penultimate features [N, features]."""

    def __init__(self, shape: tuple[int, int, int], classes: int, features: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(shape[0], 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (shape[1] // 4) * (shape[2] // 4), features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


def perceptual_loss(
    trunk: str, layers: Sequence[str] | None, default: Mapping[str, Sequence[str]], **options: Any
) -> PerceptualLoss:
    """`nn.PerceptualLoss` of `layers`, or of the trunk's default ones; what it lacks is a UserError."""
    chosen = layers or default.get(trunk)
    if chosen is None:
        raise UserError(f"layers: expected names of layers of {trunk!r} to compare")
    try:
        return PerceptualLoss(trunk, layers=chosen, **options)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from None


@torch.no_grad()
def in_batches(module: nn.Module, inputs: Tensor, batch: int = 4096) -> Tensor:
    """`module(inputs)` in eval mode, a batch at a time; the mode is put back."""
    training = module.training
    module.eval()
    try:
        return torch.cat([module(part) for part in inputs.split(batch)])
    finally:
        module.train(training)
