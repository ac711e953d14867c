"""A run's folder: claimed after its data was judged, given back where nothing was trained, known again by its data."""

import json
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from fastgen import data
from fastgen.check import UserError
from fastgen.cli import main
from fastgen.models import imle_reverse, model_class
from fastgen.models.gmmn import GMMN
from fastgen.models.imle_image import IMLE, RSIMLE
from fastgen.models.run import Run, WholeFiles, arguments_of, read_checkpoint
from fastgen.models.wae import WAEMMD

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
QUICK = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
WAE: dict[str, Any] = {"latent_dim": 2, "width": 2, "epochs": 2, "batch": 16}
MIXED: dict[str, dict[str, Any]] = {
    "glann": {"latent_dim": 4, "width": 2, "layers": ["block0"], "glo_epochs": 1, "hidden": 8, "imle_epochs": 1},
    "wae-mmd": WAE,
    "gmmn": {"epochs": 1, "code_epochs": 1, "hidden": (8,), "code_hidden": 8, "code_dim": 2, "batch": 32},
    "glo": {"latent_dim": 4, "width": 2, "epochs": 1},
    "imle": {"hidden": 8, "epochs": 1},
    "imle-reverse": {"hidden": 8, "epochs": 1},
}
SMALL_IMLE: dict[str, Any] = {"noise_dim": 2, "hidden": 8, "hidden_layers": 1, "epochs": 1, "batch": 16, "pool": 2}


@pytest.fixture(scope="module")
def images() -> data.Images:
    digits = data.load("digits")
    return data.Images("digits", digits.train[:64], digits.test[:16])


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()] + QUICK


# The data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), [("wae-mmd", WAE), ("imle", SMALL_IMLE)])
def test_data_that_changed_behind_its_path_is_told(
    name: str, settings: dict[str, Any], pixels: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "x.npy", tmp_path / "run"
    np.save(file, pixels)
    assert main(["train", name, f"--data={file}", f"--out={out}", *flags(settings)]) == 0
    before = (out / "run.json").read_text()
    other = pixels.copy()
    other[7, 3, 3] ^= 1  # one bit of one image
    for changed in (other, pixels[:-1], pixels[::-1], pixels[:, :, :-1]):
        np.save(file, changed)
        for command in (["train", name, f"--out={out}", "--resume", *QUICK], ["evaluate", str(out)]):
            assert main(command) == 2, command
            assert f"data: {file} has changed since the run in {out} began: then 48 + 12" in capsys.readouterr().err
        assert main(["sample", str(out), f"--out={tmp_path / 'a.npy'}"]) == 2
    np.save(file, pixels)
    assert main(["train", name, f"--out={out}", "--resume", *QUICK]) == 0
    assert (out / "run.json").read_text() == before


def test_fingerprint_sees_pixels_labels_and_order(images: data.Images, monkeypatch: pytest.MonkeyPatch) -> None:
    label = torch.arange(64)
    marks = [
        data.fingerprint(data.Images(*parts))
        for parts in (
            ("a", images.train, images.test),
            ("a", images.train.flip(0), images.test),
            ("a", images.test, images.train),
            ("a", images.train, images.test, label, label[:16]),
            ("a", images.train, images.test, label.flip(0), label[:16]),
        )
    ]
    assert len({mark["sha256"] for mark in marks}) == 5
    assert data.fingerprint(data.Images("b", images.train.clone(), images.test)) == marks[0]
    assert json.loads(json.dumps(marks[0])) == marks[0]
    # Of much data, rows at equal distances: 20 of the 64 images here.
    monkeypatch.setattr(data, "_HASHED", 20 * 64 * 4)
    sampled = data.fingerprint(data.Images("a", images.train, images.test))
    for row, seen in ((4, True), (5, False), (60, True)):
        other = images.train.clone()
        other[row] = 0
        assert (data.fingerprint(data.Images("a", other, images.test)) != sampled) == seen, row


def test_a_condition_is_kept_by_its_whole_path_and_fingerprint(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", pixels)
    np.save(tmp_path / "told.npy", pixels[:, ::2, ::2])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    command = ["train", "imle", "--data=x.npy", "--condition=told.npy", f"--out={out}", *flags(SMALL_IMLE)]
    assert main(command) == 0
    assert Run(out).record["arguments"]["condition"] == str(tmp_path / "told.npy")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["sample", str(out), "--out=a.npy", "--n=3"]) == 0
    assert main(["train", "imle", f"--out={out}", "--resume", *QUICK]) == 0
    (tmp_path / "words.npy").write_text("not an array")
    words = ["train", "imle", f"--data={tmp_path / 'x.npy'}", f"--condition={tmp_path / 'words.npy'}", "--out=b"]
    assert main([*words, *flags(SMALL_IMLE)]) == 2
    err = capsys.readouterr().err
    assert f"condition: {tmp_path / 'words.npy'} cannot be read as a .npy array" in err
    assert "unsafely" not in err
    assert not Path("b").exists()
    np.save(tmp_path / "told.npy", 255 - pixels[:, ::2, ::2])
    assert main(["train", "imle", f"--out={out}", "--resume", *QUICK]) == 2
    assert f"condition: {tmp_path / 'told.npy'} has changed since the run in {out} began" in capsys.readouterr().err


# The folder ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_leaves_nothing_behind(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    nan = np.zeros((20, 4, 4), np.float32)
    nan[17, 2] = np.nan
    np.save(tmp_path / "nan.npy", nan)
    stored = data.load(str(tmp_path / "nan.npy"), on_disk=True)
    alike = data.Images("alike", images.train[:1].repeat(64, 1, 1, 1), images.test)
    for model, of, trainer, says in (
        (IMLE(**SMALL_IMLE), stored, {}, "found nan"),
        (GMMN(space="data"), alike, {}, "expected images that differ"),
        (GMMN(), alike, {}, "expected images that differ"),
        (RSIMLE(radius=50.0, **SMALL_IMLE), images, {}, "radius: every sample"),
        (WAEMMD(**WAE), images, {"devices": 2}, "trainer.devices: expected as many processes"),
        (WAEMMD(**WAE), images, {"accelerator": "abacus"}, "trainer: "),
        (WAEMMD(**WAE), images, {"accelerator": "tpu"}, "trainer: "),
        (WAEMMD(**WAE), images, {"precision": "64-true"}, "trainer.precision: expected one of 32-true, bf16-mixed"),
        (WAEMMD(**WAE), images, {"limit_train_batches": 0}, "trainer.limit_train_batches: 0 leaves none of 4 batches"),
        (WAEMMD(**WAE), images, {"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches: expected"),
        (WAEMMD(**WAE), images, {"max_time": "00:00:00:00"}, "trainer.max_time or a callback ended it after 0 of 2"),
        (WAEMMD(**WAE), images, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "scissors"}, "trainer: "),
    ):
        with pytest.raises(UserError, match=says):
            model.fit(of, out, trainer={**QUIET, **trainer})
        assert not out.exists(), says
    with monkeypatch.context() as torchrun:
        torchrun.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="wae-mmd: this model trains in one process, torchrun started 2"):
            WAEMMD(**WAE).fit(images, out, trainer=QUIET)
    assert not out.exists()
    out.mkdir()
    WAEMMD(**WAE).fit(images, out, trainer=QUIET)  # an empty folder is as good as none


@pytest.mark.parametrize("name", ["glann", "wae-mmd", "gmmn", "glo", "imle", "imle-reverse"])
def test_mixed_precision_trains(name: str, images: data.Images, tmp_path: Path) -> None:
    model = model_class(name)(**MIXED[name]).fit(images, tmp_path / "run", trainer={**QUIET, "precision": "bf16-mixed"})
    assert model.sample(2, seed=0).dtype == torch.float32


def test_own_loggers_beside_ours(images: data.Images, tmp_path: Path) -> None:
    other = CSVLogger(tmp_path / "other")
    for i, logger in enumerate((None, True, False, other, [other])):
        WAEMMD(**WAE).fit(images, tmp_path / f"{i}", trainer={**QUIET, "logger": logger})
        assert (tmp_path / f"{i}" / "logs" / "wae" / "version_0" / "metrics.csv").exists()
    assert (tmp_path / "other" / "lightning_logs" / "version_0" / "metrics.csv").exists()


def test_a_disk_that_is_full_is_told_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """Some megabytes, so that torch's own writer meets the end: it has a RuntimeError for it."""
    file = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"weight": torch.zeros(3)}, file)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    try:
        with pytest.raises(OSError, match=r"last.ckpt.part cannot be written: .*File too large"):
            WholeFiles().save_checkpoint({"weight": torch.zeros(2**20)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == [file]
    assert torch.load(file, weights_only=True)["weight"].shape == (3,)


def test_a_checkpoint_that_must_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "last.ckpt")

    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(PermissionError):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_trained_stage_is_never_given_back(images: data.Images, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match="diverged"):
        WAEMMD(**{**WAE, "lr": 1e30}).fit(images, out, trainer=QUIET)
    assert (out / "wae" / "last.ckpt").exists()
    assert (out / "run.json").exists()
    with pytest.raises(UserError, match="devices"):
        WAEMMD(**{**WAE, "lr": 1e30}).fit(images, out, resume=True, trainer={**QUIET, "devices": 2})
    assert (out / "run.json").exists()


def test_options_that_would_change_nothing_are_not_offered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("max_epochs=3", "val_check_interval=0.5", "limit_val_batches=1"):
        with pytest.raises(SystemExit) as stop:
            main(["train", "imle", "--data=digits", f"--out={tmp_path / 'run'}", f"--trainer.{option}"])
        assert stop.value.code == 2
        assert f"--trainer.{option}" in capsys.readouterr().err


def test_options_that_two_optimisers_cannot_have_are_not_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in ("glo", "glann"):
        for option in ("gradient_clip_val=1.0", "accumulate_grad_batches=2"):
            with pytest.raises(SystemExit) as stop:
                main(["train", model, "--data=digits", f"--out={tmp_path / 'run'}", f"--trainer.{option}"])
            assert stop.value.code == 2
            assert option.split("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    # Of one optimiser they work, and the step size still falls to 0.
    options = ["--trainer.gradient_clip_val=1.0", "--trainer.accumulate_grad_batches=2"]
    assert main(["train", "wae-mmd", "--data=digits", f"--out={tmp_path / 'run'}", *flags(WAE), *options]) == 0
    state = torch.load(tmp_path / "run" / "wae" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2 * 45  # of 90 batches
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-12)


# Breaking off --------------------------------------------------------------------------------------------------------


class Break(Callback):
    """At the start of epoch 1: Ctrl-C."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_time_that_is_up_is_no_interruption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    start = ["train", "wae-mmd", "--data=digits", f"--out={out}", *flags({**WAE, "epochs": 10_000})]
    again = ["train", "wae-mmd", f"--out={out}", "--resume", *QUICK, "--trainer.limit_train_batches=1"]
    for command in ([*start, "--trainer.max_time=00:00:00:01"], again):  # the time is the run's, over all its starts
        assert main(command) == 2
        assert "max_time or a callback ended it after" in capsys.readouterr().err
    epoch = torch.load(out / "wae" / "last.ckpt", weights_only=True)["epoch"]
    assert main([*again, "--trainer.max_time=00:00:00:02"]) == 2
    assert torch.load(out / "wae" / "last.ckpt", weights_only=True)["epoch"] > epoch


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning leaves SIGINT ignored, and so does a shell that starts the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_told_and_the_run_goes_on(
    interruptible: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    fit = WAEMMD.fit
    with monkeypatch.context() as broken:
        broken.setattr(
            WAEMMD, "fit", lambda *a, trainer, **k: fit(*a, trainer={**trainer, "callbacks": [Break()]}, **k)
        )
        assert main(["train", "wae-mmd", "--data=digits", f"--out={out}", *flags(WAE)]) == 130
    assert "interrupted; --resume goes on" in capsys.readouterr().err
    assert Run(out).seconds()["wae"] > 0
    assert main(["sample", str(out), f"--out={tmp_path / 'a.npy'}", "--n=2"]) == 0
    assert "has not ended: this is its newest checkpoint" in capsys.readouterr().err
    assert main(["train", "wae-mmd", f"--out={out}", "--resume", *QUICK]) == 0
    assert main(["sample", str(out), f"--out={tmp_path / 'a.npy'}", "--n=2"]) == 0
    assert capsys.readouterr().err == ""


class Slow(Callback):
    """Keeps seconds.json as it stands when epoch 1 has taken a second and more."""

    seen: dict[str, float] | None = None

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_number: int) -> None:
        if (trainer.current_epoch, batch_number) == (0, 0):
            time.sleep(1.1)
        elif self.seen is None:
            self.seen = json.loads((self.out / "seconds.json").read_text())


def test_seconds_are_written_as_they_pass(images: data.Images, tmp_path: Path) -> None:
    slow = Slow(tmp_path / "run")
    start = time.perf_counter()
    IMLE(**{**SMALL_IMLE, "epochs": 2}).fit(images, slow.out, trainer={**QUIET, "callbacks": [slow]})
    most = time.perf_counter() - start
    assert slow.seen is not None
    assert slow.seen["imle"] >= 1.1
    assert slow.seen["imle_search"] > 0
    seconds = Run(slow.out).seconds()
    assert slow.seen["imle"] < seconds["imle"]
    assert seconds["imle"] + seconds["imle_search"] < most


def test_arguments_are_those_of_the_constructor() -> None:
    class Base:
        def __init__(self, given: dict[str, Any]) -> None:
            self.given = given

    class Model(Base):
        def __init__(self, a: int = 1, b: str = "x") -> None:
            super().__init__(arguments_of(locals()))

    assert Model(a=2).given == {"a": 2, "b": "x"}


class Crash(Callback):
    """Breaks off after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, *of: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise MemoryError


@pytest.mark.parametrize("name", ["imle", "imle-reverse"])
def test_gradients_of_several_batches_are_not_lost_in_the_middle(
    name: str, images: data.Images, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**SMALL_IMLE, "batch": 8, "epochs": 2, "checkpoint_every": 1}
    if name == "imle-reverse":
        settings |= {"reals": 8, "others": 8}
        del settings["pool"]
    summed = {**QUIET, "accumulate_grad_batches": 3}  # of 8 batches: steps after 3, 6 and 8
    model_class(name)(**settings).fit(images, tmp_path / "whole", trainer=summed)
    with pytest.raises(MemoryError):
        model_class(name)(**settings).fit(images, tmp_path / "cut", trainer={**summed, "callbacks": [Crash(13)]})
    state = torch.load(tmp_path / "cut" / "imle" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    model_class(name)(**settings).fit(images, tmp_path / "cut", resume=True, trainer=summed)
    whole, cut = Run(tmp_path / "whole").load("imle"), Run(tmp_path / "cut").load("imle")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_reverse_imle_draws_codes_of_its_own_for_each_batch(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a step sums the gradients of several batches."""
    asked: list[int] = []
    codes = imle_reverse.codes

    def kept(ids: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
        asked.extend(ids.tolist())
        return codes(ids, dim, seed)

    monkeypatch.setattr(imle_reverse, "codes", kept)
    settings: dict[str, Any] = {**SMALL_IMLE, "reals": 16, "batch": 3, "others": 4, "epochs": 2}
    del settings["pool"]
    model_class("imle-reverse")(**settings).fit(
        images, tmp_path / "run", trainer={**QUIET, "accumulate_grad_batches": 2}
    )
    assert asked == list(range(2 * 4 * 7))


def test_a_folder_that_was_there_stays(images: data.Images, tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for out in (folder, link):
        with pytest.raises(UserError, match="as many processes as run"):
            WAEMMD(**WAE).fit(images, out, trainer={**QUIET, "devices": 2})
        assert link.is_symlink()
        assert list(folder.iterdir()) == []


def test_resume_false_starts(tmp_path: Path) -> None:
    out = tmp_path / "run"
    wanted = ["train", "wae-mmd", "--data=digits", f"--out={out}", "--resume", "false"]
    assert main([*wanted, *flags(WAE), "--trainer.limit_train_batches=1"]) == 0
    assert main(["train", "wae-mmd", f"--out={out}", "--resume", "true", *QUICK]) == 0


def test_the_largest_resident_set_is_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"model": "wae-mmd", "data": "digits", "arguments": {}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    usage = types.SimpleNamespace(ru_maxrss=2**20)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    for platform, expected in (("linux", 2**30), ("darwin", 2**20)):  # kilobytes, bytes
        monkeypatch.setattr(sys, "platform", platform)
        Run(tmp_path).note_peak(platform)
        assert Run(tmp_path).read("peak_rss.json")[platform] == expected


@pytest.mark.parametrize(
    ("file", "text"),
    [("seconds", "[]"), ("seconds", '{"wae": "long"}'), ("peak_rss", "3"), ("trainer", "[1]"), ("run", None)],
)
def test_files_that_are_not_what_was_written_are_named(
    file: str, text: str | None, images: data.Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"model": "wae-mmd", "data": "digits", "arguments": WAEMMD(**WAE).arguments}
    (tmp_path / "run.json").write_text(json.dumps(record))
    for mark in (5, "x", [], {"images": [1]}, {"images": [48, 12], "shape": [1, 8, 8]}) if text is None else ({},):
        (tmp_path / f"{file}.json").write_text(text or json.dumps({**record, "fingerprint": mark}))
        assert main(["train", "wae-mmd", f"--out={tmp_path}", "--resume", *QUICK]) == 2
        assert f"{tmp_path / file}.json " in capsys.readouterr().err


def test_arguments_that_a_run_began_without_are_told(
    images: data.Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    WAEMMD(**WAE).fit(images, out, trainer={**QUIET, "limit_train_batches": 1})
    record = json.loads((out / "run.json").read_text())
    del record["fingerprint"]  # older runs have none: they go on with the data that is there
    (out / "run.json").write_text(json.dumps(record))
    WAEMMD(**WAE).fit(images, out, resume=True, trainer=QUIET)
    del record["arguments"]["prior"]
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"prior: the run in .* was begun by a fastgen that did not know it"):
        WAEMMD(**WAE).fit(images, out, resume=True, trainer=QUIET)
