"""IMLE in latent space: a mapper from noise whose outputs cover every given latent."""

import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastgen.models.imle_pool import codes, key, search_pool
from fastgen.models.networks import Mapper, in_batches
from fastgen.models.run import EpochLoss


class LatentIMLE(EpochLoss):
    """min over T of Σ_i min_j ‖z_i − T(e_j)‖², the e_j drawn anew each epoch.

    latent: [N, latent_dim] rows on the unit sphere
    pool: noises drawn each epoch for every latent; each latent takes the nearest of all pool·N
    chunk: of them in memory at a time
    seed: of the noise; sample number j's depends on (seed, j) alone, and the numbers go on from epoch to epoch

    The official GLANN code draws 2 N noises an epoch, searches them on the CPU through float64 copies and leaves the
    mapper's output where it falls; here it is normalised, since the latents are. Neighbours are refreshed each epoch,
    only the winners' numbers are kept, and their noise is made again from these.

    The numbers chosen last, `chosen` [N] int64, are in the checkpoint.

    Source: Li and Malik, Implicit Maximum Likelihood Estimation, 2018; Hoshen and Malik, CVPR 2019, section 3.3.
    """

    chosen: Tensor

    def __init__(
        self, latent: Tensor, *, noise_dim: int, hidden: int, layers: int, pool: int, chunk: int, lr: float, seed: int
    ) -> None:
        super().__init__()
        self.noise_dim, self.pool, self.chunk, self.lr, self.seed = noise_dim, pool, chunk, lr, seed
        self.mapper = Mapper(noise_dim, latent.shape[1], hidden, layers)
        self._held = {"latent": latent}
        self.register_buffer("chosen", torch.full((len(latent),), -1))
        self.search_seconds = 0.0

    def on_fit_start(self) -> None:
        self._held["latent"] = self._held["latent"].to(self.device)

    def noise(self, ids: Tensor) -> Tensor:
        """[n, noise_dim] of the samples `ids`."""
        return codes(ids, self.noise_dim, key(self.seed, 0))

    def on_train_epoch_start(self) -> None:
        start = time.perf_counter()
        latent = self._held["latent"]
        count = self.pool * len(latent)
        shown = self.trainer.progress_bar_callback is not None
        with tqdm(total=count, desc=f"Search {self.current_epoch}", disable=not shown, leave=False) as bar:
            found = search_pool(
                lambda: [latent],
                lambda ids: in_batches(self.mapper, self.noise(ids)),
                first=self.current_epoch * count, count=count, chunk=self.chunk, tick=bar.update,
            )  # fmt: skip
        self.chosen.copy_(found.id)
        self.note(nearest=float(found.distance.mean()))
        self.search_seconds += time.perf_counter() - start

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr, weight_decay=1e-5)

    def training_step(self, rows: Tensor, batch_number: int) -> Tensor:
        made = self.mapper(self.noise(self.chosen[rows]))
        loss = (made - self._held["latent"][rows]).square().sum(1).mean()
        self.count(len(rows), loss)
        return loss
