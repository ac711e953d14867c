"""fastgen::langevin_accept_: the end of a MALA step. State, gradient and energy become an accepted proposal's.

Its arguments are those of the `langevin_step_` that made the proposal. Returns log α [C] float64 and accepted [C] bool.
"""

from typing import Any

import torch
from torch import Tensor

from fastgen.ops import backend
from fastgen.ops import langevin as ops
from fastgen.reference import langevin as stream
from fastgen.reference import langevin_mala as reference

torch.library.define(
    "fastgen::langevin_accept_",
    "(Tensor(a!) x, Tensor(b!) grad, Tensor(c!) energy, Tensor proposal, Tensor proposal_grad, Tensor proposal_energy, "
    "Tensor? chain_id, Tensor? step_sizes, Tensor? noise_scales, Tensor? seed_tensor, Tensor? step_tensor, "
    "float step_size, float noise_scale, float precision, float grad_clip, SymInt seed, SymInt step) "
    "-> (Tensor, Tensor)",
)
ops.bump_versions("langevin_accept_")


@torch.library.impl("fastgen::langevin_accept_", ("CPU", "CUDA"))
def _accept(
    x: Tensor,
    grad: Tensor,
    energy: Tensor,
    proposal: Tensor,
    proposal_grad: Tensor,
    proposal_energy: Tensor,
    chain_id: Tensor | None,
    step_sizes: Tensor | None,
    noise_scales: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    step_size: float,
    noise_scale: float,
    precision: float,
    grad_clip: float,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    kernel = backend.choose("langevin", x.device)
    if kernel == "reference" or x.numel() == 0:
        log_alpha, accepted = reference.accept(
            x,
            grad,
            energy,
            proposal,
            proposal_grad,
            proposal_energy,
            ops.chains(x, chain_id),
            step_size if step_sizes is None else step_sizes,
            noise_scale if noise_scales is None else noise_scales,
            precision,
            grad_clip,
            ops.host(seed_tensor, seed) % 2**64,
            ops.host(step_tensor, step),
        )
        rows = accepted.view([-1] + [1] * (x.ndim - 1))
        for old, new in ((x, proposal), (grad, proposal_grad)):
            old.copy_(torch.where(rows, new, old))
    else:
        state, slope = x.contiguous(), grad.contiguous()
        others = [t.contiguous() for t in (proposal, proposal_grad)]
        energies = [t.to(torch.float64).contiguous() for t in (energy, proposal_energy)]
        per_chain = [None if t is None else t.contiguous() for t in (chain_id, step_sizes, noise_scales)]
        log_alpha = torch.empty(len(x), dtype=torch.float64, device=x.device)
        accepted = torch.empty(len(x), dtype=torch.bool, device=x.device)
        if kernel == "cpp":
            inf = float("inf")
            step = ops.host(step_tensor, step)
            all_scalars = (step_size, noise_scale, precision, grad_clip, -inf, inf, 0.0)
            key = (ops.host(seed_tensor, seed), step)
            made_by = ops.cpp_step(state, slope, None, None, per_chain, all_scalars, False, *key)
            ops.cpp(
                "langevin_accept",
                made_by,
                *(t.data_ptr() for t in (*others, *energies)),
                stream.PURPOSE_ACCEPT << 28 | step % stream.STEPS,
                log_alpha.data_ptr(),
                accepted.data_ptr(),
            )
        else:
            from fastgen.kernels import langevin_mala as kernels

            tensors = (*per_chain, seed_tensor, step_tensor)
            scalars = (step_size, noise_scale, precision, grad_clip)
            kernels.accept_(state, slope, *others, *energies, *tensors, *scalars, seed, step, log_alpha, accepted)
        for given, made in ((x, state), (grad, slope)):
            if made is not given:
                given.copy_(made)
    energy.copy_(torch.where(accepted, proposal_energy, energy))
    return log_alpha, accepted


@torch.library.register_fake("fastgen::langevin_accept_")
def _accept_fake(
    x: Tensor, grad: Tensor, energy: Tensor, proposal: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    torch._check(x.shape == proposal.shape)
    return x.new_empty(len(x), dtype=torch.float64), x.new_empty(len(x), dtype=torch.bool)
