"""Sampling from an energy by Langevin dynamics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastgen import check
from fastgen.functional.langevin import langevin_step_


class LangevinSampler(nn.Module):
    """K steps of x ← clamp(x − η·(clip(∇U(x)) + x/σ²) + s·ε) for an energy U; the unadjusted Langevin algorithm.

    Args:
        energy: [C, ...] -> [C], a module or any callable; a chain's energy must not depend on the others (a batch
            normalisation in training mode makes it). Its parameters are frozen while sampling: gradients are taken for
            the state alone, and each parameter's requires_grad is restored, after an error too.
        step_size, noise_scale, prior_scale, grad_clip, clamp: as in `fastgen.functional.langevin_step_`.
        n_steps: K >= 0.
        method: "ula"; "mala" is not built yet.
        cuda_graph: "auto" and False run the plain loop; True is not built yet.

    Call:
        x: [C, ...] float64, float32, bfloat16 or float16, the start; not changed.
        seed: 0 <= seed < 2⁶⁴; None draws one from torch's generator of the CPU, so that torch.manual_seed governs.
        return_trajectory: also keep every state.

    Returns:
        x after K steps, [C, ...], without a graph; with return_trajectory [K + 1, C, ...], from the start to the end.

    Raises:
        FloatingPointError: an energy, or the last state, is NaN or infinite; names the step and the chain.
        TypeError, ValueError, NotImplementedError: as `langevin_step_`, or where energy(x) is not [C].

    Notes:
        Chain c of step k adds the noise of (seed, step=k, chain id c). The check of the energies costs a reduction of C
        numbers a step. On the CPU it stops at once; on a GPU the first bad step is kept on the device and read at the
        end: one synchronisation a call, after steps that were for nothing.

    Source:
        Xie et al., "A theory of generative ConvNet", ICML 2016; Nijkamp et al., NeurIPS 2019.
    """

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        *,
        step_size: float | Tensor,
        n_steps: int,
        noise_scale: float | Tensor | None = None,
        prior_scale: float | None = None,
        grad_clip: float | None = None,
        clamp: tuple[float | None, float | None] | None = None,
        method: str = "ula",
        cuda_graph: bool | str = "auto",
    ) -> None:
        super().__init__()
        if not callable(energy):
            raise TypeError(f"energy: expected a callable, got {check.describe(energy)}")
        if check.choice("method", method, ("ula", "mala")) == "mala":
            check.not_built("method", method, "'ula'")
        if cuda_graph is True:
            check.not_built("cuda_graph", cuda_graph, "'auto', False")
        if cuda_graph is not False and cuda_graph != "auto":
            raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")
        self.energy = energy
        self.n_steps = check.integer("n_steps", n_steps, least=0)
        self.step_size, self.noise_scale, self.prior_scale = step_size, noise_scale, prior_scale
        self.grad_clip, self.clamp, self.method, self.cuda_graph = grad_clip, clamp, method, cuda_graph
        self._step(
            torch.zeros(1, 1), torch.zeros(1, 1), 0, 0, probe=True
        )  # a bad option is refused here, not in the loop

    def extra_repr(self) -> str:
        names = ("step_size", "n_steps", "noise_scale", "prior_scale", "grad_clip", "clamp", "method")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _step(self, x: Tensor, grad: Tensor, seed: int, step: int, probe: bool = False) -> None:
        step_size, noise_scale = self.step_size, self.noise_scale
        if probe:  # tensors are checked against the x that comes
            step_size = 0.0 if isinstance(step_size, Tensor) else step_size
            noise_scale = 0.0 if isinstance(noise_scale, Tensor) else noise_scale
        langevin_step_(
            x,
            grad,
            step_size=step_size,
            noise_scale=noise_scale,
            prior_scale=self.prior_scale,
            grad_clip=self.grad_clip,
            clamp=self.clamp,
            seed=seed,
            step=step,
        )

    def forward(self, x: Tensor, *, seed: int | None = None, return_trajectory: bool = False) -> Tensor:
        check.tensor("x", x)
        if x.ndim == 0:
            raise ValueError("x: expected [C, ...] with chains in dimension 0, got a 0-d tensor")
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        seed = check.integer("seed", seed, least=0, most=2**64 - 1)
        with torch.inference_mode(False), torch.no_grad(), _frozen(self.energy):
            x = x.detach().clone(memory_format=torch.contiguous_format)
            states = x.new_empty((self.n_steps + 1, *x.shape)) if return_trajectory else None
            if states is not None:
                states[0] = x
            # The first step at which each chain was not finite; n_steps + 1 while it is.
            bad = torch.full((len(x),), self.n_steps + 1, device=x.device)
            for step in range(self.n_steps):
                energy, grad = self._gradient(x)
                bad = torch.where(energy.isfinite(), bad, bad.clamp(max=step))
                if x.device.type == "cpu":
                    self._check(bad)
                self._step(x, grad, seed, step)
                if states is not None:
                    states[step + 1] = x
            finite = x.isfinite().flatten(1).all(dim=1) if x.ndim > 1 else x.isfinite()
            self._check(torch.where(finite, bad, bad.clamp(max=self.n_steps)))
        return x if states is None else states

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            energy = self.energy(state)
            if not isinstance(energy, Tensor) or energy.shape != x.shape[:1]:
                raise ValueError(
                    f"energy(x): expected shape [{len(x)}], one for each chain, got {check.describe(energy)}"
                )
            (grad,) = torch.autograd.grad(energy.sum(), state)
        return energy.detach(), grad

    def _check(self, bad: Tensor) -> None:
        first = bad.min() if len(bad) else torch.tensor(self.n_steps + 1)
        if (step := int(first)) > self.n_steps:
            return
        chains = (bad == first).nonzero().flatten().tolist()
        more = f" and {len(chains) - 1} more" if len(chains) > 1 else ""
        what = f"the energy at step {step}" if step < self.n_steps else f"the state after the last step, {step},"
        raise FloatingPointError(f"LangevinSampler: {what} is not finite in chain {chains[0]}{more}")


@contextmanager
def _frozen(energy: object) -> Iterator[None]:
    parameters = [p for p in energy.parameters() if p.requires_grad] if isinstance(energy, nn.Module) else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
