"""MMD² and its unit gradients on the GPU: one pass over the pairs, nothing of size N·M.

`_mmd_pack_kernel` centres, scales and pads the points into Z = [X; Y] with their norms; `_mmd_grad_kernel` keeps a tile
of rows resident and streams all columns past it (distance by a matrix product, kernel value and slope, a second product
for the gradient); `_mmd_value_kernel` walks the upper triangle of tiles where no gradient is asked for. Each program
writes its own float64 partial sum: no atomics, the same bits every time.

In units u = d²/base a pair needs t = 1 + u = 1 + ½-norms − 2·product. Padding has an infinite norm, so that it vanishes
by itself.
"""

import triton
import triton.language as tl
from fastgen.kernels.aot import Spec

IMQ_PAIRS, IMQ, RBF, RATIONAL_QUADRATIC = 0, 1, 2, 3
KINDS = {"imq_pairs": IMQ_PAIRS, "imq": IMQ, "rbf": RBF, "rational_quadratic": RATIONAL_QUADRATIC}
UNBIASED, BIASED, U_STATISTIC = 0, 1, 2
ESTIMATORS = {"unbiased": UNBIASED, "biased": BIASED, "u_statistic": U_STATISTIC}


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    """1/x for x ≥ 1, inf or NaN: one special-function instruction where the machine has it inline."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def _evaluate(u, parameters, KIND: tl.constexpr, PTX: tl.constexpr):
    """k and w = −dk/du for u = d²/base ≥ 0; inf gives 0 and 0, NaN gives NaN."""
    if KIND == 0:
        # v = 1/(1 + u), z = v − v²:  k = v + Σ (2v + bz)/(1 + bz),  w = v² (1 + 2R + (1 − 4z) S),
        # R = Σ 1/(1 + bz), S = Σ b/(1 + bz)²; the three reciprocals come out of one.
        b1 = parameters[0]
        b2 = parameters[1]
        b3 = parameters[2]
        v = _reciprocal(1.0 + u, PTX)
        vv = v * v
        z = v - vv
        q1 = 1.0 + b1 * z
        q2 = 1.0 + b2 * z
        q3 = 1.0 + b3 * z
        q12 = q1 * q2
        r = _reciprocal(q12 * q3, PTX)
        r3 = r * q3
        i1 = r3 * q2
        i2 = r3 * q1
        i3 = r * q12
        g = 1.0 + 2.0 * (i1 + i2 + i3)
        j1 = b1 * i1
        j2 = b2 * i2
        j3 = b3 * i3
        k = v * g + z * (j1 + j2 + j3)
        w = vv * (g + (1.0 - 4.0 * z) * (j1 * i1 + j2 * i2 + j3 * i3))
    elif KIND == 1:
        k = tl.zeros_like(u)
        w = tl.zeros_like(u)
        for s in tl.static_range(len(parameters)):
            q = _reciprocal(1.0 + parameters[s] * u, PTX)
            k += q
            w += parameters[s] * q * q
    elif KIND == 3:
        # With u = d²/2ℓ²: Σ t^−α and Σ t^−(α+1), t = 1 + u/α; the α come first, then their reciprocals.
        k = tl.zeros_like(u)
        w = tl.zeros_like(u)
        count: tl.constexpr = len(parameters) // 2
        for s in tl.static_range(count):
            t = 1.0 + parameters[count + s] * u
            e = tl.exp2(-parameters[s] * tl.log2(t))
            k += e
            w += e * _reciprocal(t, PTX)
    else:
        k = tl.zeros_like(u)
        w = tl.zeros_like(u)
        for s in tl.static_range(len(parameters)):
            e = tl.exp2(-parameters[s] * u)
            k += e
            w += parameters[s] * e
    return k, w


@triton.jit
def _mmd_pack_kernel(
    x_ptr, y_ptr, z_ptr, norm_ptr, n, m, d, padded_n, padded, scale, BLOCK: tl.constexpr, DP: tl.constexpr
):
    """Z = (points − x₀)·scale in float32, zeros beyond, and its squared norms, inf beyond; a point of inf gets NaN."""
    tile = tl.program_id(0)
    item = tl.program_id(1).to(tl.int64)
    start = (tile * BLOCK).to(tl.int64)
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, DP)
    inside = column < d
    cell = row[:, None] * d + column[None, :]
    centre = tl.load(x_ptr + item * n * d + column, mask=inside, other=0.0).to(tl.float32)
    if start >= padded_n:
        start_y = start - padded_n
        valid = row < m - start_y
        points = tl.load(y_ptr + (item * m + start_y) * d + cell, mask=valid[:, None] & inside[None, :], other=0.0)
        points = points.to(tl.float32)
    else:
        valid = row < n - start
        points = tl.load(x_ptr + (item * n + start) * d + cell, mask=valid[:, None] & inside[None, :], other=0.0)
        points = points.to(tl.float32)
    z = tl.where(valid[:, None], (points - centre[None, :]) * scale, 0.0)  # [BLOCK, DP]
    norm = tl.sum(z * z, 1)
    norm = tl.where(valid, norm + (norm - norm), float("inf"))  # an infinite norm of a real point becomes NaN
    tl.store(z_ptr + (item * padded + start) * DP + row[:, None] * DP + column[None, :], z)
    tl.store(norm_ptr + item * padded + start + row, norm)


@triton.jit
def _coefficients(n, m, ESTIMATOR: tl.constexpr):
    """a_xx, a_yy, a_xy in float64."""
    n = n.to(tl.float64)
    m = m.to(tl.float64)
    if ESTIMATOR == 1:
        return 1.0 / (n * n), 1.0 / (m * m), 1.0 / (n * m)
    elif ESTIMATOR == 2:
        return 1.0 / (n * (n - 1.0)), 1.0 / (m * (m - 1.0)), 1.0 / (n * (n - 1.0))
    return 1.0 / (n * (n - 1.0)), 1.0 / (m * (m - 1.0)), 1.0 / (n * m)


@triton.jit
def _distances(
    z,
    norm,
    row_start,
    z_ptr,
    norm_ptr,
    start,
    shift,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of columns and u between it and the rows; where column − row = shift the pair is put out of reach."""
    column = tl.arange(0, BLOCK_N)
    # The tile's place in 64 bits, the cells within it in 32.
    there = z_ptr + tl.cast(start, tl.int64) * DP
    other = tl.load(there + column[:, None] * DP + tl.arange(0, DP)[None, :])  # [BLOCK_N, DP]
    other_norm = tl.load(norm_ptr + start + column)
    product = tl.dot(z, tl.trans(other), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    u = (norm[:, None] + other_norm[None, :]) - 2.0 * product
    # The zero first, and NaN kept: a rounded distance below zero is zero, a bad point is not.
    u = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    first = row_start + shift
    if (first < start + BLOCK_N) & (start < first + BLOCK_M):
        row = first - start + tl.arange(0, BLOCK_M)
        u = tl.where(column[None, :] == row[:, None], float("inf"), u)
    return other, u


@triton.jit
def _mmd_grad_kernel(
    z_ptr,
    norm_ptr,
    gx_ptr,
    gy_ptr,
    partial_ptr,
    n,
    m,
    d,
    padded_n,
    padded,
    partials,
    gradient_scale,
    parameters,
    KIND: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Rows of one tile against all columns of Z: their part of the value and their gradients."""
    tile = tl.program_id(0)
    item = tl.program_id(1).to(tl.int64)
    z_ptr += item * padded * DP
    norm_ptr += item * padded
    first = (tile * BLOCK_M).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DP)
    is_y = first >= padded_n
    z = tl.load(z_ptr + first * DP + row[:, None] * DP + dim[None, :])  # [BLOCK_M, DP]
    norm = tl.load(norm_ptr + first + row)
    a_xx, a_yy, a_xy = _coefficients(n, m, ESTIMATOR)
    a_same = tl.where(is_y, a_yy, a_xx)
    pull = (a_same / a_xy).to(tl.float32)
    value = tl.zeros([BLOCK_M], tl.float64)
    slopes = tl.zeros([BLOCK_M], tl.float32)
    gradient = tl.zeros([BLOCK_M, DP], tl.float32)
    for start in range(0, padded, BLOCK_N):
        same = (start >= padded_n) == is_y
        # u_statistic leaves out i = j between the samples too; no column is 2^30 rows away.
        cross = tl.where(is_y, -padded_n, padded_n) if ESTIMATOR == 2 else 1 << 30
        other, u = _distances(
            z, norm, tile * BLOCK_M, z_ptr, norm_ptr, start, tl.where(same, 0, cross), DP, BLOCK_M, BLOCK_N, PRECISION
        )
        k, w = _evaluate(u, parameters, KIND, PTX)
        # XY is met from both sides where both have a gradient, and only from X where not.
        value += tl.sum(k, 1).to(tl.float64) * tl.where(same, a_same, -a_xy if BOTH else -2.0 * a_xy)
        w *= tl.where(same, pull, -1.0)
        slopes += tl.sum(w, 1)
        gradient = tl.dot(w, other, gradient, input_precision=PRECISION)
    local = tl.where(is_y, first - padded_n, first)
    valid = row < tl.where(is_y, m, n) - local
    tl.store(partial_ptr + item * partials + tile, tl.sum(tl.where(valid, value, 0.0), 0))
    gradient = (gradient - slopes[:, None] * z) * gradient_scale
    inside = valid[:, None] & (dim < d)[None, :]
    cell = row[:, None] * d + dim[None, :]
    if is_y:
        tl.store(gy_ptr + (item * m + local) * d + cell, gradient, mask=inside)
    else:
        tl.store(gx_ptr + (item * n + local) * d + cell, gradient, mask=inside)


@triton.jit
def _mmd_value_kernel(
    z_ptr,
    norm_ptr,
    partial_ptr,
    n,
    m,
    padded_n,
    padded,
    first_tile,
    partials,
    parameters,
    KIND: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Rows of one tile against the columns from its own on: the long rows come first, each pair is met once."""
    tile = tl.program_id(0) + first_tile
    item = tl.program_id(1).to(tl.int64)
    z_ptr += item * padded * DP
    norm_ptr += item * padded
    first = (tile * BLOCK_M).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    is_y = first >= padded_n
    z = tl.load(z_ptr + first * DP + row[:, None] * DP + tl.arange(0, DP)[None, :])  # [BLOCK_M, DP]
    norm = tl.load(norm_ptr + first + row)
    a_xx, a_yy, a_xy = _coefficients(n, m, ESTIMATOR)
    a_same = tl.where(is_y, a_yy, a_xx)
    value = tl.zeros([BLOCK_M], tl.float64)
    for start in range(tile * BLOCK_M, padded, BLOCK_N):
        same = (start >= padded_n) == is_y
        cross = padded_n if ESTIMATOR == 2 else 1 << 30
        _, u = _distances(
            z, norm, tile * BLOCK_M, z_ptr, norm_ptr, start, tl.where(same, 0, cross), DP, BLOCK_M, BLOCK_N, PRECISION
        )
        k, _ = _evaluate(u, parameters, KIND, PTX)
        # A tile against itself meets each of its pairs twice.
        twice = tl.where(start < (tile + 1) * BLOCK_M, a_same, 2.0 * a_same)
        value += tl.sum(k, 1).to(tl.float64) * tl.where(same, twice, -2.0 * a_xy)
    valid = row < tl.where(is_y, m + padded_n, n) - first
    tl.store(partial_ptr + item * partials + tile, tl.sum(tl.where(valid, value, 0.0), 0))


def aot_specs() -> list[Spec]:
    from fastgen.kernels import launch

    return launch.mmd_specs()
