"""FRAME models: each update against naive float64 loops, β = 0 and resumption to the bit, and that they learn."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastgen import data
from fastgen.check import UserError
from fastgen.functional import langevin_noise
from fastgen.models.frame import WFRAME, DeepFRAME, GenerativeConvNet, match_table
from fastgen.models.frame_learner import PIXELS, ConvScore, FilterScore, Learner
from fastgen.models.run import Run, generator
from fastgen.nn import trunk as make_trunk

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
DEEP: dict[str, Any] = {"layers": [PIXELS], "chains": 4, "n_steps": 3, "epochs": 3, "sample_steps": 5}
CONV: dict[str, Any] = {"width": 3, "batch": 16, "chains": 6, "n_steps": 3, "epochs": 3, "sample_steps": 5}
SMOOTH = {"restart": 0.0, "clamp": False}


@pytest.fixture(scope="module")
def images() -> data.Images:
    digits = data.load("digits")
    return data.Images("digits", digits.train[:64], digits.test[:16])


@pytest.fixture(scope="module")
def texture() -> data.Images:
    brick = data.load("texture:brick:16")
    return data.Images("texture:brick:16", brick.train[:40], brick.test[:8])


def state(model: Any) -> dict[str, torch.Tensor]:
    assert model.learner is not None
    return dict(model.learner.state_dict())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(1e30), second[name].nan_to_num(1e30)), name


def test_filter_means_are_those_of_loops(texture: data.Images, oracle: ModuleType) -> None:
    x, mean, std = texture.train[:9], 0.45, 0.1
    score = FilterScore(None, [PIXELS], x, mean, std)
    rectified, absolute = oracle.filter_means((x.double() - mean) / std)
    assert score.kept.tolist() == (rectified > 0).tolist()
    keep = score.kept
    torch.testing.assert_close(score.scale.double(), absolute[keep], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score.observed.double(), (rectified / absolute)[keep], rtol=1e-5, atol=1e-6)
    y = 2 * torch.randn(3, 1, 16, 16)
    expected = torch.stack([oracle.filter_means(one[None])[0] for one in y])[:, keep] / absolute[keep]
    torch.testing.assert_close(score.means(y).double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        score.weight.copy_(torch.randn(len(score.weight)))
    total = 16 * 16 * expected @ score.weight.detach().double()
    torch.testing.assert_close(score(y).detach().double(), total, rtol=1e-5, atol=1e-3)


def test_trunk_filters_are_rectified_means_of_its_maps(texture: data.Images) -> None:
    network = make_trunk("efficientnet-lite0", weights="random")
    x, mean, std = texture.train[:70], 0.4, 0.2  # more than one part of 64
    score = FilterScore(network, ["stem", PIXELS, "block1"], x, mean, std)
    stem, block = network(x, ("stem", "block1"))
    sizes = [f.double().abs().mean((0, 2, 3)) for f in (stem, block)]
    means = [f.double().relu().mean((0, 2, 3)) for f in (stem, block)]
    for name, size, rectified in zip(("stem", "block1"), sizes, means, strict=True):
        mine = torch.tensor([layer == name for layer in score.layer_of])
        alive = rectified > 0
        assert int(mine.sum()) == int(alive.sum())
        torch.testing.assert_close(score.observed[mine].double(), (rectified / size)[alive], rtol=1e-4, atol=1e-5)
    assert not any("trunk" in key for key in score.state_dict())
    table = match_table(score, score.observed)
    assert table["stem, error"] == table["all layers, worst"] == 0
    assert table["block1, within 5 %"] == 1
    off = score.observed.clone()
    off[0] += 0.2
    assert match_table(score, off)["stem, worst"] == pytest.approx(0.2, rel=1e-5)
    assert match_table(score, off)["block1, worst"] == 0


def learner_of(model: Any, images: data.Images) -> Learner:
    built: Learner = model._learner(images)
    return built


def test_chains_follow_the_equation_with_recorded_noise(texture: data.Images, oracle: ModuleType) -> None:
    model = DeepFRAME(layers=[PIXELS], step_size=0.003, reference_scale=0.8, seed=5)
    learner = learner_of(model, texture)
    weight = 0.05 * torch.randn(len(learner.score.weight), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        learner.score.weight.copy_(weight)
    x = torch.randn(2, 1, 16, 16)
    noise = [langevin_noise(x, seed=9, step=20 + k) for k in range(3)]

    def pull(at: torch.Tensor) -> torch.Tensor:
        double = learner.score.double()
        gradient = learner.pull(at)[1]
        double.float()
        return gradient

    expected = oracle.langevin(x, pull, noise, step_size=0.003 * 0.5, sigma=0.8)
    got, energy = learner.evolve(x.clone(), 3, seed=9, step=20, share=0.5)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    before, _ = learner.evolve(x.clone(), 2, seed=9, step=20, share=0.5)
    torch.testing.assert_close(energy, learner.energy(before))
    prior = before.double().square().sum((1, 2, 3)) / (2 * 0.8**2)
    torch.testing.assert_close(energy.double(), prior - learner.score(before).double(), rtol=1e-5, atol=1e-3)


def test_rounds_go_on_with_new_noise(texture: data.Images, tmp_path: Path, oracle: ModuleType) -> None:
    """With λ held at nothing the chains are those of the reference alone, their noise counted over the rounds."""
    plain = {"lr": 1e-30, "optimizer": "sgd", "step_final": 1.0, "step_size": 0.01, "reference_scale": 0.8}
    model = DeepFRAME(**{**DEEP, **plain, "epochs": 1})
    learner = model.fit(texture, tmp_path / "run", trainer={**QUIET, "limit_train_batches": 3}).learner
    start = learner.start(4, generator(0, 0, 3), (1, 16, 16))
    noise = [langevin_noise(start, seed=0, step=k) for k in range(9)]
    expected = oracle.langevin(start, torch.zeros_like, noise, step_size=0.01, sigma=0.8)
    torch.testing.assert_close(learner.chains.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_parameter_step_of_deep_frame(texture: data.Images, tmp_path: Path, oracle: ModuleType) -> None:
    """One round with plain steps: λ = lr · D · (observed − mean of h_k/s_k at the chains), all of it from loops."""
    model = DeepFRAME(**{**DEEP, "epochs": 1, "optimizer": "sgd", "lr": 1e-5, "lr_final": 1.0, "step_final": 1.0})
    one = {**QUIET, "limit_train_batches": 1}
    model.fit(texture, tmp_path / "run", trainer=one)
    learner = model.learner
    assert learner is not None
    mean, std = float(texture.train.double().mean()), float(texture.train.double().std())
    rectified, absolute = oracle.filter_means((texture.train.double() - mean) / std)
    keep = learner.score.kept
    chains = oracle.filter_means(learner.chains)[0]
    expected = 1e-5 * 256 * ((rectified - chains) / absolute)[keep]
    torch.testing.assert_close(learner.score.weight.detach().double(), expected, rtol=1e-4, atol=1e-8)
    error = ((chains - rectified) / absolute)[keep].abs().mean()
    assert float(learner.mismatch[0]) == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("penalty", ["energy", "score"])
def test_looking_ahead_is_the_jko_term(images: data.Images, oracle: ModuleType, penalty: str) -> None:
    """The gradient at negatives one step ahead is FRAME's and the penalty's by double backward, up to O(β²)."""
    sigma, x0 = 0.7, images.train[:5].double() * 4 - 1
    worst = {}
    for beta in (2e-2, 1e-2):
        model = WFRAME(base="generative-convnet", beta=beta, penalty=penalty, reference_scale=sigma, width=3)
        learner = learner_of(model, images)
        learner.score.double()
        with torch.no_grad():
            for parameter in learner.score.parameters():
                parameter.mul_(2)
        chains = torch.randn(7, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        ahead = learner.look_ahead(chains)
        got = torch.autograd.grad(learner.score.gap(ahead, x0), list(learner.score.parameters()))
        args = (learner.score, chains, x0)
        expected = oracle.penalised_gap_gradient(*args, beta=beta, sigma=sigma, penalty=penalty)
        plain = oracle.penalised_gap_gradient(*args, beta=0.0, sigma=sigma, penalty=penalty)
        term = max(float((e - p).abs().max()) for e, p in zip(expected, plain, strict=True))
        worst[beta] = max(float((g - e).abs().max()) for g, e in zip(got, expected, strict=True))
        assert worst[beta] < 0.2 * term
    assert worst[1e-2] < 0.3 * worst[2e-2]  # second order: a quarter


def test_deep_frame_learns_from_fewer_images_than_an_epoch_has_rounds(texture: data.Images, tmp_path: Path) -> None:
    few = data.Images("few", texture.train[:8], texture.test[:2])
    model = DeepFRAME(**DEEP).fit(few, tmp_path / "run", trainer=QUIET)
    assert model.learner is not None
    assert len(model.learner.energies) == 30
    assert model.learner.energies.isfinite().all()


@pytest.mark.parametrize("base", ["deep-frame", "generative-convnet"])
def test_beta_0_is_frame_to_the_bit(images: data.Images, texture: data.Images, tmp_path: Path, base: str) -> None:
    settings, source = (DEEP, texture) if base == "deep-frame" else (CONV, images)
    plain: Any = (DeepFRAME if base == "deep-frame" else GenerativeConvNet)(**settings)
    plain.fit(source, tmp_path / "frame", trainer=QUIET)
    runs = {}
    for beta in (0.0, 0.05):
        for penalty in ("energy", "score"):
            model = WFRAME(base=base, beta=beta, penalty=penalty, **settings)
            runs[beta, penalty] = state(model.fit(source, tmp_path / f"{beta}{penalty}", trainer=QUIET))
    same(state(plain), runs[0.0, "energy"])
    same(state(plain), runs[0.0, "score"])
    chains = {key: run["chains"] for key, run in runs.items()}
    assert not torch.equal(chains[0.05, "energy"], chains[0.0, "energy"])
    assert not torch.equal(chains[0.05, "energy"], chains[0.05, "score"])


def test_the_convnets_gap_and_energy(images: data.Images) -> None:
    model = GenerativeConvNet(width=2, reference_scale=0, clamp=True)
    learner = learner_of(model, images)
    x, y = torch.randn(3, 1, 8, 8), torch.randn(5, 1, 8, 8)
    each = torch.stack([learner.score(one[None])[0] for one in x])
    torch.testing.assert_close(learner.energy(x), -each)  # no reference, no ‖x‖²
    both = each.mean() - torch.stack([learner.score(one[None])[0] for one in y]).mean()
    torch.testing.assert_close(learner.score.gap(x, y), both)
    low, high = learner.bounds
    assert float(learner.chains.min()) >= low
    assert float(learner.chains.max()) <= high
    assert float(learner.chains.max()) > high - 0.1 * (high - low)  # uniform over the image's range
    mean = images.train.double().mean()
    assert low == pytest.approx(-float(mean / images.train.double().std()))
    torch.testing.assert_close(learner.image(torch.tensor([low, high, 0.0])), torch.tensor([0, 1, float(mean)]))
    sums = ConvScore((1, 8, 8), 2, "sum")
    wider = sums(torch.randn(2, 1, 16, 12))
    assert wider.shape == (2,)


KILLED = """
import os, signal
from lightning.pytorch import Callback
from fastgen import data
from fastgen.models.frame import {cls}

class Kill(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        if trainer.current_epoch == 2 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

whole = data.load({source!r})
images = data.Images({source!r}, whole.train[:{rows}], whole.test[:{test}])
{cls}(**{settings!r}).fit(images, {out!r}, trainer={{**{quiet!r}, "callbacks": [Kill()]}})
"""


@pytest.mark.parametrize("cls", [WFRAME, GenerativeConvNet])
def test_resume_after_kill_9(
    images: data.Images, texture: data.Images, tmp_path: Path, run_apart: Callable[..., list[Any]], cls: Any
) -> None:
    """The same chains, energies, snapshots and samples as of an undisturbed run."""
    settings = {**DEEP, "beta": 0.01, "restart": 0.3} if cls is WFRAME else CONV
    source = texture if cls is WFRAME else images
    whole = cls(**settings).fit(source, tmp_path / "whole", trainer=QUIET)
    out = tmp_path / "killed"
    code = KILLED.format(
        cls=cls.__name__,
        source=source.name,
        rows=len(source.train),
        test=len(source.test),
        settings=settings,
        out=str(out),
        quiet=QUIET,
    )
    (done,) = run_apart(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = Run(out).load("frame")
    assert 0 < int(kept["taken"]) < int(state(whole)["taken"])
    resumed = cls(**settings).fit(source, out, resume=True, trainer=QUIET)
    same(state(whole), state(resumed))
    assert int(state(whole)["taken"]) == settings["epochs"] * settings["n_steps"] * (10 if cls is WFRAME else 4)
    assert bool(state(whole)["energies"].isfinite().all())
    loaded = cls.load(Run(out), source)
    drawn = whole.sample(3, seed=4)
    assert drawn.shape == (3, *source.shape)
    assert torch.equal(drawn, loaded.sample(3, seed=4))
    assert not torch.equal(drawn, loaded.sample(3, seed=5))
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1


def test_deep_frame_learns_the_filter_means(texture: data.Images, tmp_path: Path) -> None:
    settings = {**DEEP, "epochs": 16, "n_steps": 15, "step_size": 5e-3, "lr": 3e-2, "chains": 12}
    model = DeepFRAME(**settings).fit(texture, tmp_path / "run", trainer=QUIET)
    mismatch = state(model)["mismatch"]
    assert float(mismatch[0]) > 0.5
    assert float(mismatch[-20:].mean()) < 0.1
    learner = model.learner
    assert learner is not None
    # The snapshots go from the start to the end.
    assert torch.equal(learner.snapshots[-1].float(), (learner.image(learner.chains[:8]) * 255).round())
    assert not torch.equal(learner.snapshots[0], learner.snapshots[1])


@pytest.mark.parametrize("start", ["chains", "reference"])
def test_where_samples_start(texture: data.Images, tmp_path: Path, start: str) -> None:
    settings = {**DEEP, "epochs": 1, "n_steps": 1, "sample_steps": 1, "sample_from": start, "noise_scale": 0.0}
    model = DeepFRAME(**settings, step_size=1e-9).fit(texture, tmp_path / "run", trainer=QUIET)
    learner = model.learner
    assert learner is not None
    before = learner.chains.clone()
    drawn = model.sample(7, seed=1)
    again = learner.image(before[torch.arange(7) % 4])
    assert torch.equal(learner.chains, before)
    assert torch.allclose(drawn, again, atol=1e-4) == (start == "chains")
    assert torch.allclose(drawn[0], drawn[4], atol=1e-4) == (start == "chains")


def test_restarts_happen_as_often_as_asked(images: data.Images) -> None:
    learner = learner_of(GenerativeConvNet(**{**CONV, "chains": 400, "restart": 0.25}), images)
    before = learner.chains.clone()
    learner._restart(0)
    assert torch.equal(learner.chains, before)
    learner._restart(7)
    fresh = (learner.chains != before).flatten(1).any(1)
    assert abs(float(fresh.float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)


def test_divergence_is_said_and_the_folder_given_back(texture: data.Images, tmp_path: Path) -> None:
    model = DeepFRAME(**{**DEEP, "step_size": 1e3}, lr=1.0)
    with pytest.raises(UserError, match="the chains diverged before Langevin step"):
        model.fit(texture, tmp_path / "run", trainer=QUIET)
    assert model.learner is not None  # what it had recorded can be read
    assert not model.learner.chains.abs().max() < 1e3
    assert not (tmp_path / "run" / "run.json").exists()  # before a checkpoint there is nothing to keep


@pytest.mark.parametrize(
    ("cls", "settings", "says"),
    [
        (DeepFRAME, {"step_size": 0.0}, "step_size: expected a finite number > 0"),
        (DeepFRAME, {"step_final": 2.0}, "step_final: expected"),
        (DeepFRAME, {"noise_scale": -1.0}, "noise_scale: expected"),
        (DeepFRAME, {"reference_scale": -1.0}, "reference_scale: expected"),
        (DeepFRAME, {"chains": 0}, "chains: expected an integer >= 1"),
        (DeepFRAME, {"restart": 1.5}, "restart: expected"),
        (GenerativeConvNet, {"head": "tail"}, "head: expected one of 'full', 'sum'"),
        (GenerativeConvNet, {"optimizer": "lion"}, "optimizer: expected one of"),
        (WFRAME, {"beta": -0.1}, "beta: expected"),
        (WFRAME, {"penalty": "both"}, "penalty: expected one of 'energy', 'score'"),
        (WFRAME, {"base": "gan"}, "base: expected one of"),
        (WFRAME, {"width": 4}, "width: expected nothing for base='deep-frame'"),
        (WFRAME, {"base": "generative-convnet", "layers": ["stem"]}, "layers: expected nothing for base="),
    ],
)
def test_bad_settings(cls: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cls(**settings)


def test_bad_layers_and_data(texture: data.Images, tmp_path: Path) -> None:
    flat = data.Images("flat", torch.full((12, 1, 8, 8), 0.5), torch.full((3, 1, 8, 8), 0.5))
    with pytest.raises(UserError, match="images of one colour"):
        DeepFRAME(layers=[PIXELS]).fit(flat, tmp_path / "a")
    with pytest.raises(UserError, match="block99"):
        DeepFRAME(layers=["block99"]).fit(texture, tmp_path / "a")
    with pytest.raises(UserError, match="each name once"):
        DeepFRAME(layers=[PIXELS, PIXELS]).fit(texture, tmp_path / "a")
    with pytest.raises(UserError, match="epochs: noise stream"):
        DeepFRAME(layers=[PIXELS], epochs=10**7, n_steps=100).fit(texture, tmp_path / "a")
    assert not (tmp_path / "a").exists()
