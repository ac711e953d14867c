"""GLO as a model: the row optimiser against dense torch, training, resuming, and samples from the fitted Gaussian."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from fastgen import data
from fastgen.check import UserError
from fastgen.models.glo import Decoder
from fastgen.models.glo_model import GLOModel, LaplacianLoss
from fastgen.models.row_adam import RowAdam, project
from fastgen.models.run import Run

SMALL: dict[str, Any] = {"latent_dim": 6, "width": 4, "epochs": 3, "batch": 16}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def images() -> data.Images:
    digits = data.load("digits")
    return data.Images("digits", digits.train[:64], digits.test[:16])


def naive(z: Tensor, gradients: list[dict[int, Tensor]], lr: float, onto: str | None) -> Tensor:
    """Dense, row by row in float64: Kingma and Ba's Adam for the rows of each step, which then are projected."""
    z = z.double().clone()
    m, v = torch.zeros_like(z), torch.zeros_like(z)
    for t, of_rows in enumerate(gradients, 1):
        for row, g in of_rows.items():
            m[row] = 0.5 * m[row] + 0.5 * g.double()
            v[row] = 0.999 * v[row] + 0.001 * g.double() ** 2
            size = lr * math.sqrt(1 - 0.999**t) / (1 - 0.5**t)
            z[row] -= size * m[row] / (v[row].sqrt() + 1e-8)
            norm = float(z[row].norm())
            if onto == "sphere" or (onto == "ball" and norm > 1):
                z[row] /= norm
    return z


@pytest.mark.parametrize("onto", ["sphere", "ball", None])
def test_row_adam(onto: str | None) -> None:
    table = torch.nn.Embedding(9, 4, sparse=True)
    with torch.no_grad():
        table.weight.mul_(0.5)
    start = table.weight.detach().clone()
    optimiser = RowAdam(table.parameters(), 0.1, betas=(0.5, 0.999), project=onto)
    gradients = []
    for step in range(6):
        rows = torch.randperm(8)[:3]  # row 8 is never touched
        rows = torch.cat([rows, rows[:1]]) if step == 2 else rows  # one of them twice
        weight = torch.randn(len(rows), 4)
        optimiser.zero_grad()
        (table(rows) * weight).sum().backward()
        optimiser.step()
        summed: dict[int, Tensor] = {}
        for row, g in zip(rows.tolist(), weight, strict=True):
            summed[row] = summed[row] + g if row in summed else g
        gradients.append(summed)
        if step == 3:  # a state that was saved goes on alike
            again = RowAdam(table.parameters(), 1.0)
            again.load_state_dict(optimiser.state_dict())
            optimiser = again
    torch.testing.assert_close(table.weight.double(), naive(start, gradients, 0.1, onto), rtol=1e-5, atol=1e-6)
    assert torch.equal(table.weight[8], start[8])


def test_without_projection_it_is_sparse_adam_and_touching_all_rows_adam() -> None:
    tables = [torch.nn.Embedding(5, 3, sparse=sparse) for sparse in (True, True, False)]
    for table in tables:
        table.load_state_dict(tables[0].state_dict())
    kinds = (RowAdam, torch.optim.SparseAdam, torch.optim.Adam)
    more: Any = ({"project": None}, {}, {})
    optimisers = [k(t.parameters(), 0.05, **kw) for k, t, kw in zip(kinds, tables, more, strict=True)]
    for _ in range(5):
        weight = torch.randn(5, 3)
        for table, optimiser in zip(tables, optimisers, strict=True):
            optimiser.zero_grad()
            (table(torch.arange(5)) * weight).sum().backward()
            optimiser.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight)
    torch.testing.assert_close(tables[0].weight, tables[2].weight, rtol=1e-5, atol=1e-6)


def test_row_adam_refuses() -> None:
    table = torch.nn.Embedding(5, 3)
    table(torch.arange(2)).sum().backward()
    with pytest.raises(RuntimeError, match="expected a sparse gradient"):
        RowAdam(table.parameters()).step()
    with pytest.raises(ValueError, match="project: expected one of 'sphere', 'ball', got 'cube'"):
        RowAdam(table.parameters(), project="cube")
    for betas in ((0.5, 1.0), (0.5,), (0.5, 0.9, 0.9), 0.5):
        with pytest.raises(ValueError, match="betas: expected"):
            RowAdam(table.parameters(), betas=betas)


@pytest.mark.parametrize("space", ["sphere", "ball"])
@pytest.mark.parametrize("loss", ["laplacian", "perceptual"])
def test_training_learns_and_latents_stay(images: data.Images, tmp_path: Path, space: str, loss: str) -> None:
    settings = {**SMALL, "epochs": 30, "width": 8, "generator_lr": 5e-3, "latent_space": space, "loss": loss}
    settings |= {"layers": ["block0"], "latent_init": "random"}
    model = GLOModel(**settings).fit(images, tmp_path / "run", trainer=QUIET)
    assert model.latent is not None
    norm = model.latent.norm(dim=1)
    if space == "sphere":
        torch.testing.assert_close(norm, torch.ones(64))
    else:
        assert float(norm.max()) <= 1 + 1e-6
        assert float(norm.min()) < 0.99
    error = (model.decode(model.latent) - images.train).square().mean()
    assert error < 0.6 * (images.train - images.train.mean(0)).square().mean()


def test_samples_come_from_the_gaussian_of_the_latents(images: data.Images, tmp_path: Path) -> None:
    model = GLOModel(**{**SMALL, "latent_space": "ball"}).fit(images, tmp_path / "run", trainer=QUIET)
    assert model.latent is not None
    model.latent = model.latent * 0.2 + 0.1  # well inside the ball, where the projection does nothing
    seen: list[Tensor] = []
    model.decode = lambda latent: seen.append(latent) or latent  # type: ignore[method-assign,func-returns-value]
    model.sample(40_000, seed=1)
    torch.testing.assert_close(seen[0].mean(0), model.latent.mean(0), atol=3e-3, rtol=0)
    torch.testing.assert_close(seen[0].T.cov(), model.latent.T.cov(), atol=3e-4, rtol=0.02)
    model.latent = model.latent * 30
    model.sample(100, seed=1)
    assert float(seen[1].norm(dim=1).max()) <= 1 + 1e-6


class StopAt(Callback):
    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("broken off")


def test_resumed_run_equals_an_unbroken_one(images: data.Images, tmp_path: Path) -> None:
    whole = GLOModel(**SMALL).fit(images, tmp_path / "whole", trainer=QUIET)
    with pytest.raises(RuntimeError, match="broken off"):
        GLOModel(**SMALL).fit(images, tmp_path / "cut", trainer={**QUIET, "callbacks": [StopAt()]})
    GLOModel(**SMALL).fit(images, tmp_path / "cut", resume=True, trainer=QUIET)
    one, two = (Run(tmp_path / name).load("glo") for name in ("whole", "cut"))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    model = GLOModel.load(Run(tmp_path / "cut"), images)
    first = model.sample(5, seed=3)
    assert first.shape == (5, 1, 8, 8)
    assert torch.equal(first, whole.sample(5, seed=3))
    assert not torch.equal(first, model.sample(5, seed=4))
    assert model.interpolations(2, 3).shape == (6, 1, 8, 8)


def test_laplacian_loss_is_the_articles() -> None:
    from fastgen.functional import laplacian_pyramid_loss

    x, y = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    expected = laplacian_pyramid_loss(x, y, levels=2) + 0.5 * (x - y).square().mean((1, 2, 3))
    torch.testing.assert_close(LaplacianLoss(2, 0.5)(x, LaplacianLoss(2, 0.5).target(y)), expected)
    torch.testing.assert_close(LaplacianLoss(0, 1.0)(x, y), (x - y).square().mean((1, 2, 3)))


def test_projection() -> None:
    z = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert project(z, "sphere").tolist() == [pytest.approx([0.6, 0.8]), pytest.approx([0.6, 0.8]), [0, 0]]
    assert project(z, "ball").tolist() == [pytest.approx([0.6, 0.8]), pytest.approx([0.3, 0.4]), [0, 0]]


def test_bad_arguments_are_named(images: data.Images, tmp_path: Path) -> None:
    for argument, bad in (("latent_dim", 0), ("batch", 1), ("latent_space", "cube"), ("loss", "l7"), ("levels", -1)):
        with pytest.raises(ValueError, match=argument):
            GLOModel(**{argument: bad})
    with pytest.raises(UserError, match="levels: expected at most 3 for images of 8x8"):
        GLOModel(levels=4).fit(images, tmp_path / "run", trainer=QUIET)
    assert not (tmp_path / "run").exists()


def test_interpolations_between_equal_and_opposite_latents_are_finite() -> None:
    decoder = Decoder()
    decoder.generator = torch.nn.Identity()
    start = torch.tensor([0.6, 0.8])
    decoder.latent = torch.stack([start, start, start, -start])
    path = decoder.interpolations(2, 3).view(2, 3, 2)
    torch.testing.assert_close(path[0], start.expand(3, 2), rtol=1e-4, atol=1e-4)
    assert path[1].isfinite().all()
    torch.testing.assert_close(path[1, [0, 2]], torch.stack([start, -start]), rtol=1e-3, atol=1e-3)
