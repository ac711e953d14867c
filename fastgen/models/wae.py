"""WAE-MMD: an auto-encoder whose codes are held to a prior by the maximum mean discrepancy."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as tf
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fastgen import check, data
from fastgen.functional import wae_mmd
from fastgen.models.model import Model, Stage
from fastgen.models.networks import Generator, in_batches
from fastgen.models.run import EpochBatches, arguments_of, cosine, seeded, step_generator


class Encoder(nn.Module):
    """Image [N, C, H, W] -> code [N, latent_dim]: the mirror of `Generator`, without an activation at the end."""

    def __init__(self, shape: tuple[int, int, int], latent_dim: int, width: int) -> None:
        super().__init__()
        channels, height, across = shape
        self.pad = (0, -across % 4, 0, -height % 4)
        self.shrink = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * width * -(-height // 4) * -(-across // 4), latent_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        code: Tensor = self.shrink(tf.pad(images, self.pad))
        return code


class WAETraining(LightningModule):
    """min over encoder Q and decoder G of w·E‖x − G(Q(x))‖² + λ·MMD²(Q(x), p(z)).

    images: float32 [N, C, H, W] in [0, 1], held on the module's device
    settings: the arguments of `WAEMMD`
    """

    def __init__(self, images: Tensor, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        shape: Any = tuple(images.shape[1:])
        self.encoder = Encoder(shape, settings["latent_dim"], settings["width"])
        self.decoder = Generator(settings["latent_dim"], shape, settings["width"])
        self._held = {"images": images}

    def on_fit_start(self) -> None:
        self._held["images"] = self._held["images"].to(self.device)

    def configure_optimizers(self) -> Any:
        return cosine(self, torch.optim.Adam(self.parameters(), self.settings["lr"], betas=(0.5, 0.999)))

    def training_step(self, rows: Tensor, batch_number: int) -> Tensor:
        a = self.settings
        images = self._held["images"][rows]
        code = self.encoder(images)
        error = (self.decoder(code) - images).square().sum((1, 2, 3)).mean()
        random = step_generator(a["seed"], self.current_epoch, batch_number, 4)
        drawn = draw_prior(len(rows), a["latent_dim"], a["prior"], random).to(self.device)
        options = {"kernel": a["kernel"], "prior": a["prior"]}
        penalty = (wae_mmd if a["penalty"] == "fused" else eager_penalty)(code, drawn, **options)
        loss = a["reconstruction_weight"] * error + a["penalty_weight"] * penalty
        log: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(rows)}
        self.log("loss", loss.detach(), prog_bar=True, **log)
        self.log("reconstruction", error.detach(), **log)
        self.log("penalty", penalty.detach(), prog_bar=True, **log)
        return loss


class WAEMMD(Model):
    """Wasserstein auto-encoder with the MMD penalty: x = G(z), z from the prior.

    Source: Tolstikhin, Bousquet, Gelly and Schölkopf, Wasserstein Auto-Encoders, ICLR 2018, algorithm 2; weights, batch
    size, latent size, Adam's settings and the conventions of the penalty are those of its code for MNIST. What differs:
    the networks have the paper's kind of layers (4×4 convolutions of stride 2, BatchNorm, ReLU, one linear layer to the
    code and back) but two strides for its four, a width of 16 for its 128, and the step size falls along a cosine.

    Args:
        latent_dim: size of a code.
        width: channels of the first and the last hidden layer.
        prior: of codes: "normal", "sphere" (uniform on the unit sphere) or "uniform" (in [-1, 1]).
        kernel: of the penalty: "imq" (seven scales) or "rbf" (bandwidth from medians of the batch).
        penalty: "fused" (fastgen.functional.wae_mmd) or "eager" (the same number from plain torch, for comparison).
        penalty_weight: the paper's lambda.
        reconstruction_weight: of the squared error of an image, summed over its pixels.
        epochs: passes over the training images.
        batch: images a step.
        lr: Adam's step size, at the start.
        seed: of everything drawn in training.
    """

    name = "wae-mmd"

    def __init__(
        self,
        latent_dim: int = 8,
        width: int = 16,
        prior: Literal["normal", "sphere", "uniform"] = "normal",
        kernel: Literal["imq", "rbf"] = "imq",
        penalty: Literal["fused", "eager"] = "fused",
        penalty_weight: float = 10.0,
        reconstruction_weight: float = 0.05,
        epochs: int = 80,
        batch: int = 100,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        self.arguments = arguments_of(locals())
        for name, count in {"latent_dim": latent_dim, "width": width, "epochs": epochs}.items():
            check.integer(name, count, least=1)
        check.integer("batch", batch, least=2)
        check.choice("prior", prior, ("normal", "sphere", "uniform"))
        check.choice("kernel", kernel, ("imq", "rbf"))
        check.choice("penalty", penalty, ("fused", "eager"))
        check.number("penalty_weight", penalty_weight, least=0)
        check.number("reconstruction_weight", reconstruction_weight, least=0)
        check.number("lr", lr, above=0)
        check.integer("seed", seed, least=0, most=2**31)
        self.training: WAETraining | None = None
        self.code: Tensor | None = None

    def stages(self, images: data.Images, *, training: bool) -> Iterator[Stage]:
        a = self.arguments
        with seeded(a["seed"]):
            self.training = WAETraining(images.train, a)
        yield Stage("wae", self.training, EpochBatches(len(images.train), a["batch"], a["seed"]), a["epochs"])
        self.code = self.encode(images.train)

    def encode(self, images: Tensor) -> Tensor:
        """Codes [N, latent_dim] of images [N, C, H, W]."""
        assert self.training is not None, "fit or load first"
        return in_batches(self.training.encoder, images, 512)

    def decode(self, code: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] of codes [N, latent_dim]."""
        assert self.training is not None, "fit or load first"
        return in_batches(self.training.decoder, code, 512)

    def sample(self, n: int, *, seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return self.decode(draw_prior(n, self.arguments["latent_dim"], self.arguments["prior"], random))

    def reconstructions(self, images: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """`n` of the images and what the decoder makes of their codes."""
        some = images[:: max(1, len(images) // n)][:n]
        return some, self.decode(self.encode(some))

    def interpolations(self, rows: int, steps: int) -> Tensor:
        """Images [rows · steps, C, H, W] along straight lines between training images' codes."""
        assert self.code is not None, "fit or load first"
        # Sorted by class, codes half the set apart belong to different ones.
        ends = self.code[:: max(1, len(self.code) // (2 * rows))]
        share = torch.linspace(0, 1, steps)[:, None]
        return self.decode(torch.lerp(ends[:rows, None], ends[rows : 2 * rows, None], share).flatten(0, 1))


def draw_prior(n: int, latent_dim: int, prior: str, random: torch.Generator) -> Tensor:
    """[n, latent_dim] draws, as `sample_pz` of the authors' code has them."""
    if prior == "uniform":
        return torch.rand(n, latent_dim, generator=random) * 2 - 1
    drawn = torch.randn(n, latent_dim, generator=random)
    return tf.normalize(drawn, dim=1) if prior == "sphere" else drawn


def eager_penalty(sample_qz: Tensor, sample_pz: Tensor, *, kernel: str, prior: str) -> Tensor:
    """`wae_mmd` as the authors wrote it, in plain torch with its N×N matrices: what the fused one is compared to."""
    n, d = sample_qz.shape

    def distances(a: Tensor, b: Tensor) -> Tensor:
        return a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T

    qq, pp, qp = (distances(*p) for p in ((sample_qz, sample_qz), (sample_pz, sample_pz), (sample_qz, sample_pz)))
    off = 1 - torch.eye(n, device=qq.device)
    if kernel == "rbf":
        half = (n * n - n) // 2
        width = 2 * (qp.flatten().topk(half).values[-1] + qq.flatten().topk(half).values[-1])
        within = (off * (torch.exp(-qq / width) + torch.exp(-pp / width))).sum() / (n * n - n)
        return within - 2 * torch.exp(-qp / width).mean()
    total = sample_qz.new_zeros(())
    for scale in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        c = scale * {"normal": 2.0 * d, "sphere": 2.0, "uniform": float(d)}[prior]
        total = total + (off * (c / (c + qq) + c / (c + pp))).sum() / (n * n - n) - 2 * (c / (c + qp)).mean()
    return total
