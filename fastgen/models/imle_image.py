"""IMLE on images: every datum pulls the nearest of many samples; the samples are never stored."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from tqdm import tqdm

from fastgen import check, data
from fastgen.functional import nearest
from fastgen.models import processes
from fastgen.models.imle_condition import Condition
from fastgen.models.imle_pool import Found, codes, key, own_spans, search_own, search_pool, spans
from fastgen.models.imle_space import Space, space
from fastgen.models.model import Model, Stage
from fastgen.models.networks import ImageMLP, in_batches
from fastgen.models.run import EpochBatches, EpochLoss, Run, arguments_of, cosine, seeded

BLOCK = 2**28  # bytes of data that are searched for at a time
PART = 1000  # samples that pass the network at a time


class PoolIMLE(EpochLoss):
    """min over G of Σ_i min_j d(x_i, G(z_j)), the z_j of an epoch numbered on from those of the last.

    images: the training images [N, C, H, W], a tensor or `data.Stored`
    measure: where distances are taken
    condition: what the generator is told beside its code
    pool: samples for each datum at a search; chunk: of them in memory at a time
    refresh: epochs from one search to the next
    adaptive: δ, or None: then every datum is searched for at once; else see `IMLE`
    radius: samples nearer than this to a datum are not chosen (distance, not squared)

    The state of the search is in the checkpoint: `chosen` [N] int64 numbers and `distance` [N] of the last search.
    """

    chosen: Tensor
    distance: Tensor
    threshold: Tensor
    age: Tensor

    def __init__(
        self,
        images: Any,
        measure: Space,
        condition: Condition,
        *,
        noise_dim: int,
        hidden: int,
        layers: int,
        pool: int,
        chunk: int,
        refresh: int,
        adaptive: float | None,
        radius: float,
        lr: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.noise_dim, self.pool, self.chunk, self.refresh = noise_dim, pool, chunk, refresh
        self.adaptive, self.radius, self.lr, self.seed = adaptive, radius, lr, seed
        shape: Any = tuple(images.shape[1:])
        self.generator = ImageMLP(noise_dim + condition.size, shape, hidden, layers)
        # Not in the module tree: a checkpoint needs neither the data nor a pretrained trunk.
        self._held: dict[str, Any] = {"images": images, "measure": measure, "condition": condition}
        self.register_buffer("chosen", torch.full((len(images),), -1))
        self.register_buffer("distance", torch.full((len(images),), torch.inf))
        self.register_buffer("threshold", torch.zeros(len(images)))
        self.register_buffer("age", torch.zeros(len(images), dtype=torch.int32))
        self.search_seconds = 0.0

    def configure_optimizers(self) -> Any:
        return cosine(self, torch.optim.Adam(self.parameters(), self.lr, betas=(0.5, 0.999)))

    def on_fit_start(self) -> None:
        held = self._held
        held["measure"].to(self.device)
        n = len(held["images"])
        if isinstance(held["images"], Tensor):
            held["images"] = held["images"].to(self.device)
            width = held["measure"](held["images"][:1]).shape[1]
            if type(held["measure"]) is Space:
                held["points"] = held["images"].flatten(1)
            elif 4 * n * width <= 4 * BLOCK:
                held["points"] = in_batches(held["measure"], held["images"], PART)
        some = torch.arange(0, n, max(1, n // 2000), device=self.device)[:2000]
        reference = self._points(some)
        # Of few data the fifth neighbour is another's; the last one then.
        k = min(5, len(some) - 1)
        held["reference"] = some, nearest(reference, reference, k + 1).distance[:, k]

    def images(self, rows: Tensor) -> Tensor:
        found: Tensor = self._held["images"][rows]
        return found.to(self.device)

    @torch.no_grad()
    def _points(self, rows: Tensor) -> Tensor:
        if "points" in self._held:
            points: Tensor = self._held["points"][rows]
            return points
        return in_batches(self._held["measure"], self.images(rows), PART)

    def sample(self, ids: Tensor, about: Any) -> Tensor:
        """Images of the samples `ids`; about: what the condition tells of them."""
        code = codes(ids, self.noise_dim, key(self.seed, 0))
        return self.generator(code if about is None else torch.cat([code, about], 1))

    @torch.no_grad()
    def _made(self, ids: Tensor, about: Any) -> Tensor:
        """Their points, `PART` at a time."""
        parts = [slice(i, i + PART) for i in range(0, len(ids), PART)]
        made = [self.sample(ids[p], None if about is None else about[p]) for p in parts]
        return torch.cat([self._held["measure"](images) for images in made])

    def on_train_epoch_start(self) -> None:
        start = time.perf_counter()
        self.age += 1
        rows = self._due()
        if len(rows):
            found = self._search(rows)
            self.chosen[rows], self.distance[rows] = found.id, found.distance
            self.age[rows] = 0
            if self.adaptive is not None:
                self.threshold[rows] = (1 - self.adaptive) * found.distance
            some, reach = self._held["reference"]
            covered = (self.distance[some] < reach).float().mean()
            self.note(nearest=float(self.distance.mean()), coverage=float(covered), searched=float(len(rows)))
        self.search_seconds += time.perf_counter() - start

    def _due(self) -> Tensor:
        """The data whose neighbour is looked for in this epoch."""
        every = torch.arange(len(self.chosen), device=self.device)
        if self.current_epoch == 0:
            return every
        if self.adaptive is None:
            return every if self.current_epoch % self.refresh == 0 else every[:0]
        now = torch.full_like(self.distance, torch.inf)
        for span in own_spans(spans(0, len(every), self.chunk)):
            rows = every[span.start : span.stop]
            made = self._made(self.chosen[rows], self._held["condition"].of(rows))
            now[rows] = (made - self._points(rows)).square().sum(1)
        self.distance.copy_(processes.smallest(now, every)[0])
        return every[(self.distance < self.threshold) | (self.age >= self.refresh)]

    def _search(self, rows: Tensor) -> Found:
        n, condition = len(self.chosen), self._held["condition"]
        first = self.current_epoch * self.pool * n
        width = self._held["measure"](self.images(rows[:1])).shape[1]
        block = max(1, BLOCK // (4 * width))
        shown = self.trainer.progress_bar_callback is not None and processes.rank() == 0
        groups = [] if condition.kind == "image" else list(condition.groups(rows, n))
        # Of images each datum has its own samples; else the pool is made once a block, and once more to reject.
        data = sum(count * -(-len(place) // block) for place, _, count, _ in groups) * (1 + (self.radius > 0))
        total = (data or len(rows)) * self.pool // processes.size()
        with tqdm(total=total, desc=f"Search {self.current_epoch}", disable=not shown, leave=False) as bar:
            if condition.kind == "image":
                return search_own(
                    lambda: ((part, self._points(part)) for part in rows.split(block)),
                    lambda ids, whose: self._made(ids, condition.of(whose)),
                    first=first, pool=self.pool, chunk=self.chunk, tick=bar.update,
                )  # fmt: skip
            distance = torch.empty(len(rows), device=self.device)
            ids = torch.empty(len(rows), dtype=torch.int64, device=self.device)
            for place, start, count, about in groups:
                part = search_pool(
                    lambda place=place: (self._points(rows[some]) for some in place.split(block)),  # type: ignore[misc]
                    lambda numbers, about=about: self._made(numbers, about(len(numbers))),  # type: ignore[misc]
                    first=first + self.pool * start, count=self.pool * count,
                    chunk=self.chunk, radius=self.radius, tick=bar.update,
                )  # fmt: skip
                distance[place], ids[place] = part.distance, part.id
        if distance.isinf().any():
            raise check.UserError(
                f"radius: every sample of the pool is within {self.radius} of a datum in epoch {self.current_epoch}: "
                "take a smaller radius or a larger pool"
            )
        return Found(distance, ids)

    def training_step(self, rows: Tensor, batch_number: int) -> Tensor:
        fake = self.sample(self.chosen[rows], self._held["condition"].of(rows))
        loss: Tensor = self._held["measure"].loss(fake, self.images(rows)).mean()
        self.count(len(rows), loss)
        return loss


class IMLE(Model):
    """Implicit maximum likelihood estimation: x = G(z), z ~ N(0, I), without an adversary and without a dropped mode.

    At each search `pool` samples for every datum are made, a chunk at a time, and each datum keeps the number of the
    nearest one; in training that sample is made again from its number (a counter-based generator) and pulled towards
    its datum. Memory depends on the chunk, not on the pool; a `.npy` file is read from disk as it is needed. Under
    torchrun each process makes and searches a share of the pool and trains on a share of each batch.

    Source: Li and Malik, Implicit Maximum Likelihood Estimation, 2018; adaptive: Aghabozorgi et al., Adaptive IMLE for
    Few-shot Pretraining-free Generative Modelling, ICML 2023; conditional: Li et al., ICCV 2019.

    Args:
        noise_dim: size of a code z.
        hidden: width of the generator's hidden layers.
        hidden_layers: their number.
        space: where distances are taken: "pixel"; "latent" (the search among principal components, the loss in
            pixels); "perceptual" (search and loss among features of a frozen network).
        components: how many principal components "latent" takes.
        trunk: the network of "perceptual": "efficientnet-lite0", "vgg16", "alexnet" or "squeezenet1_1".
        layers: its layers that are compared; default three depths of EfficientNet-lite0, or of VGG16.
        pixel_weight: of the mean squared pixel difference beside the features.
        condition: "none"; "label" (a sample is told a class and only data of that class choose among it); or a .npy
            file of images, as many as there are data, row i of which is told to the samples of datum i.
        epochs: passes over the data.
        batch: data a step, over all processes.
        lr: Adam's step size, at the start.
        pool: samples for each datum at a search.
        chunk: samples in memory at a time. Among runs with equal chunks the result is the same to the bit.
        refresh: epochs from one search to the next (the reference code's staleness).
        adaptive: δ of adaptive IMLE: a datum is searched for only when its sample has come nearer than its threshold,
            (1 - δ) times the squared distance at its last search, or after `refresh` epochs; None: all at once.
        checkpoint_every: steps between checkpoints; each epoch's end has one too.
        seed: of everything drawn in training.
    """

    name = "imle"
    on_disk = True

    def __init__(
        self,
        noise_dim: int = 16,
        hidden: int = 512,
        hidden_layers: int = 2,
        space: Literal["pixel", "latent", "perceptual"] = "pixel",
        components: int = 64,
        trunk: str = "efficientnet-lite0",
        layers: Sequence[str] | None = None,
        pixel_weight: float = 1.0,
        condition: str = "none",
        epochs: int = 150,
        batch: int = 64,
        lr: float = 1e-3,
        pool: int = 10,
        chunk: int = 4000,
        refresh: int = 5,
        adaptive: float | None = None,
        checkpoint_every: int = 200,
        seed: int = 0,
    ) -> None:
        if condition not in ("none", "label"):
            condition = str(Path(condition).expanduser().resolve())
        a = self.arguments = arguments_of(locals())
        for name in (
            "noise_dim", "hidden", "hidden_layers", "components", "epochs", "batch", "pool", "chunk", "refresh",
            "checkpoint_every",
        ):  # fmt: skip
            check.integer(name, a[name], least=1)
        check.number("lr", lr, above=0)
        check.number("pixel_weight", pixel_weight, least=0)
        check.integer("seed", seed, least=0, most=2**31)
        check.choice("space", space, ("pixel", "latent", "perceptual"))
        if adaptive is not None:
            check.number("adaptive", adaptive, above=0, most=1)
        self.generator: torch.nn.Module | None = None
        self.condition: Condition | None = None
        self.chosen: Tensor | None = None

    def fit(
        self,
        images: data.Images,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        trainer: dict[str, Any] | None = None,
    ) -> Self:
        """As `Model.fit`, in as many processes as torchrun started: a run goes on in the same number."""
        with processes.joined() as more:
            batch = min(self.arguments["batch"], len(images.train))
            if batch % processes.size():
                few = "" if batch == self.arguments["batch"] else ", all the data"
                raise check.UserError(
                    f"batch: expected a multiple of the {processes.size()} processes, got {batch}{few}"
                )
            return super().fit(images, out, resume=resume, trainer={**more, **(trainer or {})})

    def _claim(self, out: str | os.PathLike[str], images: data.Images, resume: bool) -> Run:
        """With the changes that no argument can mend told first."""
        return processes.lead(lambda: self._start(Path(out), images, resume), lambda: Run(out))

    def _start(self, out: Path, images: data.Images, resume: bool) -> Run:
        assert self.condition is not None
        more: dict[str, Any] = {"processes": processes.size()}
        if (told := self.condition.told) is not None:
            data.read_through(told)
            more["condition_fingerprint"] = data.fingerprint(told)
        if resume and (out / "run.json").exists():
            before = Run(out).record
            if before.get("processes") != more["processes"]:
                raise check.UserError(
                    f"processes: the run in {out} goes on with as many as it began with, {before.get('processes')}; "
                    f"got {more['processes']}"
                )
            if before.get("condition_fingerprint") != more.get("condition_fingerprint"):
                what = self.arguments["condition"]
                raise check.UserError(f"condition: {what} has changed since the run in {out} began")
        return Run.start(out, self.name, images, self.arguments, resume=resume, more=more)

    def stages(self, images: data.Images, *, training: bool) -> Iterator[Stage]:
        a = self.arguments
        self.condition = Condition(a["condition"], images)
        chosen = {name: a[name] for name in ("components", "trunk", "layers", "pixel_weight")}
        measure = space(a["space"], images.train, **chosen) if training else Space()
        with seeded(a["seed"]):
            module = PoolIMLE(
                images.train, measure, self.condition, layers=a["hidden_layers"], radius=a.get("radius", 0.0),
                **{k: a[k] for k in ("noise_dim", "hidden", "pool", "chunk", "refresh", "adaptive", "lr", "seed")},
            )  # fmt: skip
        loader = EpochBatches(len(images.train), a["batch"], a["seed"])
        yield Stage("imle", module, loader, a["epochs"], a["checkpoint_every"])
        self.generator, self.chosen = module.generator, module.chosen

    def decode(self, code: Tensor, about: Tensor | None = None) -> Tensor:
        """Images [N, C, H, W] in [0, 1] of codes [N, noise_dim] and, of a conditional model, of conditions [N, K]."""
        assert self.generator is not None, "fit or load first"
        return in_batches(self.generator, code if about is None else torch.cat([code, about], 1), PART)

    def sample(self, n: int, *, seed: int) -> Tensor:
        """As `Model.sample`; a conditional model is told the classes in turn, or the test images' conditions."""
        assert self.condition is not None, "fit or load first"
        code = codes(torch.arange(n), self.arguments["noise_dim"], key(seed, 1))
        return self.decode(code, self.condition.some(n))

    def reconstructions(self, images: Any, n: int) -> tuple[Tensor, Tensor]:
        """`n` of the training images [N, C, H, W] and the samples that they chose at the last search."""
        assert self.chosen is not None, "fit or load first"
        assert self.condition is not None
        rows = torch.arange(0, len(self.chosen), max(1, len(self.chosen) // n))[:n]
        code = codes(self.chosen[rows], self.arguments["noise_dim"], key(self.arguments["seed"], 0))
        return images[rows], self.decode(code, self.condition.of(rows))

    def interpolations(self, rows: int, steps: int) -> Tensor:
        """Images [rows · steps, C, H, W] between codes drawn at random, along great circles; one condition a row."""
        assert self.condition is not None, "fit or load first"
        start, stop = codes(torch.arange(2 * rows), self.arguments["noise_dim"], key(0, 1)).split(rows)
        share = torch.linspace(0, torch.pi / 2, steps)[:, None]
        path = start[:, None] * share.cos() + stop[:, None] * share.sin()
        about = self.condition.some(rows)
        return self.decode(path.flatten(0, 1), None if about is None else about.repeat_interleave(steps, 0))


class RSIMLE(IMLE):
    """Rejection-sampling IMLE: samples nearer than `radius` to any datum are no candidates.

    What a datum pulls is then never a sample that already fits, so that the codes chosen in training are spread as the
    prior is. `radius` is a distance (not squared) in `space`; all else as in `fastgen train imle --help`.

    Source: Vashist, Peng and Li, Rejection Sampling IMLE, ECCV 2024.

    Args:
        radius: ε; 0 rejects nothing.
    """

    name = "rs-imle"

    def __init__(self, radius: float = 3.0, **more: Any) -> None:
        super().__init__(**more)
        radius = check.number("radius", radius, least=0)
        if self.arguments["condition"] not in ("none", "label"):
            raise ValueError(f"condition: rejection works with 'none' and 'label', got {self.arguments['condition']!r}")
        self.arguments["radius"] = radius
