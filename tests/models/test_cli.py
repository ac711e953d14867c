"""The command line: the main job end to end on a small scale; a sentence or two and status 2 for each mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import fastgen
from fastgen import cli
from fastgen.cli import main
from fastgen.report import costs_table, curves, grid, picture

SMALL = [
    "--latent_dim=6",
    "--width=4",
    "--layers=[block0]",
    "--glo_epochs=2",
    "--hidden=16",
    "--imle_epochs=2",
    "--pool=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "glann", "--data", "digits", "--out", str(out), *SMALL]) == 0
    return out


def test_train_evaluate_sample(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"family": "mmd", "work": "w", "provider": "fastgen", "seconds": 1e-3, "status": "ok"},
        {"family": "mmd", "work": "w", "provider": "eager", "seconds": 5e-3, "status": "ok"},
    ]
    machine = {"device": "cpu x", "threads": 2, "torch": "2", "date": "2026-01-01"}
    (run / "benchmark.json").write_text(json.dumps({"rows": rows, "machine": machine}))
    assert main(["evaluate", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    keys = {"kid", "precision", "recall", "density", "coverage", "two_sample", "confident", "rarest_class"}
    for who in ("real", "gaussian", "glann"):
        assert set(metrics[who]) == keys | {"spread"}
        for key in keys:
            low, high = metrics[who]["spread"][key]
            assert low <= metrics[who][key] <= high
    assert metrics["real"]["kid"] < metrics["gaussian"]["kid"]
    assert metrics["classifier_accuracy"] > 0.9
    assert {"glo", "imle", "imle_search", "classifier", "metrics"} <= set(metrics["seconds"])
    assert metrics["peak_rss"]["train"] > 2**27
    for name in ("samples", "reconstructions", "interpolations", "neighbours", "curves"):
        assert (run / f"{name}.png").read_bytes()[:4] == b"\x89PNG", name
    report = (run / "report.md").read_text()
    assert "| mmd | w | 1 ms | 5 ms | 5.0× |" in report
    assert "| glo |" in report
    assert "cores busy" not in report
    assert "two_sample: how often a sample is told from data" in report
    assert "up to 0.8 cores busy" in costs_table([row | {"other_load": 0.8} for row in rows])
    assert "| 1 s | 5 s | 5.0× |" in costs_table([row | {"seconds": row["seconds"] * 1e3} for row in rows])

    assert main(["sample", str(run), "--n", "7", "--seed", "3", "--out", str(tmp_path / "a.npy")]) == 0
    assert main(["sample", str(run), "--n", "7", "--seed", "3", "--out", str(tmp_path / "b.npy")]) == 0
    assert main(["sample", str(run), "--n", "7", "--out", str(tmp_path / "deep" / "c.png")]) == 0
    drawn = np.load(tmp_path / "a.npy")
    assert drawn.shape == (7, 1, 8, 8)
    assert drawn.dtype == np.float32
    assert np.array_equal(drawn, np.load(tmp_path / "b.npy"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.npy", "b.npy", "deep"]


def test_resume_takes_the_runs_own_arguments(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.load(run / "imle" / "last.ckpt", weights_only=True)["state_dict"]
    assert main(["train", "glann", "--out", str(run), "--resume", "--trainer.enable_progress_bar=false"]) == 0
    after = torch.load(run / "imle" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in before.items():
        assert torch.equal(value, after[name])
    assert main(["train", "glann", "--out", str(run), "--resume", "--latent_dim=9"]) == 2
    assert "latent_dim: the run in" in capsys.readouterr().err


def test_resume_takes_up_the_trainers_options(tmp_path: Path) -> None:
    out = tmp_path / "run"
    start = ["train", "glann", "--data", "digits", "--out", str(out), *SMALL, "--trainer.limit_train_batches=0.5"]
    assert main(start) == 0
    assert json.loads((out / "trainer.json").read_text())["limit_train_batches"] == 0.5
    steps = torch.load(out / "imle" / "last.ckpt", weights_only=True)["global_step"]
    (out / "imle" / "last.ckpt").unlink()
    assert main(["train", "glann", "--out", str(out), "--resume", "--trainer.enable_progress_bar=false"]) == 0
    assert torch.load(out / "imle" / "last.ckpt", weights_only=True)["global_step"] == steps


def test_a_run_that_is_damaged_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = '{"model": "glann", "data": "digits", "arguments": {%s}}'
    for content in ("[1]", "{}", record % '"colour": 1', record % '"pool": 0'):
        out = tmp_path / "damaged"
        out.mkdir(exist_ok=True)
        (out / "run.json").write_text(content)
        assert main(["sample", str(out), "--out", str(tmp_path / "a.npy")]) == 2
        assert "run.json" in capsys.readouterr().err
    (out / "run.json").unlink()
    (out / "run.json.part").write_text("{")  # what a kill can leave is no run
    assert main(["train", "glann", "--data", "digits", "--out", str(out), *SMALL]) == 0


def test_samples_that_find_no_room_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "a.part.npy").symlink_to("/dev/full")
    assert main(["sample", str(run), f"--out={tmp_path / 'a.npy'}", "--n=3"]) == 2
    assert "a.part.npy cannot be written: " in capsys.readouterr().err
    assert not (tmp_path / "a.npy").exists()


GO_ON = "; --resume goes on from the last checkpoint"


@pytest.mark.parametrize(
    ("command", "begun", "options", "advice"),
    [
        ("train", "a/run.json", ["--out", "a"], GO_ON),
        ("train", "a/run.json", ["--out=b", "--out", "b", "--out=a"], GO_ON),
        ("train", "a/run.json", ["--out=a", "--out", "b"], ""),
        ("train", "a/b/run.json", ["--out=a"], ""),
        ("train", "run.json", ["--out="], ""),
        ("train", "a/run.json", ["--config=c.yaml"], GO_ON),  # which may name it
        ("compare", "a/frame-0/run.json", ["--out=a"], GO_ON),
        ("compare", "a/run.json", ["--out=a"], ""),
        ("sample", "a/run.json", ["a", "--out=a"], ""),
    ],
)
def test_interrupted(
    command: str,
    begun: str,
    options: list[str],
    advice: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, command, stopped)
    monkeypatch.chdir(tmp_path)
    Path(begun).parent.mkdir(parents=True, exist_ok=True)
    Path(begun).write_text("{}")
    assert main([command, *options]) == 130
    assert capsys.readouterr().err == f"fastgen: interrupted{advice}\n"


def test_half_a_name_is_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "glann", "--data=digits", f"--out={tmp_path / 'run'}", "--res"])
    assert "unrecognized arguments: --res" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_curves_of_one_epoch_and_of_losses_below_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(
        "fastgen.report._save", lambda figure, file: drawn.update({a.get_title(): a for a in figure.axes})
    )
    losses = {"one": [0.5], "below": [0.5, -0.1, 0.2], "long": [0.6 / (1 + i) for i in range(30)], "flat": [3.0, 2.9]}
    for stage, values in losses.items():
        folder = tmp_path / stage / "version_0"
        folder.mkdir(parents=True)
        rows = [f"{epoch},{value}" for epoch, value in enumerate(values)]
        (folder / "metrics.csv").write_text("\n".join(["epoch,loss", *rows]) + "\n")
    assert set(curves(tmp_path / "curves.png", tmp_path)) == set(losses)
    scales = {name: axis.get_yscale() for name, axis in drawn.items()}
    assert scales == {"below": "linear", "flat": "linear", "long": "log", "one": "linear"}
    assert drawn["one"].lines[0].get_marker() == "."  # a line of one point shows nothing
    assert all(tick == int(tick) for tick in drawn["below"].get_xticks())
    axis = drawn["long"]
    shown = [axis.yaxis.get_major_formatter()(tick) for tick in axis.get_yticks() if 0.02 <= tick <= 0.6]
    assert shown == ["0.02", "0.05", "0.1", "0.2", "0.5"]


def test_no_line_between_images_is_lost(tmp_path: Path) -> None:
    images = torch.zeros(64, 1, 64, 64)
    picture(tmp_path / "grid.png", {"many": grid(images, 8)})
    pixels = plt.imread(tmp_path / "grid.png")[..., 0]
    dark = pixels[:, pixels.shape[1] // 5] < 0.5  # down a column of images, beside the title
    assert (np.diff(dark.astype(int)) == 1).sum() == 8


def test_training_that_diverges_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--epochs=1", "--lr=1e30", "--trainer.enable_progress_bar=false"]
    assert main(["train", "wae-mmd", "--data", "digits", "--out", str(tmp_path / "run"), *flags]) == 2
    assert "diverged" in capsys.readouterr().err


def test_config_file(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    lines = [flag.removeprefix("--").replace("=", ": ", 1) for flag in SMALL if not flag.startswith("--trainer")]
    lines += ["trainer:", "  enable_progress_bar: false", "data: digits", f"out: {tmp_path / 'run'}"]
    config.write_text("\n".join(lines))
    assert main(["train", "glann", "--config", str(config), "--latent_dim=5"]) == 0
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert arguments["latent_dim"] == 5
    assert arguments["width"] == 4


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fly"], "expected one of train, sample, evaluate, compare, info, got 'fly'"),
        (["train"], "expected a model first, one of glann"),
        (["train", "gan"], "expected one of glann, "),
        (["train", "glann"], "expected --data"),
        (["train", "glann", "--data", "mnits"], "out"),
        (["train", "glann", "--data", "mnits", "--out", "{tmp}/new"], "expected one of mnist5k, digits"),
        (["train", "glann", "--data", "digits", "--out", "{run}"], "holds another run"),
        (["train", "glann", "--data", "digits", "--out", "{run}/run.json"], "is a file"),
        (["train", "glann", "--data", "digits", "--out", "{tmp}/new", "--resume"], "no run yet"),
        (["train", "glann", "--data", "digits", "--out", "{tmp}/new", "--pool", "0"], "pool: expected"),
        (["train", "glann", "--data", "digits", "--out", "{tmp}/new", "--pool", "many"], "pool"),
        (["train", "glann", "--data", "digits", "--out", "{tmp}/new", "--colour", "red"], "colour"),
        (["train", "glann", "--data", "digits", "--out", "{tmp}/new", "--layers", "[block99]"], "block99"),
        (["train", "glann", "--data", "digits", "--out", "{tmp}/new", "--trunk", "resnet"], "resnet"),
        (["train", "glann", "--data", "digits", "--out", "{tmp}/new", "--trunk", "vgg16"], "vgg16-397923af.pth"),
        (["train", "glann", "--out", "{tmp}/new", "--resume"], "holds no run yet"),
        (["train", "glann", "--config", "{tmp}/none.yaml"], "none.yaml"),
        (["sample", "{tmp}/none", "--out", "{tmp}/a.png"], "holds no run"),
        (["sample", "{run}", "--out", "{tmp}/a.gif"], "expected a .png or .npy"),
        (["sample", "{run}", "--out", "{tmp}/a.png", "--n", "0"], "n: expected at least 1"),
        (["sample", "{run}", "--out", "{tmp}/a.png", "--seed=-1"], "seed: expected an integer from 0"),
        (["sample", "{run}", "--out", "{run}/run.json/a.npy"], "run.json"),
        (["train", "wae-mmd", "--out", "{run}", "--resume"], "has 'glann', got 'wae-mmd'"),
        (["train", "glann", "--data", "", "--out", "{tmp}/new"], "expected one of mnist5k, digits"),
        (["train", "glann", "--data", "~nobody-at-all/x", "--out", "{tmp}/new"], "expected one of mnist5k, digits"),
        (["train", "glann", "--data", "digits", "--out", "{run}/run.json/x"], "run.json"),
        (["evaluate", "{tmp}"], "holds no run"),
        (["info", "x"], "expected no arguments"),
    ],
)
def test_mistakes_end_with_status_2_and_a_sentence(
    run: Path,
    tmp_path: Path,
    argv: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))
    argv = [a.format(run=run, tmp=tmp_path) for a in argv]
    try:
        status = main(argv)
    except SystemExit as stop:  # jsonargparse's own refusals
        status = int(str(stop.code))
    err = capsys.readouterr().err
    assert status == 2
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()


def test_info_names_a_kernel_for_each_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for family in ("mmd", "langevin", "perceptual", "nearest"):
        assert f"  {family}: " in out
    assert "mmd: cpp (fastgen._C" in out


def test_an_instruction_set_that_there_is_not_is_told() -> None:
    environment = {**os.environ, "FASTGEN_ISA": "sse9"}
    done = subprocess.run(
        [sys.executable, "-m", "fastgen.cli", "info"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "fastgen: FASTGEN_ISA: expected baseline, avx2 or avx512, got sse9\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "evaluate RUN" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert f"fastgen {fastgen.__version__}\n" in capsys.readouterr().out
    assert main(["info", "--help"]) == 0
    assert "usage: fastgen info" in capsys.readouterr().out
    for command, name, about in (
        ("train", "wae-mmd", "Wasserstein auto-encoder"),
        ("train", "rs-imle", "Rejection-sampling IMLE"),
        ("compare", "frame", "FRAME"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert re.search(rf"^  {name} +{about}", capsys.readouterr().out, re.M)
    with pytest.raises(SystemExit) as stop:
        main(["train", "glann", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--latent_init" in text
    assert "--trainer.accelerator" in text
    assert "normalised principal-component scores" in text.replace("\n", " ") or "principal-component" in text
