"""MMD² and its unit gradients on the GPU: one pass over the pairs, nothing of size N·M.

`_mmd_pack_kernel` centres, scales and pads the points into Z = [X; Y] with their norms; `_mmd_grad_kernel` keeps a tile
of rows resident and streams columns past it (distance by a matrix product, kernel value and slope, a second product
for the gradient); `_mmd_value_kernel` walks the upper triangle of tiles where no gradient is asked for. Each program
writes its own float64 partial sum: no atomics, the same bits every time. What does not fit on chip, the gradient of
many coordinates and the Hessian's product, is in mmd_slab.py.

In units u = d²/base a pair needs its norms − 2·product, or the product itself where the kernel is polynomial. Padding,
and pairs that do not count, are at u = inf, where every kernel and its slope are 0. In the default precision Z is in
halves (mmd_halves.py), and tensor cores add up the norms too.
"""

import triton
import triton.language as tl
from fastgen.kernels.aot import Spec
from fastgen.kernels.mmd_halves import PARTS, _columns, _dot, _halve, _norm_parts, _rows
from fastgen.kernels.mmd_kernels import IMQ, IMQ_PAIRS, LAPLACIAN, POLYNOMIAL, _evaluate, _slope

ESTIMATORS = {"unbiased": 0, "biased": 1, "u_statistic": 2}
# Where d² is less than this share of the two norms a root would be left without digits: made of differences instead.
CLOSE = tl.constexpr(2.0**-6)


@triton.jit(do_not_specialize=["n", "m"])
def _mmd_pack_kernel(
    x_ptr,
    y_ptr,
    z_ptr,  # bfloat16 where Z is packed in halves
    norm_ptr,  # None where nobody asks
    n,
    m,
    d,
    padded_n,
    padded,
    scale,
    limit,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
    DC: tl.constexpr,
    DP: tl.constexpr,
):
    """Z = (points − x₀)·scale, or where not CENTRED points·scale, zeros beyond; and its squared norms (then zeros), inf
    beyond. A point whose square is over the limit gets NaN."""
    SPLIT: tl.constexpr = z_ptr.dtype.element_ty == tl.bfloat16
    WIDTH: tl.constexpr = 2 * DP + PARTS if SPLIT else DP
    tile = tl.program_id(0)
    item = tl.program_id(1).to(tl.int64)
    start = (tile * BLOCK).to(tl.int64)
    is_y = start >= padded_n
    row = tl.arange(0, BLOCK)
    valid = row < tl.where(is_y, m + padded_n, n) - start
    norm = tl.zeros([BLOCK], tl.float32)
    z_ptr += (item * padded + start) * WIDTH
    for first in range(0, DP, DC):
        column = first + tl.arange(0, DC)
        inside = column < d
        cell = row[:, None] * d + column[None, :]
        mask = valid[:, None] & inside[None, :]
        if is_y:
            points = tl.load(y_ptr + (item * m + start - padded_n) * d + cell, mask=mask, other=0.0).to(tl.float32)
        else:
            points = tl.load(x_ptr + (item * n + start) * d + cell, mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            points -= tl.load(x_ptr + item * n * d + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        z = tl.where(valid[:, None], points * scale, 0.0)  # [BLOCK, DC]
        place = z_ptr + row[:, None] * WIDTH + column[None, :]
        if SPLIT:
            high, low = _halve(z, False)
            z = high.to(tl.float32) + low.to(tl.float32)  # whose distances are what is measured
            tl.store(place, high)
            tl.store(place + DP, low)
        else:
            tl.store(place, z)
        norm += tl.sum(z * z, 1)
    norm = tl.where(norm <= limit, norm, float("nan"))
    if not CENTRED:
        norm -= norm
    norm = tl.where(valid, norm, float("inf"))
    if SPLIT:
        tl.store(z_ptr + row[:, None] * WIDTH + 2 * DP + tl.arange(0, PARTS)[None, :], _norm_parts(norm))
    elif norm_ptr is not None:
        tl.store(norm_ptr + item * padded + start + row, norm)


@triton.jit
def _coefficients(coefficients_ptr, item, n, m, ESTIMATOR: tl.constexpr):
    """a_xx, a_yy, a_xy in float64: those given, or of unweighted points."""
    if coefficients_ptr is not None:
        place = coefficients_ptr + 3 * item
        return tl.load(place), tl.load(place + 1), tl.load(place + 2)
    n = n.to(tl.float64)
    m = m.to(tl.float64)
    if ESTIMATOR == 1:
        return 1.0 / (n * n), 1.0 / (m * m), 1.0 / (n * m)
    elif ESTIMATOR == 2:
        return 1.0 / (n * (n - 1.0)), 1.0 / (m * (m - 1.0)), 1.0 / (n * (n - 1.0))
    return 1.0 / (n * (n - 1.0)), 1.0 / (m * (m - 1.0)), 1.0 / (n * m)


@triton.jit
def _excluded(is_y, same, padded_n, KIND: tl.constexpr, ESTIMATOR: tl.constexpr):
    """Column − row of the pairs that do not count; no column is 2^30 rows away."""
    own = 1 << 30 if KIND >= POLYNOMIAL and ESTIMATOR == 1 else 0
    cross = tl.where(is_y, -padded_n, padded_n) if ESTIMATOR == 2 else 1 << 30
    return tl.where(same, own, cross)


@triton.jit
def _product(
    a_ptr,
    first,
    b_ptr,
    start,
    product,
    DP: tl.constexpr,
    DC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """product + the inner products of the rows from `first` with those from `start`, DC coordinates at a time."""
    # A tile's place in 64 bits, the cells within it in 32.
    a_ptr += tl.cast(first, tl.int64) * DP
    b_ptr += tl.cast(start, tl.int64) * DP
    for c in range(0, DP, DC):
        dim = c + tl.arange(0, DC)[None, :]
        a = tl.load(a_ptr + tl.arange(0, BLOCK_M)[:, None] * DP + dim)
        b = tl.load(b_ptr + tl.arange(0, BLOCK_N)[:, None] * DP + dim)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def _within_reach(u, row_start, start, shift, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """u, of IMQ 1 + u, no less than it can be; where column − row = shift the pair is put out of reach."""
    if KIND < POLYNOMIAL:
        # NaN is kept: a rounded distance below zero is zero, a bad point is not.
        u = tl.maximum(u, 1.0 if KIND <= IMQ else 0.0, propagate_nan=tl.PropagateNan.ALL)
    first = row_start + shift
    if (first < start + BLOCK_N) & (start < first + BLOCK_M):
        row = first - start + tl.arange(0, BLOCK_M)
        u = tl.where(tl.arange(0, BLOCK_N)[None, :] == row[:, None], float("inf"), u)
    return u


@triton.jit
def _expanded(
    product,
    norms,
    row_start,
    start,
    shift,
    parameters,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """u of a tile, of IMQ 1 + u, from its inner products; where column − row = shift the pair is put out of reach."""
    if KIND >= POLYNOMIAL:
        u = product + (norms + parameters[0])
    else:
        u = (norms + 1.0 if KIND <= IMQ else norms) - 2.0 * product
    return _within_reach(u, row_start, start, shift, KIND, BLOCK_M, BLOCK_N)


@triton.jit
def _distances(
    product,
    norm,
    z_ptr,
    norm_ptr,
    row_start,
    start,
    shift,
    d,
    parameters,
    KIND: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`_expanded` of packed points; a rooted kernel's close pairs are made of differences."""
    column = tl.arange(0, BLOCK_N)
    norms = norm[:, None] + tl.load(norm_ptr + start + column)[None, :]
    u = _expanded(product, norms, row_start, start, shift, parameters, KIND, BLOCK_M, BLOCK_N)
    if KIND >= LAPLACIAN and KIND < POLYNOMIAL:
        close = u < norms * CLOSE
        if tl.max(close.to(tl.int32)) > 0:
            here = z_ptr + tl.cast(row_start, tl.int64) * DP + tl.arange(0, BLOCK_M) * DP
            there = z_ptr + tl.cast(start, tl.int64) * DP + column * DP
            direct = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for c in range(d):
                difference = tl.load(here + c)[:, None] - tl.load(there + c)[None, :]
                direct += difference * difference
            u = tl.where(close, direct, u)
    return u


@triton.jit
def _distances_of_halves(
    z,
    z_low,
    z_norm,
    z_ptr,
    row_start,
    start,
    shift,
    KIND: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`_distances` of points in halves, `_rows`' with the columns from `start` on; and the columns' halves."""
    other, other_low, other_norm = _columns(z_ptr, start, DP, BLOCK_N)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    product = _dot(z, z_low, tl.trans(other), tl.trans(other_low), product, True)
    u = tl.dot(z_norm, tl.trans(other_norm), product)
    return _within_reach(u, row_start, start, shift, KIND, BLOCK_M, BLOCK_N), other, other_low


@triton.jit
def _lanes(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums of the rows in four parts, each of what one thread has of a tensor core's product."""
    return tl.sum(tl.sum(tl.reshape(x, [BLOCK_M, BLOCK_N // 8, 4, 2]), 3), 1)


@triton.jit(do_not_specialize=["n", "m"])
def _mmd_grad_kernel(
    z_ptr,
    norm_ptr,  # None where Z is in halves, as in the value's kernel
    weight_ptr,  # None, or of Z's points
    coefficients_ptr,  # None, or [items, 3] float64
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
    FORM: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    TERMS: tl.constexpr,
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
    SPLIT: tl.constexpr = norm_ptr is None
    WIDTH: tl.constexpr = 2 * DP + PARTS if SPLIT else DP
    z_ptr += item * padded * WIDTH
    first = (tile * BLOCK_M).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, DP)
    is_y = first >= padded_n
    if SPLIT:
        z, z_low, z_norm = _rows(z_ptr, first, 1.0 if KIND <= IMQ else 0.0, DP, BLOCK_M)
    else:
        norm_ptr += item * padded
        z = tl.load(z_ptr + first * DP + row[:, None] * DP + dim[None, :])  # [BLOCK_M, DP]
        norm = tl.load(norm_ptr + first + row)
    a_xx, a_yy, a_xy = _coefficients(coefficients_ptr, item, n, m, ESTIMATOR)
    a_same = tl.where(is_y, a_yy, a_xx)
    a_twice = 2.0 * a_same
    a_other = -2.0 * a_xy
    pull_same = a_same.to(tl.float32)
    pull_other = -a_xy.to(tl.float32)
    value = tl.zeros([BLOCK_M, 4], tl.float64)
    slopes = tl.zeros([BLOCK_M, 4], tl.float32)
    gradient = tl.zeros([BLOCK_M, DP], tl.float32)
    begin = tl.where(is_y, 0 if TERMS & 4 else padded_n, 0 if TERMS & 1 else padded_n)
    end = tl.where(is_y, padded if TERMS & 2 else padded_n, padded if TERMS & 4 else padded_n)
    for start in range(begin, end, BLOCK_N):
        same = (start >= padded_n) == is_y
        shift = _excluded(is_y, same, padded_n, KIND, ESTIMATOR)
        if SPLIT:
            u, other, other_low = _distances_of_halves(
                z, z_low, z_norm, z_ptr, tile * BLOCK_M, start, shift, KIND, DP, BLOCK_M, BLOCK_N
            )
        else:
            other = tl.load(z_ptr + tl.cast(start, tl.int64) * DP + column[:, None] * DP + dim[None, :])
            product = tl.dot(z, tl.trans(other), input_precision=PRECISION)
            u = _distances(
                product, norm, z_ptr, norm_ptr, tile * BLOCK_M, start, shift, d, parameters, KIND, DP, BLOCK_M, BLOCK_N
            )
        # Two tiles that meet from both sides count for the value once, from either side as often as from the other; XY
        # is met only from X where Y has no gradient.
        block = start // BLOCK_M
        counted = (block == tile) | ((block > tile) == (((block ^ tile) & 1) == 1))
        if not BOTH:
            counted = counted | (not same)
        share = tl.where(same, tl.where(block == tile, a_same, a_twice), a_other)
        weight = tl.load(weight_ptr + item * padded + start + column)[None, :] if weight_ptr is not None else 1.0
        if KIND != IMQ_PAIRS:
            k, w = _evaluate(u, parameters, KIND, FORM, PTX)
            value += _lanes(k * weight, BLOCK_M, BLOCK_N).to(tl.float64) * tl.where(counted, share, 0.0)
        elif counted:
            k, w = _evaluate(u, parameters, KIND, FORM, PTX)
            value += _lanes(k * weight, BLOCK_M, BLOCK_N).to(tl.float64) * share
        else:
            w = _slope(u, parameters, KIND, FORM, PTX)
        w *= weight
        pull = tl.where(same, pull_same, pull_other)
        slopes += _lanes(w, BLOCK_M, BLOCK_N) * pull
        if SPLIT:
            # Added here, and not in the tensor cores, which would round towards zero each time.
            high, low = _halve(w, PTX)
            pulled = _dot(high, low, other, other_low, tl.zeros([BLOCK_M, DP], tl.float32), False)
            gradient += pulled * pull
        else:
            gradient = tl.dot(w * pull, other, gradient, input_precision=PRECISION)
    if KIND < POLYNOMIAL:
        if SPLIT:  # read again, so as not to be in registers all the while
            place = z_ptr + first * WIDTH + row[:, None] * WIDTH + dim[None, :]
            z = tl.load(place, eviction_policy="evict_first").to(tl.float32)
            z += tl.load(place + DP, eviction_policy="evict_first").to(tl.float32)
        gradient -= tl.sum(slopes, 1)[:, None] * z
    gradient *= gradient_scale
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + item * padded + first + row)
        value *= weight[:, None]
        gradient *= weight[:, None]
    local = tl.where(is_y, first - padded_n, first)
    valid = row < tl.where(is_y, m, n) - local
    tl.store(partial_ptr + item * partials + tile, tl.sum(tl.where(valid, tl.sum(value, 1), 0.0), 0))
    inside = valid[:, None] & (dim < d)[None, :]
    cell = row[:, None] * d + dim[None, :]
    if is_y:
        tl.store(gy_ptr + (item * m + local) * d + cell, gradient, mask=inside)
    else:
        tl.store(gx_ptr + (item * n + local) * d + cell, gradient, mask=inside)


@triton.jit(do_not_specialize=["n", "m"])
def _mmd_value_kernel(
    z_ptr,
    norm_ptr,
    weight_ptr,
    coefficients_ptr,
    partial_ptr,
    n,
    m,
    d,
    padded_n,
    padded,
    first_tile,
    partials,
    parameters,
    KIND: tl.constexpr,
    FORM: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DC: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Rows of one tile against the columns from its own on: the long rows come first, each pair is met once."""
    tile = tl.program_id(0) + first_tile
    item = tl.program_id(1).to(tl.int64)
    SPLIT: tl.constexpr = norm_ptr is None
    z_ptr += item * padded * (2 * DP + PARTS if SPLIT else DP)
    first = (tile * BLOCK_M).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    is_y = first >= padded_n
    a_xx, a_yy, a_xy = _coefficients(coefficients_ptr, item, n, m, ESTIMATOR)
    a_same = tl.where(is_y, a_yy, a_xx)
    value = tl.zeros([BLOCK_M, 4], tl.float64)
    if SPLIT:
        z, z_low, z_norm = _rows(z_ptr, first, 1.0 if KIND <= IMQ else 0.0, DP, BLOCK_M)
    else:
        norm_ptr += item * padded
        norm = tl.load(norm_ptr + first + row)
        if DC == DP:
            z = tl.load(z_ptr + first * DP + row[:, None] * DP + tl.arange(0, DP)[None, :])  # [BLOCK_M, DP]
    begin = tl.where(is_y, tile * BLOCK_M, tile * BLOCK_M if TERMS & 1 else padded_n)
    end = tl.where(is_y, padded, padded if TERMS & 4 else padded_n)
    for start in range(begin, end, BLOCK_N):
        same = (start >= padded_n) == is_y
        shift = _excluded(is_y, same, padded_n, KIND, ESTIMATOR)
        if SPLIT:
            u, _, _ = _distances_of_halves(
                z, z_low, z_norm, z_ptr, tile * BLOCK_M, start, shift, KIND, DP, BLOCK_M, BLOCK_N
            )
        else:
            if DC == DP:
                place = z_ptr + tl.cast(start, tl.int64) * DP
                other = tl.load(place + column[:, None] * DP + tl.arange(0, DP)[None, :])
                product = tl.dot(z, tl.trans(other), input_precision=PRECISION)
            else:
                product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                product = _product(z_ptr, first, z_ptr, start, product, DP, DC, BLOCK_M, BLOCK_N, PRECISION)
            u = _distances(
                product, norm, z_ptr, norm_ptr, tile * BLOCK_M, start, shift, d, parameters, KIND, DP, BLOCK_M, BLOCK_N
            )
        k, _ = _evaluate(u, parameters, KIND, FORM, PTX)
        if weight_ptr is not None:
            k *= tl.load(weight_ptr + item * padded + start + column)[None, :]
        # A tile against itself meets each of its pairs twice.
        twice = tl.where(start < (tile + 1) * BLOCK_M, a_same, 2.0 * a_same)
        value += _lanes(k, BLOCK_M, BLOCK_N).to(tl.float64) * tl.where(same, twice, -2.0 * a_xy)
    if weight_ptr is not None:
        value *= tl.load(weight_ptr + item * padded + first + row)[:, None]
    valid = row < tl.where(is_y, m + padded_n, n) - first
    tl.store(partial_ptr + item * partials + tile, tl.sum(tl.where(valid, tl.sum(value, 1), 0.0), 0))


def aot_specs() -> list[Spec]:
    from fastgen.kernels import mmd_specs

    return mmd_specs.specs()
