"""GLANN learns, resumes to the bit, and keeps what was there before."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from fastgen import data
from fastgen.check import UserError
from fastgen.models.glann import GLANN
from fastgen.models.glo import initial_latents
from fastgen.models.imle import LatentIMLE
from fastgen.models.imle_pool import codes
from fastgen.models.run import EpochBatches, Run

SMALL: dict[str, Any] = {
    "latent_dim": 6,
    "width": 4,
    "layers": ["block0"],
    "glo_epochs": 3,
    "glo_batch": 16,
    "hidden": 16,
    "hidden_layers": 1,
    "imle_epochs": 3,
    "imle_batch": 16,
    "pool": 2,
    "checkpoint_every": 2,
}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def images() -> data.Images:
    digits = data.load("digits")
    return data.Images("digits", digits.train[:64], digits.test[:16])


class StopAt(Callback):
    """Breaks off at the start of an epoch, as Ctrl-C would."""

    def __init__(self, stage: str, epoch: int) -> None:
        self.stage, self.epoch = stage, epoch

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if type(module).__name__ == self.stage and trainer.current_epoch == self.epoch:
            raise RuntimeError("broken off")


def states(run: Path) -> dict[str, torch.Tensor]:
    return {f"{s}.{k}": v for s in ("glo", "imle") for k, v in Run(run).load(s).items()}


@pytest.fixture(scope="module")
def whole(images: data.Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    GLANN(**SMALL).fit(images, out, trainer=QUIET)
    return out


@pytest.mark.parametrize(("stage", "epoch"), [("GLO", 1), ("LatentIMLE", 2)])
def test_resumed_run_equals_an_unbroken_one(
    images: data.Images, whole: Path, tmp_path: Path, stage: str, epoch: int
) -> None:
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="broken off"):
        GLANN(**SMALL).fit(images, out, trainer={**QUIET, "callbacks": [StopAt(stage, epoch)]})
    # Layers as a tuple are the same layers.
    GLANN(**{**SMALL, "layers": tuple(SMALL["layers"])}).fit(images, out, resume=True, trainer=QUIET)
    expected, got = states(whole), states(out)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_a_stage_broken_off_is_not_a_finished_one(images: data.Images, tmp_path: Path) -> None:
    """Lightning's fit returns as if all were well when it is told to stop."""

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = True

    with pytest.raises(UserError, match=r"glo: trainer\.max_time or a callback ended it after 1 of 3 epochs"):
        GLANN(**SMALL).fit(images, tmp_path / "run", trainer={**QUIET, "callbacks": [Stop()]})
    assert not (tmp_path / "run" / "imle").exists()


KILLED = """
import os, signal
from lightning.pytorch import Callback
from fastgen import data
from fastgen.models.glann import GLANN

class Kill(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_number):
        if (type(module).__name__, trainer.current_epoch, batch_number) == {when!r}:
            os.kill(os.getpid(), signal.SIGKILL)

digits = data.load("digits")
images = data.Images("digits", digits.train[:64], digits.test[:16])
GLANN(**{small!r}).fit(images, {out!r}, trainer={{**{quiet!r}, "callbacks": [Kill()]}})
"""


@pytest.mark.parametrize("when", [("GLO", 1, 3), ("LatentIMLE", 1, 0), ("LatentIMLE", 2, 3)])
def test_resume_after_kill_9(
    images: data.Images, whole: Path, tmp_path: Path, run_apart: Callable[..., list[Any]], when: tuple[str, int, int]
) -> None:
    """At an epoch's start and in its middle, two steps after the last checkpoint."""
    out = tmp_path / "run"
    (done,) = run_apart(KILLED.format(small=SMALL, out=str(out), quiet=QUIET, when=when))
    assert done.returncode == -signal.SIGKILL, done.stderr
    stage = when[0].removeprefix("Latent").lower()
    last = torch.load(out / stage / "last.ckpt", weights_only=True)
    assert float(last["loss_sum"][1]) == (32 if when[2] else 0)  # rows of the epoch that was broken off
    GLANN(**SMALL).fit(images, out, resume=True, trainer=QUIET)
    for name, value in states(whole).items():
        assert torch.equal(value, states(out)[name]), name
    # The epoch's mean loss takes in the steps before the kill.
    from fastgen.report import _curve

    assert _curve(out / "logs" / stage) == _curve(whole / "logs" / stage)


def test_load_and_sample_are_deterministic(images: data.Images, whole: Path) -> None:
    model = GLANN.load(Run(whole), images)
    first = model.sample(5, seed=3)
    assert first.shape == (5, 1, 8, 8)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    assert torch.equal(first, GLANN.load(Run(whole), images).sample(5, seed=3))
    assert not torch.equal(first, model.sample(5, seed=4))
    assert model.latent is not None
    torch.testing.assert_close(model.latent.norm(dim=1), torch.ones(64))


def test_training_learns(images: data.Images, tmp_path: Path) -> None:
    """Reconstructions approach the images, and mapped noise the latents: both far below where they start."""
    settings = {**SMALL, "glo_epochs": 40, "imle_epochs": 30, "width": 8, "pool": 10, "generator_lr": 5e-3}
    model = GLANN(**settings).fit(images, tmp_path / "run", trainer=QUIET)
    assert model.latent is not None
    error = (model.decode(model.latent) - images.train).square().mean()
    spread = (images.train - images.train.mean(0)).square().mean()
    assert error < 0.5 * spread
    from fastgen.report import _curve

    nearest = _curve(tmp_path / "run" / "logs" / "imle")
    assert nearest[29] < 0.5 * nearest[0]


def test_a_folder_is_never_overwritten(images: data.Images, whole: Path, tmp_path: Path) -> None:
    before = states(whole)
    with pytest.raises(UserError, match="holds another run: give --resume"):
        GLANN(**SMALL).fit(images, whole, trainer=QUIET)
    with pytest.raises(UserError, match=r"latent_dim: the run in .* has 6, got 7"):
        GLANN(**{**SMALL, "latent_dim": 7}).fit(images, whole, resume=True, trainer=QUIET)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        GLANN(**SMALL).fit(images, tmp_path, trainer=QUIET)
    with pytest.raises(UserError, match="no run yet"):
        GLANN(**SMALL).fit(images, tmp_path / "new", resume=True, trainer=QUIET)
    assert not (tmp_path / "new").exists()
    for name, value in states(whole).items():
        assert torch.equal(value, before[name])


def test_a_checkpoint_cut_short_is_named(images: data.Images, whole: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole, out)
    file = out / "imle" / "last.ckpt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"imle.last.ckpt cannot be read as a checkpoint"):
        GLANN(**SMALL).fit(images, out, resume=True, trainer=QUIET)
    with pytest.raises(UserError, match=r"imle.last.ckpt cannot be read as a checkpoint"):
        GLANN.load(Run(out), images)
    file.unlink()
    GLANN(**SMALL).fit(images, out, resume=True, trainer=QUIET)
    for name, value in states(whole).items():
        assert torch.equal(value, states(out)[name]), name


def test_a_checkpoint_cannot_run_code(whole: Path, tmp_path: Path) -> None:
    import pickle
    import shutil

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/owned",)

    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with open(out / "glo" / "last.ckpt", "wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        Run(out).load("glo")
    torch.save({"state_dict": Evil()}, out / "glo" / "last.ckpt")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        Run(out).load("glo")
    assert not (tmp_path / "owned").exists()


def test_pca_latents_are_the_scores() -> None:
    """Cosines between latents are those between centred images projected on their leading components."""
    x = torch.rand(40, 1, 3, 3, dtype=torch.float64)
    latent = initial_latents(x.float(), 4, "pca", torch.Generator()).double()
    flat = x.flatten(1) - x.flatten(1).mean(0)
    u, s, _ = torch.linalg.svd(flat, full_matrices=False)
    scores = u[:, :4] * s[:4]
    scores = scores / scores.norm(dim=1, keepdim=True)
    torch.testing.assert_close(latent @ latent.T, scores @ scores.T, atol=1e-5, rtol=0)
    # More pixels than images takes the other way, to the same latents.
    wide = torch.rand(12, 1, 5, 5)
    small, big = (initial_latents(w, 5, "pca", torch.Generator()) for w in (wide, wide.repeat(3, 1, 1, 1)))
    torch.testing.assert_close((small @ small.T).abs(), (big[:12] @ big[:12].T).abs(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("latent_dim", [9, 30])
def test_latents_beyond_the_rank_are_finite_and_on_the_sphere(latent_dim: int) -> None:
    for kind in ("pca", "random"):
        latent = initial_latents(torch.rand(20, 1, 3, 3), latent_dim, kind, torch.Generator().manual_seed(0))
        assert latent.shape == (20, latent_dim)
        torch.testing.assert_close(latent.norm(dim=1), torch.ones(20))


class Peek(Callback):
    """Checks at each search that the winners are the nearest of a pool made all at once, numbered on from the last."""

    searches = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_number: int) -> None:
        if batch_number:
            return
        latent, chosen = module._held["latent"], module.chosen
        ids = torch.arange(40) + 40 * trainer.current_epoch
        noise = torch.cat([codes(i[None], 3, 2 * module.seed) for i in ids])
        with torch.no_grad():
            made = module.mapper.eval()(noise)
            module.mapper.train()
        assert torch.equal(chosen, ids[torch.cdist(latent, made).argmin(1)])
        assert torch.equal(module.noise(chosen), noise[chosen - ids[0]])
        self.searches += 1


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_imle_takes_the_nearest_of_its_pool(chunk: int) -> None:
    latent = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    module = LatentIMLE(latent, noise_dim=3, hidden=8, layers=1, pool=5, chunk=chunk, lr=1e-3, seed=7)
    peek = Peek()
    quiet = {**QUIET, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(max_epochs=3, callbacks=[peek], **quiet).fit(module, EpochBatches(8, 4, 0))
    assert peek.searches == 3


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> torch.Tensor:
        batches = EpochBatches(21, 4, seed)
        batches.set_epoch(epoch)
        return torch.stack(list(batches))

    assert order(0, 1).shape == (5, 4)
    assert len(order(0, 1).flatten().unique()) == 20
    torch.manual_seed(99)
    assert torch.equal(order(0, 1), order(0, 1))
    assert not torch.equal(order(0, 1), order(0, 2))
    assert not torch.equal(order(0, 1), order(1, 1))


@pytest.mark.parametrize(
    ("argument", "bad", "error"),
    [
        ("latent_dim", 0, ValueError),
        ("glo_batch", 1, ValueError),
        ("imle_lr", 0.0, ValueError),
        ("pixel_weight", -1.0, ValueError),
        ("latent_init", "zeros", ValueError),
        ("pool", 2.5, TypeError),
    ],
)
def test_bad_arguments_are_named(argument: str, bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=argument):
        GLANN(**{argument: bad})
