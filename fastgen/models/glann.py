"""GLANN: GLO learns a generator with a latent for each image, IMLE learns to draw such latents from noise."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fastgen import check, data
from fastgen.models.glo import Decoder
from fastgen.models.imle import LatentIMLE
from fastgen.models.imle_pool import codes, key
from fastgen.models.model import Stage
from fastgen.models.networks import in_batches, perceptual_loss
from fastgen.models.run import EpochBatches, arguments_of, seeded

# What is compared by default: four depths of EfficientNet-lite0; GLANN's own taps of VGG16.
LAYERS = {
    "efficientnet-lite0": ("block0", "block2", "block4", "block7"),
    "vgg16": ("relu1_2", "relu2_2", "conv3_2"),
}


class GLANN(Decoder):
    """Generative latent nearest neighbours: x = G(T(e)), e ~ N(0, I).

    Stage 1 (GLO) learns the generator G and a latent on the unit sphere for each image under a perceptual loss; stage 2
    (IMLE) learns the mapper T from noise, so that every latent has a mapped noise near it.

    Source: Hoshen and Malik, Non-Adversarial Image Synthesis with Generative Latent Nearest Neighbors, CVPR 2019. What
    differs from the official code stands in `GLO` and `LatentIMLE`, and: the perceptual trunk is frozen and features
    of the targets are computed once (2 network passes a step for its 6); latents start from principal components.

    Args:
        latent_dim: size of a latent.
        latent_init: "pca" (normalised principal-component scores) or "random" (as in the paper).
        width: channels of the generator's last hidden layer.
        trunk: the perceptual network: "efficientnet-lite0" (weights come with the extra `train`), "vgg16",
            "alexnet" or "squeezenet1_1" (weights from torch hub's cache).
        layers: its layers that are compared; default four depths of EfficientNet-lite0, GLANN's own taps of VGG16.
        pixel_weight: of the mean absolute pixel difference beside the features.
        glo_epochs: epochs of stage 1.
        glo_batch: images a step of stage 1.
        generator_lr: Adam's step size for the generator, at the start.
        latent_lr: Adam's step size for the latents, at the start.
        noise_dim: size of the mapper's noise.
        hidden: width of the mapper's hidden layers.
        hidden_layers: their number.
        imle_epochs: epochs of stage 2.
        imle_batch: latents a step of stage 2.
        imle_lr: Adam's step size for the mapper.
        pool: noises drawn for each latent in each epoch.
        chunk: of them in memory at a time.
        checkpoint_every: steps between checkpoints; each epoch's end has one too.
        seed: of everything drawn in training.
    """

    name = "glann"

    def __init__(
        self,
        latent_dim: int = 64,
        latent_init: Literal["pca", "random"] = "pca",
        width: int = 16,
        trunk: str = "efficientnet-lite0",
        layers: Sequence[str] | None = None,
        pixel_weight: float = 1.0,
        glo_epochs: int = 45,
        glo_batch: int = 64,
        generator_lr: float = 1e-3,
        latent_lr: float = 1e-2,
        noise_dim: int = 64,
        hidden: int = 512,
        hidden_layers: int = 2,
        imle_epochs: int = 150,
        imle_batch: int = 64,
        imle_lr: float = 1e-3,
        pool: int = 10,
        chunk: int = 4000,
        checkpoint_every: int = 200,
        seed: int = 0,
    ) -> None:
        a = self.arguments = arguments_of(locals())
        for name in (
            "latent_dim", "width", "glo_epochs", "noise_dim", "hidden", "hidden_layers", "imle_epochs", "pool", "chunk",
            "checkpoint_every",
        ):  # fmt: skip
            check.integer(name, a[name], least=1)
        for name in ("glo_batch", "imle_batch"):
            check.integer(name, a[name], least=2)  # BatchNorm has no statistics of one row
        for name in ("generator_lr", "latent_lr", "imle_lr"):
            check.number(name, a[name], above=0)
        check.number("pixel_weight", pixel_weight, least=0)
        check.integer("seed", seed, least=0, most=2**31)
        check.choice("latent_init", latent_init, ("pca", "random"))
        self.mapper: torch.nn.Module | None = None

    def stages(self, images: data.Images, *, training: bool) -> Iterator[Stage]:
        a, rows = self.arguments, len(images.train)
        every, options = a["checkpoint_every"], {"pixel_weight": a["pixel_weight"]}
        loss = perceptual_loss(a["trunk"], a["layers"], LAYERS, **options) if training else None
        glo = self._glo(images.train, loss)
        yield Stage("glo", glo, EpochBatches(rows, a["glo_batch"], a["seed"]), a["glo_epochs"], every)
        self.generator, self.latent = glo.generator, glo.latent.weight.detach()
        shape = {"noise_dim": a["noise_dim"], "hidden": a["hidden"], "layers": a["hidden_layers"]}
        with seeded(a["seed"] + 1):
            imle = LatentIMLE(self.latent, **shape, pool=a["pool"], chunk=a["chunk"], lr=a["imle_lr"], seed=a["seed"])
        yield Stage("imle", imle, EpochBatches(rows, a["imle_batch"], a["seed"] + 1), a["imle_epochs"], every)
        self.mapper = imle.mapper

    def sample(self, n: int, *, seed: int) -> Tensor:
        assert self.mapper is not None, "fit or load first"
        noise = codes(torch.arange(n), self.arguments["noise_dim"], key(seed, 1))
        return self.decode(in_batches(self.mapper, noise))
