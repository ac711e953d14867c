"""The Metropolis test at the end of a Langevin step (MALA): it makes the step's noise again instead of keeping it."""

import math

import torch
from torch import Tensor

from fastgen.reference import langevin


def accept(
    x: Tensor,
    grad: Tensor,
    energy: Tensor,
    proposal: Tensor,
    proposal_grad: Tensor,
    proposal_energy: Tensor,
    chain_id: Tensor,
    step_size: float | Tensor,
    noise_scale: float | Tensor,
    precision: float,
    grad_clip: float,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """x [C, ...] and the y that `langevin.step_` made of it -> (log α [C] float64, accepted [C] bool).

    d(x) = bound(∇U(x), ±grad_clip) + x·precision, q = d(x) + d(y), V(x) = U(x) + ‖x‖²·precision/2, β = 2η/s²:

        log α = log [π(y) p(x | y)] − log [π(x) p(y | x)],   π ∝ exp(−βV),   p(y | x) = N(y; x − η·d(x), s²I)
              = −β·(V(y) − V(x)) − β·(η/4)·‖q‖² + (η/s)·⟨q, ε⟩          since y − x = −η·d(x) + s·ε

    β is 1 for s = √(2η). Any drift d gives the right distribution, so a clipped gradient does too. Accepted where
    log u < log α with u = (w0 + ½)·2⁻³², w0 of the counter (0, 1·2²⁸ + step, chain id). U(y) = ∞ lies outside the
    support: log α = −∞. U(y) = −∞ has no meaning: log α = NaN, which is never accepted.
    Sums are in float64; scalars are rounded to the type of x, float32 or float64, as in the step.
    """

    def scalar(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=x.dtype, device=x.device).double()

    def drift(at: Tensor, g: Tensor) -> Tensor:
        g = langevin.bound(g, -grad_clip, grad_clip)
        return (g + at * precision if precision != 0 else g).reshape(shape).double()

    shape = (len(x), math.prod(x.shape[1:]))
    q = drift(x, grad) + drift(proposal, proposal_grad)
    noise = langevin.normals(shape[1], chain_id, seed, step).double()
    rise = proposal_energy.double() - energy.double()
    if precision != 0:
        old, new = x.reshape(shape).double(), proposal.reshape(shape).double()
        rise = rise + 0.5 * scalar(precision) * ((new - old) * (new + old)).sum(1)
    h, s = scalar(step_size), scalar(noise_scale)
    log_alpha = h / s * (q * noise).sum(1) - 2 * h / (s * s) * (rise + 0.25 * h * q.square().sum(1))
    log_alpha = torch.where(proposal_energy == math.inf, -math.inf, log_alpha)
    log_alpha = torch.where(proposal_energy == -math.inf, math.nan, log_alpha)
    w = langevin.words(4, chain_id, seed, step, langevin.PURPOSE_ACCEPT)[:, 0, 0]
    return log_alpha, ((w.double() + 0.5) * 2.0**-32).log() < log_alpha
