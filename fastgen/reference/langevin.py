"""The Langevin step, and noise stream v1: public and frozen.

**Stream v1** gives element i of a chain at a step one standard normal, a function of (seed, step, chain id, i) alone:

    key      = (seed mod 2³², seed div 2³²)                                                     0 <= seed < 2⁶⁴
    counter  = (i div 4, purpose·2²⁸ + step, chain id mod 2³², chain id div 2³²)    i < 2³⁴, step < 2²⁸, chain id < 2⁶⁴
    w0..w3   = Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), Random123's order
    normal(i) = n[i mod 4],   n0, n1 = pair(w0, w1),   n2, n3 = pair(w2, w3)

i counts a chain's elements in row-major order whatever the strides. Ids are given as int64, whose 64 bits are the id
(−1 is chain 2⁶⁴ − 1), and so is a seed that is a tensor: any of them is one chain, and none need be refused, for which
a GPU would be waited for. The purpose, the top 4 bits of the second counter
word, is 0 for this noise, 1 for the draw that accepts a MALA step, 2 for a replay buffer's decisions, 3 for its fresh
values; 4 to 15 are kept. pair(a, b) is Box–Muller on float32:

    u = float32((a >> 1) | 1)·2⁻³¹                 31 bits, the midpoints of 2³⁰ cells, then rounded to float32; never 0
    r = √(−2 ln u),  negated if bit 31 of b is set                                                   r <= 6.5555415
    φ = (π/4)·float32(t)·2⁻³¹,  t = the int32 whose bits are (b << 2) | 2                    φ in [−π/4, π/4], never 0
    pair = (r·sin φ, r·cos φ) if bit 30 of b is set, else (r·cos φ, r·sin φ)

Each operation on float32 is a +, −, × or √, rounded to nearest even with no fused multiply-add, in the order of `pair`
below, and no intermediate is subnormal. So C++, Triton and this file give the same bits on every processor and GPU.
Against exact logarithm, sine and cosine of the same u and φ the radius is within 1.2e-7, sine and cosine within 1.7e-7,
and a normal within 3.5e-7, relatively (over every float32 that can occur). The largest |normal| is 6.5555415; a normal
distribution passes that once in 1.8e10 draws.
KNOWN_ANSWERS and KNOWN_CHECKSUM hold what every implementation must give.
"""

import math

import torch
from torch import Tensor

PURPOSE_NOISE, PURPOSE_ACCEPT, PURPOSE_DECIDE, PURPOSE_FRESH = 0, 1, 2, 3
STEPS = 2**28
LOW = 0xFFFFFFFF

# (seed, step, chain id): the words of elements 0 to 7, and their normals as the bits of a float32.
KNOWN_ANSWERS = {
    (0x0, 0x0, 0x0): (
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8 f8e4cca4 5cb200db b1a574eb 097eff67",
        "3f6cb6b0 bf7dbb33 bf1e1ba0 bef6d1b3 3e1d5353 3e392a68 3f54ec99 3e4a2da3",
    ),
    (0xFFFFFFFFFFFFFFFF, 0xFFFFFFF, 0x7FFFFFFFFFFFFFFF): (
        "268ef992 9af20b62 df301cca 1e26f4c9 72173d11 70b8a324 52a19c69 71cc83ba",
        "bfc48c7d bf98f729 3ec60622 3eb4d487 beee6b4c 3f976d0a bf037c5d 3fb4eb2f",
    ),
    (0x134D765, 0x3E8, 0x100000007): (
        "37f71e2b b38cafd6 4fef5a4d 944b1aa8 4cfe961c 00c44012 f1b5953b c1be5dad",
        "bfd4de21 3f064d82 bfab91a3 bf3a9998 3fc66181 3ceee9f0 bc6d940d bead6173",
    ),
}

# The sum modulo 2³² of the bits of the first 2¹⁶ normals of seed 0, step 0, chain 0.
KNOWN_CHECKSUM = 0x884275E1

# −2 ln(1 + x) = −2x + x²·L(x) on [√½ − 1, √2 − 1], sin y = y + y·y²·S(y²), cos y = 1 + y²·C(y²) on [−π/4, π/4]:
# minimax in the relative error (3.0e-8, 4e-9, 3.8e-8), rounded to float32, lowest power first.
L = (
    0.9999998211860657,
    -0.6666790246963501,
    0.5000351071357727,
    -0.39924144744873047,
    0.33141016960144043,
    -0.2983594536781311,
    0.2861504554748535,
    -0.1746968924999237,
)
S = (-0.16666655242443085, 0.00833216030150652, -0.00019515282474458218)
C = (-0.4999988377094269, 0.041655778884887695, -0.0013591853203251958)
MINUS_2_LN2 = -1.6525916635146132e-07  # times 2⁻²³: it multiplies an exponent that still stands in bits 23 and up
QUARTER_PI = 3.65729529994141e-10  # times 2⁻³¹
SQRT_HALF = 0x3F3504F3  # the bits of √½


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10. Words are int64 tensors in [0, 2³²); 32 × 32 -> 64 bit products wrap into int64 unharmed."""
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & LOW) ^ c1 ^ k0, b & LOW, (a >> 32 & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two words, int64 in [0, 2³²), to two float32 normals."""
    # u = m·2ᵉ with m in [√½, √2): e is split off from √½'s bits on, and stays in its place, a multiple of 2²³.
    k = ((a >> 1) | 1).to(torch.int32).float().view(torch.int32) - (SQRT_HALF + (31 << 23))
    m = ((k & 0x7FFFFF) + SQRT_HALF).view(torch.float32)
    x = m - 1.0
    z = x * x
    high, low = (x * L[7] + L[6]) * z + (x * L[5] + L[4]), (x * L[3] + L[2]) * z + (x * L[1] + L[0])
    square = (z * (high * (z * z) + low) - (x + x)) + (k & -0x800000).float() * MINUS_2_LN2
    # In float64: torch's float32 square root on a CPU may be MKL's, which is not always the nearest.
    r = square.double().sqrt().float()
    r = torch.where(b >> 31 == 1, -r, r)
    t = ((b << 2) & LOW) | 2
    y = torch.where(t < 2**31, t, t - 2**32).to(torch.int32).float() * QUARTER_PI
    z = y * y
    sine = y + y * (z * ((z * S[2] + S[1]) * z + S[0]))
    cosine = 1.0 + z * ((z * C[2] + C[1]) * z + C[0])
    swap = (b >> 30 & 1) == 1
    return r * torch.where(swap, sine, cosine), r * torch.where(swap, cosine, sine)


def words(elements: int, chain_id: Tensor, seed: int, step: int, purpose: int = PURPOSE_NOISE) -> Tensor:
    """chain_id [C] int64 -> [C, ceil(elements / 4), 4] int64: the words of each group of four elements."""
    group = torch.arange(-(-elements // 4), device=chain_id.device)[None, :].expand(len(chain_id), -1)
    chain = chain_id[:, None].expand_as(group)
    second = torch.full_like(group, purpose << 28 | step % STEPS)
    return torch.stack(philox(group, second, chain & LOW, chain >> 32 & LOW, seed), dim=-1)


def normals(elements: int, chain_id: Tensor, seed: int, step: int, purpose: int = PURPOSE_NOISE) -> Tensor:
    """chain_id [C] int64 -> [C, elements] float32 of stream v1."""
    w = words(elements, chain_id, seed, step, purpose)
    n0, n1 = pair(w[..., 0], w[..., 1])
    n2, n3 = pair(w[..., 2], w[..., 3])
    return torch.stack((n0, n1, n2, n3), dim=-1).flatten(1)[:, :elements]


def bound(x: Tensor, low: float, high: float) -> Tensor:
    """x held within [low, high]; NaN stays NaN."""
    x = torch.where(x < low, low, x)
    return torch.where(x > high, high, x)


def step_(
    x: Tensor,
    grad: Tensor,
    chain_id: Tensor,
    step_size: float | Tensor,
    noise_scale: float | Tensor,
    precision: float,
    grad_clip: float,
    low: float,
    high: float,
    noise_first: bool,
    seed: int,
    step: int,
    lookahead: float = 0.0,
    lookahead_out: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    """In place on x [C, ...]. Scalars are rounded to the compute type: float64 for float64, else float32.

    d = bound(grad, ±grad_clip) + x·precision                          (no second term at precision 0)
    y = x − step_size·d                                                (bounded here too if noise_first)
    x = bound(y + noise_scale·ε, low, high)                            (no noise at noise_scale 0)
    lookahead_out = x_before − lookahead·d
    stats [C, 3] = ‖grad‖₂, the elements that a bound moved, those that were not finite before it or are not as stored
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = [-1] + [1] * (x.ndim - 1)
    before = x.to(compute)
    d = bound(grad.to(compute), -grad_clip, grad_clip)
    if precision != 0:
        d = d + before * precision
    if lookahead_out is not None:
        lookahead_out.copy_(before - d * lookahead)
    h = step_size.to(compute).view(shape) if isinstance(step_size, Tensor) else step_size
    y = moved = before - d * h
    if noise_first:
        y = bound(y, low, high)
    if isinstance(noise_scale, Tensor) or noise_scale != 0:
        elements = math.prod(x.shape[1:])
        s = noise_scale.to(compute).view(shape) if isinstance(noise_scale, Tensor) else noise_scale
        y = y + normals(elements, chain_id, seed, step).view(x.shape).to(compute) * s
    x.copy_(bound(y, low, high))
    if stats is not None:
        clamped, wrong = (y < low) | (y > high), ~(y.isfinite() & moved.isfinite() & x.isfinite())
        if noise_first:
            clamped |= (moved < low) | (moved > high)
        rows = (grad.double().square(), clamped, wrong)
        norm, *counts = (row.reshape(len(x), math.prod(x.shape[1:])).double().sum(1) for row in rows)
        stats.copy_(torch.stack((norm.sqrt(), *counts), dim=1))
