"""The Metropolis test that makes a Langevin step exact: MALA's second half."""

import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.langevin import _key, _like, _scales, _state, _written
from fastgen.ops import langevin_mala as _ops
from fastgen.reference.langevin import PURPOSE_DECIDE, PURPOSE_FRESH

assert _ops  # it registers the op


def langevin_accept_(
    x: Tensor,
    grad: Tensor,
    energy: Tensor,
    proposal: Tensor,
    proposal_grad: Tensor,
    proposal_energy: Tensor,
    *,
    step_size: float | Tensor,
    noise_scale: float | Tensor | None = None,
    prior_scale: float | None = None,
    grad_clip: float | None = None,
    seed: int | Tensor,
    step: int | Tensor = 0,
    chain_id: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept or reject, in place, the proposal that `langevin_step_` made of x; its noise is made again, not stored.

    With d(x) = clip(∇U(x)) + x/σ², V(x) = U(x) + ‖x‖²/2σ² and β = 2η/s² (1 where noise_scale is None), a proposal y is
    accepted with probability min(1, α),

        log α = −β·(V(y) − V(x)) − β·(η/4)·‖d(x) + d(y)‖² + (η/s)·⟨d(x) + d(y), ε⟩

    so that the chain's stationary density is exactly ∝ exp(−β·V), clipped gradients or not.

    Args:
        x, grad, energy: the state [C, ...] float32 or float64, ∇U and U [C] there; those of an accepted proposal after.
        proposal, proposal_grad, proposal_energy: likewise at the proposal.
        step_size, noise_scale, prior_scale, grad_clip, seed, step, chain_id: those of the step; no clamp. s > 0.

    Returns:
        log α [C] float64 and accepted [C] bool. log α is −∞ where U(y) = ∞, which lies outside the support, and NaN
        where the proposal's energy or gradient has no meaning; both are rejected.

    Raises:
        TypeError, ValueError: as `langevin_step_`; a half type, whose rounding is no smaller than the noise.

    Notes:
        Deterministic: a function of the arguments alone, whatever the order or split of chains or the number of
        threads. Sums are in float64; the last bits of log α differ between CPU and GPU. Not differentiable.

    Source:
        Roberts and Tweedie, Bernoulli 1996; the truncated drift (MALTA) is theirs too.
    """
    _state("x", x)
    check.tensor("x", x, dtypes=(torch.float32, torch.float64))
    for name, value in (("grad", grad), ("proposal", proposal), ("proposal_grad", proposal_grad)):
        check.tensor(name, value, dtypes=(x.dtype,))
        _like(name, value, "x", x)
    for name, value in (("energy", energy), ("proposal_energy", proposal_energy)):
        check.tensor(name, value, ndim=(1,))
        if len(value) != len(x) or value.device != x.device:
            raise ValueError(f"{name}: expected shape [{len(x)}] on {x.device}, got {check.describe(value)}")
    given = {"x": x, "grad": grad, "energy": energy, "proposal": proposal}
    given |= {"proposal_grad": proposal_grad, "proposal_energy": proposal_energy}
    for name, value in given.items():
        if torch.is_grad_enabled() and value.requires_grad:
            raise RuntimeError(f"{name}: langevin_accept_ is not differentiable; detach it")
        if not name.startswith("proposal"):
            _written(name, value)
    if noise_scale is not None and not isinstance(noise_scale, Tensor):
        check.number("noise_scale", noise_scale, above=0.0, dtype=torch.float64)
    step_sizes, noise_scales, scalars, _ = _scales(x, None, step_size, noise_scale, prior_scale, grad_clip)
    key = _key(x, seed, step, chain_id)
    log_alpha, accepted = torch.ops.fastgen.langevin_accept_(
        *given.values(), key[0], step_sizes, noise_scales, key[1], key[2], *scalars, key[3], key[4]
    )  # fmt: skip
    return log_alpha, accepted


def decisions(chain_id: Tensor, *, seed: Tensor, step: Tensor) -> Tensor:
    """[C, 2] int64 in [0, 2⁶²), what a replay buffer decides with: of purpose 2 the upper 31 bits of words 0 and 1, and
    those of words 2 and 3, the earlier word above the later."""
    pair = _words(chain_id, 4, seed, step, PURPOSE_DECIDE).view(torch.int64)
    return ((pair & 0xFFFFFFFE) << 30) | ((pair >> 33) & 0x7FFFFFFF)


def fresh_uniforms(chain_id: Tensor, elements: int, *, seed: Tensor, step: Tensor) -> Tensor:
    """[C, elements] float32 on the midpoints of 2²³ cells of (0, 1), of purpose 3."""
    words = _words(chain_id, elements, seed, step, PURPOSE_FRESH)
    return (((words >> 9) & 0x7FFFFF).to(torch.float32) + 0.5) * 2.0**-23


def fresh_normals(chain_id: Tensor, elements: int, *, seed: Tensor, step: Tensor) -> Tensor:
    """[C, elements] float32 standard normals, of purpose 3."""
    out = torch.empty(len(chain_id), elements, dtype=torch.float32, device=chain_id.device)
    torch.ops.fastgen.langevin_noise_(out, chain_id, seed, step, 0, 0, PURPOSE_FRESH)
    return out


def _words(chain_id: Tensor, elements: int, seed: Tensor, step: Tensor, purpose: int) -> Tensor:
    """[C, elements] int32, the words' bits."""
    out = torch.empty(len(chain_id), elements, dtype=torch.int32, device=chain_id.device)
    torch.ops.fastgen.langevin_noise_(out, chain_id, seed, step, 0, 0, purpose)
    return out
