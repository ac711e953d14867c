"""The Langevin update and its noise: one read of x and grad, one write of x, noise from registers.

fastgen/reference/langevin.py specifies stream v1. Every float operation is rounded by itself (enable_fp_fusion=False at
each launch), so that the bits are those of the CPU.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from fastgen.kernels import launch, relaunch, tuned
from fastgen.kernels.aot import Spec
from torch import Tensor

WARPS = 4
FLAGS = ("NOISE", "PRIOR", "CLIP", "CLAMP", "NOISE_FIRST")
OPTIONS = {"enable_fp_fusion": False}  # set, never inherited: Triton's default is changing


@triton.jit
def _words(c0, c1, c2, c3, k0, k1):
    # A product of 64 bits is one IMAD.WIDE where umulhi and a product of 32 bits are two.
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _pair(a, b):
    k = ((a >> 1) | 1).to(tl.int32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) - 0x4EB504F3
    x = ((k & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    e = (k & -0x800000).to(tl.float32)
    z = x * x
    high = (x * -0.1746968924999237 + 0.2861504554748535) * z + (x * -0.2983594536781311 + 0.33141016960144043)
    low = (x * -0.39924144744873047 + 0.5000351071357727) * z + (x * -0.6666790246963501 + 0.9999998211860657)
    r = tl.sqrt_rn((z * (high * (z * z) + low) - (x + x)) + e * -1.6525916635146132e-07)
    r = (r.to(tl.uint32, bitcast=True) ^ (b & 0x80000000)).to(tl.float32, bitcast=True)
    y = ((b << 2) | 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.65729529994141e-10
    z = y * y
    s = y + y * (z * ((z * -0.00019515282474458218 + 0.00833216030150652) * z + -0.16666655242443085))
    c = 1.0 + z * ((z * -0.0013591853203251958 + 0.041655778884887695) * z + -0.4999988377094269)
    swap = (b & 0x40000000) != 0
    return r * tl.where(swap, s, c), r * tl.where(swap, c, s)


@triton.jit
def _noise(group, step_word, chain, seed_lo, seed_hi, GROUPS: tl.constexpr, RAW: tl.constexpr):
    """group [GROUPS], chain of one id or [GROUPS] int64 -> [4 · GROUPS] float32 in the elements' order; raw words."""
    zero = tl.zeros([GROUPS], tl.uint32)
    w0, w1, w2, w3 = _words(
        group.to(tl.uint32),
        zero + step_word,
        zero + chain.to(tl.uint32),
        zero + (chain >> 32).to(tl.uint32),
        seed_lo,
        seed_hi,
    )
    if RAW:
        n0, n1, n2, n3 = w0, w1, w2, w3
    else:
        n0, n1 = _pair(w0, w1)
        n2, n3 = _pair(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [4 * GROUPS])


@triton.jit
def _bound(x, low, high):
    x = tl.where(x < low, low, x)  # comparisons let NaN through
    return tl.where(x > high, high, x)


# What is converted here is not specialised: a 1 would become a constant of the compiler, which has no conversions.
@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "step_word", "chains"])
def _langevin_kernel(
    x_ptr,
    grad_ptr,  # None: the noise itself is stored, or the words where x is int32
    lookahead_ptr,  # None or like x
    partial_ptr,  # None, or [programs, 3] float64: what the program adds to its chain's statistics
    chain_id_ptr,  # None: 0, 1, ...
    step_sizes_ptr,  # None or [chains] of the compute type; so is noise_scales_ptr
    noise_scales_ptr,
    seed_ptr,  # None: seed_lo and seed_hi
    step_ptr,  # None: step_word
    seed_lo,
    seed_hi,
    step_word,
    chains,
    elements,
    step_size: tl.float64,
    noise_scale: tl.float64,
    precision: tl.float64,
    grad_clip: tl.float64,
    low: tl.float64,
    high: tl.float64,
    lookahead: tl.float64,
    NOISE: tl.constexpr,
    PRIOR: tl.constexpr,
    CLIP: tl.constexpr,
    CLAMP: tl.constexpr,
    NOISE_FIRST: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,  # elements % 4 == 0
    ROW: tl.constexpr,  # the type that counts chains
):
    groups_of_chain = tl.cdiv(elements, 4)
    lane = tl.arange(0, 4 * GROUPS)
    if ONE_CHAIN:
        blocks = tl.cdiv(groups_of_chain, GROUPS)
        row = tl.program_id(0) // blocks
        first = (tl.program_id(0) % blocks).to(tl.int64) * GROUPS
        group = first.to(tl.uint32) + tl.arange(0, GROUPS).to(tl.uint32)
        at = first * 4 + lane
        mask = at < elements
        at += row.to(tl.int64) * elements
        rows = row
        row_mask = None
    else:
        first = tl.program_id(0).to(tl.int64) * GROUPS
        first_row = (first // groups_of_chain).to(ROW)
        index = (first % groups_of_chain).to(tl.int32) + tl.arange(0, GROUPS)  # 64-bit division once, not in each lane
        row = first_row + index // groups_of_chain
        group = index % groups_of_chain
        row_mask = row < chains
        if WHOLE_GROUPS:
            at = tl.program_id(0).to(tl.int64) * (4 * GROUPS) + lane
            mask = at < chains.to(tl.int64) * elements
        rows = tl.reshape(tl.join(tl.join(row, row), tl.join(row, row)), [4 * GROUPS])
        if not WHOLE_GROUPS:
            place = 4 * tl.reshape(tl.join(tl.join(group, group), tl.join(group, group)), [4 * GROUPS]) + lane % 4
            at = rows.to(tl.int64) * elements + place
            mask = (rows < chains) & (place < elements)
    if NOISE:
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
            seed_lo = seed.to(tl.int32)
            seed_hi = (seed >> 32).to(tl.int32)
        if step_ptr is not None:
            step_word = (tl.load(step_ptr).to(tl.int32) & 0xFFFFFFF) | (step_word & -0x10000000)
        chain = row.to(tl.int64)
        if chain_id_ptr is not None:
            chain = tl.load(chain_id_ptr + row, mask=row_mask)
        noise = _noise(
            group,
            step_word.to(tl.uint32, bitcast=True),
            chain,
            seed_lo.to(tl.uint32, bitcast=True),
            seed_hi.to(tl.uint32, bitcast=True),
            GROUPS,
            x_ptr.dtype.element_ty == tl.int32,
        )
    if grad_ptr is None:
        tl.store(x_ptr + at, noise.to(x_ptr.dtype.element_ty), mask=mask)
    else:
        x = tl.load(x_ptr + at, mask=mask).to(COMPUTE)
        d = tl.load(grad_ptr + at, mask=mask).to(COMPUTE)
        if partial_ptr is not None:
            wide = tl.where(mask, d, 0.0).to(tl.float64)
            tl.store(partial_ptr + 3 * tl.program_id(0), tl.sum(wide * wide))
        if CLIP:
            clip = tl.full((), grad_clip, COMPUTE)
            d = _bound(d, -clip, clip)
        if PRIOR:
            d = d + x * tl.full((), precision, COMPUTE)
        if lookahead_ptr is not None:
            ahead = x - tl.full((), lookahead, COMPUTE) * d
            tl.store(lookahead_ptr + at, ahead.to(x_ptr.dtype.element_ty), mask=mask)
        if step_sizes_ptr is None:
            h = tl.full((), step_size, COMPUTE)
        elif ONE_CHAIN:
            h = tl.load(step_sizes_ptr + rows)
        else:
            h = tl.load(step_sizes_ptr + rows, mask=mask)
        x = x - h * d
        # Not finite where `zero` is NaN.
        zero = x - x
        outside = mask & False
        if CLAMP:
            lowest = tl.full((), low, COMPUTE)
            highest = tl.full((), high, COMPUTE)
            if NOISE_FIRST:
                outside = (x < lowest) | (x > highest)
                x = _bound(x, lowest, highest)
        if NOISE:
            if noise_scales_ptr is None:
                s = tl.full((), noise_scale, COMPUTE)
            elif ONE_CHAIN:
                s = tl.load(noise_scales_ptr + rows)
            else:
                s = tl.load(noise_scales_ptr + rows, mask=mask)
            x = x + s * noise.to(COMPUTE)
            zero += x - x
        if CLAMP:
            outside = outside | (x < lowest) | (x > highest)
            x = _bound(x, lowest, highest)
        stored = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, stored, mask=mask)
        if partial_ptr is not None:
            rounded = stored.to(COMPUTE)
            zero += rounded - rounded
            tl.store(partial_ptr + 3 * tl.program_id(0) + 1, tl.sum((outside & mask).to(tl.int32)).to(tl.float64))
            tl.store(partial_ptr + 3 * tl.program_id(0) + 2, tl.sum(((zero != 0) & mask).to(tl.int32)).to(tl.float64))


_launcher = relaunch.Relaunch(_langevin_kernel)


def _signed(word: int) -> int:
    """32 bits as the int32 that Triton passes whatever the value: a type that depends on it would compile twice."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def _launch(
    x: Tensor,
    grad: Tensor | None,
    lookahead_out: Tensor | None,
    stats: Tensor | None,
    chain_id: Tensor | None,
    step_sizes: Tensor | None,
    noise_scales: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    scalars: tuple[float, ...],
    flags: tuple[bool, ...],
    seed: int,
    step: int,
    table: tuple[int, bool] | None,
) -> None:
    size = x.numel()
    if size == 0:
        return
    chains = len(x)
    elements = size // chains
    tensors = (x, grad, lookahead_out, None, chain_id, step_sizes, noise_scales, seed_tensor, step_tensor)
    numbers = (_signed(seed), _signed(seed >> 32), _signed(step), chains, elements, *scalars)
    # `step_sizes` and what follows it have the types that x's dtype says.
    key = (x.dtype, x.get_device(), relaunch.aligned(*tensors), chains, elements, flags, table, tuned.changes())
    with torch.cuda.device_of(x):
        if stats is None and _launcher.again(key, (*tensors, *numbers)):
            return
        groups, one_chain = launch.langevin(elements, whole=stats is not None) if table is None else table
        of_chain = -(-elements // 4)
        programs = chains * -(-of_chain // groups) if one_chain else -(-chains * of_chain // groups)
        constants = _constants(flags, x.dtype, chains, elements, groups, one_chain)
        options = {**constants, "num_warps": WARPS, **OPTIONS}
        if stats is None:
            _launcher.first(key, (programs,), (*tensors, *numbers), options)
            return
        partial = stats.new_empty(chains, programs // chains, 3)
        _langevin_kernel[(programs,)](*tensors[:3], partial, *tensors[4:], *numbers, **options)
    torch.sum(partial, dim=1, out=stats)
    stats[:, 0].sqrt_()


def _constants(
    flags: tuple[bool, ...], dtype: torch.dtype, chains: int, elements: int, groups: int, one_chain: bool
) -> dict[str, Any]:
    return {
        **dict(zip(FLAGS, flags, strict=True)),
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "GROUPS": groups,
        "ONE_CHAIN": one_chain,
        "WHOLE_GROUPS": elements % 4 == 0,
        "ROW": tl.int32 if chains < 2**30 else tl.int64,
    }


def step_(
    x: Tensor,
    grad: Tensor,
    lookahead_out: Tensor | None,
    stats: Tensor | None,
    chain_id: Tensor | None,
    step_sizes: Tensor | None,
    noise_scales: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    step_size: float,
    noise_scale: float,
    precision: float,
    grad_clip: float,
    low: float,
    high: float,
    lookahead: float,
    noise_first: bool,
    seed: int,
    step: int,
    table: tuple[int, bool] | None = None,
) -> None:
    """Contiguous tensors, stats [C, 3] float64; `table` overrides the launch table."""
    flags = (
        noise_scales is not None or noise_scale != 0,
        precision != 0,
        grad_clip != math.inf,
        low != -math.inf or high != math.inf,
        noise_first,
    )
    scalars = (step_size, noise_scale, precision, grad_clip, low, high, lookahead)
    tensors = (lookahead_out, stats, chain_id, step_sizes, noise_scales, seed_tensor, step_tensor)
    _launch(x, grad, *tensors, scalars, flags, seed, step & 0xFFFFFFF, table)


_NOISE_ALONE = (True, False, False, False, False)


def noise_(
    out: Tensor,
    chain_id: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    seed: int,
    step: int,
    table: tuple[int, bool] | None = None,
    purpose: int = 0,
) -> None:
    """Normals into a contiguous tensor, or the words where it is int32."""
    tensors = (None, None, None, chain_id, None, None, seed_tensor, step_tensor)
    _launch(out, *tensors, (0.0,) * 7, _NOISE_ALONE, seed, purpose << 28 | step & 0xFFFFFFF, table)


def aot_specs() -> list[Spec]:
    """CIFAR-sized float32 chains with prior and clamp; then every dtype, short and odd chains, tensors of scalars."""
    pointers = ["x", "grad", "lookahead", "partial", "chain_id", "step_sizes", "noise_scales", "seed", "step"]
    numbers = ["step_size", "noise_scale", "precision", "grad_clip", "low", "high", "lookahead"]
    kinds = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    kinds[torch.int32] = "i32"

    def spec(name: str, dtype: torch.dtype, elements: int, present: tuple[str, ...], flags: tuple[bool, ...]) -> Spec:
        of_state = kinds[dtype]
        types = dict.fromkeys(["x", "grad", "lookahead"], of_state)
        types |= dict.fromkeys(["step_sizes", "noise_scales"], "fp64" if of_state == "fp64" else "fp32")
        types |= dict.fromkeys(["chain_id", "seed", "step"], "i64") | {"partial": "fp64"}
        signature = {f"{p}_ptr": f"*{types[p]}" if p in present else "constexpr" for p in pointers}
        signature |= dict.fromkeys(["seed_lo", "seed_hi", "step_word", "chains", "elements"], "i32")
        signature |= dict.fromkeys(numbers, "fp64")
        constexprs: dict[str, Any] = {f"{p}_ptr": None for p in pointers if p not in present}
        constants = _constants(flags, dtype, 2, elements, *launch.langevin(elements, "partial" in present))
        constexprs |= constants
        signature |= dict.fromkeys(constants, "constexpr")
        divisible = ("elements",) if elements % 16 == 0 else ()
        return Spec(name, _langevin_kernel, signature, constexprs, WARPS, options=dict(OPTIONS), divisible=divisible)

    image, both = 3 * 32 * 32, ("x", "grad")
    flags, every = (True, True, False, True, False), (True,) * 5
    unsummed = tuple(pointer for pointer in pointers if pointer != "partial")
    floats = {dtype: kind for dtype, kind in kinds.items() if dtype.is_floating_point}
    from fastgen.kernels import langevin_mala

    return [
        *(spec(f"step_{kind}", dtype, image, both, flags) for dtype, kind in floats.items()),
        *(spec(f"step_short_{kind}", dtype, 64, both, flags) for dtype, kind in floats.items()),
        *(spec(f"noise_{kind}", dtype, image, ("x",), _NOISE_ALONE) for dtype, kind in kinds.items()),
        *(spec(f"step_stats_{kind}", dtype, image, (*both, "partial"), flags) for dtype, kind in floats.items()),
        spec("step_everything", torch.float32, image, tuple(pointers), every),
        spec("step_short_everything", torch.float32, 64, unsummed, every),
        spec("step_short_stats", torch.float32, 64, tuple(pointers), every),
        spec("step_odd", torch.float32, 7, unsummed, every),
        spec("step_long_odd", torch.float32, 28 * 28 * 3 + 1, both, flags),
        *langevin_mala.aot_specs(),
    ]
