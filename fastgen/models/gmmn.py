"""Generative moment matching networks: a generator from noise, trained by MMD alone, in pixels or in codes."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fastgen import check, data
from fastgen.functional import RBF, median_squared_distance, mmd
from fastgen.models.model import Model, Stage
from fastgen.models.networks import in_batches
from fastgen.models.run import EpochBatches, arguments_of, cosine, seeded, step_generator

LADDER = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the median squared distance: the Gaussians' 2·bandwidth²


def layers(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them and a sigmoid at the end: numbers in (0, 1)."""
    body = nn.Sequential()
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after)
        # Torch's own start shrinks the spread at every layer: the samples would begin as one point.
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        body += nn.Sequential(linear, nn.ReLU())
    body[-1] = nn.Sigmoid()
    return body


def spread(points: Tensor) -> float:
    """The median squared distance of the first 2,000 points [N, D]; a UserError where it is 0."""
    median = float(median_squared_distance(points[:2000]))
    if not median > 0:
        raise check.UserError("data: expected images that differ: more than half of their distances are zero")
    return median


class CodeTraining(LightningModule):
    """An auto-encoder of flat images: least squared error from images that have lost a share of their pixels.

    images: float32 [N, P] in [0, 1], held on the module's device
    drop: the share of pixels set to 0 before encoding; the paper's dropout in the encoder, without which codes between
        those of the data decode badly
    """

    def __init__(self, images: Tensor, *, code_dim: int, hidden: int, drop: float, lr: float, seed: int) -> None:
        super().__init__()
        self.drop, self.lr, self.seed = drop, lr, seed
        self.encoder = layers(images.shape[1], hidden, code_dim)
        self.decoder = layers(code_dim, hidden, images.shape[1])
        self._held = {"images": images}

    def on_fit_start(self) -> None:
        self._held["images"] = self._held["images"].to(self.device)

    def configure_optimizers(self) -> Any:
        return cosine(self, torch.optim.Adam(self.parameters(), self.lr))

    def training_step(self, rows: Tensor, batch_number: int) -> Tensor:
        images = self._held["images"][rows]
        random = step_generator(self.seed, self.current_epoch, batch_number, 5)
        kept = (torch.rand(images.shape, generator=random) >= self.drop).to(self.device)
        loss = (self.decoder(self.encoder(images * kept / (1 - self.drop))) - images).square().sum(1).mean()
        self.log("loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(rows))
        return loss


class MomentTraining(LightningModule):
    """min over G of MMD(G(h), y), h uniform in [-1, 1]^noise_dim: the root of the biased MMD², as the paper has it.

    target: float32 [N, D], the codes or pixels y that are to be matched, held on the module's device
    """

    def __init__(self, target: Tensor, *, noise_dim: int, hidden: tuple[int, ...], lr: float, seed: int) -> None:
        super().__init__()
        self.noise_dim, self.lr, self.seed = noise_dim, lr, seed
        self.body = layers(noise_dim, *hidden, target.shape[1])
        median = spread(target)
        self.kernel = RBF(tuple(math.sqrt(scale * median / 2) for scale in LADDER))
        self._held = {"target": target}

    def on_fit_start(self) -> None:
        self._held["target"] = self._held["target"].to(self.device)

    def configure_optimizers(self) -> Any:
        return cosine(self, torch.optim.Adam(self.parameters(), self.lr))

    def training_step(self, rows: Tensor, batch_number: int) -> Tensor:
        random = step_generator(self.seed, self.current_epoch, batch_number, 6)
        made = self.body(draw_noise(len(rows), self.noise_dim, random).to(self.device))
        squared = mmd(made, self._held["target"][rows], kernel=self.kernel, estimator="biased")
        loss = squared.clamp_min(1e-10).sqrt()  # the root's slope stays finite
        self.log("loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(rows))
        return loss


class GMMN(Model):
    """Generative moment matching network: x = G(h), or D(G(h)) through an auto-encoder's decoder D; h is uniform.

    Source: Li, Swersky and Zemel, Generative Moment Matching Networks, ICML 2015 (also Dziugaite, Roy and Ghahramani,
    UAI 2015, who found the same in pixels). What differs: Adam for gradient descent with momentum, the Gaussians'
    bandwidths are a ladder about the data's median distance and not fixed numbers, and the auto-encoder is trained as a
    whole, not layer by layer.

    Args:
        space: where moments are matched: "code" (of an auto-encoder trained first) or "data" (pixels).
        noise_dim: size of the uniform noise.
        hidden: widths of the generator's hidden layers.
        epochs: passes over the training images by the generator.
        batch: images, and as many samples, of each step: MMD's own noise falls with it.
        lr: Adam's step size for the generator, at the start.
        code_dim: size of a code.
        code_hidden: width of the auto-encoder's hidden layer.
        code_epochs: passes over the training images by the auto-encoder.
        code_batch: images a step of the auto-encoder.
        code_lr: Adam's step size for the auto-encoder, at the start.
        drop: share of the pixels hidden from the auto-encoder in training.
        seed: of everything drawn in training.
    """

    name = "gmmn"

    def __init__(
        self,
        space: Literal["code", "data"] = "code",
        noise_dim: int = 10,
        hidden: tuple[int, ...] = (64, 256, 256, 1024),
        epochs: int = 150,
        batch: int = 500,
        lr: float = 1e-3,
        code_dim: int = 32,
        code_hidden: int = 512,
        code_epochs: int = 60,
        code_batch: int = 100,
        code_lr: float = 1e-3,
        drop: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.arguments = arguments_of(locals())
        check.choice("space", space, ("code", "data"))
        counts = {"noise_dim": noise_dim, "epochs": epochs, "batch": batch, "code_dim": code_dim}
        counts |= {"code_hidden": code_hidden, "code_epochs": code_epochs, "code_batch": code_batch}
        for name, count in counts.items():
            check.integer(name, count, least=1)
        for width in hidden:
            check.integer("hidden", width, least=1)
        check.number("lr", lr, above=0)
        check.number("code_lr", code_lr, above=0)
        check.number("drop", drop, least=0, most=0.9)
        seed = check.integer("seed", seed, least=0, most=2**31)
        self.keys = 2 * seed, 2 * seed + 1  # of the two stages' first weights and batches: no other seed has them
        self.code: CodeTraining | None = None
        self.body: nn.Module | None = None
        self.shape: tuple[int, int, int] = (0, 0, 0)

    def stages(self, images: data.Images, *, training: bool) -> Iterator[Stage]:
        a, rows, target = self.arguments, len(images.train), images.train.flatten(1)
        self.shape = images.shape
        if a["space"] == "code":
            if training:
                spread(target)  # said before the folder is claimed
            shape = {"code_dim": a["code_dim"], "hidden": a["code_hidden"]}
            with seeded(self.keys[0]):
                code = CodeTraining(target, **shape, drop=a["drop"], lr=a["code_lr"], seed=a["seed"])
            yield Stage("autoencoder", code, EpochBatches(rows, a["code_batch"], self.keys[0]), a["code_epochs"])
            self.code, target = code, in_batches(code.encoder, target)
        with seeded(self.keys[1]):
            moments = MomentTraining(
                target, noise_dim=a["noise_dim"], hidden=tuple(a["hidden"]), lr=a["lr"], seed=a["seed"]
            )
        yield Stage("gmmn", moments, EpochBatches(rows, a["batch"], self.keys[1]), a["epochs"])
        self.body = moments.body

    def decode(self, code: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] of codes [N, code_dim], or of flat pixels."""
        flat = code if self.code is None else in_batches(self.code.decoder, code)
        return flat.unflatten(1, self.shape)

    def sample(self, n: int, *, seed: int) -> Tensor:
        assert self.body is not None, "fit or load first"
        noise = draw_noise(n, self.arguments["noise_dim"], torch.Generator().manual_seed(seed))
        return self.decode(in_batches(self.body, noise))

    def reconstructions(self, images: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """`n` of the images and what the auto-encoder makes of them; none where there is none."""
        if self.code is None:
            return images[:0], images[:0]
        some = images[:: max(1, len(images) // n)][:n]
        return some, self.decode(in_batches(self.code.encoder, some.flatten(1)))

    def interpolations(self, rows: int, steps: int) -> Tensor:
        """Images [rows · steps, C, H, W] along straight lines between noises."""
        assert self.body is not None, "fit or load first"
        ends = draw_noise(2 * rows, self.arguments["noise_dim"], torch.Generator().manual_seed(0))
        share = torch.linspace(0, 1, steps)[:, None]
        return self.decode(in_batches(self.body, torch.lerp(ends[:rows, None], ends[rows:, None], share).flatten(0, 1)))


def draw_noise(n: int, noise_dim: int, random: torch.Generator) -> Tensor:
    """[n, noise_dim], uniform in [-1, 1]."""
    return torch.rand(n, noise_dim, generator=random) * 2 - 1
