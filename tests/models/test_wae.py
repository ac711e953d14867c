"""WAE-MMD and GMMN learn, resume to the bit, and the fused penalty trains as the eager one does."""

import csv
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from fastgen import data
from fastgen.check import UserError
from fastgen.cli import main
from fastgen.functional import wae_mmd
from fastgen.models.gmmn import GMMN
from fastgen.models.run import EpochBatches, Run, step_generator
from fastgen.models.wae import WAEMMD, draw_prior, eager_penalty

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
WAE_SMALL: dict[str, Any] = {"latent_dim": 3, "width": 4, "epochs": 3, "batch": 16}
GMMN_SMALL: dict[str, Any] = {
    "noise_dim": 3,
    "hidden": (8, 16),
    "epochs": 3,
    "batch": 32,
    "code_dim": 4,
    "code_hidden": 16,
    "code_epochs": 3,
    "code_batch": 16,
}
MODELS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "wae": (WAEMMD, WAE_SMALL, ("wae",)),
    "gmmn": (GMMN, GMMN_SMALL, ("autoencoder", "gmmn")),
    "gmmn_data": (GMMN, {**GMMN_SMALL, "space": "data"}, ("gmmn",)),
}


@pytest.fixture(scope="module")
def images() -> data.Images:
    digits = data.load("digits")
    return data.Images("digits", digits.train[:64], digits.test[:16])


@pytest.fixture(scope="module")
def whole(images: data.Images, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for name, (model, settings, _) in MODELS.items():
        runs[name] = tmp_path_factory.mktemp(name) / "run"
        model(**settings).fit(images, runs[name], trainer=QUIET)
    return runs


@pytest.mark.parametrize(("model", "draw"), [("wae", "draw_prior"), ("gmmn_data", "draw_noise")])
def test_neighbouring_seeds_draw_noise_of_their_own(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, draw: str
) -> None:
    """In no epoch does one meet a batch of the other's."""
    made, settings, _ = MODELS[model]
    module = sys.modules[made.__module__]
    drawn: list[bytes] = []
    original = getattr(module, draw)

    def kept(*arguments: Any) -> torch.Tensor:
        found: torch.Tensor = original(*arguments)
        drawn.append(found.numpy().tobytes())
        return found

    monkeypatch.setattr(module, draw, kept)
    for seed in (0, 1):
        more = {"epochs": 12, "batch": 8, "seed": seed}
        made(**{**settings, **more}).fit(images, tmp_path / str(seed), trainer=QUIET)
    assert len(drawn) == 2 * 12 * 8
    assert len(set(drawn)) == len(drawn)


def test_neighbouring_seeds_share_no_stage_s_start_or_order(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GMMN's two stages, made alike: neither begins as the other one of the next seed, or meets its batches."""
    seen: list[bytes] = []
    original = EpochBatches.__iter__

    def kept(batches: EpochBatches) -> Iterator[torch.Tensor]:
        for rows in original(batches):
            seen.append(rows.numpy().tobytes())
            yield rows

    monkeypatch.setattr(EpochBatches, "__iter__", kept)
    alike = {"noise_dim": 64, "hidden": (16,), "batch": 16, "epochs": 3}
    for seed in (0, 1, 2):
        model = GMMN(**{**GMMN_SMALL, **alike}, seed=seed).fit(images, tmp_path / str(seed), trainer=QUIET)
        for stage, body in zip(model.stages(images, training=False), ("encoder", "body"), strict=True):
            first = getattr(stage.module, body)[0]
            assert first.weight.shape == (16, 64)
            seen.append(first.weight.detach().numpy().tobytes())
    assert len(seen) == 3 * (2 * 3 * 4 + 2)
    assert len(set(seen)) == len(seen)


def test_a_step_s_generator_is_its_own() -> None:
    keys = {
        step_generator(seed, epoch, batch, purpose).initial_seed() % 2**32
        for seed in range(6)
        for epoch in range(300)
        for batch in range(20)
        for purpose in (4, 5)
    }
    assert len(keys) == 6 * 300 * 20 * 2


def states(run: Path, stages: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {f"{s}.{k}": v for s in stages for k, v in Run(run).load(s).items()}


def curve(run: Path, stage: str, column: str = "loss") -> list[float]:
    with open(run / "logs" / stage / "version_0" / "metrics.csv", newline="") as lines:
        return [float(row[column]) for row in csv.DictReader(lines)]


@pytest.mark.parametrize("name", MODELS)
def test_resumed_run_equals_an_unbroken_one(
    name: str, images: data.Images, whole: dict[str, Path], tmp_path: Path
) -> None:
    model, settings, stages = MODELS[name]

    class StopAt(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if type(module).__name__ != "CodeTraining" and trainer.current_epoch == 1:
                raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        model(**settings).fit(images, tmp_path / "run", trainer={**QUIET, "callbacks": [StopAt()]})
    torch.rand(7)  # what is drawn elsewhere changes nothing
    model(**settings).fit(images, tmp_path / "run", resume=True, trainer=QUIET)
    expected, got = states(whole[name], stages), states(tmp_path / "run", stages)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key


KILLED = """
import os, signal
from lightning.pytorch import Callback
from fastgen import data
from fastgen.models.wae import WAEMMD

class Kill(Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.current_epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

digits = data.load("digits")
images = data.Images("digits", digits.train[:64], digits.test[:16])
WAEMMD(**{small!r}).fit(images, {out!r}, trainer={{**{quiet!r}, "callbacks": [Kill()]}})
"""


def test_resume_after_kill_9(
    images: data.Images, whole: dict[str, Path], tmp_path: Path, run_apart: Callable[..., list[Any]]
) -> None:
    out = tmp_path / "run"
    (done,) = run_apart(KILLED.format(small=WAE_SMALL, out=str(out), quiet=QUIET))
    assert done.returncode == -signal.SIGKILL, done.stderr
    WAEMMD(**WAE_SMALL).fit(images, out, resume=True, trainer=QUIET)
    for key, value in states(whole["wae"], ("wae",)).items():
        assert torch.equal(value, states(out, ("wae",))[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_load_and_sample_are_deterministic(name: str, images: data.Images, whole: dict[str, Path]) -> None:
    loaded = MODELS[name][0].load(Run(whole[name]), images)
    first = loaded.sample(5, seed=3)
    assert first.shape == (5, 1, 8, 8)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    assert torch.equal(first, MODELS[name][0].load(Run(whole[name]), images).sample(5, seed=3))
    assert not torch.equal(first, loaded.sample(5, seed=4))
    originals, made = loaded.reconstructions(images.train, 16)
    assert originals.shape == made.shape == ((0 if name == "gmmn_data" else 16), 1, 8, 8)
    assert loaded.interpolations(2, 5).shape == (10, 1, 8, 8)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_fused_and_eager_training_curves_agree(kernel: str, images: data.Images, tmp_path: Path) -> None:
    settings = {**WAE_SMALL, "kernel": kernel, "epochs": 6}
    for penalty in ("fused", "eager"):
        WAEMMD(**settings, penalty=penalty).fit(images, tmp_path / penalty, trainer=QUIET)
    for column in ("loss", "penalty", "reconstruction"):
        fused, eager = (curve(tmp_path / p, "wae", column) for p in ("fused", "eager"))
        assert len(fused) == 6
        assert fused == pytest.approx(eager, rel=2e-3, abs=2e-4), column
    # The penalty matters: without it the curve is another.
    WAEMMD(**{**settings, "penalty_weight": 0.0}).fit(images, tmp_path / "none", trainer=QUIET)
    without = curve(tmp_path / "none", "wae", "penalty")
    assert abs(without[5] - curve(tmp_path / "fused", "wae", "penalty")[5]) > 0.01


@pytest.mark.parametrize("prior", ["normal", "sphere", "uniform"])
@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_the_eager_penalty_is_the_fused_one(prior: str, kernel: str) -> None:
    code = torch.randn(50, 4, dtype=torch.float64)
    drawn = draw_prior(50, 4, prior, torch.Generator().manual_seed(1)).double()
    fused = wae_mmd(code, drawn, kernel=kernel, prior=prior)
    assert float(eager_penalty(code, drawn, kernel=kernel, prior=prior)) == pytest.approx(float(fused), abs=1e-12)


def test_priors_are_what_they_say() -> None:
    random = torch.Generator().manual_seed(0)
    assert torch.allclose(draw_prior(100, 5, "sphere", random).norm(dim=1), torch.ones(100))
    uniform = draw_prior(10_000, 2, "uniform", random)
    assert -1 <= float(uniform.min()) < -0.99
    assert float(uniform.var(0).mean()) == pytest.approx(1 / 3, rel=0.05)
    assert float(draw_prior(10_000, 2, "normal", random).var(0).mean()) == pytest.approx(1, rel=0.05)


def test_wae_learns_and_its_codes_approach_the_prior(images: data.Images, tmp_path: Path) -> None:
    settings = {**WAE_SMALL, "epochs": 40, "latent_dim": 2, "lr": 3e-3}
    model = WAEMMD(**settings).fit(images, tmp_path / "run", trainer=QUIET)
    error = curve(tmp_path / "run", "wae", "reconstruction")
    assert error[-1] < 0.5 * error[0]
    drawn = draw_prior(64, 2, "normal", torch.Generator().manual_seed(0))
    free = WAEMMD(**{**settings, "penalty_weight": 0.0}).fit(images, tmp_path / "free", trainer=QUIET)
    assert model.code is not None
    assert free.code is not None
    assert float(wae_mmd(model.code, drawn)) < 0.2 * float(wae_mmd(free.code, drawn))


@pytest.mark.parametrize("space", ["code", "data"])
def test_gmmn_learns(space: str, images: data.Images, tmp_path: Path) -> None:
    settings = {**GMMN_SMALL, "epochs": 60, "code_epochs": 60, "space": space, "lr": 5e-3, "code_lr": 5e-3}
    GMMN(**settings).fit(images, tmp_path / "run", trainer=QUIET)
    loss = curve(tmp_path / "run", "gmmn")
    assert loss[-1] < 0.5 * loss[0]
    if space == "code":
        error = curve(tmp_path / "run", "autoencoder")
        assert error[-1] < 0.7 * error[0]


@pytest.mark.parametrize("name", ["wae-mmd", "gmmn"])
def test_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    small = WAE_SMALL if name == "wae-mmd" else GMMN_SMALL
    flags = [f"--{key}={list(value) if isinstance(value, tuple) else value}" for key, value in small.items()]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["train", name, "--data", "digits", "--out", str(out), *flags, *quiet]) == 0
    assert main(["train", name, "--out", str(out), "--resume", *quiet]) == 0
    assert main(["evaluate", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"kid", "coverage"} <= set(metrics[name])
    for picture in ("samples", "reconstructions", "interpolations", "neighbours", "curves"):
        assert (out / f"{picture}.png").read_bytes()[:4] == b"\x89PNG", picture
    assert main(["sample", str(out), "--n", "4", "--out", str(tmp_path / "a.png")]) == 0
    assert main(["train", name, "--out", str(out), "--resume", "--batch=48"]) == 2
    assert "batch: the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "argument", "bad", "error"),
    [
        (WAEMMD, "latent_dim", 0, ValueError),
        (WAEMMD, "batch", 1, ValueError),
        (WAEMMD, "prior", "cauchy", ValueError),
        (WAEMMD, "penalty", "fast", ValueError),
        (WAEMMD, "penalty_weight", -1.0, ValueError),
        (WAEMMD, "lr", 0.0, ValueError),
        (GMMN, "space", "latent", ValueError),
        (GMMN, "hidden", (8, 0), ValueError),
        (GMMN, "drop", 0.95, ValueError),
        (GMMN, "epochs", 2.5, TypeError),
    ],
)
def test_bad_arguments_are_named(model: Any, argument: str, bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=argument):
        model(**{argument: bad})


def test_a_cut_checkpoint_is_named(images: data.Images, whole: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(whole["gmmn"], tmp_path / "run")
    file = tmp_path / "run" / "gmmn" / "last.ckpt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cut short"):
        GMMN.load(Run(tmp_path / "run"), images)
