"""The FRAME models from the command line, and FRAME against wFRAME."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.cli import main
from fastgen.models.run import Run

QUICK = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
SMALL = ["--chains=4", "--n_steps=2", "--epochs=2", "--sample_steps=3", *QUICK]


def test_a_texture_is_trained_measured_and_sampled(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--data", "texture:brick:16", "--out", str(out), "--layers=[pixels,stem]", "--beta=0.01", *SMALL]
    assert main(["train", "wframe", *arguments]) == 0
    recorded = json.loads((out / "run.json").read_text())["arguments"]
    assert recorded["base"] == "deep-frame"
    assert recorded["step_size"] == 2e-3  # the base's default
    assert main(["train", "wframe", "--out", str(out), "--resume", *QUICK]) == 0  # nothing is left to do
    assert main(["evaluate", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["rounds"] == 20
    assert metrics["Langevin steps"] == 40
    # Filter means against the data's, of the chains, of new samples and, as a floor, of test crops.
    for who in ("chains", "samples", "test"):
        for layer in ("pixels", "stem", "all layers"):
            assert metrics[f"{who}: {layer}, error"] > 0
            assert 0 <= metrics[f"{who}: {layer}, within 5 %"] <= 1
    assert metrics["test: pixels, error"] < metrics["samples: pixels, error"]
    assert metrics["energy of reference"] > metrics["energy of test"]
    assert "kid" not in metrics
    for name in ("samples", "over_time", "energy", "curves"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG", name
    report = (out / "report.md").read_text()
    assert "![over_time](over_time.png)" in report
    assert "![energy](energy.png)" in report
    assert main(["sample", str(out), "--n", "3", "--out", str(tmp_path / "a.npy")]) == 0
    assert np.load(tmp_path / "a.npy").shape == (3, 1, 16, 16)


def test_compare_leaves_another_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main(["compare", "frame", "--data", "digits", "--out", str(tmp_path)]) == 2
    assert "holds the run of a model" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_compare_draws_both_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare"
    command = ["compare", "frame", "--data", "digits", "--out", str(out), "--seeds=2", "--epochs=1", "--bound=0.3"]
    command += ["--options={width: 2, chains: 4, n_steps: 1, batch: 256}", *QUICK]
    assert main(command) == 0
    result = json.loads((out / "compare.json").read_text())
    assert [(r["model"], r["seed"]) for r in result["runs"]] == [
        ("FRAME", 0),
        ("wFRAME", 0),
        ("FRAME", 1),
        ("wFRAME", 1),
    ]
    for row in result["runs"]:
        name = f"{row['model'].lower()}-{row['seed']}"
        energies = Run(out / name).load("frame")["energies"]
        assert len(energies) == 5
        assert row["largest"] == float(energies.abs().max())
        assert row["last"] == float(energies[-1])
        assert row["bounded"] == (row["largest"] <= 0.3)
        assert Run(out / name).record["arguments"]["beta"] == (0.0 if row["model"] == "FRAME" else 0.1)
    assert result["FRAME bounded"].endswith(" of 2")
    # One start and one schedule: what differs is the update alone.
    first, second = (Run(out / f"{name}-0").load("frame") for name in ("frame", "wframe"))
    assert torch.equal(first["snapshots"][0], second["snapshots"][0])
    assert first["energies"][0] == second["energies"][0]
    assert not torch.equal(first["chains"], second["chains"])
    for name in ("energy", "chains"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "| wFRAME | 1 |" in capsys.readouterr().out
    assert main(command) == 2
    assert "give --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert json.loads((out / "compare.json").read_text()) == result


def test_a_diverging_run_is_not_bounded(tmp_path: Path) -> None:
    out = tmp_path / "compare"
    options = "--options={layers: [pixels], chains: 2, n_steps: 2, step_size: 1000.0}"
    command = ["compare", "frame", "--data", "texture:grass:8", "--out", str(out), "--seeds=1", "--epochs=1"]
    assert main([*command, "--base=deep-frame", options, *QUICK]) == 0
    rows = json.loads((out / "compare.json").read_text())["runs"]
    assert [r["end"] for r in rows] == ["diverged", "diverged"]
    assert not any(r["bounded"] for r in rows)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["compare"], "expected a model first, one of frame"),
        (["compare", "glann"], "expected one of frame, got 'glann'"),
        (
            ["compare", "frame", "--data", "digits", "--out", "{tmp}/new", "--options={beta: 1}"],
            "options: beta is an option",
        ),
        (["compare", "frame", "--data", "digits", "--out", "{tmp}/new", "--options={colour: 1}"], "colour"),
        (["compare", "frame", "--data", "digits", "--out", "{tmp}/new", "--seeds=0"], "seeds: expected"),
        (["train", "wframe", "--data", "digits", "--out", "{tmp}/new", "--width=3"], "width: expected nothing"),
        (["train", "deep-frame", "--data", "texture:moss", "--out", "{tmp}/new"], "texture:brick or"),
        (
            ["train", "deep-frame", "--data", "texture:brick", "--out", "{tmp}/new", "--layers=[stem,block99]"],
            "block99",
        ),
        (
            ["train", "deep-frame", "--data", "texture:brick", "--out", "{tmp}/new", "--trunk=vgg16"],
            "vgg16-397923af.pth",
        ),
    ],
)
def test_mistakes(
    tmp_path: Path,
    argv: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))
    assert main([a.replace("{tmp}", str(tmp_path)) for a in argv]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()
