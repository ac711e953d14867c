"""Sampling from an energy by Langevin dynamics."""

import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen import check
from fastgen.functional.langevin import langevin_step_
from fastgen.nn import langevin_graph
from fastgen.nn.cuda_graph import surroundings
from fastgen.nn.langevin_chains import Chains, Divergence
from fastgen.nn.langevin_graph import Kept, Recorded
from fastgen.nn.langevin_signature import signature
from fastgen.reference.langevin import STEPS

Schedule = float | Tensor | Sequence[float] | Callable[[int], float]


class LangevinRun(NamedTuple):
    """What `LangevinSampler.run` returns; tensors without a graph, on x's device."""

    x: Tensor  # [C, ...]: the state after the last step
    trajectory: Tensor | None  # [C, D, ...]: the states kept
    energy: Tensor  # [C, K]: the energy U (without the prior's term) of the state that each step started from
    acceptance_rate: Tensor | None  # [C] float64, of MALA
    resets: Tensor  # [C] int64: how often a chain was put back to its last finite state
    divergences: list[Divergence]  # the first of each chain that was reset
    next_step: int  # `step` for the call that goes on with these chains


class LangevinSampler(nn.Module):
    """K steps of x ← clamp(x − η·(clip(∇U(x)) + x/σ²) + s·ε) for an energy U.

    Args:
        energy: [C, ...] -> [C], a module or any callable, differentiable; a chain's energy must not depend on the
            others (a batch normalisation in training mode makes it). A module's parameters are frozen while sampling:
            gradients are for the state alone, and each parameter's requires_grad is restored, after an error too.
        step_size, noise_scale: as in `fastgen.functional.langevin_step_`, step_size > 0; or a schedule: a list or tuple
            of n_steps numbers, or a function of k = 0, ..., n_steps − 1, asked for every k when a call starts.
        prior_scale, grad_clip, clamp: as in `langevin_step_`.
        n_steps: K >= 0.
        method: "ula", unadjusted: the stationary density is exp(−U − ‖x‖²/2σ²) but for an error of order η; or "mala",
            adjusted: each step is accepted or rejected so that it is exact (`langevin_accept_`), at temperature
            s²/2η; float32 or float64 state, s > 0, no clamp. The energy is evaluated K times, for mala K + 1.
        burn_in, thin: a trajectory keeps the state after each thin-th step that follows the first burn_in.
        on_divergence: "raise", or "reset": a chain whose energy, gradient or state is not finite goes on from its last
            finite state with the noise of the current step; it is counted, and a warning names the first.
        cuda_graph: on CUDA, "auto" runs the chain as CUDA graphs that later calls replay. A first call takes its first
            step as it is and records the second, a second like it records up to 32 steps at once, a shorter chain
            whole. Weights that change in place are read as they are. What else has changed has the chain recorded anew:
            shapes, options, torch's switches; other modules, parameters or buffers; attributes and hooks of the
            energy's modules; what a function closes over, and the globals that it names. Unseen is what belongs to
            installed packages, what code finds by names that it makes up, and what the energy does in Python, a cache
            of something made of its weights, say. An energy that refers to what cannot be looked into (a generator, an
            array of NumPy's) is recorded in every call. Four graphs are kept, in a sixteenth of the device's memory at
            most, and as long as the sampler. An energy that cannot be captured falls back to the loop with a warning.
            True raises instead; False is the plain loop. On the CPU "auto" is the plain loop. The numbers are the same.

    Call:
        x: [C, ...] float64, float32, bfloat16 or float16, the start; not changed.
        seed: 0 <= seed < 2⁶⁴; None draws one from torch's generator of the CPU, so that torch.manual_seed governs.
        step: the number of the first step's noise. Chains persist over calls with the same seed and step=run.next_step,
            or simply with another seed in each call.
        chain_id: [C] int64, the global numbers of the chains; None is 0, ..., C − 1. A chain's noise depends on its
            number alone, so any split over batches or processes gives the same chains.
        return_trajectory: return the states kept instead of the last.

    Returns:
        x after K steps, [C, ...], without a graph; with return_trajectory [C, D, ...], D = (K − burn_in) div thin: the
        (chain, draw, *shape) of ArviZ, `arviz.convert_to_dataset({"x": trajectory.numpy()})` for `rhat` and `ess`.
        `run` takes the same arguments and returns a `LangevinRun` with energies, acceptance rates and resets.

    Raises:
        FloatingPointError: an energy or a state is NaN or infinite (and on_divergence is "raise", or it is the start);
        names the step, the chain and the energy.
        TypeError, ValueError: as `langevin_step_`; or energy(x) is not [C], or not differentiable in x.

    Notes:
        Chain c of the call's k-th step adds the noise of (seed, step + k, chain id c). The check of the energies costs
        a reduction of C numbers a step; "reset" keeps a copy of state and gradient besides. On the CPU a bad energy
        stops the loop at once; on a GPU the first bad step is kept on the device and read at the end: one
        synchronisation a call, after steps that were for nothing.
        MALA treats U = +∞ as outside the support and rejects; NaN and −∞ count as divergences.

    Source:
        Xie et al., "A theory of generative ConvNet", ICML 2016; Nijkamp et al., NeurIPS 2019; MALA: Roberts and
        Tweedie, Bernoulli 1996.
    """

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        *,
        step_size: Schedule,
        n_steps: int,
        noise_scale: Schedule | None = None,
        prior_scale: float | None = None,
        grad_clip: float | None = None,
        clamp: tuple[float | None, float | None] | None = None,
        method: str = "ula",
        burn_in: int = 0,
        thin: int = 1,
        on_divergence: str = "raise",
        cuda_graph: bool | str = "auto",
    ) -> None:
        super().__init__()
        if not callable(energy):
            raise TypeError(f"energy: expected a callable, got {check.describe(energy)}")
        if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
            raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")
        self.energy = energy
        self.n_steps = check.integer("n_steps", n_steps, least=0, most=STEPS)
        self.step_size, self.noise_scale, self.prior_scale = step_size, noise_scale, prior_scale
        self.grad_clip, self.clamp, self.cuda_graph = grad_clip, clamp, cuda_graph
        self.method = check.choice("method", method, ("ula", "mala"))
        self.on_divergence = check.choice("on_divergence", on_divergence, ("raise", "reset"))
        self.burn_in = check.integer("burn_in", burn_in, least=0, most=self.n_steps)
        self.thin = check.integer("thin", thin, least=1)
        self._kept = Kept()
        if method == "mala" and clamp is not None:
            raise ValueError(f"clamp: expected None for method='mala', whose proposals are Gaussian, got {clamp!r}")
        # A bad option is refused here, not in the loop; tensors are checked against the x that comes.
        schedule = self._schedule()
        h, s = schedule[0] if schedule else (1.0, 1.0)
        probe = [1.0 if isinstance(value, Tensor) else value for value in (h, s)]
        x = torch.zeros(1, 1, dtype=torch.float64)
        langevin_step_(
            x, torch.zeros_like(x), step_size=probe[0], noise_scale=probe[1], prior_scale=prior_scale,
            grad_clip=grad_clip, clamp=clamp, seed=0,
        )  # fmt: skip

    def extra_repr(self) -> str:
        names = "step_size n_steps noise_scale prior_scale grad_clip clamp method burn_in thin on_divergence cuda_graph"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split())

    def forward(
        self,
        x: Tensor,
        *,
        seed: int | None = None,
        step: int = 0,
        chain_id: Tensor | None = None,
        return_trajectory: bool = False,
    ) -> Tensor:
        found = self.run(x, seed=seed, step=step, chain_id=chain_id, return_trajectory=return_trajectory)
        return found.x if found.trajectory is None else found.trajectory

    def run(
        self,
        x: Tensor,
        *,
        seed: int | None = None,
        step: int = 0,
        chain_id: Tensor | None = None,
        return_trajectory: bool = False,
    ) -> LangevinRun:
        """As a call, but returns everything there is to know about it."""
        mala = self.method == "mala"
        check.tensor("x", x, dtypes=(torch.float64, torch.float32) if mala else check.FLOATS)
        if x.ndim == 0:
            raise ValueError("x: expected [C, ...] with chains in dimension 0, got a 0-d tensor")
        if self.cuda_graph is True and not x.is_cuda:
            raise ValueError(f"cuda_graph: expected x on a CUDA device for cuda_graph=True, got it on {x.device}")
        if chain_id is not None:
            check.tensor("chain_id", chain_id, dtypes=(torch.int64,), ndim=(1,))
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        seed = check.integer("seed", seed, least=0, most=2**64 - 1)
        step = check.integer("step", step, least=0, most=STEPS - self.n_steps)
        schedule = self._schedule(torch.float64 if x.dtype == torch.float64 else torch.float32)
        record = langevin_graph.recorder(x.device)
        recording = record is not None and self.cuda_graph is not False and self.n_steps > 0
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            recording = False
        columns = _columns(schedule) if recording else []
        key = self._key(x, chain_id, columns) if recording else None

        def make() -> Recorded:
            return Recorded(Chains(self, x, chain_id, late=record is not None), record, self.cuda_graph is True)

        with (
            torch.inference_mode(False),
            torch.no_grad(),
            self._kept.lent(key, make) as recorded,
            ExitStack() as stack,
        ):
            chains = recorded.chains
            chains.begin(self, x, seed, step, chain_id, lambda: stack.enter_context(_frozen(self.energy)))
            shape = (len(x), (self.n_steps - self.burn_in) // self.thin, *x.shape[1:])
            trajectory = x.new_empty(shape) if return_trajectory else None
            if recording:
                chains.lay_out(columns)
            for taken in recorded.steps(each=return_trajectory) if recording else chains.steps(schedule):
                # A state that is to be reset is so only when the next step looks at it.
                done, state = (taken - 1, chains.good_x) if chains.resets_late else (taken, chains.x)
                kept, rest = divmod(done - self.burn_in, self.thin)
                if trajectory is not None and kept > 0 and rest == 0:
                    trajectory[:, kept - 1] = state
            kept, rest = divmod(self.n_steps - self.burn_in, self.thin)
            if trajectory is not None and chains.resets_late and kept > 0 and rest == 0:
                trajectory[:, kept - 1] = chains.x
            # Copied before the wait in `finish`: then the place is another call's.
            last, resets = (chains.x, chains.resets) if key is None else (chains.x.clone(), chains.resets.clone())
            rate = chains.accepted.double() / self.n_steps if mala else None
            divergences = chains.finish()
            energy = chains.energy_found()
        if divergences:
            worst, more = divergences[0], f", and {len(divergences) - 1} more" if len(divergences) > 1 else ""
            text = f"was reset at step {worst.step} (energy {worst.energy})"
            warnings.warn(f"LangevinSampler: chain {worst.chain} {text}{more}", stacklevel=2)
        return LangevinRun(last, trajectory, energy, rate, resets, divergences, step + self.n_steps)

    def _key(self, x: Tensor, chain_id: Tensor | None, columns: list[Any]) -> Hashable | None:
        """All that recorded chains depend on, but for what is copied to where they read it; None if that cannot be
        told."""
        around = surroundings(x.device)
        options = (self.n_steps, self.method, self.on_divergence, self.prior_scale, self.grad_clip, self.clamp)
        varying = ["varies" if isinstance(c, list) else c for c in columns]
        chains = (type(x), x.device, x.shape, x.dtype, None if chain_id is None else (chain_id.device, chain_id.shape))
        given = (chains, self.cuda_graph is True, varying, options, self.energy)
        key = None if around is None else signature(x.device, *given)
        return None if key is None else (around, key)

    def _schedule(self, dtype: torch.dtype = torch.float64) -> list[tuple[Any, Any]]:
        """(η, s) of each step: numbers, tensors for each chain, or None for s = √(2η)."""
        columns = []
        for name, value in (("step_size", self.step_size), ("noise_scale", self.noise_scale)):
            if callable(value) and not isinstance(value, Tensor):
                rows: list[Any] = [value(k) for k in range(self.n_steps)]
            elif isinstance(value, (list, tuple)):
                if len(value) != self.n_steps:
                    raise ValueError(f"{name}: expected one number for each of {self.n_steps} steps, got {len(value)}")
                rows = list(value)
            else:
                columns.append([_scale(name, value, self.method, dtype)] * max(self.n_steps, 1))
                continue
            for k, row in enumerate(rows):
                if isinstance(row, Tensor):
                    raise TypeError(f"{name}[{k}]: expected a number, got {check.describe(row)}")
                rows[k] = _scale(f"{name}[{k}]", row, self.method, dtype)
            columns.append(rows)
        return list(zip(*columns, strict=False))

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            energy = self.energy(state)
            if not isinstance(energy, Tensor) or energy.shape != x.shape[:1]:
                raise ValueError(
                    f"energy(x): expected shape [{len(x)}], one for each chain, got {check.describe(energy)}"
                )
            grad = None
            if energy.requires_grad:
                grad = _grad(energy, state)
            if grad is None:
                raise ValueError(
                    "energy(x): expected a function differentiable in x, got a result without a graph to x"
                )
        return energy.detach(), grad


_ENGINE = getattr(torch.autograd.graph, "_engine_run_backward", None)  # torch's own, and so not promised


def _grad(energy: Tensor, state: Tensor) -> Tensor | None:
    """Of the sum of the energies. torch.autograd.grad looks its arguments over for a fifth of a small network's step:
    between plain tensors it has nothing to find, unless somebody watches the call."""
    ones = torch.ones_like(energy)
    watched = torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_function_stack()
    found: tuple[Tensor | None, ...]
    if _ENGINE is not None and type(energy) is type(state) is Tensor and not watched:
        found = _ENGINE((energy,), (ones,), False, False, (state,), True, accumulate_grad=False)
    else:
        found = torch.autograd.grad(energy, state, ones, allow_unused=True)
    return found[0]


def _columns(schedule: list[tuple[Any, Any]]) -> list[Any]:
    """η and s of all steps: a number or a tensor for all, or a list of numbers."""
    numbers = [(h, math.sqrt(2.0 * h) if s is None and not isinstance(h, Tensor) else s) for h, s in schedule]
    columns = [list(column) for column in zip(*numbers, strict=True)]
    return [c if not isinstance(c[0], Tensor) and len(set(c)) > 1 else c[0] for c in columns]


def _scale(name: str, value: Any, method: str, dtype: torch.dtype) -> Any:
    """`value` as `_schedule` has it. Numbers are checked when the sampler is made; a tensor of them when it lies on the
    CPU, without a wait."""
    if value is None and name == "noise_scale":
        return None
    positive = name.startswith("step_size") or method == "mala"
    if not isinstance(value, Tensor):
        return check.number(name, value, above=0.0 if positive else None, least=None if positive else 0.0, dtype=dtype)
    if value.device.type == "cpu":
        good = value.isfinite() & ((value > 0) if positive else (value >= 0))
        if not bool(good.all()):
            chain = int((~good).flatten().nonzero()[0, 0])
            got = f"{float(value.flatten()[chain])}" + (f" for chain {chain}" if value.ndim else "")
            raise ValueError(f"{name}: expected finite numbers {'> 0' if positive else '>= 0'}, got {got}")
    return value


@contextmanager
def _frozen(energy: object) -> Iterator[None]:
    named = list(energy.named_parameters()) if isinstance(energy, nn.Module) else []
    for name, parameter in named:
        if parameter.requires_grad and parameter.is_inference():  # autograd refuses it, and it could not be restored
            raise ValueError(f"energy: expected parameters made outside torch.inference_mode, got {name} made inside")
    parameters = [p for _, p in named if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
