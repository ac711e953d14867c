"""Sampling from an energy by Langevin dynamics."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen import check
from fastgen.functional.langevin import langevin_step_
from fastgen.functional.langevin_mala import langevin_accept_
from fastgen.reference.langevin import STEPS

Schedule = float | Tensor | Sequence[float] | Callable[[int], float]
MIN_GRAPH_STEPS = 4  # below, a capture costs more than it saves


class Divergence(NamedTuple):
    """Where a chain first had an energy, a gradient or a state that was not finite."""

    step: int
    chain: int
    energy: float


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
        cuda_graph: on CUDA, "auto" runs the first step as it is, captures the second and replays it, in every call anew
            (so that no change of the energy goes unseen); an energy that cannot be captured falls back to the loop with
            a warning. True raises instead; False is the plain loop. On the CPU "auto" is the plain loop. The numbers
            are the same.

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
        if method == "mala" and clamp is not None:
            raise ValueError(f"clamp: expected None for method='mala', whose proposals are Gaussian, got {clamp!r}")
        # A bad option is refused here, not in the loop; tensors are checked against the x that comes.
        schedule = self._schedule()
        h, s = schedule[0] if schedule else (1.0, 1.0)
        probe = [1.0 if isinstance(value, Tensor) else value for value in (h, s)]
        x = torch.zeros(1, 1, dtype=torch.float64)
        self._step(x, torch.zeros_like(x), *probe, seed=0, step=0)

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
        with torch.inference_mode(False), torch.no_grad(), _frozen(self.energy):
            chains = _Chains(self, x, seed, step, None if chain_id is None else chain_id.clone())
            shape = (len(x), (self.n_steps - self.burn_in) // self.thin, *x.shape[1:])
            trajectory = x.new_empty(shape) if return_trajectory else None
            energies = []
            for k in chains.steps():
                if chains.started_from is not None:
                    energies.append(chains.started_from.clone() if x.is_cuda else chains.started_from)
                # A state that is to be reset is so only when the next step looks at it.
                done, state = (k, chains.good_x) if chains.resets_late else (k + 1, chains.x)
                kept, rest = divmod(done - self.burn_in, self.thin)
                if trajectory is not None and kept > 0 and rest == 0:
                    trajectory[:, kept - 1] = state
            chains.finish()
            kept, rest = divmod(self.n_steps - self.burn_in, self.thin)
            if trajectory is not None and chains.resets_late and kept > 0 and rest == 0:
                trajectory[:, kept - 1] = chains.x
            energy = torch.stack(energies, dim=1) if energies else chains.energy.new_empty(len(x), 0)
        rate = chains.accepted.double() / self.n_steps if mala else None
        divergences = chains.divergences() if self.on_divergence == "reset" else []
        if divergences:
            worst, more = divergences[0], f", and {len(divergences) - 1} more" if len(divergences) > 1 else ""
            text = f"was reset at step {worst.step} (energy {worst.energy})"
            warnings.warn(f"LangevinSampler: chain {worst.chain} {text}{more}", stacklevel=2)
        return LangevinRun(chains.x, trajectory, energy, rate, chains.resets, divergences, step + self.n_steps)

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
                columns.append([value] * max(self.n_steps, 1))
                _scale(name, value, self.method, dtype)
                continue
            for k, row in enumerate(rows):
                if isinstance(row, Tensor):
                    raise TypeError(f"{name}[{k}]: expected a number, got {check.describe(row)}")
                _scale(f"{name}[{k}]", row, self.method, dtype)
            columns.append(rows)
        return list(zip(*columns, strict=False))

    def _step(self, x: Tensor, grad: Tensor, step_size: Any, noise_scale: Any, **key: Any) -> None:
        langevin_step_(
            x,
            grad,
            step_size=step_size,
            noise_scale=noise_scale,
            prior_scale=self.prior_scale,
            grad_clip=self.grad_clip,
            clamp=self.clamp,
            **key,
        )

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
                (grad,) = torch.autograd.grad(energy, state, torch.ones_like(energy), allow_unused=True)
            if grad is None:
                raise ValueError(
                    "energy(x): expected a function differentiable in x, got a result without a graph to x"
                )
        return energy.detach(), grad


class _Chains:
    """The state of one call. `advance` touches tensors on the device alone, in place, so that it can be captured."""

    def __init__(self, sampler: LangevinSampler, x: Tensor, seed: int, first: int, chain_id: Tensor | None) -> None:
        count = len(x)
        self.sampler, self.first, self.chain_id, self.n_steps = sampler, first, chain_id, sampler.n_steps
        self.x = x.detach().clone(memory_format=torch.contiguous_format)
        self.mala, self.reset = sampler.method == "mala", sampler.on_divergence == "reset"
        self.resets_late = self.reset and not self.mala
        self.eager_check = x.device.type == "cpu" and not self.reset
        self.seed: int | Tensor = seed
        self.step: int | Tensor = first
        if x.is_cuda:  # where a captured step finds them
            signed = seed - 2**64 if seed >= 2**63 else seed
            # Filled there: a copy from the host would wait for the device.
            self.seed, self.step = (torch.full((), n, dtype=torch.int64, device=x.device) for n in (signed, first))
        self.schedule = sampler._schedule(torch.float64 if x.dtype == torch.float64 else torch.float32)
        self.energy = x.new_zeros(count, dtype=torch.float64)
        self.started_from: Tensor | None = None
        self.start_finite = _finite(self.x)
        if x.device.type == "cpu":
            self.check_start()
        self.accepted = torch.zeros(count, dtype=torch.int64, device=x.device)
        self.resets = torch.zeros_like(self.accepted)
        self.bad_step = torch.full_like(self.accepted, -1)
        self.bad_energy = torch.zeros(count, dtype=torch.float64, device=x.device)
        if self.mala:
            energy, grad = sampler._gradient(self.x)
            # A copy: the gradient may be a buffer of the energy's, and steps write here.
            self.grad = grad.clone(memory_format=torch.contiguous_format)
            self.proposal = torch.empty_like(self.x)
            ok = energy.isfinite() & _finite(grad)
            self.energy = torch.where(ok, energy, math.nan)  # a start without a meaning is never left
            self.record(ok, energy, start=True)
        elif self.resets_late:
            self.good_x, self.good_grad = self.x.clone(), torch.zeros_like(self.x)

    def steps(self) -> Iterator[int]:
        """Runs a step for each number it yields."""
        graph, wanted = None, self.sampler.cuda_graph
        use_graph = wanted is True or (wanted == "auto" and self.n_steps >= MIN_GRAPH_STEPS)
        use_graph &= self.x.is_cuda and not torch.cuda.is_current_stream_capturing()
        for k in range(self.n_steps):
            if graph is not None:
                self.load(k)
                graph.replay()
            elif not use_graph:
                self.advance(*self.schedule[k])
            elif k == 0:  # the warm-up that a capture needs is the first step itself
                self.tables()
                side = torch.cuda.Stream(self.x.device)
                side.wait_stream(torch.cuda.current_stream(self.x.device))
                with torch.cuda.stream(side):
                    self.load(k)
                    self.advance(self.h, self.s)
                torch.cuda.current_stream(self.x.device).wait_stream(side)
            else:
                self.load(k)
                graph = self.capture()
                if graph is not None:
                    graph.replay()
                else:
                    use_graph = False
                    self.advance(*self.schedule[k])
            yield k

    def tables(self) -> None:
        """The schedule on the device: a captured step reads η and s from tensors that `load` fills."""
        compute = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        given = self.schedule
        numbers = [(h, math.sqrt(2.0 * h) if s is None and not isinstance(h, Tensor) else s) for h, s in given]
        self.table: list[Tensor | None] = []
        for column in zip(*numbers, strict=True):
            varies = not isinstance(column[0], Tensor) and len(set(column)) > 1
            pinned = torch.tensor(column, dtype=compute).pin_memory() if varies else None
            self.table.append(None if pinned is None else pinned.to(self.x.device, non_blocking=True))
        self.h, self.s = (
            column[0] if table is None else table.new_empty(len(self.x))
            for column, table in zip(zip(*numbers, strict=True), self.table, strict=True)
        )

    def load(self, k: int) -> None:
        for table, value in zip(self.table, (self.h, self.s), strict=True):
            if table is not None:
                value.copy_(table[k].expand_as(value))

    def capture(self) -> "torch.cuda.CUDAGraph | None":
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.advance(self.h, self.s)
        except RuntimeError as error:
            if self.sampler.cuda_graph is True:
                raise
            what = str(error).splitlines()[0]
            warnings.warn(f"LangevinSampler: the energy cannot be captured, the plain loop runs: {what}", stacklevel=4)
            return None
        return graph

    def advance(self, h: Any, s: Any) -> None:
        sampler = self.sampler
        key: dict[str, Any] = {"seed": self.seed, "step": self.step, "chain_id": self.chain_id}
        if self.mala:
            self.keep(self.energy)
            self.proposal.copy_(self.x)
            sampler._step(self.proposal, self.grad, h, s, **key)
            energy, grad = sampler._gradient(self.proposal)
            log_alpha, accepted = langevin_accept_(
                self.x, self.grad, self.energy, self.proposal, grad.contiguous(), energy, step_size=h, noise_scale=s,
                prior_scale=sampler.prior_scale, grad_clip=sampler.grad_clip, **key,
            )  # fmt: skip
            self.accepted.add_(accepted)
            self.record(~log_alpha.isnan(), energy)
        else:
            energy, grad = sampler._gradient(self.x)
            if self.reset:
                ok = energy.isfinite() & _finite(grad) & _finite(self.x)
                self.record(ok, energy)  # before the state moves, which the energy may be a view of
                grad = self.put_back(ok, grad, energy)
                energy = self.energy.to(energy.dtype)
            elif not (self.eager_check and math.isfinite(energy.sum())):  # a finite sum clears them all
                self.record(energy.isfinite(), energy)
            self.keep(energy)
            sampler._step(self.x, grad, h, s, **key)
        self.step += 1  # in place where it is a tensor

    def keep(self, energy: Tensor) -> None:
        """On CUDA in place from the second step on: a captured step must write where the first one did."""
        if self.started_from is not None and energy.is_cuda:
            self.started_from.copy_(energy)
        else:
            self.started_from = energy.clone()  # it may be a view of the state that the step moves

    def put_back(self, ok: Tensor, grad: Tensor, energy: Tensor) -> Tensor:
        rows = ok.view([-1] + [1] * (self.x.ndim - 1))
        self.x.copy_(torch.where(rows, self.x, self.good_x))
        self.good_x.copy_(self.x)
        self.good_grad.copy_(torch.where(rows, grad, self.good_grad))
        self.energy.copy_(torch.where(ok, energy.double(), self.energy))
        return self.good_grad

    def record(self, ok: Tensor, energy: Tensor, start: bool = False) -> None:
        if self.eager_check and bool(ok.all()):
            return
        first = ~ok & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(first, self.step, self.bad_step))
        self.bad_energy.copy_(torch.where(first, energy.double(), self.bad_energy))
        if not start:
            self.resets.add_(~ok)
        if self.eager_check:
            self.check()

    def finish(self) -> None:
        """Looks at the last state, and reads what was recorded on a GPU."""
        if self.x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self.check_start()
        finite = _finite(self.x)
        if self.resets_late and self.n_steps > 0:
            rows = finite.view([-1] + [1] * (self.x.ndim - 1))
            self.x.copy_(torch.where(rows, self.x, self.good_x))
            self.record(finite, self.energy)
            finite = _finite(self.x)
        # A chain that starts without a finite energy has nothing to go back to.
        lost = self.bad_step == self.first
        if self.mala:
            lost = lost & self.energy.isnan()
        if not self.reset or bool(lost.any()):
            self.check()
        if not bool(finite.all()):
            last = self.first + self.n_steps
            raise FloatingPointError(
                f"LangevinSampler: the state after the last step, {last}, is not finite in chain {_named(~finite)}"
            )

    def check_start(self) -> None:
        if not bool(self.start_finite.all()):
            raise FloatingPointError(
                f"LangevinSampler: x, the state before step {self.first}, is not finite in chain "
                f"{_named(~self.start_finite)}"
            )

    def check(self) -> None:
        if not bool((self.bad_step >= 0).any()):
            return
        first = int(self.bad_step[self.bad_step >= 0].min())
        bad = self.bad_step == first
        raise FloatingPointError(
            f"LangevinSampler: the energy at step {first} is not finite in chain {_named(bad)}: "
            f"{float(self.bad_energy[bad][0])}"
        )

    def divergences(self) -> list[Divergence]:
        chains = (self.bad_step >= 0).nonzero().flatten().tolist()
        found = [Divergence(int(self.bad_step[c]), c, float(self.bad_energy[c])) for c in chains]
        return sorted(found)


def _named(bad: Tensor) -> str:
    chains = bad.nonzero().flatten().tolist()
    return f"{chains[0]}" + (f" and {len(chains) - 1} more" if len(chains) > 1 else "")


def _scale(name: str, value: Any, method: str, dtype: torch.dtype) -> None:
    """Numbers are checked when the sampler is made; a tensor of them when it lies on the CPU, without a wait."""
    if value is None and name == "noise_scale":
        return
    positive = name.startswith("step_size") or method == "mala"
    if not isinstance(value, Tensor):
        check.number(name, value, above=0.0 if positive else None, least=None if positive else 0.0, dtype=dtype)
    elif value.device.type == "cpu":
        good = value.isfinite() & ((value > 0) if positive else (value >= 0))
        if not bool(good.all()):
            chain = int((~good).flatten().nonzero()[0, 0])
            got = f"{float(value.flatten()[chain])}" + (f" for chain {chain}" if value.ndim else "")
            raise ValueError(f"{name}: expected finite numbers {'> 0' if positive else '>= 0'}, got {got}")


def _finite(x: Tensor) -> Tensor:
    return x.isfinite().reshape(len(x), math.prod(x.shape[1:])).all(dim=1)


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
