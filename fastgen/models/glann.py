"""GLANN: GLO learns a generator with a latent for each image, IMLE learns to draw such latents from noise."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import check, data
from fastgen.models.glo import GLO, Decoder, initial_latents
from fastgen.models.imle import LatentIMLE
from fastgen.models.imle_pool import codes, key
from fastgen.models.networks import in_batches
from fastgen.models.run import ResumableBatches, Run, arguments_of, generator
from fastgen.nn import PerceptualLoss

NAME = "glann"

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

    def fit(
        self,
        images: data.Images,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        trainer: dict[str, Any] | None = None,
    ) -> "GLANN":
        """Train both stages into the folder `out`, each with its own checkpoint and log.

        resume: go on with the run in `out` from its last whole checkpoint, in whichever stage it was, in the middle of
            an epoch too
        trainer: more arguments for both stages' lightning.Trainer

        Raises UserError where `out` holds another run, or one that was asked for differently.
        """
        loss = self._loss()  # what it lacks is said before the folder is claimed
        a, options, rows = self.arguments, trainer or {}, len(images.train)
        every = a["checkpoint_every"]
        run = Run.start(out, NAME, images, a, resume=resume)
        glo = self._glo(images.train, loss)
        loader = ResumableBatches(rows, a["glo_batch"], a["seed"])
        run.fit("glo", glo, loader, a["glo_epochs"], options, every=every)
        imle = self._imle(glo.latent.weight.detach())
        loader = ResumableBatches(rows, a["imle_batch"], a["seed"] + 1)
        run.fit("imle", imle, loader, a["imle_epochs"], options, every=every)
        run.note_peak("train")
        return self._take(glo, imle)

    @classmethod
    def load(cls, run: Run, images: data.Images) -> "GLANN":
        """The model of a finished run on the same data."""
        model = cls(**run.record["arguments"])
        glo = model._glo(images.train, None)
        run.restore("glo", glo)
        imle = model._imle(glo.latent.weight.detach())
        run.restore("imle", imle)
        return model._take(glo, imle)

    def _loss(self) -> PerceptualLoss:
        a = self.arguments
        layers = a["layers"] or LAYERS.get(a["trunk"])
        if layers is None:
            raise check.UserError(f"layers: expected names of layers of {a['trunk']!r} to compare")
        try:
            return PerceptualLoss(a["trunk"], layers=layers, pixel_weight=a["pixel_weight"])
        except (ValueError, TypeError, OSError) as error:
            raise check.UserError(str(error)) from None

    def _glo(self, images: Tensor, loss: PerceptualLoss | None) -> GLO:
        a = self.arguments
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(a["seed"])
            kind = "random" if loss is None else a["latent_init"]  # a checkpoint's latents replace them
            latent = initial_latents(images, a["latent_dim"], kind, generator(a["seed"], 0, 2))
            rates = {"generator_lr": a["generator_lr"], "latent_lr": a["latent_lr"]}
            return GLO(images, loss, latent, width=a["width"], **rates)

    def _imle(self, latent: Tensor) -> LatentIMLE:
        a = self.arguments
        shape = {"noise_dim": a["noise_dim"], "hidden": a["hidden"], "layers": a["hidden_layers"]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(a["seed"] + 1)
            return LatentIMLE(latent, **shape, pool=a["pool"], chunk=a["chunk"], lr=a["imle_lr"], seed=a["seed"])

    def _take(self, glo: GLO, imle: LatentIMLE) -> "GLANN":
        self.generator, self.mapper = glo.generator.cpu().eval(), imle.mapper.cpu().eval()
        self.latent = glo.latent.weight.detach().cpu()
        return self

    def sample(self, n: int, *, seed: int) -> Tensor:
        """`n` images [n, C, H, W] in [0, 1]; the same for the same seed."""
        assert self.mapper is not None, "fit or load first"
        noise = codes(torch.arange(n), self.arguments["noise_dim"], key(seed, 1))
        return self.decode(in_batches(self.mapper, noise))
