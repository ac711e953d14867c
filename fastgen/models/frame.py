"""FRAME models: deep FRAME, the generative ConvNet, and wFRAME's update on either. Their learning: `frame_learner`.

Sparse FRAME would be another score beside `FilterScore` and `ConvScore`, multi-grid another way to start the chains.
"""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import check, data
from fastgen.models.frame_learner import PIXELS, ConvScore, FilterScore, Learner
from fastgen.models.model import Model, Stage
from fastgen.models.run import EpochBatches, arguments_of, generator, seeded
from fastgen.nn import trunk as make_trunk

ROUNDS = 10  # parameter steps of an epoch of deep FRAME, whose data is its filter means

# What deep FRAME matches by default: four depths of EfficientNet-lite0, two of VGG16.
LAYERS = {
    "efficientnet-lite0": (PIXELS, "stem", "block0", "block2", "block4"),
    "vgg16": (PIXELS, "relu1_2", "relu2_2"),
}


class _Frame(Model):
    """What the three models share. A run taken up again ends with the same chains to the bit."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        a = self.arguments = arguments
        for key in ("chains", "n_steps", "epochs", "sample_steps"):
            check.integer(key, a[key], least=1)
        check.integer("seed", a["seed"], least=0, most=2**31)
        for key in ("step_size", "lr"):
            check.number(key, a[key], above=0)
        for key in ("step_final", "lr_final"):
            check.number(key, a[key], above=0, most=1)
        check.number("restart", a["restart"], least=0, most=1)
        if a["noise_scale"] is not None:
            check.number("noise_scale", a["noise_scale"], least=0)
        check.number("reference_scale", a["reference_scale"], least=0)
        if not isinstance(a["clamp"], bool):
            raise TypeError(f"clamp: expected True or False, got {check.describe(a['clamp'])}")
        check.choice("sample_from", a["sample_from"], ("chains", "reference"))
        check.choice("optimizer", a["optimizer"], ("adam", "sgd"))
        if "width" in a:
            check.integer("width", a["width"], least=1)
            check.integer("batch", a["batch"], least=1)
            check.choice("head", a["head"], ("full", "sum"))
        if "beta" in a:
            check.number("beta", a["beta"], least=0)
            check.choice("penalty", a["penalty"], ("energy", "score"))
        self.learner: Learner | None = None
        self.images: data.Images | None = None
        self._drawn: Tensor | None = None

    def stages(self, images: data.Images, *, training: bool) -> Iterator[Stage]:
        # Kept before it is trained: what a diverging run has recorded can be read.
        self.learner, self.images = self._learner(images), images
        yield Stage("frame", self.learner, self._loader(images), self.arguments["epochs"])

    def _loader(self, images: data.Images) -> EpochBatches:
        a = self.arguments
        rows, batch = (len(images.train), a["batch"]) if "width" in a else (ROUNDS, 1)
        return EpochBatches(rows, batch, a["seed"])

    def _learner(self, images: data.Images) -> Learner:
        a = self.arguments
        mean, std = float(images.train.double().mean()), float(images.train.double().std())
        if not std > 0:
            raise check.UserError(f"data: {images.name} has images of one colour")
        observed = (images.train - mean) / std
        with seeded(a["seed"]):
            score = self._score(images, mean, std)
        rounds, bounds = len(self._loader(images)), ((0 - mean) / std, (1 - mean) / std)
        if rounds * a["epochs"] * a["n_steps"] >= 2**28:
            raise check.UserError(
                "epochs: noise stream v1 counts to 2²⁸ Langevin steps; ask for fewer or shorter rounds"
            )
        settings = {"beta": None, "penalty": "energy", **a, "reference_scale": a["reference_scale"] or None}
        return Learner(score, observed, settings=settings, rounds=rounds, bounds=bounds)

    def _score(self, images: data.Images, mean: float, std: float) -> FilterScore | ConvScore:
        a = self.arguments
        if "width" in a:
            if min(images.shape[1:]) < 4:
                raise check.UserError(f"data: expected images of 4x4 or more, {images.name} has {images.shape}")
            return ConvScore(images.shape, a["width"], a["head"])
        layers = a["layers"] or LAYERS.get(a["trunk"])
        if layers is None:
            raise check.UserError(f"layers: expected names of layers of {a['trunk']!r}, or {PIXELS!r}")
        deep = [layer for layer in layers if layer != PIXELS]
        try:
            network = make_trunk(a["trunk"]) if deep else None
            if network is not None:
                network.check_layers(deep)
            if len(set(layers)) != len(layers):
                raise ValueError(f"layers: each name once, got {list(layers)}")
            return FilterScore(network, layers, images.train, mean, std)
        except (ValueError, TypeError, OSError) as error:
            raise check.UserError(str(error)) from None

    def sample(self, n: int, *, seed: int) -> Tensor:
        """`n` images [n, C, H, W] in [0, 1], the same for the same seed: `sample_steps` Langevin steps under the
        parameters as learned, with noise of their own, from where `sample_from` says.

        "chains": sample i goes on from training chain i modulo their number, which those of one chain resemble.
        "reference": from the reference; without one, from uniform pixels.
        """
        assert self.learner is not None, "fit or load first"
        learner, steps = self.learner, self.arguments["sample_steps"]
        n = check.integer("n", n, least=1)
        parts, shape = [], tuple(learner.chains.shape[1:])
        for i, size in enumerate([256] * (n // 256) + [n % 256] * (n % 256 > 0)):
            if self.arguments["sample_from"] == "chains":
                x = learner.chains[(256 * i + torch.arange(size)) % len(learner.chains)]
            else:
                x = learner.start(size, generator(seed, i, 5), shape)
            # Bit 40 keeps the noise apart from that of training, whose seeds end at 2³¹.
            share = self.arguments["step_final"]
            x, _ = learner.evolve(x, steps, seed=seed + 2**40 + i * 2**41, step=0, share=share)
            parts.append(learner.image(x))
        return torch.cat(parts)

    def _some(self) -> Tensor:
        """Eight samples of seed 0, drawn once for figures and pictures."""
        if self._drawn is None:
            self._drawn = self.sample(8, seed=0)
        return self._drawn

    def measure(self, images: data.Images) -> dict[str, Any]:
        """U over D of the chains, the data and new samples, and of deep FRAME how well filter means match."""
        assert self.learner is not None, "fit or load first"
        learner, score = self.learner, self.learner.score
        shape = tuple(learner.chains.shape[1:])
        low, high = learner.bounds
        as_state = {who: x * (high - low) + low for who, x in (("train", images.train), ("test", images.test))}
        drawn = self._some() * (high - low) + low
        states = {"chains": learner.chains, "samples": drawn, **as_state}
        states["reference"] = learner.start(8, generator(0, 0, 6), shape)
        result: dict[str, Any] = {}
        done = int(learner.energies.isfinite().sum())
        result["rounds"], result["Langevin steps"] = done, int(learner.taken)
        with torch.no_grad():
            for who, x in states.items():
                energy = torch.cat([learner.energy(part) for part in x.split(64)])
                result[f"energy of {who}"] = float(energy.double().mean() / x[0].numel())
            if isinstance(score, FilterScore):
                for who in ("chains", "samples", "test"):
                    means = torch.cat([score.means(part) for part in states[who].split(64)]).double().mean(0)
                    result |= {f"{who}: {key}": value for key, value in match_table(score, means).items()}
        return result

    def pictures(self, folder: Path) -> list[str]:
        """samples.png, over_time.png and energy.png."""
        from fastgen import report

        assert self.learner is not None, "fit or load first"
        assert self.images is not None
        learner, train = self.learner, self.images.train
        kept = min(8, len(learner.chains))
        panels = {
            "data": train[:: max(1, len(train) // 8)][:8],
            f"chains after {int(learner.taken)} steps": learner.image(learner.chains[:kept]),
            f"samples of {self.arguments['sample_steps']} steps from the {self.arguments['sample_from']}": self._some(),
        }
        report.samples(folder / "samples.png", panels, side=4)
        over_time = learner.snapshots.transpose(0, 1).float() / 255
        times = ", ".join(map(str, learner.times))
        report.picture(
            folder / "over_time.png",
            {f"a chain in each row, after epochs {times}": report.grid(over_time.flatten(0, 1), len(learner.times))},
        )
        energy_curves(folder / "energy.png", {self.name: [learner.energies[learner.energies.isfinite()]]})
        return ["over_time", "energy"]


def match_table(score: FilterScore, means: Tensor) -> dict[str, float]:
    """How far filter means [K] (of `score.means`) are from the data's, layer by layer and over all.

    error: Σ_k |difference| / Σ_k data's mean, in units of each filter's mean |response|; worst: the largest difference
    in those units; within 5 %: the share of filters whose difference is at most 0.05 of them.
    """
    observed = score.observed.double()
    difference = (means.double() - observed).abs()
    table = {}
    for layer in (*score.layers, "all layers"):
        mine = torch.tensor([layer in (name, "all layers") for name in score.layer_of])
        if mine.any():
            table[f"{layer}, error"] = float(difference[mine].sum() / observed[mine].sum())
            table[f"{layer}, worst"] = float(difference[mine].max())
            table[f"{layer}, within 5 %"] = float((difference[mine] <= 0.05).double().mean())
    return table


def energy_curves(file: Path, curves: dict[str, list[Tensor]]) -> None:
    """The energies of one or more runs of each model against the round; written beside and renamed."""
    from fastgen import report

    plt = report._pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for i, (name, runs) in enumerate(curves.items()):
        for j, energies in enumerate(runs):
            axis.plot(energies.tolist(), color=f"C{i}", label=name if j == 0 else None, alpha=0.8)
    axis.set(xlabel="round", ylabel="energy of the chains, per pixel and channel")
    if len(curves) > 1:
        axis.legend()
    largest = max((float(e.abs().max()) for runs in curves.values() for e in runs if len(e)), default=0.0)
    if largest > 100:  # a run that diverges would press the others into a line
        axis.set_yscale("symlog", linthresh=10)
    axis.grid(alpha=0.3)
    report._save(figure, file)


class DeepFRAME(_Frame):
    """Deep FRAME: p(x) ∝ exp(D Σ_k λ_k h_k(x)/s_k) N(x; 0, σ²), λ such that the filters' means are the data's.

    h_k is the mean rectified response of filter k of a pretrained network. Chains persist from round to round. An epoch
    is ten rounds of Langevin steps and one step of λ.

    Source: Lu, Zhu and Wu, Learning FRAME Models Using CNN Filters, AAAI 2016. What differs: filters of several layers
    at once, each scaled by its mean response; Adam; and the image is standardised, so that σ = 1 is the data's own
    contrast.

    Args:
        trunk: the network of the filters: "efficientnet-lite0" (weights come with the extra `train`), "vgg16",
            "alexnet" or "squeezenet1_1" (weights from torch hub's cache).
        layers: whose filters are matched; "pixels" is the image and its differences. Default "pixels" and four depths
            of EfficientNet-lite0.
        chains: Markov chains, all of which every round moves.
        n_steps: Langevin steps a round.
        step_size: η of x ← x − η∇U + sε at the start; FRAME's δ is step_size = δ²/2. Pixels in units of the data's
            standard deviation.
        step_final: share of step_size left at the end, along a line.
        noise_scale: s; default √(2η), the diffusion at temperature 1.
        reference_scale: σ of the Gaussian reference; 0 leaves it out.
        clamp: hold pixels within [0, 1].
        restart: chance of each chain in each round to start anew.
        lr: step size of λ at the start.
        lr_final: share of it left at the end, along a line.
        optimizer: "adam" (β = .5, .9) or "sgd", the plain rule of the paper.
        epochs: of ten rounds each.
        sample_steps: Langevin steps of a sample.
        sample_from: "chains", those of training, or "reference": chains of their own, which with these filters need
            many more steps than training took, since λ no longer grows along with them.
        seed: of everything drawn in training.
    """

    name = "deep-frame"

    def __init__(
        self,
        trunk: str = "efficientnet-lite0",
        layers: Sequence[str] | None = None,
        chains: int = 8,
        n_steps: int = 10,
        step_size: float = 2e-3,
        step_final: float = 0.2,
        noise_scale: float | None = None,
        reference_scale: float = 1.0,
        clamp: bool = False,
        restart: float = 0.0,
        lr: float = 8e-3,
        lr_final: float = 0.01,
        optimizer: Literal["adam", "sgd"] = "adam",
        epochs: int = 30,
        sample_steps: int = 200,
        sample_from: Literal["chains", "reference"] = "chains",
        seed: int = 0,
    ) -> None:
        super().__init__(arguments_of(locals()))


class GenerativeConvNet(_Frame):
    """The generative ConvNet: p_θ(x) ∝ exp(f_θ(x)) N(x; 0, σ²), every layer of the ConvNet f_θ learned.

    Persistent chains, each of which may start anew, so that samples of `sample_steps` steps resemble them. An epoch
    is a pass over the data.

    Source: Xie, Lu, Zhu and Wu, A Theory of Generative ConvNet, ICML 2016; chains that start anew: Du and Mordatch,
    NeurIPS 2019.

    Args:
        width: channels of the first of three layers.
        head: "full", a weight for each unit of the last layer (pictures of things), or "sum", one for each channel
            (textures).
        batch: observed images a round.
        chains: Markov chains, all of which every round moves.
        n_steps: Langevin steps a round.
        step_size: η of x ← x − η∇U + sε at the start; FRAME's δ is step_size = δ²/2. Pixels in units of the data's
            standard deviation.
        step_final: share of step_size left at the end, along a line.
        noise_scale: s; default √(2η), the diffusion at temperature 1.
        reference_scale: σ of the Gaussian reference; 0 leaves it out.
        clamp: hold pixels within [0, 1].
        restart: chance of each chain in each round to start anew.
        lr: the optimizer's step size at the start.
        lr_final: share of it left at the end, along a line.
        optimizer: "adam" (β = .5, .9) or "sgd", the plain rule of the paper.
        epochs: passes over the data.
        sample_steps: Langevin steps of a sample.
        sample_from: "reference", chains of their own, or "chains", those of training.
        seed: of everything drawn in training.
    """

    name = "generative-convnet"

    def __init__(
        self,
        width: int = 16,
        head: Literal["full", "sum"] = "full",
        batch: int = 64,
        chains: int = 64,
        n_steps: int = 20,
        step_size: float = 5e-3,
        step_final: float = 1.0,
        noise_scale: float | None = None,
        reference_scale: float = 1.0,
        clamp: bool = True,
        restart: float = 0.05,
        lr: float = 1e-3,
        lr_final: float = 0.1,
        optimizer: Literal["adam", "sgd"] = "adam",
        epochs: int = 20,
        sample_steps: int = 400,
        sample_from: Literal["chains", "reference"] = "reference",
        seed: int = 0,
    ) -> None:
        super().__init__(arguments_of(locals()))


class WFRAME(_Frame):
    """wFRAME on deep FRAME or the generative ConvNet: negatives one noise-free step of size β ahead of the chains.

    To first order in β that adds the Jordan-Kinderlehrer-Otto flow's penalty (β/2) E‖∇U‖² to the likelihood; β = 0 is
    FRAME itself. The derivation is ours (it stands at `frame_learner.Learner`): the paper's update could not be had.

    Source: after Cai et al., FRAME Revisited, AAAI 2019 (arXiv 1812.01186).

    Args:
        base: "deep-frame" or "generative-convnet", whose options follow; what is not given is the base's default.
        beta: β, the flow's step, in units of step_size (a diffusion time).
        penalty: "energy" for ‖∇U‖², the reference's part included, or "score" for ‖∇f‖².
        trunk: deep-frame's.
        layers: deep-frame's.
        width: generative-convnet's.
        head: generative-convnet's.
        batch: generative-convnet's.
        chains: Markov chains.
        n_steps: Langevin steps a round.
        step_size: η at the start.
        step_final: share of it left at the end.
        noise_scale: s; default √(2η).
        reference_scale: σ of the Gaussian reference; 0 leaves it out.
        clamp: hold pixels within [0, 1].
        restart: chance of each chain in each round to start anew.
        lr: the optimizer's step size at the start.
        lr_final: share of it left at the end.
        optimizer: "adam" or "sgd".
        epochs: of ten rounds, or passes over the data.
        sample_steps: Langevin steps of a sample.
        sample_from: "chains" or "reference".
        seed: of everything drawn in training.
    """

    name = "wframe"

    def __init__(
        self,
        base: Literal["deep-frame", "generative-convnet"] = "deep-frame",
        beta: float = 0.02,
        penalty: Literal["energy", "score"] = "energy",
        trunk: str | None = None,
        layers: Sequence[str] | None = None,
        width: int | None = None,
        head: Literal["full", "sum"] | None = None,
        batch: int | None = None,
        chains: int | None = None,
        n_steps: int | None = None,
        step_size: float | None = None,
        step_final: float | None = None,
        noise_scale: float | None = None,
        reference_scale: float | None = None,
        clamp: bool | None = None,
        restart: float | None = None,
        lr: float | None = None,
        lr_final: float | None = None,
        optimizer: Literal["adam", "sgd"] | None = None,
        epochs: int | None = None,
        sample_steps: int | None = None,
        sample_from: Literal["chains", "reference"] | None = None,
        seed: int | None = None,
    ) -> None:
        given = arguments_of(locals())
        check.choice("base", base, ("deep-frame", "generative-convnet"))
        known = inspect.signature((DeepFRAME if base == "deep-frame" else GenerativeConvNet).__init__).parameters
        arguments: dict[str, Any] = {key: given[key] for key in ("base", "beta", "penalty")}
        for key, value in given.items():
            if key in arguments:
                continue
            if key in known:
                arguments[key] = known[key].default if value is None else value
            elif value is not None:
                raise ValueError(f"{key}: expected nothing for base={base!r}, which has no such option, got {value!r}")
        super().__init__(arguments)
