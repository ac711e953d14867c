"""LPIPS's epilogue and plain feature distances: each map is read once on the way forward and once on the way back.

A program holds a block of pixels with all their channels of both maps in registers, so that norms, sums and what is
written come from one read. fastgen/reference/perceptual.py says what is computed. Launches set enable_fp_fusion=False:
fused, x0·a0 − x1·a1 would keep the rounding of one product, and identical maps must give exactly 0.
"""

from typing import Any

import triton
import triton.language as tl
from fastgen.kernels import launch
from fastgen.kernels.aot import Spec
from fastgen.kernels.langevin import _words

OPTIONS = {"enable_fp_fusion": False}  # set, never inherited: Triton's default is changing


@triton.jit
def _scale(square, eps, INSIDE: tl.constexpr):
    """Of Σf²: u = f·scale, and 1/r for the gradient. A sum that overflowed gives NaN, not a plausible 0."""
    if INSIDE:
        inverse = 1.0 / (tl.sqrt_rn(square + eps) + (square - square))
        scale = inverse
    else:
        r = tl.where(square != 0, tl.sqrt_rn(square) + (square - square), 1.0)
        inverse = 1.0 / r
        scale = tl.where(square != 0, 1.0 / (r + eps), 0.0)
    return scale, inverse


@triton.jit
def _offsets(pixels, channels, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample, offset of its elements, offsets [BLOCK_P, BLOCK_C] within it and which of them there are."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    n = tl.program_id(0) // blocks
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (p < pixels) & (c < channels)
    at = p * channels + c if LAST else c * pixels + p
    return n, n.to(tl.int64) * channels * pixels, at, mask


@triton.jit
def _loaded(f0_ptr, f1_ptr, weight_ptr, base, at, mask, channels, BLOCK_C: tl.constexpr):
    """A block of both maps, and the weights [1, BLOCK_C]."""
    x0 = tl.load(f0_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(f1_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
    c = tl.arange(0, BLOCK_C)
    return x0, x1, tl.load(weight_ptr + c, mask=c < channels, other=0.0)[None, :]


@triton.jit
def _lpips_value_kernel(
    f0_ptr,  # [N, C, P] or (LAST) [N, P, C], of any float type
    f1_ptr,
    weight_ptr,  # [C] float32
    partial_ptr,  # [N · blocks] float32: of a sample, to be added up
    pixels,
    channels,
    eps,
    INSIDE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, base, at, mask = _offsets(pixels, channels, LAST, BLOCK_P, BLOCK_C)
    x0, x1, w = _loaded(f0_ptr, f1_ptr, weight_ptr, base, at, mask, channels, BLOCK_C)
    a, _ = _scale(tl.sum(x0 * x0, 1), eps, INSIDE)
    b, _ = _scale(tl.sum(x1 * x1, 1), eps, INSIDE)
    d = x0 * a[:, None] - x1 * b[:, None]
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(d * d * w, 1), 0) / pixels)


@triton.jit
def _lpips_grad_kernel(
    f0_ptr,
    f1_ptr,
    weight_ptr,
    grad_ptr,  # [N] float32
    out0_ptr,  # like f0
    out1_ptr,  # None, or like f1
    pixels,
    channels,
    eps,
    INSIDE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, base, at, mask = _offsets(pixels, channels, LAST, BLOCK_P, BLOCK_C)
    x0, x1, w = _loaded(f0_ptr, f1_ptr, weight_ptr, base, at, mask, channels, BLOCK_C)
    each = tl.load(grad_ptr + n) * (2.0 / pixels)
    a, inverse0 = _scale(tl.sum(x0 * x0, 1), eps, INSIDE)
    b, inverse1 = _scale(tl.sum(x1 * x1, 1), eps, INSIDE)
    u = x0 * a[:, None]
    v = x1 * b[:, None]
    d = (u - v) * w
    along = tl.sum(u * d, 1) * (inverse0 * each)
    out = d * (a * each)[:, None] - u * along[:, None]
    tl.store(out0_ptr + base + at, out.to(out0_ptr.dtype.element_ty), mask=mask)
    if out1_ptr is not None:
        along = tl.sum(v * d, 1) * (inverse1 * each)
        out = v * along[:, None] - d * (b * each)[:, None]
        tl.store(out1_ptr + base + at, out.to(out1_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _feature_kernel(
    f0_ptr,  # [N, size], of any float type
    f1_ptr,
    grad_ptr,  # None for the value, or [N] float32
    out_ptr,  # [N · blocks] float32, of a sample to be added up; or the gradient, like f0
    size,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(size, BLOCK)
    n = tl.program_id(0) // blocks
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    base = n.to(tl.int64) * size
    x0 = tl.load(f0_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(f1_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
    d = x0 - x1
    if grad_ptr is None:
        d = d * d if SQUARED else tl.abs(d)
        tl.store(out_ptr + tl.program_id(0), tl.sum(d, 0) / size)
    else:
        each = tl.load(grad_ptr + n) / size
        slope = d * 2.0 if SQUARED else tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # 0 at a tie, NaN at NaN
        tl.store(out_ptr + base + at, (slope * each).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lpips_scale_kernel(
    f_ptr,
    scale_ptr,  # [N, P] float32
    pixels,
    channels,
    eps,
    INSIDE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, base, at, mask = _offsets(pixels, channels, LAST, BLOCK_P, BLOCK_C)
    x = tl.load(f_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
    scale, _ = _scale(tl.sum(x * x, 1), eps, INSIDE)
    p = (tl.program_id(0) % tl.cdiv(pixels, BLOCK_P)) * BLOCK_P + tl.arange(0, BLOCK_P)
    tl.store(scale_ptr + n.to(tl.int64) * pixels + p, scale, mask=p < pixels)


@triton.jit(do_not_specialize=["dim", "layer", "seed_lo", "seed_hi", "splits", "share"])
def _project_kernel(
    f_ptr,
    scale_ptr,  # [N, P] float32
    root_ptr,  # [C] float32, √(w / P)
    partial_ptr,  # [N, splits, dim] float32
    pixels,
    channels,
    dim,
    layer,
    seed_lo,
    seed_hi,
    splits,
    share,  # of the runs of a sample that a split takes, whole tiles of them
    LAST: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Buckets look for what is theirs: each run of 64 pixels of a channel lies on 64 that follow each other. So all is
    added up in one order, without atomics, at the price of looking at all of a tile's runs for each bucket."""
    n = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits) * share
    bucket = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    runs = tl.cdiv(pixels, 64)
    zero = tl.zeros([RUNS], tl.uint32)
    k0, k1 = seed_lo.to(tl.uint32, bitcast=True), seed_hi.to(tl.uint32, bitcast=True)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, first + share, RUNS):
        i = start + tl.arange(0, RUNS)
        c = i // runs
        run = i % runs
        w0, w1, w2, _ = _words(run.to(tl.uint32), c.to(tl.uint32), zero + layer.to(tl.uint32), zero, k0, k1)
        shift = ((w2.to(tl.uint64) * dim) >> 32).to(tl.int32)
        j = bucket - shift[:, None]
        j = tl.where(j < 0, j + dim, j)
        p = run[:, None] * 64 + j
        mask = (j < 64) & (p < pixels) & (c < channels)[:, None] & (bucket < dim)
        at = p * channels + c[:, None] if LAST else c[:, None] * pixels + p
        x = tl.load(f_ptr + n * channels * pixels + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + n * pixels + p, mask=mask, other=0.0)
        root = tl.load(root_ptr + c, mask=c < channels, other=0.0)[:, None]
        word = tl.where(j < 32, w0[:, None], w1[:, None])
        x = x * scale * root
        negative = ((word >> (j & 31).to(tl.uint32)) & 1) != 0
        total += tl.sum(tl.where(negative, -x, x), 0)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * dim + tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(out, total, mask=tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D) < dim)


@triton.jit(do_not_specialize=["dim", "layer", "seed_lo", "seed_hi"])
def _unproject_kernel(
    f_ptr,
    grad_ptr,  # [N, dim] float32
    root_ptr,  # [C] float32, √(w / P)
    out_ptr,  # like f
    pixels,
    channels,
    dim,
    layer,
    seed_lo,
    seed_hi,
    eps,
    INSIDE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,  # divides 64
    BLOCK_C: tl.constexpr,
):
    """The way back of `_project_kernel` and of the norms, a block of pixels with all their channels in registers."""
    n, base, at, mask = _offsets(pixels, channels, LAST, BLOCK_P, BLOCK_C)
    x = tl.load(f_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
    first = (tl.program_id(0) % tl.cdiv(pixels, BLOCK_P)) * BLOCK_P
    j = (first % 64 + tl.arange(0, BLOCK_P))[:, None]
    c = tl.arange(0, BLOCK_C)
    zero = tl.zeros([BLOCK_C], tl.uint32)
    k0, k1 = seed_lo.to(tl.uint32, bitcast=True), seed_hi.to(tl.uint32, bitcast=True)
    w0, w1, w2, _ = _words(
        zero + (first // 64).to(tl.uint32), c.to(tl.uint32), zero + layer.to(tl.uint32), zero, k0, k1
    )
    bucket = ((w2.to(tl.uint64) * dim) >> 32).to(tl.int32)[None, :] + j
    bucket = tl.where(bucket < dim, bucket, bucket - dim)
    v = tl.load(grad_ptr + n.to(tl.int64) * dim + bucket, mask=mask, other=0.0)
    v = v * tl.load(root_ptr + c, mask=c < channels, other=0.0)[None, :]
    word = tl.where(j < 32, w0[None, :], w1[None, :])
    v = tl.where(((word >> (j & 31).to(tl.uint32)) & 1) != 0, -v, v)
    scale, inverse = _scale(tl.sum(x * x, 1), eps, INSIDE)
    along = tl.sum(x * scale[:, None] * v, 1) * inverse
    out = (v - x * along[:, None]) * scale[:, None]
    tl.store(out_ptr + base + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def aot_specs() -> list[Spec]:
    """First float32 maps of 64 channels in planes; then every width of the three nets, dtype and layout."""
    layers = [(64, 128 * 128), (128, 64 * 64), (192, 27 * 27), (256, 32 * 32), (384, 13 * 13), (512, 16 * 16)]
    kinds = [("fp32", c, p, last) for last in (False, True) for c, p in layers]
    kinds += [(kind, c, p, last) for kind in ("bf16", "fp16") for last in (False, True) for c, p in layers[::5]]
    specs = []
    for kind, channels, pixels, last in kinds:
        blocks = launch.lpips_blocks(channels)
        warps = blocks.pop("num_warps")
        constexprs: dict[str, Any] = {"INSIDE": False, "LAST": last, **blocks}
        types = dict.fromkeys(("f0_ptr", "f1_ptr", "out0_ptr", "out1_ptr"), f"*{kind}")
        types |= dict.fromkeys(("weight_ptr", "grad_ptr", "partial_ptr"), "*fp32")
        types |= {"pixels": "i32", "channels": "i32", "eps": "fp32", **dict.fromkeys(constexprs, "constexpr")}
        divisible = tuple(name for name, v in (("pixels", pixels), ("channels", channels)) if v % 16 == 0)
        for kernel, sides in ((_lpips_value_kernel, 0), (_lpips_grad_kernel, 1), (_lpips_grad_kernel, 2)):
            signature = {name: types[name] for name in kernel.arg_names}
            absent = {"out1_ptr": None} if sides == 1 else {}
            name = f"{('value', 'grad', 'both')[sides]} {kind} C={channels} {'last' if last else 'planes'}"
            specs.append(
                Spec(
                    name,
                    kernel,
                    {**signature, **dict.fromkeys(absent, "constexpr")},
                    {**constexprs, **absent},
                    warps,
                    options=dict(OPTIONS),
                    divisible=divisible,
                )
            )
    for kind in ("fp32", "bf16", "fp16"):
        for channels, pixels in layers[::5]:
            for last in (False, True):
                specs += _project_specs(kind, channels, pixels, last)
        for squared in (False, True):
            for value in (True, False):
                signature = {"f0_ptr": f"*{kind}", "f1_ptr": f"*{kind}", "grad_ptr": "constexpr" if value else "*fp32"}
                signature |= {"out_ptr": "*fp32" if value else f"*{kind}", "size": "i32"}
                signature |= {"SQUARED": "constexpr", "BLOCK": "constexpr"}
                constexprs = {"SQUARED": squared, "BLOCK": launch.FEATURE_BLOCK}
                constexprs |= {"grad_ptr": None} if value else {}
                name = f"{'l2' if squared else 'l1'} {'value' if value else 'grad'} {kind}"
                specs.append(
                    Spec(name, _feature_kernel, signature, constexprs, options=dict(OPTIONS), divisible=("size",))
                )
    return specs


def _project_specs(kind: str, channels: int, pixels: int, last: bool) -> list[Spec]:
    name = f"{kind} C={channels} {'last' if last else 'planes'}"
    divisible = tuple(name for name, v in (("pixels", pixels), ("channels", channels)) if v % 16 == 0)
    blocks = launch.lpips_blocks(channels)
    warps = blocks.pop("num_warps")
    given: dict[str, Any] = {"INSIDE": False, "LAST": last, **blocks}
    types = {"f_ptr": f"*{kind}", "scale_ptr": "*fp32", "pixels": "i32", "channels": "i32", "eps": "fp32"}
    signature = {**types, **dict.fromkeys(given, "constexpr")}
    options = dict(OPTIONS)
    found = [Spec(f"scale {name}", _lpips_scale_kernel, signature, given, warps, options=options, divisible=divisible)]
    given = {"LAST": last, **launch.project_blocks(1024)}
    types = {"f_ptr": f"*{kind}", **dict.fromkeys(("scale_ptr", "root_ptr", "partial_ptr"), "*fp32")}
    types |= dict.fromkeys(("pixels", "channels", "dim", "layer"), "i32")
    types |= dict.fromkeys(("seed_lo", "seed_hi", "splits", "share"), "i32")
    signature = {**types, **dict.fromkeys(given, "constexpr")}
    found.append(Spec(f"project {name}", _project_kernel, signature, given, options=options, divisible=divisible))
    blocks = launch.unproject_blocks(channels)
    warps = blocks.pop("num_warps")
    given = {"INSIDE": False, "LAST": last, **blocks}
    types = {"f_ptr": f"*{kind}", "out_ptr": f"*{kind}", "grad_ptr": "*fp32", "root_ptr": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("pixels", "channels", "dim", "layer", "seed_lo", "seed_hi"), "i32")
    types |= dict.fromkeys(given, "constexpr")
    signature = {name: types[name] for name in _unproject_kernel.arg_names}
    found.append(
        Spec(f"unproject {name}", _unproject_kernel, signature, given, warps, options=options, divisible=divisible)
    )
    return found
