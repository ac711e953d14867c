"""The `fastgen` command: train, sample, evaluate, compare, info."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from fastgen import __version__
from fastgen.check import UserError

USAGE = """usage: fastgen COMMAND ...

  train MODEL --data DATA --out FOLDER   train a model; --help lists its options, --resume goes on with a run
  sample RUN --out FILE.png|FILE.npy     draw images from a trained run
  evaluate RUN                           figures, pictures and report.md of a trained run
  compare frame --data DATA --out FOLDER FRAME against wFRAME: both energies over one schedule, several seeds
  info                                   versions, devices, and which kernel each op would run here and why

fastgen COMMAND --help says more, fastgen --version which fastgen this is.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one or two sentences on stderr where the user can mend it."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"train": train, "sample": sample, "evaluate": evaluate, "compare": compare, "info": info}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"fastgen {__version__}")
        return 0
    if argv[0] not in commands:
        print(f"fastgen: expected one of {', '.join(commands)}, got {argv[0]!r}", file=sys.stderr)
        return 2
    try:
        commands[argv[0]](argv[1:])
    except (UserError, OSError) as error:  # OSError: a full disk, a folder where a file should be
        print(f"fastgen: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        further = "; --resume goes on from the last checkpoint" if _begun(argv) else ""
        print(f"fastgen: interrupted{further}", file=sys.stderr)
        return 130
    return 0


def _parser(command: str, description: str) -> Any:
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        raise UserError(f"`fastgen {command}` needs the extra train: pip install 'fastgen[train]'") from None
    # Half a name would be taken for one whose other half --resume's stored arguments and `_out` do not look for.
    return ArgumentParser(prog=f"fastgen {command}", description=description, allow_abbrev=False)


def _quiet() -> None:
    """Lightning's banner and its advice do not apply."""
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


def train(argv: list[str]) -> None:
    from fastgen.models import MODELS

    model, images, parsed, options = _training("train", argv, MODELS)
    model.fit(images, parsed.out, resume=parsed.resume, trainer=options)
    if os.environ.get("RANK", "0") == "0":  # torchrun's: each of its processes comes here
        print(f"{parsed.out}: trained; `fastgen evaluate {parsed.out}` measures it")


def compare(argv: list[str]) -> None:
    import importlib

    from fastgen.models import COMPARISONS

    comparison, images, parsed, options = _training("compare", argv, COMPARISONS)
    result = comparison.run(images, parsed.out, resume=parsed.resume, trainer=options)
    print(importlib.import_module(type(comparison).__module__).table(result))
    print(f"{parsed.out}: compare.json and pictures written")


def _training(command: str, argv: list[str], among: dict[str, tuple[str, str]]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(model built from the arguments, its data, all arguments, those for Lightning's Trainer)"""
    from fastgen.models import model_class

    if argv and argv[0] in ("-h", "--help"):
        print(
            f"usage: fastgen {command} MODEL ...; `fastgen {command} MODEL --help` lists its options\n\nMODEL is one of"
        )
        print("\n".join(f"  {name:20}{_about(name, among)}".rstrip() for name in among))
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"{command}: expected a model first, one of {', '.join(among)}")
    name, chosen, argv = argv[0], model_class(argv[0], among), argv[1:]
    parser = _parser(f"{command} {name}", (chosen.__doc__ or "").split("\n")[0])
    from lightning.pytorch import Trainer

    from fastgen import data

    parser.add_argument("--config", action="config", help="a YAML file of any of these options")
    parser.add_argument("--data", type=str, help="mnist5k, digits, texture:brick, a .npy file or a folder of images")
    parser.add_argument("--out", type=str, help="the run's folder")
    parser.add_argument("--resume", type=bool, default=False, nargs="?", const=True, help="go on with the run in --out")
    given = parser.add_class_arguments(chosen, instantiate=False)
    # What a run's stages set themselves is not for the outside, nor what would change nothing: they do not validate.
    own = {
        "max_epochs", "max_steps", "min_epochs", "min_steps", "enable_checkpointing", "default_root_dir", "barebones",
        "fast_dev_run", "overfit_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
        "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "reload_dataloaders_every_n_epochs",
        "use_distributed_sampler",
    }  # fmt: skip
    own |= set(getattr(chosen, "not_for_trainer", ()))
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=own)
    resumed = _stored(name, argv) if command == "train" and _wants_resume(argv) else []
    parsed = parser.parse_args([*resumed, *argv])
    for needed, value in (("data", parsed.data), ("out", parsed.out or None)):
        if value is None:
            raise UserError(f"{needed}: expected --{needed}; `fastgen {command} {name} --help` lists the options")
    built = parser.instantiate(parsed)
    _quiet()
    try:
        model = chosen(**{key: getattr(parsed, key) for key in given})
    except (ValueError, TypeError) as error:  # its own checks of its arguments
        raise UserError(str(error)) from None
    options = {k: v for k, v in built.trainer.items() if v != parser.get_default(f"trainer.{k}")}
    images = data.load(parsed.data, on_disk=getattr(chosen, "on_disk", False))
    return model, images, parsed, options


def _about(name: str, among: dict[str, tuple[str, str]]) -> str:
    """A model in a line; nothing where the package that trains it is missing."""
    from fastgen.models import model_class

    try:
        return (model_class(name, among).__doc__ or "").split("\n")[0]
    except UserError:
        return ""


def _wants_resume(argv: list[str]) -> bool:
    given = [(a, (*argv[i + 1 :], "")[0]) for i, a in enumerate(argv) if a.split("=")[0] == "--resume"]
    said = [a.partition("=")[2] or after for a, after in given]
    return bool(said) and said[-1].lower() != "false"


def _out(argv: list[str]) -> str | None:
    """The run's folder, the last that is named; None where a --config file may name it."""
    out = ""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--out":
            out = after
        elif word.startswith("--out="):
            out = word.removeprefix("--out=")
    return out or None


def _begun(argv: list[str]) -> bool:
    """Whether there is, or may be, a run to go on with."""
    runs = {"train": "run.json", "compare": "*/run.json"}.get(argv[0])
    if runs is None:
        return False
    out = _out(argv)
    return any(a.startswith("--config") for a in argv) if out is None else any(Path(out).glob(runs))


def _stored(name: str, argv: list[str]) -> list[str]:
    """The arguments of the run that is resumed, before those on the command line."""
    from fastgen.models.run import Run

    out = _out(argv)
    if out is None:  # with all the rest, then
        return []
    if not (Path(out) / "run.json").exists():
        raise UserError(f"resume: {out} holds no run yet: leave --resume out to start one")
    run = Run(out)
    if run.record["model"] != name:
        raise UserError(f"model: the run in {out} has {run.record['model']!r}, got {name!r}")
    values = {"data": run.record["data"], **run.record["arguments"]}
    values |= {f"trainer.{key}": value for key, value in run.read("trainer.json").items()}
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
        if value is not None
    ]


def _open(path: str) -> tuple[Any, Any, Any]:
    """(run, its data, its trained model)"""
    from fastgen import data
    from fastgen.models import model_class

    try:
        from fastgen.models.run import Run
    except ImportError:
        raise UserError("this needs the extra train: pip install 'fastgen[train]'") from None
    _quiet()
    run = Run(path)
    chosen = model_class(run.record["model"])
    images = data.load(run.record["data"], on_disk=getattr(chosen, "on_disk", False))
    run.same_data(images)
    try:
        model = chosen.load(run, images)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.path / 'run.json'} does not fit its model: {error}") from None
    if "train" not in run.read("peak_rss.json"):  # written when the last stage has ended
        print(f"fastgen: the training in {path} has not ended: this is its newest checkpoint", file=sys.stderr)
    return run, images, model


def sample(argv: list[str]) -> None:
    parser = _parser("sample", "Draw images from a trained run.")
    parser.add_argument("run", type=str, help="the run's folder")
    parser.add_argument(
        "--out", type=str, required=True, help="a .png grid, or a .npy array float32 [n, C, H, W] in [0, 1]"
    )
    parser.add_argument("--n", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same images")
    parsed = parser.parse_args(argv)
    file = Path(parsed.out)
    if file.suffix not in (".png", ".npy"):
        raise UserError(f"out: expected a .png or .npy file, got {parsed.out}")
    if parsed.n < 1:
        raise UserError(f"n: expected at least 1, got {parsed.n}")
    if not 0 <= parsed.seed < 2**31:
        raise UserError(f"seed: expected an integer from 0 to 2**31 − 1, got {parsed.seed}")
    _, _, model = _open(parsed.run)
    images = model.sample(parsed.n, seed=parsed.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".png":
        from fastgen import report

        side = max(1, round(parsed.n**0.5))
        report.picture(file, {f"{parsed.n} samples, seed {parsed.seed}": report.grid(images, side)})
    else:
        import numpy as np

        part = file.with_suffix(".part.npy")
        try:
            np.save(part, images.numpy())
        except OSError as error:  # numpy's own names no file
            raise OSError(f"{part} cannot be written: {error}") from None
        os.replace(part, file)
    print(f"{file}: {parsed.n} samples")


def evaluate(argv: list[str]) -> None:
    parser = _parser("evaluate", "Figures, pictures and report.md of a trained run, written into its folder.")
    parser.add_argument("run", type=str, help="the run's folder")
    parsed = parser.parse_args(argv)
    run, images, model = _open(parsed.run)
    from fastgen import report
    from fastgen.models import evaluation

    name = run.record["model"]
    if hasattr(model, "measure") or images.train_label is None:  # no classifier can be trained to judge by
        measured = evaluation.measure(run, model, images)
        if not hasattr(model, "measure"):
            panels = {"real": images.test[:100], name.upper(): model.sample(100, seed=0)}
            report.samples(run.path / "samples.png", panels)
        print(report.measured_table(measured))
    else:
        baseline = evaluation.Gaussian(images.train)
        measured = evaluation.evaluate(run, model, images, baseline, name=name)
        drawn = model.sample(100, seed=0)
        panels = {"real": images.test[:: max(1, len(images.test) // 100)], name.upper(): drawn}
        report.samples(run.path / "samples.png", {**panels, "Gaussian": baseline.sample(100, seed=0)})
        report.neighbours(run.path / "neighbours.png", drawn[:20], images.train)
        print(report.figures_table(measured))
    if hasattr(model, "reconstructions"):
        originals, made = model.reconstructions(images.train, min(64, len(images.train) // 16 * 16))
        if len(originals):
            report.reconstructions(run.path / "reconstructions.png", originals, made)
    if hasattr(model, "interpolations") and len(images.train) >= 16:
        report.interpolations(run.path / "interpolations.png", model.interpolations(8, 12), 12)
    own = model.pictures(run.path) if hasattr(model, "pictures") else []
    report.write(run.path, measured, run.record, own)
    print(f"{run.path}: metrics.json, report.md and pictures written")


def info(argv: list[str]) -> None:
    import importlib.metadata
    import platform

    import torch

    from fastgen.ops import backend

    if argv in (["-h"], ["--help"]):
        print("usage: fastgen info\n\nVersions, devices, and which kernel each op would run here and why.")
        return
    if argv:
        raise UserError(f"info: expected no arguments, got {' '.join(argv)}")
    print(f"fastgen {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    for package in ("triton", "faiss-cpu", "faiss-gpu", "lightning"):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package}: not installed")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
        print(f"{device} ({name})")
        for family in ("mmd", "langevin", "perceptual", "nearest"):
            kernel, reason = backend.explain(family, torch.device(device).type)
            print(f"  {family}: {kernel} ({reason})")


if __name__ == "__main__":
    sys.exit(main())
