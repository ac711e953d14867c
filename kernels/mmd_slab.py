"""MMD²'s gradients where they do not fit on chip, and its Hessian's product: slabs of slopes through memory.

`_mmd_slope_kernel` writes what each pair of a slab, rows × columns of bounded number, pulls with; `_mmd_pull_kernel`
multiplies the slab with the points. Slab after slab on one stream: each adds to what the last one left.

With w = −dk/du, c = d²k/du² and V the directions in the units of Z, a gradient is Σ_j w (z_j − z_i), and changes
along V by Σ_j w (v_j − v_i) − 2 c σ (z_j − z_i), σ = ⟨z_i − z_j, v_i − v_j⟩. Where the kernel is polynomial, with
w = dk/du, it is Σ_j w z_j, and changes by Σ_j w v_j + c σ z_j, σ = ⟨v_i, z_j⟩ + ⟨z_i, v_j⟩.
"""

import triton
import triton.language as tl
from fastgen.kernels.mmd import _coefficients, _distances, _excluded, _product
from fastgen.kernels.mmd_kernels import (
    IMQ,
    POLYNOMIAL,
    RATIONAL_QUADRATIC,
    RBF,
    _evaluate,
    _exponential,
    _horner,
    _power,
    _reciprocal,
)


@triton.jit
def _add_bend(c, v, parameters, FIRST: tl.constexpr, LAST: tl.constexpr, SIZE: tl.constexpr, PTX: tl.constexpr):
    """IMQ's d²k/du² with the terms of a group: Π t is from FIRST on, Σ 2a² Π' t³ from LAST on."""
    s = v * _reciprocal(_horner(v, parameters, FIRST, SIZE + 1), PTX)
    return c + s * s * (s * _horner(v, parameters, LAST, 3 * SIZE - 2))


@triton.jit
def _bend(u, parameters, KIND: tl.constexpr, FORM: tl.constexpr, PTX: tl.constexpr):
    """d²k/du², of what `_evaluate` takes; inf gives 0, NaN gives NaN. What `_evaluate` has made is not made again."""
    c = tl.zeros_like(u)
    if KIND == IMQ:
        v = _reciprocal(u, PTX)
        c = 2.0 * v * v * v
        for group in tl.static_range(len(FORM) - 1):
            c = _add_bend(
                c,
                v,
                parameters,
                4 * FORM[group],
                4 * FORM[len(FORM) - 1] + 3 * FORM[group] - 2 * group,
                FORM[group + 1] - FORM[group],
                PTX,
            )
    elif KIND == RBF:
        e = c
        for s in tl.static_range(len(parameters)):
            e = _exponential(e, u, parameters[s], FORM[s])
            c += e * (parameters[s] * parameters[s])
    elif KIND == RATIONAL_QUADRATIC:
        count: tl.constexpr = len(parameters) // 2
        for s in tl.static_range(count):
            e, shrink = _power(parameters[count + s] * u, parameters[s], PTX)
            c += (1.0 + parameters[count + s]) * e * shrink * shrink
        c = tl.where(u == float("inf"), 0.0, c)
    elif KIND > POLYNOMIAL:
        c += (KIND - POLYNOMIAL + 1) * (KIND - POLYNOMIAL)
        for _ in tl.static_range(KIND - POLYNOMIAL - 1):
            c *= u
        c = tl.where(u == float("inf"), 0.0, c)
    return c


@triton.jit(do_not_specialize=["n", "m"])
def _mmd_slope_kernel(
    z_ptr,
    v_ptr,  # None for a gradient; with it also the Hessian's second slab is written, and no value
    norm_ptr,
    along_ptr,  # ⟨z, v⟩ of each point
    weight_ptr,  # None, or of Z's points
    coefficients_ptr,  # None, or [items, 3] float64
    slope_ptr,  # [items, rows, columns] float32
    bend_ptr,
    partial_ptr,  # [items, partials, columns / BLOCK_N] float64, to add to
    n,
    m,
    d,
    padded_n,
    padded,
    first_row,
    first_column,
    rows,
    columns,
    partials,
    bend_scale,
    parameters,
    KIND: tl.constexpr,
    FORM: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DC: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile of a slab, and its part of the value."""
    item = tl.program_id(2).to(tl.int64)
    row_start = first_row + tl.program_id(0) * BLOCK_M
    start = first_column + tl.program_id(1) * BLOCK_N
    is_y = row_start >= padded_n
    same = (start >= padded_n) == is_y
    z_ptr += item * padded * DP
    norm_ptr += item * padded
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    norm = tl.load(norm_ptr + row_start + row)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    product = _product(z_ptr, row_start, z_ptr, start, product, DP, DC, BLOCK_M, BLOCK_N, PRECISION)
    shift = _excluded(is_y, same, padded_n, KIND, ESTIMATOR)
    u = _distances(product, norm, z_ptr, norm_ptr, row_start, start, shift, d, parameters, KIND, DP, BLOCK_M, BLOCK_N)
    k, w = _evaluate(u, parameters, KIND, FORM, PTX)
    a_xx, a_yy, a_xy = _coefficients(coefficients_ptr, item, n, m, ESTIMATOR)
    a_same = tl.where(is_y, a_yy, a_xx)
    factor = tl.where(same, a_same, -a_xy).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + item * padded + start + column)[None, :]
        k *= weight
        w *= weight
    slab = (item * rows + tl.program_id(0) * BLOCK_M) * columns + tl.program_id(1) * BLOCK_N
    cell = row[:, None] * columns + column[None, :]
    tl.store(slope_ptr + slab + cell, w * factor)
    if v_ptr is not None:
        v_ptr += item * padded * DP
        along_ptr += item * padded
        crossed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        crossed = _product(v_ptr, row_start, z_ptr, start, crossed, DP, DC, BLOCK_M, BLOCK_N, PRECISION)
        crossed = _product(z_ptr, row_start, v_ptr, start, crossed, DP, DC, BLOCK_M, BLOCK_N, PRECISION)
        if KIND < POLYNOMIAL:
            crossed -= tl.load(along_ptr + row_start + row)[:, None] + tl.load(along_ptr + start + column)[None, :]
        bend = _bend(u, parameters, KIND, FORM, PTX) * crossed * (bend_scale * factor)
        if weight_ptr is not None:
            bend *= weight
        tl.store(bend_ptr + slab + cell, bend)
    else:
        # XY is met from both sides where both have a gradient, and only from X where not.
        value = tl.sum(k, 1).to(tl.float64) * tl.where(same, a_same, -a_xy if BOTH else -2.0 * a_xy)
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + item * padded + row_start + row)
        valid = row < tl.where(is_y, m + padded_n, n) - row_start
        place = (item * partials + row_start // BLOCK_M) * (columns // BLOCK_N) + tl.program_id(1)
        tl.store(partial_ptr + place, tl.load(partial_ptr + place) + tl.sum(tl.where(valid, value, 0.0), 0))


@triton.jit(do_not_specialize=["count", "pulled"])
def _mmd_pull_kernel(
    slope_ptr,
    o_ptr,  # [items, padded, DP]: the points, or their directions
    weight_ptr,  # None, or of Z's points
    out_ptr,  # [items, count, d], to add to
    count,
    d,
    padded,
    first_row,
    local_row,
    first_column,
    rows,
    columns,
    pulled,
    scale,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_i += scale Σ_j w_ij (o_j − o_i) over the slab's `pulled` columns, or where INNER scale Σ_j w_ij o_j."""
    tile = tl.program_id(0) * BLOCK_M
    item = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    dim = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    slope_ptr += (item * rows + tile) * columns
    o_ptr += item * padded * DP
    there = o_ptr + tl.cast(first_column, tl.int64) * DP
    gradient = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slopes = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, pulled, BLOCK_K):
        w = tl.load(slope_ptr + row[:, None] * columns + start + inner[None, :])
        o = tl.load(there + tl.cast(start, tl.int64) * DP + inner[:, None] * DP + dim[None, :])
        gradient = tl.dot(w, o, gradient, input_precision=PRECISION)
        slopes += tl.sum(w, 1)
    first = tl.cast(first_row + tile, tl.int64)
    if not INNER:
        gradient -= slopes[:, None] * tl.load(o_ptr + first * DP + row[:, None] * DP + dim[None, :])
    gradient *= scale
    if weight_ptr is not None:
        gradient *= tl.load(weight_ptr + item * padded + first + row)[:, None]
    local = local_row + tile
    inside = (row < count - local)[:, None] & (dim < d)[None, :]
    out_ptr += (item * count + local) * d + row[:, None] * d + dim[None, :]
    tl.store(out_ptr, tl.load(out_ptr, mask=inside, other=0.0) + gradient, mask=inside)
