"""MMD² and its unit gradients of small samples on the GPU in one launch: there a launch costs more than the pairs.

A program has a tile of rows of X or Y, makes of them what `_mmd_pack_kernel` would, and streams both samples past them
in the same way. Whichever program of an item ends last adds all the partial sums, in their own order: the same bits
every time.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastgen.kernels import mmd_launch, relaunch
from fastgen.kernels.mmd import CLOSE, ESTIMATORS, _coefficients, _excluded, _expanded
from fastgen.kernels.mmd_halves import _dot, _halve
from fastgen.kernels.mmd_kernels import KINDS, LAPLACIAN, POLYNOMIAL, _evaluate
from fastgen.kernels.mmd_units import in_units
from torch import Tensor

MOST = 1024  # points of both samples together: beyond, the tiles of `_mmd_grad_kernel` are the faster ones
MOST_DIMS = 64
ROWS = 64  # BLOCK_M of every configuration: a warp group's
SLOTS = 32  # tiles of rows of an item, at most
KEPT = 1 << 14  # partial sums and items of a launch that room is kept for
LARGEST = tl.constexpr(mmd_launch.LARGEST)


@triton.jit
def _halves(z, PRECISION: tl.constexpr):
    """What products are made of: for "bf16x3" two bfloat16, whose sum has 17 bits of z."""
    if PRECISION == "bf16x3":
        high, low = _halve(z, False)
    else:
        high = z
        low = z
    return high, low


@triton.jit
def _load(
    points_ptr,
    start,
    count,
    d,
    scale,
    centre,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of points in units of the base, their halves and their squared norms, as `_mmd_pack_kernel` makes them:
    but beyond the last point that point again, which nothing is made of at a norm of inf."""
    row = start + tl.arange(0, BLOCK)
    dim = tl.arange(0, DP)
    place = tl.minimum(row, count - 1)[:, None] * d + dim[None, :]
    z = (tl.load(points_ptr + place, mask=(dim < d)[None, :], other=0.0).to(tl.float32) - centre[None, :]) * scale
    high, low = _halves(z, PRECISION)
    if PRECISION == "bf16x3":
        # The points are those that the products see: then no distance is off by more than a share of itself.
        z = high.to(tl.float32) + low.to(tl.float32)
    norm = tl.sum(z * z, 1)
    norm = tl.where(norm <= LARGEST, norm, float("nan"))
    if KIND >= POLYNOMIAL:
        norm -= norm
    return z, high, low, tl.where(row < count, norm, float("inf"))


@triton.jit
def _product(a, a_low, b, b_low, total, WHOLE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a·b, of halves as `_dot`."""
    if PRECISION == "bf16x3":
        total = _dot(a, a_low, b, b_low, total, WHOLE)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _direct(
    rows_ptr,
    first,
    rows,
    columns_ptr,
    start,
    columns,
    d,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """u of a tile from differences."""
    row = first + tl.arange(0, BLOCK_M)
    column = start + tl.arange(0, BLOCK_N)
    u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(d):
        a = tl.load(rows_ptr + row * d + c, mask=row < rows, other=0.0).to(tl.float32)
        b = tl.load(columns_ptr + column * d + c, mask=column < columns, other=0.0).to(tl.float32)
        difference = (a[:, None] - b[None, :]) * scale
        u += difference * difference
    return u


@triton.jit(do_not_specialize=["n", "m"])
def _mmd_small_kernel(
    x_ptr,
    y_ptr,
    x_weight_ptr,  # None, or [items, n] and [items, m]
    y_weight_ptr,
    coefficients_ptr,  # None, or [items, 3] float64
    value_ptr,
    gx_ptr,
    gy_ptr,
    partial_ptr,
    counter_ptr,
    n,
    m,
    d,
    scale,
    gradient_scale,
    parameters,
    KIND: tl.constexpr,
    FORM: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    AT_ZERO: tl.constexpr,  # what a pair i = i adds that is left out of the sums
    TERMS: tl.constexpr,
    SIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Rows of one tile against all points: their part of the value, and their gradients if these are asked for."""
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    item = tl.program_id(1).to(tl.int64)
    tiles_x = tl.cdiv(n, BLOCK_M)
    is_y = tile >= tiles_x
    first = tl.where(is_y, tile - tiles_x, tile) * BLOCK_M
    rows = tl.where(is_y, m, n)
    x_ptr += item * n * d
    y_ptr += item * m * d
    row = first + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DP)
    if KIND < POLYNOMIAL:
        centre = tl.load(x_ptr + dim, mask=dim < d, other=0.0).to(tl.float32)
    else:
        centre = tl.zeros([DP], tl.float32)
    rows_ptr = tl.where(is_y, y_ptr, x_ptr)
    z, z_high, z_low, norm = _load(rows_ptr, first, rows, d, scale, centre, KIND, BLOCK_M, DP, PRECISION)
    a_xx, a_yy, a_xy = _coefficients(coefficients_ptr, item, n, m, ESTIMATOR)
    a_same = tl.where(is_y, a_yy, a_xx)
    if x_weight_ptr is not None:
        x_weight_ptr += item * n
        y_weight_ptr += item * m
        row_weight = tl.load(tl.where(is_y, y_weight_ptr, x_weight_ptr) + row, mask=row < rows, other=0.0)
    # The pairs i = i of the biased estimator are left out of the sums where their distance is exactly zero.
    value = tl.zeros([BLOCK_M], tl.float64)
    if AT_ZERO > 0:
        value += tl.where(tl.where(is_y, TERMS & 2, TERMS & 1) > 0, AT_ZERO * a_same, 0.0)
        if x_weight_ptr is not None:
            value *= row_weight
    slopes = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gradient = tl.zeros([BLOCK_M, DP], tl.float32)
    for side in range(2):
        of_y = side == 1
        same = of_y == is_y
        # XY is met from both sides where both have a gradient, and only from X where not.
        a = tl.where(same, a_same, -a_xy if SIDES == 2 else -2.0 * a_xy)
        slope_scale = tl.where(same, a_same, -a_xy).to(tl.float32)
        across = TERMS & 4 if SIDES == 2 else tl.where(is_y, 0, TERMS & 4)
        met = tl.where(same, tl.where(is_y, TERMS & 2, TERMS & 1), across) > 0
        columns = tl.where(of_y, m, n)
        columns_ptr = tl.where(of_y, y_ptr, x_ptr)
        shift = _excluded(is_y, same, 0, KIND, ESTIMATOR)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, tl.where(met, columns, 0), BLOCK_N):
            _, other, other_low, other_norm = _load(
                columns_ptr, start, columns, d, scale, centre, KIND, BLOCK_N, DP, PRECISION
            )
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            product = _product(z_high, z_low, tl.trans(other), tl.trans(other_low), product, True, PRECISION)
            norms = norm[:, None] + other_norm[None, :]
            u = _expanded(product, norms, first, start, shift, parameters, KIND, BLOCK_M, BLOCK_N)
            if KIND >= LAPLACIAN and KIND < POLYNOMIAL:
                close = u < norms * CLOSE
                if tl.max(close.to(tl.int32)) > 0:
                    direct = _direct(rows_ptr, first, rows, columns_ptr, start, columns, d, scale, BLOCK_M, BLOCK_N)
                    u = tl.where(close, direct, u)
            k, w = _evaluate(u, parameters, KIND, FORM, PTX)
            if x_weight_ptr is not None:
                column = start + tl.arange(0, BLOCK_N)
                weight_ptr = tl.where(of_y, y_weight_ptr, x_weight_ptr)
                weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0)[None, :]
                k *= weight
                w *= weight
            total += k
            if SIDES > 0:
                w *= slope_scale
                slopes += w
                w, w_low = _halves(w, PRECISION)
                gradient = _product(w, w_low, other, other_low, gradient, False, PRECISION)
        value += tl.sum(total, 1).to(tl.float64) * a
    if KIND < POLYNOMIAL:
        gradient -= tl.sum(slopes, 1)[:, None] * z
    gradient *= gradient_scale
    if x_weight_ptr is not None:
        value *= row_weight
        gradient *= row_weight[:, None]
    inside = (row < rows)[:, None] & (dim < d)[None, :]
    cell = row[:, None] * d + dim[None, :]
    if is_y:
        if SIDES == 2:
            tl.store(gy_ptr + item * m * d + cell, gradient, mask=inside)
    else:
        if SIDES > 0:
            tl.store(gx_ptr + item * n * d + cell, gradient, mask=inside)
    partial_ptr += item * tiles
    tl.store(partial_ptr + tile, tl.sum(tl.where(row < rows, value, 0.0), 0))
    # Released with this program's partial sum, acquired with the others': whoever counts to the end sees them all.
    if tl.atomic_add(counter_ptr + item, 1, sem="acq_rel", scope="gpu") == tiles - 1:
        slot = tl.arange(0, SLOTS)
        partial = tl.load(partial_ptr + slot, mask=slot < tiles, other=0.0, cache_modifier=".cg")
        tl.store(value_ptr + item, tl.sum(partial, 0).to(tl.float32))
        tl.store(counter_ptr + item, 0)


_launcher = relaunch.Relaunch(_mmd_small_kernel)


def fits(x: Tensor, y: Tensor) -> bool:
    return x.shape[-2] + y.shape[-2] <= MOST and x.shape[-1] <= MOST_DIMS


def blocks(kind: str, precision: str) -> dict[str, int]:
    """What needs more registers meets fewer columns at a time. Loads are not made a step ahead: that takes registers
    too, and the columns are in the nearest cache but for the first program that meets them."""
    narrow = kind in mmd_launch.COSTLY or precision in ("ieee", "bf16x6", "tf32x3")
    warps = 8 if precision == "ieee" else 4  # without tensor cores a tile's rows need not be a warp group's
    return {"BLOCK_M": ROWS, "BLOCK_N": 16 if narrow else 32, "num_warps": warps, "num_stages": 1}


class _Plan(NamedTuple):
    """What a launch needs to know but for the samples' sizes."""

    numbers: tuple[Any, ...]  # the kernel's last arguments
    constants: dict[str, Any]
    key: object  # of this plan alone


@functools.lru_cache(maxsize=256)
def _plan(
    d: int,
    sides: int,
    precision: str,
    pairs: tuple[float, float, float, float] | None,
    kind: str,
    parameters: tuple[float, ...],
    estimator: str,
    terms: int,
    ptx: bool,
) -> _Plan:
    name, base, units, form, slope = in_units(kind, parameters, pairs)
    inner = kind == "polynomial"
    scale = base**-0.5
    precision = mmd_launch.product_precision(kind, precision)
    dp = max(16, 1 << (d - 1).bit_length())
    constants = {
        "KIND": KINDS[name] + (int(parameters[0]) - 1 if inner else 0),
        "FORM": form,
        "ESTIMATOR": ESTIMATORS[estimator],
        "AT_ZERO": mmd_launch.at_zero(kind, parameters, estimator),
        "TERMS": terms,
        "SIDES": sides,
        "SLOTS": SLOTS,
        "DP": dp,
        "PRECISION": precision,
        "PTX": ptx,
        **blocks(kind, precision),
    }
    return _Plan((d, scale, 4 * slope * scale, units), constants, object())


_kept: dict[int, tuple[Tensor, Tensor]] = {}


def _device(x: Tensor) -> int | None:
    """Where launches go to a device's default stream, which cannot be captured: the device; else None."""
    if not x.is_cuda:
        return -1
    device = x.get_device()
    return None if torch._C._cuda_getCurrentRawStream(device) else device


def _room(x: Tensor, items: int, tiles: int) -> tuple[Tensor, Tensor]:
    """For partial sums, and counters that are zero.

    A launch leaves the counters at zero, and the launches of one stream run one after another: what is kept for the
    default stream serves them all. A graph may be replayed on any stream, beside other work: what is captured has room
    of its own, made zero within the graph, and no graph runs beside itself. So has a launch on any other stream: it may
    be the rehearsal of a graph, where torch.compile has memory come from a pool that nothing else may keep."""
    device = _device(x)
    keeps = device is not None and items * tiles <= KEPT
    if keeps and (found := _kept.get(device)) is not None:
        return found
    size = KEPT if keeps else items * tiles
    made = x.new_empty(size, dtype=torch.float64), x.new_zeros(size, dtype=torch.int32)
    if keeps:
        _kept[device] = made
    return made


def mmd(
    x: Tensor,
    y: Tensor,
    sides: int,
    precision: str,
    pairs: tuple[float, float, float, float] | None,
    kind: str,
    parameters: Sequence[float],
    estimator: str,
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
    coefficients: Tensor | None = None,
    terms: int = mmd_launch.ALL,
) -> tuple[Tensor, ...]:
    """`mmd_launch.mmd` of samples that `fits`; the current device is theirs."""
    *batch, n, d = x.shape
    m = y.shape[-2]
    items = batch[0] if batch else 1
    ptx = x.is_cuda and torch.version.hip is None
    plan = _plan(d, sides, precision, pairs, kind, tuple(parameters), estimator, terms, ptx)
    if x_weight is not None or y_weight is not None:
        x_weight, y_weight = (
            (x.new_ones(()) if w is None else w).to(torch.float32).expand(items, size).contiguous()
            for w, size in ((x_weight, n), (y_weight, m))
        )
    if coefficients is not None:
        coefficients = coefficients.to(torch.float64).expand(items, 3).contiguous()
    tiles = -(-n // ROWS)
    if sides == 2 or terms & mmd_launch.YY:
        tiles += -(-m // ROWS)
    x, y = x.contiguous(), y.contiguous()
    value = x.new_empty(batch, dtype=torch.float32)
    gradients = [torch.empty_like(p, dtype=torch.float32) for p in (x, y)[:sides]]
    given = (x, y, x_weight, y_weight, coefficients)
    made = (value, *gradients, *(None,) * (2 - sides), *_room(x, items, tiles))
    arguments = (*given, *made, n, m, *plan.numbers)
    key = (plan.key, x.dtype, x.get_device(), relaunch.aligned(*given), tiles, items)
    if not _launcher.again(key, arguments):
        _launcher.first(key, (tiles, items), arguments, plan.constants)
    return value, *gradients
