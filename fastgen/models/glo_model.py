"""GLO as a model of its own: images drawn from a Gaussian fitted to the latents that were learned."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen import check, data
from fastgen.functional import laplacian_pyramid_loss
from fastgen.models.glo import Decoder
from fastgen.models.imle_pool import codes
from fastgen.models.imle_space import LAYERS
from fastgen.models.model import Stage
from fastgen.models.networks import perceptual_loss
from fastgen.models.row_adam import project
from fastgen.models.run import EpochBatches, arguments_of


class LaplacianLoss(nn.Module):
    """GLO's own loss, [N]: the Laplacian pyramid's mean absolute differences and the mean squared pixel difference."""

    def __init__(self, levels: int, pixel_weight: float) -> None:
        super().__init__()
        self.levels, self.pixel_weight = levels, pixel_weight

    def target(self, images: Tensor, *, chunk: int | None = None) -> Tensor:
        return images

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = self.pixel_weight * (x - target).square().mean((1, 2, 3))
        return loss + laplacian_pyramid_loss(x, target, levels=self.levels) if self.levels else loss


class GLOModel(Decoder):
    """Generative latent optimisation: a generator and a latent for each image, learned by reconstruction.

    Images are drawn from a Gaussian with the mean and covariance of the latents, brought back to the sphere or ball.

    Source: Bojanowski, Joulin, Lopez-Paz and Szlam, Optimizing the Latent Space of Generative Networks, ICML 2018.

    Args:
        latent_dim: size of a latent.
        latent_init: "pca" (normalised principal-component scores, as the article) or "random".
        latent_space: "sphere" holds latents at length 1, "ball" within it.
        width: channels of the generator's last hidden layer.
        loss: "laplacian" (the article's, with a pixel term), or "perceptual" (as GLANN's).
        levels: of the Laplacian pyramid; None: as many as the images' sides allow, 3 at most.
        trunk: the network of "perceptual".
        layers: its layers that are compared; default three depths of EfficientNet-lite0, or of VGG16.
        pixel_weight: of the pixels' own difference: squared beside "laplacian", absolute beside "perceptual".
        epochs: passes over the images.
        batch: images a step.
        generator_lr: Adam's step size for the generator, at the start.
        latent_lr: Adam's step size for the latents, at the start.
        checkpoint_every: steps between checkpoints; each epoch's end has one too.
        seed: of everything drawn in training.
    """

    name = "glo"

    def __init__(
        self,
        latent_dim: int = 64,
        latent_init: Literal["pca", "random"] = "pca",
        latent_space: Literal["sphere", "ball"] = "sphere",
        width: int = 16,
        loss: Literal["laplacian", "perceptual"] = "laplacian",
        levels: int | None = None,
        trunk: str = "efficientnet-lite0",
        layers: Sequence[str] | None = None,
        pixel_weight: float = 1.0,
        epochs: int = 45,
        batch: int = 64,
        generator_lr: float = 1e-3,
        latent_lr: float = 1e-2,
        checkpoint_every: int = 200,
        seed: int = 0,
    ) -> None:
        self.arguments = arguments_of(locals())
        for name in ("latent_dim", "width", "epochs", "checkpoint_every"):
            check.integer(name, self.arguments[name], least=1)
        check.integer("batch", batch, least=2)  # BatchNorm has no statistics of one row
        if levels is not None:
            check.integer("levels", levels, least=0)
        for name in ("generator_lr", "latent_lr"):
            check.number(name, self.arguments[name], above=0)
        check.number("pixel_weight", pixel_weight, least=0)
        check.integer("seed", seed, least=0, most=2**31)
        check.choice("latent_init", latent_init, ("pca", "random"))
        check.choice("latent_space", latent_space, ("sphere", "ball"))
        check.choice("loss", loss, ("laplacian", "perceptual"))

    def stages(self, images: data.Images, *, training: bool) -> Iterator[Stage]:
        a = self.arguments
        glo = self._glo(images.train, self._loss(images.shape) if training else None, a["latent_space"])
        loader = EpochBatches(len(images.train), a["batch"], a["seed"])
        yield Stage("glo", glo, loader, a["epochs"], a["checkpoint_every"])
        self.generator, self.latent = glo.generator, glo.latent.weight.detach()

    def _loss(self, shape: tuple[int, int, int]) -> nn.Module:
        a = self.arguments
        if a["loss"] == "laplacian":
            most = min(shape[1:]).bit_length() - 1
            levels = min(3, most) if a["levels"] is None else a["levels"]
            if levels > most:
                raise check.UserError(f"levels: expected at most {most} for images of {shape[1]}x{shape[2]}")
            return LaplacianLoss(levels, a["pixel_weight"])
        return perceptual_loss(a["trunk"], a["layers"], LAYERS, pixel_weight=a["pixel_weight"])

    def sample(self, n: int, *, seed: int) -> Tensor:
        assert self.latent is not None, "fit or load first"
        latent = self.latent.double()
        mean = latent.mean(0)
        # The root of the covariance, which may be singular.
        value, vector = torch.linalg.eigh((latent - mean).T @ (latent - mean) / (len(latent) - 1))
        noise = codes(torch.arange(n), latent.shape[1], seed).double()
        drawn = mean + (noise * value.clamp_min(0).sqrt()) @ vector.T
        return self.decode(project(drawn, self.arguments["latent_space"]).float())
