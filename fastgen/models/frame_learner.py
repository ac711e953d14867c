"""What the FRAME models share: scores f_θ, and the module that moves chains and parameters in turn."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as tf
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fastgen.check import UserError
from fastgen.functional import langevin_step_
from fastgen.models.run import generator
from fastgen.nn import Trunk

SNAPSHOTS = 8
PIXELS = "pixels"


class FilterScore(nn.Module):
    """f_λ(x) = D Σ_k λ_k h_k(x)/s_k, linear in λ: the exponent of deep FRAME over its Gaussian reference.

    h_k is the mean over positions of the rectified response max(0, F_k) of filter k, s_k the mean of |F_k| over the
    data, which makes every λ_k a pure number, and D the numbers in an image. Filters are the channels of a frozen
    trunk's layers and, as the layer "pixels", FRAME's oldest: ±x − c for c = 0, 1, 2, whose means stand for the
    histogram, and the differences ∂₁x, ∂₂x, ∂₁∂₂x of neighbours, without which a trunk that begins with a stride of 2
    leaves the finest frequencies free. A filter that the data never excites is left out.

    trunk: None where layers has nothing but "pixels"
    layers: whose maps F are taken
    images: the data, float32 [N, C, H, W] in [0, 1]
    mean, std: an image is std·x + mean

    `observed` [K] holds the data's mean of h_k/s_k.

    Source: Zhu, Wu and Mumford, IJCV 1998; Lu, Zhu and Wu, "Learning FRAME models using CNN filters", AAAI 2016.
    """

    observed: Tensor
    scale: Tensor
    kept: Tensor

    def __init__(self, trunk: Trunk | None, layers: Sequence[str], images: Tensor, mean: float, std: float) -> None:
        super().__init__()
        self.layers, self.mean, self.std, self.numbers = tuple(layers), mean, std, images[0].numel()
        self.deep = tuple(layer for layer in layers if layer != PIXELS)
        # Held out of the module tree: a checkpoint needs no pretrained trunk.
        self._held = {"trunk": trunk}
        size, mean_response, widths = [], [], []
        with torch.no_grad():
            for part in images.split(64):
                maps = self._maps((part - mean) / std)
                widths = [f.shape[1] for f in maps]
                size.append(torch.cat([f.abs().mean((2, 3)) for f in maps], 1))
                mean_response.append(torch.cat([f.relu().mean((2, 3)) for f in maps], 1))
        scale = torch.cat(size).double().mean(0)
        rectified = torch.cat(mean_response).double().mean(0)
        kept = rectified > 0
        self.register_buffer("kept", kept)
        self.register_buffer("scale", scale[kept].float())
        self.register_buffer("observed", (rectified[kept] / scale[kept]).float())
        self.weight = nn.Parameter(torch.zeros(len(self.scale)))
        every = [name for name, width in zip(self.layers, widths, strict=True) for _ in range(width)]
        self.layer_of = [name for name, keep in zip(every, kept.tolist(), strict=True) if keep]

    def _apply(self, *args: Any, **kwargs: Any) -> "FilterScore":
        super()._apply(*args, **kwargs)
        if self._held["trunk"] is not None:
            self._held["trunk"].to(self.weight.device)
        return self

    def _maps(self, x: Tensor) -> list[Tensor]:
        maps: dict[str, Tensor] = {}
        if (trunk := self._held["trunk"]) is not None:
            maps = dict(zip(self.deep, trunk(x * self.std + self.mean, self.deep), strict=True))
        if PIXELS in self.layers:
            right, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
            both = right[..., 1:, :] - right[..., :-1, :]
            # Padded to one size: that counts as answers of zero, in the data's means as well.
            differences = [tf.pad(right, (0, 1)), tf.pad(down, (0, 0, 0, 1)), tf.pad(both, (0, 1, 0, 1))]
            maps[PIXELS] = torch.cat([x, -x, x - 1, -x - 1, x - 2, -x - 2, *differences], 1)
        return [maps[layer] for layer in self.layers]

    def means(self, x: Tensor) -> Tensor:
        """h_k(x)/s_k, [N, K]."""
        return torch.cat([f.relu().mean((2, 3)) for f in self._maps(x)], 1)[:, self.kept] / self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.numbers * (self.means(x) @ self.weight)

    def gap(self, negatives: Tensor, observed: Tensor) -> Tensor:
        """E f(negatives) − E f(data), over the whole data whatever `observed`: its filter means are known."""
        with torch.no_grad():
            difference = self.means(negatives).mean(0) - self.observed
        return self.numbers * (difference @ self.weight)


class ConvScore(nn.Module):
    """f_θ(x) of a small ConvNet, all layers learned: 3×3 to `width` channels, 4×4 of stride 2 to 2·width and 4·width,
    SiLU between (the paper has ReLU), then

    head: "full", one weight for each unit (pictures of things), or "sum", one for each channel (textures)

    Source: Xie et al., "A theory of generative ConvNet", ICML 2016.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, head: str) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.SiLU(),
        )
        kernel: Any = (height // 4, breadth // 4) if head == "full" else 1
        self.head = nn.Conv2d(4 * width, 1, kernel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.head(self.body(x)).sum((1, 2, 3))
        return score

    def gap(self, negatives: Tensor, observed: Tensor) -> Tensor:
        """E f(negatives) − E f(observed)."""
        score = self(torch.cat([negatives, observed]))
        return score[: len(negatives)].mean() - score[len(negatives) :].mean()


class Learner(LightningModule):
    """Chains and parameters in turn, p_θ(x) ∝ exp(f_θ(x) − ‖x‖²/2σ²), U = −f_θ + ‖x‖²/2σ²:

        K times   x ← clamp(x − η ∇U(x) + s ε)
        once      θ ← θ − lr · optimiser(∇_θ (E f_θ(x⁻) − E f_θ(data)))

    with x⁻ = x in FRAME and, in wFRAME, x⁻ = x − β ∇U(x) (penalty "energy") or x + β ∇f_θ(x) (penalty "score"): to
    O(β²) the gradient of FRAME plus that of (β/2) E‖∇U‖², or (β/2) E‖∇f‖², at the chains. β = 0 is FRAME.

    Where it comes from, derived here (the paper's own update could not be had, nor code): one step of the
    Jordan-Kinderlehrer-Otto flow, p⁺ = argmin_p E_p U − H(p) + W₂²(p, p_t)/2β, has to first order the velocity
    v = −∇(U + log p_t) and the minimum E_{p_t} U − H(p_t) − (β/2) E‖∇(U + log p_t)‖². Put for −log Z into the negative
    log-likelihood, with the potential's part of the velocity alone, it gives the penalty (β/2) E_{p_t}‖∇U‖².

    The state is x = (image − mean)/std with the data's mean and std, two numbers. All that a run needs to go on is in
    the state_dict: the chains, the count of Langevin steps (which keys their noise), the record of energies, snapshots.

    score: a module with forward(x [N, C, H, W]) -> [N] and gap(negatives, observed) -> scalar
    observed: the data as states
    chains: states to start from
    settings: the options of a model, where their meaning stands; beta None is FRAME without a look ahead
    rounds: parameter steps an epoch
    bounds: what 0 and 1 are as states

    Energies are kept for each round: the mean of U over the chains in the round's last gradient, over D pixels.
    """

    chains: Tensor
    taken: Tensor
    energies: Tensor
    mismatch: Tensor
    snapshots: Tensor

    def __init__(
        self,
        score: FilterScore | ConvScore,
        observed: Tensor,
        *,
        settings: dict[str, Any],
        rounds: int,
        bounds: tuple[float, float],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.score, self.settings, self.bounds = score, settings, bounds
        self.clamp = bounds if settings["clamp"] else None
        self.total = rounds * settings["epochs"]
        self._held = {"observed": observed}
        chains = self.start(settings["chains"], generator(settings["seed"], 0, 3), tuple(observed.shape[1:]))
        self.register_buffer("chains", chains)
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.register_buffer("energies", torch.full((self.total,), torch.nan))
        self.register_buffer("mismatch", torch.full((self.total,), torch.nan))
        self.register_buffer("snapshots", self._bytes(chains[:SNAPSHOTS]).repeat(SNAPSHOTS, 1, 1, 1, 1))
        # After which epochs a snapshot is taken; the first is of the start.
        self.times = [round(self.settings["epochs"] * i / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)]

    def start(self, n: int, random: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """States drawn from the reference N(0, σ²I); without one, uniform over the range of an image."""
        if self.settings["reference_scale"] is not None:
            x = self.settings["reference_scale"] * torch.randn(n, *shape, generator=random)
        else:
            x = self.bounds[0] + (self.bounds[1] - self.bounds[0]) * torch.rand(n, *shape, generator=random)
        return x if self.clamp is None else x.clamp(*self.clamp)

    def image(self, x: Tensor) -> Tensor:
        """States as images in [0, 1]."""
        low, high = self.bounds
        return ((x - low) / (high - low)).clamp(0, 1)

    def _bytes(self, x: Tensor) -> Tensor:
        return (self.image(x) * 255).round().to(torch.uint8)

    def energy(self, x: Tensor) -> Tensor:
        """U(x), [N]."""
        return self._prior(x) - self.score(x)

    def _prior(self, x: Tensor) -> Tensor:
        """‖x‖²/2σ², [N]; 0 without a reference."""
        scale = self.settings["reference_scale"]
        return x.new_zeros(len(x)) if scale is None else x.flatten(1).square().sum(1) / (2 * scale**2)

    def pull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f(x), −∇f(x)), without a graph."""
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            score = self.score(state)
            (gradient,) = torch.autograd.grad(-score.sum(), state)
        return score.detach(), gradient

    @torch.no_grad()
    def evolve(self, x: Tensor, steps: int, *, seed: int, step: int, share: float) -> tuple[Tensor, Tensor]:
        """`steps` Langevin steps of x, in place -> (x, U in the last gradient [N]).

        share: of the settings' step_size that a step takes (of noise_scale, where given, its root)
        seed, step: key the noise of the first step; later ones count on
        """
        s, scale = self.settings, self.settings["reference_scale"]
        noise_scale = None if s["noise_scale"] is None else s["noise_scale"] * share**0.5
        energy = x.new_zeros(len(x))
        for k in range(steps):
            score, gradient = self.pull(x)
            if k == steps - 1:
                energy = self._prior(x) - score
            langevin_step_(
                x,
                gradient,
                step_size=s["step_size"] * share,
                noise_scale=noise_scale,
                prior_scale=scale,
                clamp=self.clamp,
                seed=seed,
                step=step + k,
            )
        return x, energy

    @torch.no_grad()
    def look_ahead(self, x: Tensor) -> Tensor:
        """wFRAME's negatives: one step of size β without noise, of U or of −f alone."""
        s = self.settings
        ahead, prior = torch.empty_like(x), s["reference_scale"] if s["penalty"] == "energy" else None
        # The step itself goes nowhere: what is wanted is the look ahead, whose β may be 0.
        langevin_step_(
            x.clone(),
            self.pull(x)[1],
            step_size=s["step_size"],
            noise_scale=0.0,
            prior_scale=prior,
            seed=0,
            lookahead=(s["beta"], ahead),
        )
        return ahead

    def configure_optimizers(self) -> Any:
        s = self.settings
        parameters = list(self.score.parameters())
        optimiser: torch.optim.Optimizer
        if s["optimizer"] == "adam":
            optimiser = torch.optim.Adam(parameters, s["lr"], betas=(0.5, 0.9))
        else:
            optimiser = torch.optim.SGD(parameters, s["lr"])
        return [optimiser], [torch.optim.lr_scheduler.LambdaLR(optimiser, lambda at: self._share("lr_final", at))]

    def _share(self, final: str, at: int) -> float:
        """What is left in round `at` of something that falls along a line to settings[final] of its start."""
        return float(1 - (1 - self.settings[final]) * min(at / self.total, 1.0))

    def on_fit_start(self) -> None:
        self._held["observed"] = self._held["observed"].to(self.device)

    def training_step(self, rows: Tensor, batch_number: int) -> None:
        s = self.settings
        taken = int(self.taken)
        at = taken // s["n_steps"]
        self._restart(at)
        _, energy = self.evolve(
            self.chains, s["n_steps"], seed=s["seed"], step=taken, share=self._share("step_final", at)
        )
        self.taken += s["n_steps"]
        if not bool(energy.isfinite().all() & self.chains.isfinite().all()):
            raise Diverged(taken + s["n_steps"])
        self.energies[at] = energy.mean() / self.chains[0].numel()
        negatives = self.chains if s["beta"] is None else self.look_ahead(self.chains)
        observed = self._held["observed"]
        # Deep FRAME, which needs none of the data here, counts rounds, of which there may be more.
        gap = self.score.gap(negatives, observed[rows % len(observed)])
        optimiser: Any = self.optimizers()
        optimiser.zero_grad()
        self.manual_backward(gap)
        optimiser.step()
        falling: Any = self.lr_schedulers()
        falling.step()
        self.log("energy", self.energies[at], on_step=False, on_epoch=True, prog_bar=True, batch_size=1)
        if isinstance(self.score, FilterScore):
            with torch.no_grad():
                self.mismatch[at] = (self.score.means(self.chains).mean(0) - self.score.observed).abs().mean()
            self.log("loss", self.mismatch[at], on_step=False, on_epoch=True, prog_bar=True, batch_size=1)

    def _restart(self, at: int) -> None:
        """Each chain starts anew with probability `restart`, except in the first round."""
        share = self.settings["restart"]
        if share and at:
            random = generator(self.settings["seed"], at, 4)
            fresh = torch.rand(len(self.chains), generator=random) < share
            drawn = self.start(len(self.chains), random, tuple(self.chains.shape[1:]))
            self.chains[fresh.to(self.device)] = drawn[fresh].to(self.device)

    def on_train_epoch_end(self) -> None:
        for i, time in enumerate(self.times):
            if time == self.current_epoch + 1:
                self.snapshots[i] = self._bytes(self.chains[:SNAPSHOTS])


class Diverged(UserError):
    """The chains left the finite numbers."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"the chains diverged before Langevin step {step}: a smaller step_size or lr, a clamp, or wframe in place "
            "of FRAME keeps them"
        )
