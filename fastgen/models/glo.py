"""GLO: a generator and one latent for each training image, learned together by reconstruction."""

from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from fastgen.models.model import Model
from fastgen.models.networks import Generator, in_batches
from fastgen.models.row_adam import RowAdam, project
from fastgen.models.run import EpochLoss, generator, seeded

# Options of Lightning's Trainer that it refuses beside two optimisers.
NOT_BESIDE_TWO_OPTIMISERS = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches")


class GLO(EpochLoss):
    """min over θ and z_i of Σ_i loss(G_θ(z_i), x_i), ‖z_i‖ = 1 (or ≤ 1).

    images: float32 [N, C, H, W] in [0, 1]; they and the loss's cached target features live on the module's device
    loss: a perceptual loss, or what has its `target`; frozen, not part of the checkpoint; None for a module that only
        loads one
    latent: [N, latent_dim] rows on the unit sphere to start from
    generator_lr, latent_lr: Adam's (β = .5, .999) at the start; both fall to 0 along a cosine
    sphere_or_ball: "sphere" or "ball", where latents are held

    Each step touches the batch's latents alone: `RowAdam` keeps moments row by row and projects those rows at once. The
    official code (yedidh/glann) runs dense Adam over all N rows in every step, projects once an epoch, makes its
    optimiser anew each epoch and lets the perceptual network collect weight gradients.

    Source: Bojanowski et al., Optimizing the Latent Space of Generative Networks, ICML 2018; Hoshen and Malik,
    Non-Adversarial Image Synthesis with Generative Latent Nearest Neighbors, CVPR 2019.
    """

    steps: int

    def __init__(
        self,
        images: Tensor,
        loss: nn.Module | None,
        latent: Tensor,
        *,
        width: int,
        generator_lr: float,
        latent_lr: float,
        sphere_or_ball: str = "sphere",
    ) -> None:
        super().__init__()
        self.sphere_or_ball = sphere_or_ball
        self.automatic_optimization = False
        self.generator_lr, self.latent_lr = generator_lr, latent_lr
        shape: Any = tuple(images.shape[1:])
        self.generator = Generator(latent.shape[1], shape, width)
        self.latent = nn.Embedding.from_pretrained(latent.clone(), freeze=False, sparse=True)
        # Held out of the module tree: a checkpoint needs neither the data nor the pretrained trunk.
        self._held: dict[str, Any] = {"images": images, "loss": loss}

    def on_fit_start(self) -> None:
        loss = self._held["loss"].to(self.device)
        self._held["target"] = loss.target(self._held["images"].to(self.device), chunk=256)

    def on_fit_end(self) -> None:
        del self._held["target"]

    def configure_optimizers(self) -> Any:
        optimisers = [
            torch.optim.Adam(self.generator.parameters(), self.generator_lr, betas=(0.5, 0.999)),
            RowAdam(self.latent.parameters(), self.latent_lr, betas=(0.5, 0.999), project=self.sphere_or_ball),
        ]
        return optimisers, [torch.optim.lr_scheduler.CosineAnnealingLR(o, self.steps) for o in optimisers]

    def training_step(self, rows: Tensor, batch_number: int) -> None:
        optimisers: Any = self.optimizers()
        reconstruction = self.generator(self.latent(rows)).float()  # of lower precision under autocast
        loss = self._held["loss"](reconstruction, self._held["target"][rows]).mean()
        for optimiser in optimisers:
            optimiser.zero_grad()
        self.manual_backward(loss)
        schedules: Any = self.lr_schedulers()
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        self.count(len(rows), loss)


class Decoder(Model):
    """What a generator with a latent for each training image can draw."""

    not_for_trainer = NOT_BESIDE_TWO_OPTIMISERS
    generator: nn.Module | None = None
    latent: Tensor | None = None

    def _glo(self, images: Tensor, loss: nn.Module | None, space: str = "sphere") -> GLO:
        a = self.arguments
        kind = "random" if loss is None else a["latent_init"]  # a checkpoint's latents replace them
        latent = initial_latents(images, a["latent_dim"], kind, generator(a["seed"], 0, 2))
        rates = {"generator_lr": a["generator_lr"], "latent_lr": a["latent_lr"]}
        with seeded(a["seed"]):
            return GLO(images, loss, latent, width=a["width"], **rates, sphere_or_ball=space)

    def decode(self, latent: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] of latents [N, latent_dim]."""
        assert self.generator is not None, "fit or load first"
        return in_batches(self.generator, latent, 512)

    def reconstructions(self, images: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """`n` of the training images [N, C, H, W] and what the generator makes of their latents."""
        assert self.latent is not None, "fit or load first"
        some = slice(0, None, max(1, len(self.latent) // n))
        return images[some][:n], self.decode(self.latent[some][:n])

    def interpolations(self, rows: int, steps: int) -> Tensor:
        """Images [rows · steps, C, H, W] along great circles between training images' latents."""
        assert self.latent is not None, "fit or load first"
        # Sorted by class, latents half the set apart belong to different ones.
        ends = self.latent[:: max(1, len(self.latent) // (2 * rows))]
        start, stop = ends[:rows], ends[rows : 2 * rows]
        # Not 0 nor π, of equal or opposite latents, whose sine divides.
        angle = tf.cosine_similarity(start, stop).clamp(-1, 1).acos().clamp(1e-3, torch.pi - 1e-3)[:, None]
        share = torch.linspace(0, 1, steps)
        weight = torch.stack([((1 - share) * angle).sin(), (share * angle).sin()]) / angle.sin()
        path = weight[0, ..., None] * start[:, None] + weight[1, ..., None] * stop[:, None]
        return self.decode(project(path.flatten(0, 1), "ball"))  # of latents in a ball a path may leave it


def initial_latents(images: Tensor, latent_dim: int, kind: str, generator: torch.Generator) -> Tensor:
    """Rows on the unit sphere: "random" as in the paper, or "pca", the images' leading principal-component scores.

    "pca" starts similar images at neighbouring latents, in the proportions that the data has: the prior that IMLE must
    learn afterwards is then close to a smooth one. Components beyond the data's own rank are random and small.
    """
    if kind == "random":
        return tf.normalize(torch.randn(len(images), latent_dim, generator=generator), dim=1)
    flat = images.flatten(1).double()
    flat = flat - flat.mean(0)
    if flat.shape[1] <= len(flat):
        scores = flat @ torch.linalg.eigh(flat.T @ flat)[1].flip(1)[:, :latent_dim]
    else:
        value, vector = torch.linalg.eigh(flat @ flat.T)
        scores = (vector * value.clamp_min(0).sqrt()).flip(1)[:, :latent_dim]
    # An eigenvector's sign is arbitrary: fixed here, so that every LAPACK gives the same start.
    scores = scores * scores.gather(0, scores.abs().argmax(0, keepdim=True)).sign()
    if scores.shape[1] < latent_dim:
        small = 1e-3 * scores.std() * torch.randn(len(images), latent_dim - scores.shape[1], generator=generator)
        scores = torch.cat([scores, small], 1)
    return tf.normalize(scores, dim=1).float()
