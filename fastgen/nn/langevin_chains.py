"""The chains of a call to LangevinSampler: their state, a step of them, and what went wrong."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastgen.check import finite_rows
from fastgen.functional.langevin import Steps
from fastgen.functional.langevin_mala import langevin_accept_

if TYPE_CHECKING:
    from fastgen.nn.langevin import LangevinSampler

BLOCK = 32  # steps in one graph, at most: recording takes as long as running them, and is done once


class Divergence(NamedTuple):
    """Where a chain first had an energy, a gradient or a state that was not finite."""

    step: int
    chain: int
    energy: float


class Chains:
    """The state of a call. `start`, `advance` and `settle` touch tensors alone, and in place where the chains are
    `late`, on a GPU: there they can be recorded, and replayed in other calls, which `begin` writes into them."""

    def __init__(self, sampler: "LangevinSampler", x: Tensor, chain_id: Tensor | None, late: bool) -> None:
        count, device = len(x), x.device
        self.sampler: LangevinSampler | None = sampler
        self.late, self.n_steps = late, sampler.n_steps
        self.block = self.n_steps // math.ceil(self.n_steps / BLOCK) if self.n_steps else 1
        self.x = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.chain_id = None if chain_id is None else torch.empty_like(chain_id)
        self.mala, self.reset = sampler.method == "mala", sampler.on_divergence == "reset"
        self.resets_late = self.reset and not self.mala
        self.eager_check = not late and not self.reset
        self.kept_tell = late and not (self.mala or self.reset)  # which energies were bad, at the end
        self.seed: int | Tensor = 0
        self.step: int | Tensor = 0
        if late:  # where a recorded step finds them
            self.seed, self.step = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.energy, self.bad_energy = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(2))
        self.accepted, self.resets, self.bad_step = (
            torch.zeros(count, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.start_finite, self.finite = (torch.ones(count, dtype=torch.bool, device=device) for _ in range(2))
        self.well = torch.ones((), dtype=torch.bool, device=device)
        if self.mala:
            self.grad, self.proposal = torch.empty_like(self.x), torch.empty_like(self.x)
        elif self.resets_late:
            self.good_x, self.good_grad = torch.empty_like(self.x), torch.empty_like(self.x)
        self.energies: Tensor | None = None  # [block, C], of the steps of a graph
        # η and s of those steps, where they vary. One chain's are read where they lie: where that is no multiple of 16
        # bytes, by another kernel of Triton's, which a capture must not load.
        self.rows: list[Tensor | None] = []

    def begin(
        self,
        sampler: "LangevinSampler",
        x: Tensor,
        seed: int,
        first: int,
        chain_id: Tensor | None,
        freeze: Callable[[], object],
    ) -> None:
        """A call's own; `freeze` is called before the energy is asked for the first time, which may be never."""
        self.sampler, self.first = sampler, first
        self.freeze: Callable[[], object] | None = freeze
        self.x.copy_(x)
        if self.chain_id is not None and chain_id is not None:
            self.chain_id.copy_(chain_id)
        if isinstance(self.seed, Tensor) and isinstance(self.step, Tensor):
            # Filled there: a copy from the host would wait for the device.
            self.seed.fill_(seed - 2**64 if seed >= 2**63 else seed)
            self.step.fill_(first)
        else:
            self.seed, self.step = seed, first
        self.drift = {"prior_scale": sampler.prior_scale, "grad_clip": sampler.grad_clip}
        self.take_step = Steps(
            self.proposal if self.mala else self.x, **self.drift, clamp=sampler.clamp, seed=self.seed,
            chain_id=self.chain_id,
        )  # fmt: skip
        self.found: Tensor | None = None  # [C, K]: the energies
        self.listed: list[Tensor] = []

    def steps(self, schedule: list[tuple[Any, Any]]) -> Iterator[int]:
        """Runs the chains; yields how many steps are done."""
        self.start()
        for k in range(self.n_steps):
            self.advance(*schedule[k])
            self.collect(k, 1)
            yield k + 1
        self.settle(self.found)

    def lay_out(self, columns: list[Any]) -> None:
        """η and s for recorded steps: a number or a tensor, or a list of numbers that they read from the device."""
        self.columns, self.tables = columns, [self._table(c) if isinstance(c, list) else None for c in columns]
        if not self.rows:
            self.rows = [None if t is None else t.new_empty(self.block, 4) for t in self.tables]

    def _table(self, column: list[float]) -> Tensor:
        table = torch.tensor(column, dtype=torch.float64 if self.x.dtype == torch.float64 else torch.float32)
        return table.pin_memory().to(self.x.device, non_blocking=True) if self.x.is_cuda else table

    def load(self, first: int, count: int) -> None:
        """Has a recorded step, or as many as are in a graph, be those from `first` on."""
        for row, table in zip(self.rows, self.tables, strict=True):
            if row is not None and table is not None:
                row[:count, 0].copy_(table[first : first + count])

    def recorded_step(self, row: int) -> None:
        h, s = (c if r is None else r[row, 0] for c, r in zip(self.columns, self.rows, strict=True))
        self.advance(h, s, row)

    def collect(self, first: int, count: int) -> None:
        """Takes the energies of the steps from `first` on away from where the next ones go."""
        if self.energies is not None:
            if self.found is None:
                self.found = self.energies.new_empty(len(self.x), self.n_steps)
            self.found[:, first : first + count] = self.energies[:count].T

    def energy_found(self) -> Tensor:
        if self.listed:
            return torch.stack(self.listed, dim=1)
        return self.energy.new_empty(len(self.x), 0) if self.found is None else self.found

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.sampler is not None
        if self.freeze is not None:
            self.freeze()
            self.freeze = None
        return self.sampler._gradient(x)

    def start(self) -> None:
        self.start_finite.copy_(finite_rows(self.x))
        if not self.late:
            self.check_start()
        for counter in (self.accepted, self.resets):
            counter.zero_()
        self.bad_step.fill_(-1)
        if self.mala:
            energy, grad = self.gradient(self.x)
            # A copy: the gradient may be a buffer of the energy's, and steps write here.
            self.grad.copy_(grad)
            ok = energy.isfinite() & finite_rows(grad)
            self.told = energy.dtype
            self.energy.copy_(torch.where(ok, energy, math.nan))  # a start without a meaning is never left
            self.record(ok, energy, start=True)
        elif self.resets_late:
            self.good_x.copy_(self.x)
            self.good_grad.zero_()
            self.energy.zero_()

    def advance(self, h: Any, s: Any, row: int = 0) -> None:
        if self.mala:
            self.keep(self.energy, self.told, row)
            self.proposal.copy_(self.x)
            self.take_step(self.grad, h, s, self.step)
            energy, grad = self.gradient(self.proposal)
            log_alpha, accepted = langevin_accept_(
                self.x, self.grad, self.energy, self.proposal, grad.contiguous(), energy, step_size=h, noise_scale=s,
                **self.drift, seed=self.seed, step=self.step, chain_id=self.chain_id,
            )  # fmt: skip
            self.accepted.add_(accepted)
            self.record(~log_alpha.isnan(), energy)
        else:
            energy, grad = self.gradient(self.x)
            if self.reset:
                ok = energy.isfinite() & finite_rows(grad) & finite_rows(self.x)
                self.record(ok, energy)  # before the state moves, which the energy may be a view of
                grad = self.put_back(ok, grad, energy)
                energy = self.energy.to(energy.dtype)
            elif not (self.kept_tell or math.isfinite(energy.sum())):  # a finite sum clears them all
                self.record(energy.isfinite(), energy)
            self.keep(energy, energy.dtype, row)
            self.take_step(grad, h, s, self.step)
        self.step += 1  # in place where it is a tensor

    def keep(self, energy: Tensor, dtype: torch.dtype, row: int) -> None:
        """A copy: it may be a view of the state that the step moves."""
        if not self.late:
            self.listed.append(energy.clone() if energy.dtype is dtype else energy.to(dtype))
            return
        if self.energies is None:
            self.energies = energy.new_empty(self.block, len(energy), dtype=dtype)
        self.energies[row].copy_(energy)

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

    def settle(self, energies: Tensor | None) -> None:
        """Looks at the last state, and whether all was well."""
        finite = finite_rows(self.x)
        if self.resets_late and self.n_steps > 0:
            rows = finite.view([-1] + [1] * (self.x.ndim - 1))
            self.x.copy_(torch.where(rows, self.x, self.good_x))
            self.record(finite, self.energy)
            finite = finite_rows(self.x)
        self.finite.copy_(finite)
        well = self.start_finite.all() & finite.all()
        if not self.kept_tell:
            well = well & (self.bad_step < 0).all()
        elif energies is not None:
            well = well & energies.isfinite().all()
        self.well.copy_(well)

    def finish(self) -> list[Divergence]:
        """Waits for the device and raises what was found there; or returns how chains that were put back diverged."""
        if self.x.is_cuda and torch.cuda.is_current_stream_capturing():
            return []
        if bool(self.well):
            return []
        self.check_start()
        if self.kept_tell and self.found is not None:
            self.look_back(self.found)
        # A chain that starts without a finite energy has nothing to go back to.
        lost = self.bad_step == self.first
        if self.mala:
            lost = lost & self.energy.isnan()
        if not self.reset or bool(lost.any()):
            self.check()
        if not bool(self.finite.all()):
            last = self.first + self.n_steps
            raise FloatingPointError(
                f"LangevinSampler: the state after the last step, {last}, is not finite in chain {_named(~self.finite)}"
            )
        chains = (self.bad_step >= 0).nonzero().flatten().tolist()
        return sorted(Divergence(int(self.bad_step[c]), c, float(self.bad_energy[c])) for c in chains)

    def look_back(self, energies: Tensor) -> None:
        """Records the first step of each chain whose energy, of [C, K], was not finite."""
        bad = ~energies.isfinite()
        k = bad.to(torch.uint8).argmax(dim=1)  # the first of them
        self.bad_step.copy_(torch.where(bad.any(dim=1), k + self.first, -1))
        self.bad_energy.copy_(energies.gather(1, k[:, None])[:, 0])

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


def _named(bad: Tensor) -> str:
    chains = bad.nonzero().flatten().tolist()
    return f"{chains[0]}" + (f" and {len(chains) - 1} more" if len(chains) > 1 else "")
