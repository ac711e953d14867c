"""IMLE learns, resumes to the bit, and splits over processes."""

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from fastgen import data
from fastgen.check import UserError
from fastgen.models import imle_image, processes
from fastgen.models.imle_condition import Condition
from fastgen.models.imle_image import IMLE, RSIMLE, key
from fastgen.models.imle_pool import codes
from fastgen.models.imle_reverse import IMLEReverse, reverse_loss
from fastgen.models.imle_space import Components, Perceptual
from fastgen.models.run import Run

SMALL: dict[str, Any] = {
    "noise_dim": 4,
    "hidden": 16,
    "hidden_layers": 1,
    "epochs": 4,
    "batch": 16,
    "pool": 3,
    "chunk": 50,
    "refresh": 2,
    "checkpoint_every": 2,
}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
Apart = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def images() -> data.Images:
    digits = data.load("digits")
    assert digits.train_label is not None
    assert digits.test_label is not None
    return data.Images("digits", digits.train[:64], digits.test[:16], digits.train_label[:64], digits.test_label[:16])


@pytest.fixture(scope="module")
def whole(images: data.Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    IMLE(**SMALL).fit(images, out, trainer=QUIET)
    return out


def weights(run: Path) -> dict[str, Tensor]:
    return Run(run).load("imle")


def same(run: Path, other: Path) -> None:
    one, two = weights(run), weights(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def rows_of(run: Path, stage: str = "imle") -> list[dict[str, str]]:
    import csv

    found: list[dict[str, str]] = []
    for file in sorted((run / "logs" / stage).glob("version_*/metrics.csv")):
        with open(file, newline="") as lines:
            found += list(csv.DictReader(lines))
    return found


def told(run: Path, stage: str = "imle") -> list[dict[str, str]]:
    """What metrics.csv says of each epoch, of a resumed run from all its files; nothing where a column is empty."""
    return [{k: v for k, v in row.items() if v} for row in rows_of(run, stage)]


class Peek(Callback):
    """Checks at each search that the winners are those of a pool made all at once."""

    searches = 0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        # Callbacks come before the module's own hook: keep the weights that will search.
        self.before = {k: v.clone() for k, v in module.generator.state_dict().items()}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_number: int) -> None:
        if batch_number or trainer.current_epoch % module.refresh:
            return
        n = len(module.chosen)
        ids = torch.arange(3 * n) + trainer.current_epoch * 3 * n
        z = torch.cat([codes(i[None], module.noise_dim, key(module.seed, 0)) for i in ids])
        with torch.no_grad():
            pool = module.generator(z).flatten(1).double()
        distance = torch.cdist(module._held["images"].flatten(1).double(), pool).square()
        torch.testing.assert_close(module.distance.double(), distance.min(1).values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            module.distance.double(), distance[torch.arange(n), module.chosen - ids[0]], rtol=1e-5, atol=1e-6
        )
        self.searches += 1


def test_winners_are_the_nearest_and_made_again_from_their_number(images: data.Images, tmp_path: Path) -> None:
    peek = Peek()
    model = IMLE(**SMALL).fit(images, tmp_path / "run", trainer={**QUIET, "callbacks": [peek]})
    assert peek.searches == 2
    assert model.chosen is not None
    assert int(model.chosen.min()) >= 2 * 64 * 3
    originals, chosen = model.reconstructions(images.train, 16)
    assert originals.shape == chosen.shape == (16, 1, 8, 8)
    assert torch.equal(originals, images.train[::4])
    assert model.interpolations(3, 4).shape == (12, 1, 8, 8)


def test_it_learns(images: data.Images, tmp_path: Path) -> None:
    """The mean nearest distance falls and coverage rises, search by search."""
    settings = {**SMALL, "epochs": 40, "refresh": 5, "hidden": 64, "pool": 10, "lr": 3e-3}
    IMLE(**settings).fit(images, tmp_path / "run", trainer=QUIET)
    searched = [row for row in rows_of(tmp_path / "run") if row["nearest"]]
    near = [float(row["nearest"]) for row in searched]
    cover = [float(row["coverage"]) for row in searched]
    assert len(near) == 8
    assert near[-1] < 0.5 * near[0]
    assert sum(b < a for a, b in itertools.pairwise(near)) >= 6
    assert cover[0] < 0.1
    assert cover[-1] > 0.5


KILLED = """
import os, signal
from lightning.pytorch import Callback
from fastgen import data
from fastgen.models import model_class

class Kill(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_number):
        if (trainer.current_epoch, batch_number) == {when!r}:
            os.kill(os.getpid(), signal.SIGKILL)

digits = data.load("digits")
images = data.Images("digits", digits.train[:64], digits.test[:16], digits.train_label[:64], digits.test_label[:16])
model_class({name!r})(**{small!r}).fit(images, {out!r}, trainer={{**{quiet!r}, "callbacks": [Kill()]}})
"""


@pytest.mark.parametrize("when", [(2, 3), (1, 0)])
def test_resume_after_kill_9_in_the_middle_of_an_epoch(
    images: data.Images, whole: Path, tmp_path: Path, run_apart: Apart, when: tuple[int, int]
) -> None:
    out = tmp_path / "run"
    code = KILLED.format(small=SMALL, out=str(out), quiet=QUIET, when=when, name="imle")
    (done,) = run_apart(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    step = torch.load(out / "imle" / "last.ckpt", weights_only=True)["global_step"]
    assert step == {(2, 3): 10, (1, 0): 4}[when]  # two steps into the epoch, and the end of the first
    IMLE(**SMALL).fit(images, out, resume=True, trainer=QUIET)
    same(out, whole)
    assert told(out) == told(whole)


@pytest.fixture
def npy(images: data.Images, tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", (data.load("digits").train[:80, 0] * 16).round().numpy().astype(np.uint8) * 15)
    return tmp_path / "x.npy"


def test_data_on_disk_trains_to_the_same_weights(npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file read row by row, searched in blocks of 10 rows, against the same in memory."""
    stored, held = data.load(str(npy), on_disk=True), data.load(str(npy))
    assert isinstance(stored.train, data.Stored)
    assert torch.equal(stored.train[torch.tensor([5, 2, 2])], held.train[[5, 2, 2]])
    assert torch.equal(stored.test[:], held.test)
    assert stored.shape == held.shape == (1, 8, 8)
    IMLE(**SMALL).fit(held, tmp_path / "held", trainer=QUIET)
    monkeypatch.setattr(imle_image, "BLOCK", 10 * 4 * 64)
    IMLE(**SMALL).fit(stored, tmp_path / "stored", trainer=QUIET)
    same(tmp_path / "stored", tmp_path / "held")


def test_bad_files_are_named(npy: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.npy"
    short.write_bytes(npy.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"short\.npy cannot be read as a \.npy array"):
        data.load(str(short), on_disk=True)
    np.save(tmp_path / "words.npy", np.zeros((20, 4, 4), np.int64))
    with pytest.raises(UserError, match="expected uint8 or floating-point pixels, got int64"):
        data.load(str(tmp_path / "words.npy"), on_disk=True)
    bad = np.zeros((20, 4, 4), np.float32)
    bad[:, 2] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    with pytest.raises(UserError, match=r"nan\.npy: expected floating-point pixels in \[0, 1\], found nan"):
        IMLE(**SMALL).fit(data.load(str(tmp_path / "nan.npy"), on_disk=True), tmp_path / "run", trainer=QUIET)


class Searched(Callback):
    """Which data were searched for, by epoch, and what was asked of the thresholds."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_number: int) -> None:
        if batch_number == 0:
            self.rows[trainer.current_epoch] = (module.age == 0).nonzero()[:, 0].tolist()
            if trainer.current_epoch > 0:
                due = (self.near(module) < self.threshold) | (self.age + 1 >= module.refresh)
                assert self.rows[trainer.current_epoch] == due.nonzero()[:, 0].tolist()
            fresh = module.age == 0
            torch.testing.assert_close(module.threshold[fresh], 0.9 * module.distance[fresh])
        self.chosen = module.chosen.clone()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.threshold, self.age = module.threshold.clone(), module.age.clone()
        z = codes(module.chosen, module.noise_dim, key(module.seed, 0))
        with torch.no_grad():
            made = module.generator(z)
        self.end = (made - module._held["images"]).flatten(1).square().sum(1)

    def near(self, module: Any) -> Tensor:
        return self.end


def test_adaptive_searches_only_for_what_has_come_near(images: data.Images, tmp_path: Path) -> None:
    seen = Searched()
    settings = {**SMALL, "adaptive": 0.1, "refresh": 4, "epochs": 7, "lr": 3e-3}
    IMLE(**settings).fit(images, tmp_path / "run", trainer={**QUIET, "callbacks": [seen]})
    sizes = [len(rows) for rows in seen.rows.values()]
    assert sizes[0] == 64
    assert any(0 < size < 64 for size in sizes[1:])


def test_a_class_is_chosen_from_its_own_samples(images: data.Images, tmp_path: Path) -> None:
    settings = {**SMALL, "condition": "label", "epochs": 1}
    model = IMLE(**settings).fit(images, tmp_path / "run", trainer=QUIET)
    assert model.chosen is not None
    assert images.train_label is not None
    start = images.train_label.bincount(minlength=10).cumsum(0) * 3
    assert torch.equal(torch.bucketize(model.chosen, start, right=True), images.train_label)
    condition = Condition("label", images)
    some = condition.some(12)
    assert some is not None
    assert some.argmax(1).tolist() == [*range(10), 0, 1]
    assert torch.equal(model.sample(12, seed=1), IMLE.load(Run(tmp_path / "run"), images).sample(12, seed=1))
    assert model.interpolations(2, 3).shape == (6, 1, 8, 8)


def test_an_image_is_chosen_from_its_own_samples(npy: Path, tmp_path: Path) -> None:
    told = tmp_path / "told.npy"
    np.save(told, np.load(npy)[:, ::4, ::4])
    stored = data.load(str(npy), on_disk=True)
    settings = {**SMALL, "condition": str(told), "epochs": 1}
    model = IMLE(**settings).fit(stored, tmp_path / "run", trainer=QUIET)
    assert model.chosen is not None
    assert torch.equal(model.chosen // 3, torch.arange(64))
    assert model.sample(5, seed=0).shape == (5, 1, 8, 8)
    np.save(told, np.load(npy)[:40, ::4, ::4])
    with pytest.raises(UserError, match="condition: expected as many images as the data, 80, got 40"):
        IMLE(**settings).fit(stored, tmp_path / "other", trainer=QUIET)
    assert not (tmp_path / "other").exists()


def test_rejection(images: data.Images, tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 2}
    RSIMLE(radius=0.0, **settings).fit(images, tmp_path / "none", trainer=QUIET)
    IMLE(**settings).fit(images, tmp_path / "plain", trainer=QUIET)
    same(tmp_path / "none", tmp_path / "plain")
    module = RSIMLE(radius=2.9, **settings)
    module.fit(images, tmp_path / "some", trainer=QUIET)
    assert float(weights(tmp_path / "some")["distance"].min()) >= 2.9**2
    assert float(weights(tmp_path / "plain")["distance"].min()) < 2.9**2
    with pytest.raises(UserError, match=r"radius: every sample of the pool is within 50\.0 of a datum in epoch 0"):
        RSIMLE(radius=50.0, **settings).fit(images, tmp_path / "all", trainer=QUIET)


def test_spaces(images: data.Images, tmp_path: Path) -> None:
    x, y = images.train[:5], images.train[7:12]
    components = Components(images.train, 60)
    flat = (images.train.flatten(1) - images.train.flatten(1).mean(0)).double()
    basis = torch.linalg.svd(flat, full_matrices=False)[2][:60]
    expected = ((x - y).flatten(1).double() @ basis.T).square().sum(1).float()
    torch.testing.assert_close((components(x) - components(y)).square().sum(1), expected)
    torch.testing.assert_close(components.loss(x, y), (x - y).flatten(1).square().sum(1))
    perceptual = Perceptual("efficientnet-lite0", ["block0", "block1"], 0.5)
    from fastgen.nn import PerceptualLoss

    named = PerceptualLoss("efficientnet-lite0", layers=["block0", "block1"], distance="l2", pixel_weight=0.5)
    torch.testing.assert_close(perceptual.loss(x, y), named(x, y), rtol=1e-4, atol=1e-6)
    for space in ("latent", "perceptual"):
        settings = {**SMALL, "space": space, "components": 9, "layers": ["block0"], "epochs": 1}
        model = IMLE(**settings).fit(images, tmp_path / space, trainer=QUIET)
        assert torch.equal(model.sample(3, seed=2), IMLE.load(Run(tmp_path / space), images).sample(3, seed=2))
    with pytest.raises(UserError, match="components: expected at most 64"):
        IMLE(**{**SMALL, "space": "latent", "components": 65}).fit(images, tmp_path / "many", trainer=QUIET)


def test_reverse_loss_has_a_plus() -> None:
    fake, other, real = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (6, 5, 7))
    pull, push = reverse_loss(fake, other, real, 2.0)
    to_real = (fake[:, None] - real).square().sum(2).min(1).values
    to_other = (2.0 - (fake[:, None] - other).square().sum(2).min(1).values).clamp_min(0)
    assert 0 < int((push > 0).sum()) < 6
    torch.testing.assert_close(pull.double(), to_real, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(push.double(), to_other, rtol=1e-6, atol=1e-6)
    mine = torch.autograd.grad((pull + push).sum(), (fake, other))
    naive = torch.autograd.grad((to_real + to_other).sum(), (fake, other))
    for a, b in zip(mine, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_reverse_learns_and_resumes(images: data.Images, tmp_path: Path, run_apart: Apart) -> None:
    settings = {"noise_dim": 4, "hidden": 32, "hidden_layers": 1, "epochs": 30, "reals": 16, "batch": 8, "others": 16}
    settings |= {"lr": 3e-3, "checkpoint_every": 3, "warm_up": 0.2}
    first = IMLEReverse(**settings).fit(images, tmp_path / "whole", trainer=QUIET)
    rows = rows_of(tmp_path / "whole")
    assert float(rows[-1]["pull"]) < 0.7 * float(rows[0]["pull"])
    for epoch, row in enumerate(rows):
        pull, push, cover = (float(row[name]) for name in ("pull", "push", "cover"))
        expected = cover if epoch < 6 else pull + 4 * push + cover
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-5)
    # Not all samples seek the same datum.
    near = torch.cdist(first.sample(200, seed=0).flatten(1), images.train.flatten(1)).argmin(1)
    assert len(near.unique()) >= 3
    again = IMLEReverse.load(Run(tmp_path / "whole"), images)
    assert torch.equal(first.sample(4, seed=3), again.sample(4, seed=3))
    for when in ((5, 3), (6, 3)):
        cut = tmp_path / f"cut{when[0]}"
        code = KILLED.format(small=settings, out=str(cut), quiet=QUIET, when=when, name="imle-reverse")
        (done,) = run_apart(code)
        assert done.returncode == -signal.SIGKILL, done.stderr
        IMLEReverse(**settings).fit(images, cut, resume=True, trainer=QUIET)
        same(cut, tmp_path / "whole")
        assert told(cut) == told(tmp_path / "whole")


@pytest.mark.parametrize(("warm_up", "cover_weight"), [(1.0, 2.5), (0.0, 2.5), (0.0, 0.0)])
def test_reverse_loss_of_a_step(images: data.Images, tmp_path: Path, warm_up: float, cover_weight: float) -> None:
    """Its first step's, by cdist: in the warm-up and beside the reversed form each datum's nearest of all samples."""
    settings = {"noise_dim": 4, "hidden": 32, "epochs": 1, "reals": 64, "batch": 8, "others": 16, "seed": 5}
    settings |= {"warm_up": warm_up, "cover_weight": cover_weight, "margin": 2.0, "push_weight": 3.0}
    module = next(IMLEReverse(**settings).stages(images, training=True)).module
    made = module.generator(codes(torch.arange(24), 4, key(5, 0))).flatten(1).detach().double()
    IMLEReverse(**settings).fit(images, tmp_path / "run", trainer=QUIET)
    real = images.train.flatten(1).double()
    cover = torch.cdist(real, made).square().min(1).values.mean()
    pull = torch.cdist(made[:8], real).square().min(1).values.mean()
    push = (2 - torch.cdist(made[:8], made[8:]).square().min(1).values).relu().mean()
    assert push > 0
    expected = cover if warm_up else pull + 3 * push + cover_weight * cover
    assert float(rows_of(tmp_path / "run")[0]["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_two_processes_train_and_a_changed_number_of_processes_is_told(
    npy: Path, tmp_path: Path, run_apart: Apart, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    flags += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    train = ["train", "imle", f"--data={npy}", *flags]
    code = f"from fastgen.cli import main; assert main({[*train, f'--out={out}']!r}) == 0"
    both = run_apart(code, 2)
    assert [done.returncode for done in both] == [0, 0]
    assert sum(done.stdout.count(f"{out}: trained") for done in both) == 1
    code = f"from fastgen.cli import main; assert main({[*train, f'--out={npy}/below']!r}) == 2"
    for done in run_apart(code, 2):  # a folder that cannot be made is told by both, and none is left waiting
        assert done.returncode == 0
        assert f"Not a directory: '{npy}/below'" in done.stderr
    from fastgen.cli import main

    assert main([*train, f"--out={tmp_path / 'one'}"]) == 0
    one, two = rows_of(tmp_path / "one"), rows_of(out)
    assert one[0]["nearest"] == two[0]["nearest"]  # one search, split in two
    for a, b in zip(one, two, strict=True):  # and the same steps, but for the order in which gradients are summed
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
    assert main(["train", "imle", f"--out={out}", "--resume"]) == 2
    assert "goes on with as many as it began with, 2; got 1" in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "batch"), [(63, 64), (64, 31)])
def test_processes_have_equal_shares_of_a_batch(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, batch: int
) -> None:
    """The mean of their gradients is else not that of the batch; one of all the data is no larger than they."""
    monkeypatch.setattr(processes, "size", lambda: 2)
    few = data.Images("few", images.train[:rows], images.test)
    with pytest.raises(UserError, match=rf"batch: expected a multiple of the 2 processes, got {min(rows, batch)}"):
        IMLE(**{**SMALL, "batch": batch}).fit(few, tmp_path / "run", trainer=QUIET)
    assert not (tmp_path / "run").exists()


def test_load_and_sample_are_deterministic(images: data.Images, whole: Path) -> None:
    model = IMLE.load(Run(whole), images)
    first = model.sample(5, seed=3)
    assert first.shape == (5, 1, 8, 8)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    assert torch.equal(first, IMLE.load(Run(whole), images).sample(5, seed=3))
    assert not torch.equal(first, model.sample(5, seed=4))
    torch.testing.assert_close(model.sample(2, seed=3), first[:2])


@pytest.mark.parametrize(
    ("argument", "bad", "error"),
    [
        ("noise_dim", 0, ValueError),
        ("pool", 2.5, TypeError),
        ("chunk", 0, ValueError),
        ("lr", 0.0, ValueError),
        ("adaptive", 0.0, ValueError),
        ("space", "sound", ValueError),
        ("condition", "nowhere.npy", UserError),
    ],
)
def test_bad_arguments_are_named(
    images: data.Images, tmp_path: Path, argument: str, bad: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=argument):
        IMLE(**{**SMALL, argument: bad}).fit(images, tmp_path / "run", trainer=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.fixture(autouse=True)
def _no_processes_left() -> Iterator[None]:
    yield
    assert not torch.distributed.is_initialized()
