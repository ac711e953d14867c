"""Points as pairs of bfloat16, the high half of each number and what it leaves: "bf16x3" products without a split.

Triton's own "bf16x3" takes float32 apart in registers whenever it multiplies, for each program anew, and what comes out
has to go back through shared memory. Packed in halves, tiles stream straight from memory to the tensor cores, and a
point's norm goes with them as three bfloat16s: the tensor cores' sum then is the distance, norms and all.

A distance takes the low halves' product too. Norms are those of what the halves add up to, so that with it a distance
is right but for a share of itself and float32's rounding. Without it two points of a cluster away from the centre are
off by 2^-18 of their norms, all pairs of the cluster alike (up to 100 times the error, in value and gradients).
"""

import triton
import triton.language as tl

PARTS = tl.constexpr(16)  # bfloat16s that a point's norm takes: what a tensor core's instruction adds up


@triton.jit
def _halve(x, PTX: tl.constexpr):
    """x in bfloat16, and what that leaves of it."""
    if PTX:  # in twos, as the instruction rounds them: LLVM takes one at a time, at an eighth of the speed
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 first, second;
            cvt.rn.bf16x2.f32 $0, $3, $2;
            shl.b32 first, $0, 16;
            and.b32 second, $0, 0xffff0000;
            sub.f32 first, $2, first;
            sub.f32 second, $3, second;
            cvt.rn.bf16x2.f32 $1, second, first;
            }""",
            "=&r,=&r,r,r",
            [x],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _norm_parts(norm):
    """[BLOCK, PARTS]: 1, 1, 1, the norm in three parts, whose sum it is to the bit, 1, and zeros."""
    high = norm.to(tl.bfloat16).to(tl.float32)
    finite = norm != float("inf")
    rest = tl.where(finite, norm, 0.0) - tl.where(finite, high, 0.0)
    middle = rest.to(tl.bfloat16).to(tl.float32)
    place = tl.arange(0, PARTS)[None, :]
    parts = tl.where(place == 3, high[:, None], tl.where(place == 4, middle[:, None], (rest - middle)[:, None]))
    return tl.where((place < 3) | (place == 6), 1.0, tl.where(place < 6, parts, 0.0)).to(tl.bfloat16)


@triton.jit
def _columns(z_ptr, start, DP: tl.constexpr, BLOCK: tl.constexpr):
    """The BLOCK points from `start` on: their high halves, the low ones and their norms' parts."""
    z_ptr += tl.cast(start, tl.int64) * (2 * DP + PARTS)
    row = tl.arange(0, BLOCK)[:, None] * (2 * DP + PARTS)
    place = z_ptr + (row + tl.arange(0, DP)[None, :])
    parts = tl.load(z_ptr + (row + 2 * DP + tl.arange(0, PARTS)[None, :]))
    return tl.load(place), tl.load(place + DP), parts


@triton.jit
def _rows(z_ptr, start, least, DP: tl.constexpr, BLOCK: tl.constexpr):
    """The same such that products with columns add up to `least` + d²: −2 times the points, and parts of their norms
    where a column has ones."""
    high, low, _ = _columns(z_ptr, start, DP, BLOCK)
    z_ptr += tl.cast(start, tl.int64) * (2 * DP + PARTS) + 2 * DP
    place = tl.arange(0, PARTS)[None, :]
    parts = tl.load(z_ptr + (tl.arange(0, BLOCK)[:, None] * (2 * DP + PARTS) + tl.where(place < 3, place + 3, 0)))
    parts = tl.where(place < 6, parts.to(tl.float32), tl.where(place == 6, least, 0.0)).to(tl.bfloat16)
    return (high.to(tl.float32) * -2.0).to(tl.bfloat16), (low.to(tl.float32) * -2.0).to(tl.bfloat16), parts


@triton.jit
def _dot(a, a_low, b, b_low, total, WHOLE: tl.constexpr):
    """total + a·b, the small products first; if WHOLE with that of the low halves."""
    if WHOLE:
        total = tl.dot(a_low, b_low, total)
    total = tl.dot(a_low, b, total)
    total = tl.dot(a, b_low, total)
    return tl.dot(a, b, total)
