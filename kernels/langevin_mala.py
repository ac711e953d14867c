"""The end of a MALA step: log α from state, proposal and noise made again; accepted proposals replace the state.

fastgen/reference/langevin_mala.py has the formula. A chain that fits one program is read once; longer ones go through a
kernel of sums, then one that decides and copies.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastgen.kernels import langevin, launch
from fastgen.kernels.aot import Spec
from fastgen.kernels.langevin import _bound, _noise, _words
from torch import Tensor

OPTIONS = langevin.OPTIONS
WORDS = ["seed_lo", "seed_hi", "step_word"]  # a 1 would become a constant of the compiler, which has no conversions


@triton.jit
def _key(row, chain_id_ptr, seed_ptr, step_ptr, seed_lo, seed_hi, step_word):
    chain = row.to(tl.int64)
    if chain_id_ptr is not None:
        chain = tl.load(chain_id_ptr + row)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        seed_lo = seed.to(tl.int32)
        seed_hi = (seed >> 32).to(tl.int32)
    if step_ptr is not None:
        step_word = tl.load(step_ptr).to(tl.int32) & 0xFFFFFFF
    return (
        chain,
        seed_lo.to(tl.uint32, bitcast=True),
        seed_hi.to(tl.uint32, bitcast=True),
        step_word.to(tl.uint32, bitcast=True),
    )


@triton.jit
def _sums(x, g, y, y_grad, noise, precision, grad_clip, PRIOR: tl.constexpr, CLIP: tl.constexpr, COMPUTE: tl.constexpr):
    """Σ q², Σ q·ε and Σ (y − x)(y + x) in float64; lanes beyond the chain hold zeros."""
    if CLIP:
        clip = tl.full((), grad_clip, COMPUTE)
        g = _bound(g, -clip, clip)
        y_grad = _bound(y_grad, -clip, clip)
    moved = tl.zeros((), tl.float64)
    if PRIOR:
        p = tl.full((), precision, COMPUTE)
        g = g + x * p
        y_grad = y_grad + y * p
        moved = tl.sum((y.to(tl.float64) - x.to(tl.float64)) * (y.to(tl.float64) + x.to(tl.float64)))
    q = g.to(tl.float64) + y_grad.to(tl.float64)
    return tl.sum(q * q), tl.sum(q * noise.to(tl.float64)), moved


@triton.jit(do_not_specialize=WORDS)
def _sums_kernel(
    x_ptr,
    grad_ptr,
    y_ptr,
    y_grad_ptr,
    chain_id_ptr,
    seed_ptr,
    step_ptr,
    partial_ptr,  # [chains, blocks, 3] float64
    seed_lo,
    seed_hi,
    step_word,
    elements,
    precision: tl.float64,
    grad_clip: tl.float64,
    PRIOR: tl.constexpr,
    CLIP: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    blocks = tl.cdiv(elements, 4 * GROUPS)
    row = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks).to(tl.int64) * GROUPS
    chain, k0, k1, word = _key(row, chain_id_ptr, seed_ptr, step_ptr, seed_lo, seed_hi, step_word)
    group = first.to(tl.uint32) + tl.arange(0, GROUPS).to(tl.uint32)
    noise = _noise(group, word, chain, k0, k1, GROUPS, False)
    at = first * 4 + tl.arange(0, 4 * GROUPS)
    mask = at < elements
    at += row.to(tl.int64) * elements
    g = tl.load(grad_ptr + at, mask=mask, other=0.0)
    y_grad = tl.load(y_grad_ptr + at, mask=mask, other=0.0)
    x, y = g, g
    if PRIOR:
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        y = tl.load(y_ptr + at, mask=mask, other=0.0)
    qq, qe, yx = _sums(x, g, y, y_grad, noise, precision, grad_clip, PRIOR, CLIP, COMPUTE)
    out = partial_ptr + 3 * tl.program_id(0)
    tl.store(out, qq)
    tl.store(out + 1, qe)
    tl.store(out + 2, yx)


@triton.jit(do_not_specialize=WORDS)
def _accept_kernel(
    x_ptr,
    grad_ptr,
    y_ptr,
    y_grad_ptr,
    energy_ptr,  # [chains] float64; so is y_energy_ptr
    y_energy_ptr,
    chain_id_ptr,
    step_sizes_ptr,
    noise_scales_ptr,
    seed_ptr,
    step_ptr,
    sums_ptr,  # [chains, 3] float64; None: a chain fits this program, which makes them
    log_alpha_ptr,
    accepted_ptr,
    seed_lo,
    seed_hi,
    step_word,
    elements,
    step_size: tl.float64,
    noise_scale: tl.float64,
    precision: tl.float64,
    grad_clip: tl.float64,
    PRIOR: tl.constexpr,
    CLIP: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    blocks = tl.cdiv(elements, 4 * GROUPS)
    row = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks).to(tl.int64) * (4 * GROUPS)
    chain, k0, k1, word = _key(row, chain_id_ptr, seed_ptr, step_ptr, seed_lo, seed_hi, step_word)
    at = first + tl.arange(0, 4 * GROUPS)
    mask = at < elements
    at += row.to(tl.int64) * elements
    if sums_ptr is None:
        noise = _noise(tl.arange(0, GROUPS), word, chain, k0, k1, GROUPS, False)
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0)
        y = tl.load(y_ptr + at, mask=mask, other=0.0)
        y_grad = tl.load(y_grad_ptr + at, mask=mask, other=0.0)
        qq, qe, yx = _sums(x, g, y, y_grad, noise, precision, grad_clip, PRIOR, CLIP, COMPUTE)
    else:
        qq = tl.load(sums_ptr + 3 * row)
        qe = tl.load(sums_ptr + 3 * row + 1)
        yx = tl.load(sums_ptr + 3 * row + 2)
    h = tl.full((), step_size, COMPUTE)
    if step_sizes_ptr is not None:
        h = tl.load(step_sizes_ptr + row)
    s = tl.full((), noise_scale, COMPUTE)
    if noise_scales_ptr is not None:
        s = tl.load(noise_scales_ptr + row)
    h = h.to(tl.float64)
    s = s.to(tl.float64)
    after = tl.load(y_energy_ptr + row)
    rise = after - tl.load(energy_ptr + row) + 0.5 * tl.full((), precision, COMPUTE).to(tl.float64) * yx
    log_alpha = h / s * qe - 2 * h / (s * s) * (rise + 0.25 * h * qq)
    log_alpha = tl.where(after == float("inf"), float("-inf"), log_alpha)
    log_alpha = tl.where(after == float("-inf"), float("nan"), log_alpha)
    zero = k0 & 0
    w0, _w1, _w2, _w3 = _words(zero, word | 0x10000000, chain.to(tl.uint32), (chain >> 32).to(tl.uint32), k0, k1)
    excess = tl.log((w0.to(tl.float64) + 0.5) * 2.3283064365386963e-10) - log_alpha
    if first == 0:
        tl.store(log_alpha_ptr + row, log_alpha)
        tl.store(accepted_ptr + row, (excess < 0).to(tl.int8))
    mask = mask & (tl.zeros([4 * GROUPS], tl.float64) + excess < 0)
    if sums_ptr is not None:
        y = tl.load(y_ptr + at, mask=mask)
        y_grad = tl.load(y_grad_ptr + at, mask=mask)
    tl.store(x_ptr + at, y, mask=mask)
    tl.store(grad_ptr + at, y_grad, mask=mask)


def accept_(
    x: Tensor,
    grad: Tensor,
    proposal: Tensor,
    proposal_grad: Tensor,
    energy: Tensor,
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
    log_alpha: Tensor,
    accepted: Tensor,
) -> None:
    """Contiguous float32 or float64 state of at least one element; energies and log_alpha float64, accepted bool."""
    chains = len(x)
    elements = x.numel() // chains
    groups, whole, warps = launch.langevin_accept(elements)
    programs = chains * -(-elements // (4 * groups))
    key = (langevin._signed(seed), langevin._signed(seed >> 32), step & 0xFFFFFFF, elements)
    flags = {
        "PRIOR": precision != 0,
        "CLIP": grad_clip != float("inf"),
        "COMPUTE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "GROUPS": groups,
        "num_warps": warps,
        **OPTIONS,
    }
    with torch.cuda.device_of(x):
        sums = None
        if not whole:
            partial = log_alpha.new_empty(chains, programs // chains, 3)
            _sums_kernel[(programs,)](
                x, grad, proposal, proposal_grad, chain_id, seed_tensor, step_tensor, partial,
                *key, precision, grad_clip, **flags,
            )  # fmt: skip
            sums = partial.sum(1)
        _accept_kernel[(programs,)](
            x, grad, proposal, proposal_grad, energy, proposal_energy, chain_id, step_sizes, noise_scales,
            seed_tensor, step_tensor, sums, log_alpha, accepted.view(torch.int8),
            *key, step_size, noise_scale, precision, grad_clip, **flags,
        )  # fmt: skip


def aot_specs() -> list[Spec]:
    """Chains that fit a program, and CIFAR-sized ones; float32 with prior, then everything in float64."""
    specs = []
    for kernel, name, elements in (
        (_accept_kernel, "accept_whole", 1024),
        (_sums_kernel, "accept_sums", 3 * 64 * 64),
        (_accept_kernel, "accept_copy", 3 * 64 * 64),
    ):
        groups, _, warps = launch.langevin_accept(elements)
        for kind, everything in (("fp32", False), ("fp64", True)):
            types: dict[str, str] = dict.fromkeys(["x", "grad", "y", "y_grad"], f"*{kind}")
            types |= dict.fromkeys(["energy", "y_energy", "log_alpha", "partial"], "*fp64")
            types |= {"accepted": "*i8"}
            optional = {"chain_id": "*i64", "seed": "*i64", "step": "*i64"}
            optional |= dict.fromkeys(["step_sizes", "noise_scales"], f"*{kind}")
            types |= dict.fromkeys(optional, "constexpr") if not everything else optional
            types["sums"] = "constexpr" if name == "accept_whole" else "*fp64"
            signature: dict[str, Any] = {f"{k}_ptr": v for k, v in types.items()}
            signature |= dict.fromkeys(["seed_lo", "seed_hi", "step_word", "elements"], "i32")
            signature |= dict.fromkeys(["step_size", "noise_scale", "precision", "grad_clip"], "fp64")
            signature |= dict.fromkeys(["PRIOR", "CLIP", "COMPUTE", "GROUPS"], "constexpr")
            signature = {argument: signature[argument] for argument in kernel.arg_names}
            constexprs: dict[str, Any] = {k: None for k, v in signature.items() if v == "constexpr"}
            compute = tl.float64 if kind == "fp64" else tl.float32
            constexprs |= {"PRIOR": True, "CLIP": everything, "COMPUTE": compute, "GROUPS": groups}
            specs.append(
                Spec(f"{name}_{kind}", kernel, signature, constexprs, warps, options=dict(OPTIONS),
                     divisible=("elements",))
            )  # fmt: skip
    return specs
