"""Where IMLE measures distances: pixels, principal components, or the features of a perceptual network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import check
from fastgen.models.networks import perceptual_loss

# Four depths of EfficientNet-lite0; IMLE's users elsewhere take VGG16.
LAYERS = {"efficientnet-lite0": ("block0", "block2", "block4"), "vgg16": ("relu1_2", "relu2_2", "relu3_3")}


class Space(nn.Module):
    """Points [N, D] of images, searched by squared L2; `loss(fake, real)` [N] is what is minimised. Here: pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return (self(fake) - self(real)).square().sum(1)


class Components(Space):
    """The search among the `rank` leading principal components of `images`, the loss in pixels.

    Distances among components are at most those among pixels, and many times cheaper.
    """

    basis: Tensor
    centre: Tensor

    def __init__(self, images: Tensor, rank: int) -> None:
        super().__init__()
        flat = images.flatten(1).double()
        if rank > min(flat.shape):
            raise check.UserError(f"components: expected at most {min(flat.shape)} of this data, got {rank}")
        centre = flat.mean(0)
        # Right singular vectors by the smaller Gram matrix.
        vector = torch.linalg.eigh((flat - centre).T @ (flat - centre))[1] if flat.shape[1] <= 4096 else None
        if vector is None:
            vector = torch.linalg.svd(flat - centre, full_matrices=False)[2].T.flip(1)
        self.register_buffer("basis", vector[:, -rank:].float())
        self.register_buffer("centre", centre.float())

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - self.centre) @ self.basis

    def loss(self, fake: Tensor, real: Tensor) -> Tensor:
        return (fake - real).flatten(1).square().sum(1)


class Perceptual(Space):
    """Feature maps of a frozen network side by side, each over the root of its size, and √w of the pixels' likewise.

    The squared distance of two such points is `nn.PerceptualLoss(distance="l2", pixel_weight=w)`: N + M passes of the
    network for N·M perceptual distances, and the loss is the distance that was searched.
    """

    def __init__(self, trunk: str, layers: Sequence[str] | None, pixel_weight: float) -> None:
        super().__init__()
        self.network = perceptual_loss(trunk, layers, LAYERS, distance="l2")
        self.pixel_weight = pixel_weight

    def forward(self, images: Tensor) -> Tensor:
        parts = [(f.flatten(1), 1.0) for f in self.network.features(images).maps]
        parts += [(images.flatten(1), self.pixel_weight)] if self.pixel_weight else []
        return torch.cat([p * (w / p.shape[1]) ** 0.5 for p, w in parts], 1)


def space(kind: str, images: Any, *, components: int, trunk: str, layers: Any, pixel_weight: float) -> Space:
    """images: the training images; at most 10,000 of them are read for their principal components."""
    if kind == "latent":
        return Components(images[:: max(1, len(images) // 10_000)], components)
    return Perceptual(trunk, layers, pixel_weight) if kind == "perceptual" else Space()
