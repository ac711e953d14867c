"""A run's folder: what was asked for, checkpoints, logs, seconds. Nothing in it is overwritten except by itself."""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fastgen import __version__, data
from fastgen.check import UserError
from fastgen.models import processes

# Data and codes are float32: the others would need them in their own type.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class Run:
    """The folder of one training run.

    run.json                  model, data and its fingerprint, arguments: what `--resume`, `fastgen sample` and
                              `fastgen evaluate` read
    <stage>/last.ckpt         the newest whole checkpoint of a stage
    logs/<stage>/version_*    metrics.csv, one folder a start
    seconds.json              seconds spent in each stage and search, summed over resumptions
    trainer.json              options for Lightning's Trainer, which `--resume` takes up
    peak_rss.json             bytes of the largest resident set, by command
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.fresh = self.made = False  # whether `start` claimed the folder just now, and whether it made it
        try:
            self.record: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no run: expected a folder made by `fastgen train`") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / 'run.json'} cannot be read: {error}") from None
        wanted = {"model": str, "data": str, "arguments": dict}
        if (
            not isinstance(self.record, dict)
            or any(not isinstance(self.record.get(key), kind) for key, kind in wanted.items())
            or not data.is_fingerprint(self.record.get("fingerprint"))
        ):
            raise UserError(
                f"{self.path / 'run.json'} is not what `fastgen train` wrote: expected model, data, arguments"
            )

    @classmethod
    def start(
        cls,
        path: str | os.PathLike[str],
        model: str,
        images: data.Images,
        arguments: dict[str, Any],
        *,
        resume: bool,
        more: dict[str, Any] | None = None,
    ) -> "Run":
        """Claim an empty or new folder, or go on with the run that `path` holds where `resume` is set.

        more: what run.json keeps beside model, data and arguments

        Raises UserError where the folder holds anything else, or a run that was asked for with other arguments, where
        the data is another than that run's, or bad; the folder is then as it was.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > processes.size():
            raise UserError(f"{model}: this model trains in one process, torchrun started {os.environ['WORLD_SIZE']}")
        folder = Path(path)
        record = {"model": model, "data": images.name, **(more or {}), "arguments": arguments}
        if folder.exists() and not folder.is_dir():
            raise UserError(f"out: expected a folder, {folder} is a file")
        if (folder / "run.json").exists():
            if not resume:
                raise UserError(f"out: {folder} holds another run: give --resume to go on with it, or another folder")
            run = cls(folder)
            before = _flat(run.record)
            for key, value in _flat(json.loads(json.dumps(record))).items():  # a tuple comes back as a list
                if key not in before:
                    raise UserError(
                        f"{key}: the run in {folder} was begun by a fastgen that did not know it, and cannot be "
                        "resumed by this one; start another"
                    )
                if (old := before[key]) != value:
                    raise UserError(
                        f"{key}: the run in {folder} has {old!r}, got {value!r}; leave it out to resume that run"
                    )
            run.same_data(images)
            return run
        # A kill may have left the record's first part, before anything else was written.
        if folder.exists() and any(file.name != "run.json.part" for file in folder.iterdir()):
            raise UserError(f"out: {folder} is not empty and holds no run: give another folder")
        if resume:
            raise UserError(f"resume: {folder} holds no run yet: leave --resume out to start one")
        data.read_through(images)
        record["fingerprint"] = data.fingerprint(images)
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {**record, "version": __version__})
        run = cls(folder)
        run.fresh, run.made = True, made
        return run

    def same_data(self, images: data.Images) -> None:
        """Raises UserError where the data behind the run's name or path has changed since it began."""
        was, now = self.record.get("fingerprint"), data.fingerprint(images)
        if was not in (None, now):
            raise UserError(
                f"data: {images.name} has changed since the run in {self.path} began: then {data.described(was)}, "
                f"now {data.described(now)}"
            )

    def _give_back(self) -> None:
        """Take away what a start wrote that ended before its first checkpoint: the folder can be claimed again."""
        if not self.fresh or any(self.path.glob("*/last.ckpt")):
            return
        for name in ("run", "trainer", "seconds", "peak_rss"):
            (self.path / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / "logs", ignore_errors=True)
        if self.made and not any(self.path.iterdir()):  # it may else be a link, or the folder we are in
            self.path.rmdir()

    def checkpoint(self, stage: str) -> Path:
        return self.path / stage / "last.ckpt"

    def load(self, stage: str) -> dict[str, Any]:
        """The state_dict of a stage's newest checkpoint. Unpickles tensors and plain data only."""
        file = self.checkpoint(stage)
        if not file.exists():
            raise UserError(f"{self.path} has no {stage} checkpoint yet: train it with --resume")
        state: dict[str, Any] = read_checkpoint(file)["state_dict"]
        return state

    def restore(self, stage: str, module: torch.nn.Module) -> None:
        """Load a stage's newest checkpoint into `module`, which run.json and the data say how to make."""
        state = self.load(stage)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{self.path}: its {stage} checkpoint does not fit its run.json: {error}") from None

    def fit(
        self,
        stage: str,
        module: LightningModule,
        loader: "EpochBatches",
        epochs: int,
        options: dict[str, Any],
        *,
        every: int | None = None,
    ) -> None:
        """Train `module` to `epochs` with Lightning, from the stage's checkpoint where there is one.

        module: is told in `steps` how many steps its optimiser will take in the whole of the training
        options: more arguments for lightning.Trainer; its callbacks and loggers are added to ours
        every: also keep a checkpoint each so many steps, in the middle of an epoch: the module is an `EpochLoss`

        Raises UserError for what the user can mend; a folder claimed just now, without a checkpoint, is given back.
        """
        try:
            self._fit(stage, module, loader, epochs, dict(options), every)
        except MisconfigurationException as error:
            self._give_back()
            raise UserError(f"trainer: {error}") from None
        except UserError:
            self._give_back()
            raise
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None

    def _fit(
        self, stage: str, module: Any, loader: "EpochBatches", epochs: int, options: dict[str, Any], every: int | None
    ) -> None:
        file = self.checkpoint(stage)
        plain = _plain(options)
        loggers = options.pop("logger", None)
        loggers = [] if loggers is None or isinstance(loggers, bool) else loggers  # ours is there in any case
        callbacks = options.pop("callbacks", None) or []
        plugins = options.pop("plugins", None) or []
        asked: dict[str, Any] = dict(
            max_epochs=epochs,
            logger=[CSVLogger(self.path / "logs", name=stage), *(loggers if isinstance(loggers, list) else [loggers])],
            callbacks=[
                ModelCheckpoint(dirpath=file.parent, filename=file.stem, enable_version_counter=False),
                *([MidEpoch(file, every)] if every else []),
                Clock(self, stage),
                *([TQDMProgressBar(refresh_rate=20)] if options.get("enable_progress_bar", True) else []),
                *(callbacks if isinstance(callbacks, list) else [callbacks]),
            ],
            plugins=[WholeFiles(), *(plugins if isinstance(plugins, list) else [plugins])],
            **{"enable_model_summary": False, "log_every_n_steps": len(loader), **options},
        )
        try:
            trainer = Trainer(**asked)
        except (ValueError, TypeError, ImportError) as error:  # TPUs say that their package is missing
            raise UserError(f"trainer: {error}") from None
        if trainer.precision not in PRECISIONS:
            raise UserError(f"trainer.precision: expected one of {', '.join(PRECISIONS)}, got {trainer.precision}")
        if trainer.world_size > processes.size():
            joined = f"torchrun started {processes.size()}" if processes.size() > 1 else "this is one"
            raise UserError(f"trainer.devices: expected as many processes as run, {joined}; got {trainer.world_size}")
        if trainer.accumulate_grad_batches < 1:
            few = trainer.accumulate_grad_batches
            raise UserError(f"trainer.accumulate_grad_batches: expected an integer >= 1, got {few}")
        # Lightning's own estimate sets the loader up before a checkpoint has given it back its place.
        batches, limit = len(loader), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        if batches < 1:
            raise UserError(f"trainer.limit_train_batches: {limit} leaves none of {len(loader)} batches")
        module.steps = epochs * -(-batches // trainer.accumulate_grad_batches)
        write_json(self.path / "trainer.json", plain)
        try:
            trainer.fit(module, loader, ckpt_path=str(file) if file.exists() else None, weights_only=True)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise UserError(f"{file} does not fit the run's arguments or data: {error}") from None
        # Lightning returns as if all were well where it is told to stop.
        if trainer.current_epoch < epochs:
            raise UserError(
                f"{stage}: trainer.max_time or a callback ended it after {trainer.current_epoch} of {epochs} epochs; "
                "--resume goes on with a longer max_time, which counts the time before it too, or null for none"
            )
        wrong = [name for name, weight in module.named_parameters() if not weight.isfinite().all()]
        if wrong:
            raise UserError(f"{stage}: training diverged, {wrong[0]} is not finite: start anew with a lower rate")

    def add_seconds(self, more: dict[str, float]) -> None:
        seconds = self.seconds()
        for name, value in more.items():
            seconds[name] = seconds.get(name, 0.0) + value
        write_json(self.path / "seconds.json", seconds)

    def seconds(self) -> dict[str, float]:
        return self.read("seconds.json", float)

    def note_peak(self, command: str) -> None:
        """Keep the bytes of this process's largest resident set in peak_rss.json, under the command's name."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        write_json(self.path / "peak_rss.json", {**self.read("peak_rss.json", int), command: peak})

    def read(self, name: str, values: type = object) -> dict[str, Any]:
        """A JSON object of the run, its values of that type; {} where the file is not there."""
        file = self.path / name
        try:
            found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
            if not isinstance(found, dict) or not all(isinstance(value, values) for value in found.values()):
                raise ValueError(f"expected an object of {values.__name__}s, by name")
        except ValueError as error:
            raise UserError(f"{file} cannot be read: {error}; move it away") from None
        return found


class WholeFiles(TorchCheckpointIO):
    """Checkpoints written beside and renamed, so that a kill at any moment leaves the last one whole.

    Lightning's own goes through the system's temporary folder, from where a move to another disk is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        try:
            with open(part, "wb") as out:
                torch.save(checkpoint, out)
                out.flush()
                os.fsync(out.fileno())
        except (OSError, RuntimeError) as error:
            # Torch's writer makes a RuntimeError of a full disk, whose own error stands behind it.
            reason = error if isinstance(error, OSError) else error.__context__ or error
            part.unlink(missing_ok=True)
            raise OSError(f"{part} cannot be written: {reason}") from None
        os.replace(part, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class Clock(Callback):
    """Keeps seconds.json up to date while a stage trains, so that a kill loses one second of it, or one search.

    A module's own `search_seconds` stand apart, as `<stage>_search`.
    """

    def __init__(self, run: Run, stage: str) -> None:
        self.run, self.stage, self.since, self.searched = run, stage, time.perf_counter(), 0.0

    def _note(self, module: Any, least: float) -> None:
        now = time.perf_counter()
        if now - self.since < least:
            return
        seconds = {self.stage: now - self.since}
        if hasattr(module, "search_seconds"):
            search = module.search_seconds - self.searched
            seconds = {self.stage: now - self.since - search, f"{self.stage}_search": search}
            self.searched = module.search_seconds
        self.since = now
        self.run.add_seconds(seconds)

    def on_train_batch_end(self, trainer: Any, module: Any, *batch: Any) -> None:
        self._note(module, least=1.0)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._note(module, least=0.0)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        self._note(module, least=0.0)


class MidEpoch(Callback):
    """Keeps a stage's checkpoint each `every` steps of the optimiser, between which the gradients of several batches
    may be summed: they are in no checkpoint. The epoch's end has its own."""

    def __init__(self, file: Path, every: int) -> None:
        self.file, self.every = file, every

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_number: int) -> None:
        batches = self.every * trainer.accumulate_grad_batches
        if (batch_number + 1) % batches == 0 and batch_number + 1 < trainer.num_training_batches:
            trainer.save_checkpoint(self.file, weights_only=False)  # what it does anyway, without a remark each time
            for logger in trainer.loggers:  # what was logged before the checkpoint is not logged again after it
                logger.save()


class EpochBatches:
    """Shuffled batches of row numbers; the modules hold the data itself on their device.

    The order depends on (seed, epoch) alone, so that a resumed run repeats it, and Lightning's checkpoints keep the
    place in it. Each process gets its share of a batch, every batch the same for any number of them.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed, self.epoch = rows, min(batch_size, rows), seed, 0
        self.skip = self.taken = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(self.rows, generator=generator(self.seed, self.epoch, 0))
        skip, self.skip = self.skip, 0
        # The rows left over at the end are others in each epoch.
        for number, rows in enumerate(order[: len(self) * self.batch_size].split(self.batch_size)):
            if number >= skip:
                self.taken = number + 1
                yield rows[processes.rank() :: processes.size()]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["taken"]


def cosine(module: Any, optimiser: torch.optim.Optimizer) -> Any:
    """For `configure_optimizers`: the optimiser, its step size falling to 0 along a cosine over `Run.fit`'s `steps`."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, module.steps)
    return [optimiser], [{"scheduler": schedule, "interval": "step"}]


def generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """Random numbers that depend on (seed, epoch, purpose) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 16 + purpose)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's own random numbers begin at `seed`, for a module's first weights; put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def step_generator(seed: int, epoch: int, batch: int, purpose: int) -> torch.Generator:
    """As `generator`, for each batch. Torch heeds 32 bits: seeds are laid out by the golden section, so that the first
    dozen lie a hundred epochs and more apart."""
    return torch.Generator().manual_seed((seed * 165_902_235 % 2**28 + epoch * 100_000 + batch) * 16 + purpose)


def read_checkpoint(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(found["state_dict"], dict) or not isinstance(found["pytorch-lightning_version"], str):
            raise TypeError("not Lightning's")
    except PermissionError:
        raise
    except Exception as error:  # torch.load raises a dozen kinds for a file cut short
        raise UserError(
            f"{file} cannot be read as a checkpoint ({type(error).__name__}): it is cut short or of another kind; "
            "move it away and give --resume to train that stage again"
        ) from None
    return found


def write_json(file: Path, content: Any) -> None:
    if processes.rank() > 0:
        return
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, file)


class EpochLoss(LightningModule):
    """Logs an epoch's means of `names`, and what was noted at its start, also of an epoch that is taken up in its
    middle: Lightning's own means forget what came before the checkpoint. `count` belongs into every step."""

    names: tuple[str, ...] = ("loss",)

    def __init__(self) -> None:
        super().__init__()
        self.loss_sum = torch.zeros(len(self.names) + 1, dtype=torch.float64)
        self.noted: dict[str, float] = {}

    def count(self, rows: int, *means: torch.Tensor) -> None:
        """The step's mean over its rows of each of `names`."""
        self.loss_sum = self.loss_sum.to(means[0].device)
        self.loss_sum += torch.stack(
            [*(mean.detach().double() * rows for mean in means), self.loss_sum.new_tensor(rows)]
        )

    def note(self, **values: float) -> None:
        """Figures of the epoch that starts: shown at once, and logged with its loss."""
        self.noted = values
        self.log_dict(values, prog_bar=True, logger=False, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loss_sum"] = processes.summed(self.loss_sum)
        checkpoint["noted"] = self.noted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.noted = checkpoint["noted"]
        if processes.rank() == 0:
            self.loss_sum = checkpoint["loss_sum"]

    def on_train_epoch_end(self) -> None:
        *totals, rows = processes.summed(self.loss_sum).tolist()
        means = {name: total / rows for name, total in zip(self.names, totals, strict=True)}
        self.log_dict(means, prog_bar=True, rank_zero_only=True)
        self.log_dict(self.noted, rank_zero_only=True)
        self.loss_sum.zero_()
        self.noted = {}


def arguments_of(scope: dict[str, Any]) -> dict[str, Any]:
    """What a model was made with, for run.json: `arguments_of(locals())` as the first statement of its __init__.
    Numpy's numbers become Python's."""
    return {name: _python(value) for name, value in scope.items() if name not in ("self", "__class__")}


def _python(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        parts = map(_python, value)
        return tuple(parts) if isinstance(value, tuple) else list(parts)  # a named tuple takes no iterator
    return value.item() if isinstance(value, np.generic) else value


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run takes up of the Trainer's options: the plain ones, but for display and how it was started."""
    start = ("devices", "num_nodes", "use_distributed_sampler")  # by `processes.joined`
    plain = {
        k: v for k, v in arguments_of(options).items() if isinstance(v, (bool, int, float, str)) and k not in start
    }
    return {k: v for k, v in plain.items() if not k.startswith("enable")}


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in record.items() if k != "arguments"}, **record.get("arguments", {})}
