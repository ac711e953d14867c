"""IMLE in latent space: a mapper from noise whose outputs cover every given latent."""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fastgen.functional import nearest
from fastgen.models.networks import Mapper, in_batches
from fastgen.models.run import generator


class LatentIMLE(LightningModule):
    """min over T of Σ_i min_j ‖z_i − T(e_j)‖², the e_j drawn anew each epoch.

    latent: [N, latent_dim] rows on the unit sphere
    pool: noises drawn each epoch for every latent; each latent takes the nearest of all pool·N
    seed: of the noise; epoch t's depends on (seed, t) alone

    The official GLANN code draws 2 N noises an epoch, searches them on the CPU through float64 copies and leaves the
    mapper's output where it falls; here it is normalised, since the latents are. Neighbours are refreshed each epoch.

    Source: Li and Malik, Implicit Maximum Likelihood Estimation, 2018; Hoshen and Malik, CVPR 2019, section 3.3.
    """

    def __init__(
        self, latent: Tensor, *, noise_dim: int, hidden: int, layers: int, pool: int, lr: float, seed: int
    ) -> None:
        super().__init__()
        self.noise_dim, self.pool, self.lr, self.seed = noise_dim, pool, lr, seed
        self.mapper = Mapper(noise_dim, latent.shape[1], hidden, layers)
        self._held = {"latent": latent}
        self.search_seconds = 0.0

    def on_fit_start(self) -> None:
        self._held["latent"] = self._held["latent"].to(self.device)

    def on_train_epoch_start(self) -> None:
        start = time.perf_counter()
        latent = self._held["latent"]
        random = generator(self.seed, self.current_epoch, 1)
        noise = torch.randn(self.pool * len(latent), self.noise_dim, generator=random).to(self.device)
        found = nearest(latent, in_batches(self.mapper, noise))
        self._held["noise"] = noise[found.index[:, 0]]
        self.log("nearest", found.distance.mean(), prog_bar=True)
        self.search_seconds += time.perf_counter() - start

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr, weight_decay=1e-5)

    def training_step(self, rows: Tensor, batch_number: int) -> Tensor:
        loss = (self.mapper(self._held["noise"][rows]) - self._held["latent"][rows]).square().sum(1).mean()
        self.log("loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(rows))
        return loss
