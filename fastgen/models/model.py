"""What the models share: training and loading, stage by stage."""

import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

from lightning.pytorch import LightningModule
from torch import Tensor

from fastgen import data
from fastgen.models.run import EpochBatches, Run


class Stage(NamedTuple):
    """One of a run's trainings, with the arguments of `Run.fit`; its checkpoint and log go by its name."""

    name: str
    module: LightningModule
    loader: EpochBatches
    epochs: int
    every: int | None = None


class Model:
    """A model is its arguments, for run.json (`self.arguments = arguments_of(locals())`), and its `stages`."""

    name: str
    arguments: dict[str, Any]

    def stages(self, images: data.Images, *, training: bool) -> Iterator[Stage]:
        """The stages in turn: what follows a `yield` finds its module trained, or as its checkpoint has it, and keeps
        what `sample` needs. What the first one lacks is said before a folder is claimed.

        training: else no module is trained: what only its training needs is left out
        """
        raise NotImplementedError

    def fit(
        self,
        images: data.Images,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        trainer: dict[str, Any] | None = None,
    ) -> Self:
        """Train into the folder `out`, each stage with its own checkpoint and log.

        resume: go on with the run in `out` from its last whole checkpoint, in whichever stage it was, where a model has
            `checkpoint_every` in the middle of an epoch too, to the same weights as if it had not been broken off
        trainer: more arguments for each stage's lightning.Trainer

        Raises UserError where `out` holds another run, or one that was asked for differently.
        """
        stages = self.stages(images, training=True)
        first = next(stages)
        run = self._claim(out, images, resume)
        for name, module, loader, epochs, every in itertools.chain([first], stages):
            run.fit(name, module, loader, epochs, trainer or {}, every=every)
            module.cpu().eval()
        run.note_peak("train")
        return self

    def _claim(self, out: str | os.PathLike[str], images: data.Images, resume: bool) -> Run:
        return Run.start(out, self.name, images, self.arguments, resume=resume)

    @classmethod
    def load(cls, run: Run, images: data.Images) -> Self:
        """The model of a run on the same data, as its newest checkpoints have it."""
        model = cls(**run.record["arguments"])
        for stage in model.stages(images, training=False):
            run.restore(stage.name, stage.module)
            stage.module.eval()
        return model

    def sample(self, n: int, *, seed: int) -> Tensor:
        """`n` images [n, C, H, W] in [0, 1]; the same for the same seed."""
        raise NotImplementedError
