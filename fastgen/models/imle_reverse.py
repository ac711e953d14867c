"""IMLE turned round: every sample is pulled to its nearest datum and pushed off other samples."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen import check, data
from fastgen.functional import nearest
from fastgen.models.imle_image import PART
from fastgen.models.imle_pool import codes, key
from fastgen.models.model import Model, Stage
from fastgen.models.networks import ImageMLP, in_batches
from fastgen.models.run import EpochBatches, EpochLoss, arguments_of, cosine, seeded


def reverse_loss(fake: Tensor, other: Tensor, real: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """(min_j ‖G(z_i) − x_j‖², relu(m − min_j ‖G(z_i) − G(z'_j)‖²)), both [N], to be summed and minimised.

    fake: [N, D]; other: [K, D], of codes of its own: among the same codes the second distance would be 0
    real: [M, D]
    """
    return nearest(fake, real).distance[:, 0], (margin - nearest(fake, other).distance[:, 0]).relu()


class ReverseModule(EpochLoss):
    """images: [N, C, H, W], a tensor or `data.Stored`; batch, others: samples a step on the two sides; warm_up: epochs
    of IMLE's own loss, with the nearest of the step's samples for each of its data."""

    names = ("loss", "pull", "push", "cover")

    def __init__(
        self, images: Any, *, noise_dim: int, hidden: int, layers: int, batch: int, others: int, margin: float,
        push_weight: float, cover_weight: float, warm_up: int, lr: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.noise_dim, self.batch, self.others, self.margin = noise_dim, batch, others, margin
        self.push_weight, self.cover_weight, self.warm_up = push_weight, cover_weight, warm_up
        self.lr, self.seed = lr, seed
        shape: Any = tuple(images.shape[1:])
        self.generator = ImageMLP(noise_dim, shape, hidden, layers)
        self._held = {"images": images}

    def configure_optimizers(self) -> Any:
        return cosine(self, torch.optim.Adam(self.parameters(), self.lr, betas=(0.5, 0.999)))

    def training_step(self, rows: Tensor, batch_number: int) -> Tensor:
        real = self._held["images"][rows.cpu()].to(self.device).flatten(1)
        count = self.batch + self.others
        # By batches, not by the optimiser's steps, each of which may take several.
        number = self.current_epoch * self.trainer.num_training_batches + batch_number
        ids = torch.arange(count, device=self.device) + number * count
        made = self.generator(codes(ids, self.noise_dim, key(self.seed, 0))).flatten(1).float()
        pull, push = reverse_loss(made[: self.batch], made[self.batch :], real, self.margin)
        cover = nearest(real, made).distance.mean()
        loss: Tensor = (pull + self.push_weight * push).mean() + self.cover_weight * cover
        if self.current_epoch < self.warm_up:
            loss = cover
        self.count(len(rows), loss, pull.mean(), push.mean(), cover)
        return loss


class IMLEReverse(Model):
    """IMLE of the reverse Kullback-Leibler divergence, with a margin: samples seek data, and keep off each other.

    mean over i of min_j ‖G(z_i) − x_j‖² + w·relu(m − min_j ‖G(z_i) − G(z'_j)‖²), z and z' two batches of codes,
    and c times IMLE's own form beside it: mean over j of min_i ‖x_j − G(z_i)‖², over all codes

    The first term pulls each sample to its nearest datum, the second pushes it away from the other samples as long as
    one is nearer than the margin; it is what keeps the generator from collapsing to a few data. Source: Su Jianlin,
    "GLANN", 2019, section "IMLE": its two formulas print a minus before the sum, against its own step 6 ("minimise the
    real-fake distance and maximise the fake-fake one"); KL(q‖p) has a plus there, as is computed here.

    The form alone finds no modes, and leaves those that it has. Samples that all lie in one datum's cell are all pulled
    to that datum, and the push does not end there: noise of squared length r² about it costs r² and takes two samples
    2 r² apart, so that with w > 1/2 (more, since the push counts the nearest of many alone) noise is the cheapest way
    to the margin, and with a lower w nothing keeps them apart. On MNIST-5k, from the start, w = 4 ended in noisy threes
    (977 of 1,000 samples), w falling from 4 or 2 to 0.5 in threes, and from a start that covered all ten digits w of 0,
    0.25 and 1 ended in ones alone. So the first `warm_up` of the training is IMLE's own form, in which each datum of a
    step pulls the nearest of its samples; the reversed one then spreads and sharpens what is there, with w = 4, at
    which all digits stayed. IMLE's own stays beside it with c = 1: coverage was 0.52 in place of 0.43, precision 0.84
    in place of 0.81, at the same recall and KID. c = 4 gave cleaner and less various samples (precision 0.87, recall
    0.40), c = 4 with w = 10 noise again; and c does not stand in for the push: w = 1 with c = 1 left a recall of 0.03.
    The source has no such start, w = 1 and c = 0.

    Args:
        noise_dim: size of a code z.
        hidden: width of the generator's hidden layers.
        hidden_layers: their number.
        epochs: passes over the data.
        reals: data a step.
        batch: samples a step.
        others: samples of the second batch.
        margin: m, in squared distance; None: the mean squared distance from a datum to the nearest of `others` more.
        push_weight: w of the second term; the source's is 1.
        cover_weight: c of IMLE's own form beside the reversed one; the source's is 0.
        warm_up: share of the epochs, from 0 (the source's form alone) to 1, that begin with IMLE's own.
        lr: Adam's step size, at the start.
        checkpoint_every: steps between checkpoints; each epoch's end has one too.
        seed: of everything drawn in training.
    """

    name = "imle-reverse"
    on_disk = True

    def __init__(
        self,
        noise_dim: int = 16,
        hidden: int = 512,
        hidden_layers: int = 2,
        epochs: int = 300,
        reals: int = 500,
        batch: int = 64,
        others: int = 256,
        margin: float | None = None,
        push_weight: float = 4.0,
        cover_weight: float = 1.0,
        warm_up: float = 0.7,
        lr: float = 1e-3,
        checkpoint_every: int = 200,
        seed: int = 0,
    ) -> None:
        self.arguments = arguments_of(locals())
        for name in ("noise_dim", "hidden", "hidden_layers", "epochs", "reals", "batch", "others", "checkpoint_every"):
            check.integer(name, self.arguments[name], least=1)
        check.number("lr", lr, above=0)
        check.number("push_weight", push_weight, least=0)
        check.number("cover_weight", cover_weight, least=0)
        check.number("warm_up", warm_up, least=0, most=1)
        check.integer("seed", seed, least=0, most=2**31)
        if margin is not None:
            check.number("margin", margin, least=0)
        self.generator: torch.nn.Module | None = None

    def stages(self, images: data.Images, *, training: bool) -> Iterator[Stage]:
        a, margin = self.arguments, self.arguments["margin"]
        if margin is None:
            margin = _margin(images.train, a["others"]) if training else 0.0
        names = ("noise_dim", "hidden", "batch", "others", "push_weight", "cover_weight", "lr", "seed")
        more = {"layers": a["hidden_layers"], "margin": margin, "warm_up": round(a["warm_up"] * a["epochs"])}
        with seeded(a["seed"]):
            module = ReverseModule(images.train, **more, **{k: a[k] for k in names})
        loader = EpochBatches(len(images.train), a["reals"], a["seed"])
        yield Stage("imle", module, loader, a["epochs"], a["checkpoint_every"])
        self.generator = module.generator

    def sample(self, n: int, *, seed: int) -> Tensor:
        assert self.generator is not None, "fit or load first"
        return in_batches(self.generator, codes(torch.arange(n), self.arguments["noise_dim"], key(seed, 1)), PART)


def _margin(images: Any, others: int) -> float:
    """Of up to 1,000 data, the mean squared distance to the nearest of `others` (at most the rest) others."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    others = min(others, len(images) - 1)
    left, right = images[order[others : others + 1000]].flatten(1), images[order[:others]].flatten(1)
    return float(nearest(left, right).distance.mean())
