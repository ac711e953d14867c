"""Exact nearest neighbours on the GPU, k = 1: half-precision products find rows, float64 decides, a bound proves.

With c a point about the mean, q' = q − c, b' = b − c:  ½‖q − b‖² = ½‖q'‖² + (½‖b'‖² − q'·b').
`_nearest_extent_kernel` and `_nearest_centre_kernel` find c and how far points lie from it. `_nearest_pack_kernel`
rounds s·q' and t·b' (s, t powers of two) to float16, which has TF32's mantissa at bfloat16's speed, and measures what
rounding took away. `_nearest_filter_kernel` scores all pairs, st·½‖b'‖² − q̂·b̂, on the tensor cores and keeps of each
query and each of four classes of rows the four groups of 32 rows with the smallest minimum, and the smallest minimum of
those it dropped: two instructions a pair, since no index is carried, and nothing of size N·M is written.
`_nearest_rank_kernel` measures the rows of the groups that the bound leaves, in the defined order of float64 sums, and
says whether a dropped group could hold the answer; such queries are searched again (ops/nearest.py).
kernels/nearest_launch.py has the bound.

A group is what one thread has of a tile's scores where the tensor cores leave them: of a query's 128 rows a class c has
8 j + 2 c and 8 j + 2 c + 1. So groups a quarter of a tile cost less than the tile's minimum: threads exchange nothing.
"""

import triton
import triton.language as tl
from fastgen.kernels.aot import Spec

TENSOR_CORE = tl.constexpr(2.0**-23)  # of the bound in kernels/nearest_launch.py
FLOAT32 = tl.constexpr(2.0**-22)
SUBNORMAL = tl.constexpr(2.0**-140)


@triton.jit(do_not_specialize=["queries", "rows", "d"])
def _nearest_extent_kernel(
    query_ptr,
    database_ptr,
    allowed_ptr,
    partial_ptr,
    queries,
    rows,
    d,
    MASKED: tl.constexpr,
    SLABS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of a slab of the queries or of the database in some columns: the sum, the least, the most and how many rows."""
    slab = tl.program_id(1)
    side = tl.program_id(2)
    x_ptr = query_ptr if side == 0 else database_ptr
    count = queries if side == 0 else rows
    each = tl.cdiv(count, SLABS * BLOCK) * BLOCK
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK, BLOCK_K], tl.float64)
    least = tl.full([BLOCK, BLOCK_K], float("inf"), tl.float32)
    most = tl.full([BLOCK, BLOCK_K], float("-inf"), tl.float32)
    seen = tl.zeros([BLOCK], tl.int32)
    first = slab.to(tl.int64) * each
    for start in range(0, each, BLOCK):
        row = first + start + tl.arange(0, BLOCK)
        read = row < count
        if MASKED:
            hidden = tl.load(allowed_ptr + row, mask=read & (side == 1), other=1) == 0
            read = read & ~hidden
        inside = read[:, None] & (column < d)[None, :]
        x = tl.load(x_ptr + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += x.to(tl.float64)
        least = tl.minimum(least, tl.where(inside, x, float("inf")))
        most = tl.maximum(most, tl.where(inside, x, float("-inf")))
        seen += read.to(tl.int32)
    place = partial_ptr + ((side * 4) * SLABS + slab) * d + column
    tl.store(place, tl.sum(total, 0), mask=column < d)
    tl.store(place + SLABS * d, tl.min(least, 0).to(tl.float64), mask=column < d)
    tl.store(place + 2 * SLABS * d, tl.max(most, 0).to(tl.float64), mask=column < d)
    count_seen = tl.zeros([BLOCK_K], tl.float64) + tl.sum(seen, 0)
    tl.store(place + 3 * SLABS * d, count_seen, mask=column < d)


@triton.jit(do_not_specialize=["d"])
def _nearest_centre_kernel(
    partial_ptr, centre_ptr, extent_ptr, d, SLABS: tl.constexpr, BLOCK_K: tl.constexpr, WIDEST: tl.constexpr
):
    """The database's mean, and the farthest that queries and rows lie from it in each block of columns."""
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (column < d)[None, :]
    place = partial_ptr + tl.arange(0, SLABS)[:, None] * d + column[None, :]
    plane = SLABS * d
    total = tl.sum(tl.load(place + 4 * plane, mask=inside, other=0.0), 0)
    count = tl.sum(tl.load(place + 7 * plane, mask=inside, other=0.0), 0)
    centre = total / tl.where(column < d, count, 1.0)
    tl.store(centre_ptr + column, centre, mask=column < d)
    for side in tl.static_range(2):
        least = tl.min(tl.load(place + (4 * side + 1) * plane, mask=inside, other=float("inf")), 0)
        most = tl.max(tl.load(place + (4 * side + 2) * plane, mask=inside, other=float("-inf")), 0)
        extent = tl.where(column < d, tl.maximum(most - centre, centre - least), 0.0)
        tl.store(extent_ptr + side * WIDEST + tl.program_id(0), tl.max(extent, 0))


@triton.jit
def _power(extent):
    """The power of two that takes a number to between 8 and 16."""
    exponent = (tl.maximum(extent, 1e-30).to(tl.int64, bitcast=True) >> 52) - 1023
    return ((1023 + 3 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["queries", "rows", "d", "blocks", "query_programs", "row_programs"])
def _nearest_pack_kernel(
    query_ptr,
    database_ptr,
    allowed_ptr,
    centre_ptr,
    extent_ptr,
    packed_query_ptr,
    packed_ptr,
    length_ptr,
    lost_ptr,
    norm_ptr,
    half_ptr,
    most_ptr,
    scale_ptr,
    queries,
    rows,
    d,
    blocks,
    query_programs,
    row_programs,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEST: tl.constexpr,
):
    """float16 of (x − centre)·scale, zeros beyond. Of queries the lengths of what was rounded and of what rounding took
    away, and ‖q'‖²; of rows half the square as scores have it, infinite where no row may be chosen, and the greatest of
    both lengths; the scales' reciprocals and their product."""
    side = (tl.program_id(0) >= query_programs).to(tl.int32)
    program = tl.program_id(0) - side * query_programs
    x_ptr = query_ptr if side == 0 else database_ptr
    out_ptr = packed_query_ptr if side == 0 else packed_ptr
    row = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    read = row < (queries if side == 0 else rows)
    if MASKED:
        hidden = tl.load(allowed_ptr + row, mask=read & (side == 1), other=1) == 0
        read = read & ~hidden
    part = tl.arange(0, WIDEST)
    known = part < blocks
    s = _power(tl.max(tl.load(extent_ptr + part, mask=known, other=0.0), 0))
    t = _power(tl.max(tl.load(extent_ptr + WIDEST + part, mask=known, other=0.0), 0))
    s, t = tl.minimum(s, t * 1048576.0), tl.minimum(t, s * 1048576.0)
    scale = tl.where(side == 0, s, t)
    norm = tl.zeros([BLOCK], tl.float64)
    loss = tl.zeros([BLOCK], tl.float64)
    for block in range(blocks):
        column = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = read[:, None] & (column < d)[None, :]
        x = tl.load(x_ptr + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float64)
        centre = tl.load(centre_ptr + column, mask=column < d, other=0.0)
        exact = tl.where(inside, (x - centre[None, :]) * scale, 0.0)
        rounded = exact.to(tl.float32).to(tl.float16)
        tl.store(out_ptr + row[:, None] * (blocks * BLOCK_K) + column[None, :], rounded)
        off = exact - rounded.to(tl.float64)
        norm += tl.sum(exact * exact, 1)
        loss += tl.sum(off * off, 1)
    length = tl.sqrt(norm)
    lost = tl.sqrt(loss)
    if side == 0:
        tl.store(length_ptr + row, length)
        tl.store(lost_ptr + row, lost)
        tl.store(norm_ptr + row, norm / (s * s))
        if program == 0:
            tl.store(scale_ptr, 1.0 / s)
            tl.store(scale_ptr + 1, 1.0 / t)
            tl.store(scale_ptr + 2, s * t)
    else:
        tl.store(half_ptr + row, tl.where(read, norm * (s / (2.0 * t)), float("inf")).to(tl.float32))
        # A maximum would pass over NaN.
        tl.store(most_ptr + program, tl.max(tl.where(length == length, length, float("inf")), 0))
        tl.store(most_ptr + row_programs + program, tl.max(tl.where(lost == lost, lost, float("inf")), 0))


@triton.jit
def _insert(low, tile, value, kept):
    """The smaller of two stays, the larger goes on."""
    first = low < value
    return (
        tl.where(first, low, value),
        tl.where(first, tile, kept),
        tl.where(first, value, low),
        tl.where(first, kept, tile),
    )


@triton.jit
def _keep(low, tile, v0, v1, v2, v3, t0, t1, t2, t3, dropped):
    """One more group of each query and class among the four kept."""
    v0, t0, low, tile = _insert(low, tile, v0, t0)
    v1, t1, low, tile = _insert(low, tile, v1, t1)
    v2, t2, low, tile = _insert(low, tile, v2, t2)
    v3, t3, low, tile = _insert(low, tile, v3, t3)
    return v0, v1, v2, v3, t0, t1, t2, t3, tl.minimum(dropped, low)


@triton.jit
def _take(score, start, v0, v1, v2, v3, t0, t1, t2, t3, dropped, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The groups of a tile of scores, which begins at a row."""
    tile = tl.zeros([BLOCK_M, 4], tl.int32) + start // 128
    if BLOCK_N == 128:
        low = tl.min(tl.min(tl.reshape(score, [BLOCK_M, 16, 4, 2]), 3), 1)
        v0, v1, v2, v3, t0, t1, t2, t3, dropped = _keep(low, tile, v0, v1, v2, v3, t0, t1, t2, t3, dropped)
    else:
        tl.static_assert(BLOCK_N == 256)
        both = tl.min(tl.min(tl.reshape(score, [BLOCK_M, 2, 16, 4, 2]), 4), 2)
        low, high = tl.split(tl.permute(both, (0, 2, 1)))
        v0, v1, v2, v3, t0, t1, t2, t3, dropped = _keep(low, tile, v0, v1, v2, v3, t0, t1, t2, t3, dropped)
        v0, v1, v2, v3, t0, t1, t2, t3, dropped = _keep(high, tile + 1, v0, v1, v2, v3, t0, t1, t2, t3, dropped)
    return v0, v1, v2, v3, t0, t1, t2, t3, dropped


@triton.jit(do_not_specialize=["tiles", "tiles_each", "parts"])
def _nearest_filter_kernel(
    q_ptr,
    b_ptr,
    half_ptr,
    value_ptr,
    tile_ptr,
    dropped_ptr,
    tiles,
    tiles_each,
    parts,
    blocks,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of queries against one part of the database. RESIDENT is the width where the queries stay in shared
    memory, 0 where they are read again for each tile: tiles and their blocks of columns are then one loop, so that the
    next tile is on its way while scores are looked at."""
    part = tl.program_id(1)
    query = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    v0 = tl.full([BLOCK_M, 4], float("inf"), tl.float32)
    v1 = v0
    v2 = v0
    v3 = v0
    dropped = v0
    t0 = tl.zeros([BLOCK_M, 4], tl.int32)
    t1 = t0
    t2 = t0
    t3 = t0
    first = part * tiles_each
    here = tl.minimum(tiles_each, tiles - first)
    if RESIDENT > 0:
        dim = tl.arange(0, RESIDENT)
        q = tl.load(q_ptr + query[:, None] * RESIDENT + dim[None, :])
        for tile in range(first, first + here):
            start = tl.cast(tile, tl.int64) * BLOCK_N
            half = tl.load(half_ptr + start + column)
            b = tl.load(b_ptr + start * RESIDENT + column[:, None] * RESIDENT + dim[None, :])
            score = half[None, :] - tl.dot(q, tl.trans(b))
            v0, v1, v2, v3, t0, t1, t2, t3, dropped = _take(
                score, tile * BLOCK_N, v0, v1, v2, v3, t0, t1, t2, t3, dropped, BLOCK_M, BLOCK_N
            )
    else:
        dim = tl.arange(0, BLOCK_K)
        width = blocks * BLOCK_K
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(here * blocks):
            tile = first + step // blocks
            block = step % blocks
            start = tl.cast(tile, tl.int64) * BLOCK_N
            at = block * BLOCK_K + dim
            q = tl.load(q_ptr + query[:, None] * width + at[None, :])
            b = tl.load(b_ptr + (start + column)[:, None] * width + at[None, :])
            product = tl.dot(q, tl.trans(b), product)
            if block == blocks - 1:
                score = tl.load(half_ptr + start + column)[None, :] - product
                v0, v1, v2, v3, t0, t1, t2, t3, dropped = _take(
                    score, tile * BLOCK_N, v0, v1, v2, v3, t0, t1, t2, t3, dropped, BLOCK_M, BLOCK_N
                )
                product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    place = (query * parts + part)[:, None] * 16 + tl.arange(0, 4)[None, :]
    tl.store(value_ptr + place, v0)
    tl.store(value_ptr + place + 4, v1)
    tl.store(value_ptr + place + 8, v2)
    tl.store(value_ptr + place + 12, v3)
    tl.store(tile_ptr + place, t0)
    tl.store(tile_ptr + place + 4, t1)
    tl.store(tile_ptr + place + 8, t2)
    tl.store(tile_ptr + place + 12, t3)
    tl.store(dropped_ptr + query * parts + part, tl.min(dropped, 1))


@triton.jit
def _eight(query_ptr, row_ptr, real, start, d):
    """Eight coordinates of the queries and of the rows."""
    column = (start + tl.arange(0, 8))[None, :]
    inside = column < d
    q = tl.load(query_ptr + column, mask=inside, other=0.0)
    return q, tl.load(row_ptr + column, mask=real[:, None] & inside, other=0.0)


@triton.jit
def _square(q, b):
    step = q.to(tl.float64) - b.to(tl.float64)
    return step * step


@triton.jit
def _direct(query_ptr, row_ptr, real, d, ROWS: tl.constexpr):
    """float32 of Σ(q − b)² [ROWS], from pointers [1 or ROWS, 1] and [ROWS, 1]: eight interleaved float64 sums, halved
    three times. Products and sums must round apart: launched with enable_fp_fusion=False."""
    part = tl.zeros([ROWS, 8], tl.float64)
    for start in range(0, d, 32):
        q0, b0 = _eight(query_ptr, row_ptr, real, start, d)  # all are on the way before the first is waited for
        q1, b1 = _eight(query_ptr, row_ptr, real, start + 8, d)
        q2, b2 = _eight(query_ptr, row_ptr, real, start + 16, d)
        q3, b3 = _eight(query_ptr, row_ptr, real, start + 24, d)
        part += _square(q0, b0)
        part += _square(q1, b1)
        part += _square(q2, b2)
        part += _square(q3, b3)
    four = tl.sum(tl.reshape(part, [ROWS, 2, 4]), 1)
    two = tl.sum(tl.reshape(four, [ROWS, 2, 2]), 1)
    return tl.sum(two, 1).to(tl.float32)


@triton.jit(do_not_specialize=["blocks", "parts"])
def _nearest_rank_kernel(
    query_ptr,
    database_ptr,
    half_ptr,
    value_ptr,
    tile_ptr,
    dropped_ptr,
    length_ptr,
    lost_ptr,
    norm_ptr,
    most_ptr,
    scale_ptr,
    index_ptr,
    distance_ptr,
    open_ptr,
    d,
    blocks,
    parts,
    BLOCK_K: tl.constexpr,
):
    """The winner of one query among its groups, and whether a dropped group could hold a better row."""
    query = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + query)
    lost = tl.load(lost_ptr + query)
    radius = tl.load(most_ptr)
    most_lost = tl.load(most_ptr + 1)
    unit = tl.load(scale_ptr + 2)
    error = lost * radius + (length + lost) * most_lost
    error += (2 * blocks * BLOCK_K + 8) * TENSOR_CORE * (length + lost) * (radius + most_lost)
    both = length * tl.load(scale_ptr) + radius * tl.load(scale_ptr + 1)
    error += (FLOAT32 * (both * both) + SUBNORMAL) * unit
    error *= 1.0 + 1e-6

    least = tl.full([], float("inf"), tl.float32)
    dropped = tl.full([], float("inf"), tl.float32)
    for part in range(parts):
        place = query * parts + part
        least = tl.minimum(least, tl.min(tl.load(value_ptr + place * 16 + tl.arange(0, 16)), 0))
        dropped = tl.minimum(dropped, tl.load(dropped_ptr + place))
    limit = least.to(tl.float64) + 2.0 * error
    best = tl.full([], float("inf"), tl.float32)
    best_row = tl.full([], 2147483647, tl.int32)
    of_group = tl.arange(0, 32)
    for part in range(parts):
        place = (query * parts + part) * 16
        if tl.min(tl.load(value_ptr + place + tl.arange(0, 16)), 0).to(tl.float64) <= limit:
            for c in range(16):
                value = tl.load(value_ptr + place + c)
                if (value.to(tl.float64) <= limit) & (value < float("inf")):
                    row = tl.load(tile_ptr + place + c) * 128 + of_group // 2 * 8 + c % 4 * 2 + of_group % 2
                    real = tl.load(half_ptr + row) < float("inf")
                    row_at = database_ptr + row[:, None].to(tl.int64) * d
                    distance = tl.where(real, _direct(query_ptr + query * d, row_at, real, d, 32), float("inf"))
                    low = tl.min(distance, 0)
                    low_row = tl.min(tl.where(distance == low, row, 2147483647), 0)
                    better = (low < best) | ((low == best) & (low_row < best_row))
                    best = tl.where(better, low, best)
                    best_row = tl.where(better, low_row, best_row)
    # A row as near as the best has a score at or below this.
    reach = (best.to(tl.float64) - tl.load(norm_ptr + query)) * (unit * 0.5) + error
    tl.store(index_ptr + query, best_row.to(tl.int64))
    tl.store(distance_ptr + query, best)
    tl.store(open_ptr + query, (dropped.to(tl.float64) > reach).to(tl.int8) == 0)


@triton.jit(do_not_specialize=["pairs", "k"])
def _nearest_distance_kernel(query_ptr, database_ptr, index_ptr, distance_ptr, pairs, k, d, BLOCK: tl.constexpr):
    """Of each query the distances to the rows that it names, k of them."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = pair < pairs
    row = tl.load(index_ptr + pair, mask=real, other=0)
    query_at = query_ptr + (tl.where(real, pair, 0) // k)[:, None] * d
    distance = _direct(query_at, database_ptr + row[:, None] * d, real, d, BLOCK)
    tl.store(distance_ptr + pair, distance, mask=real)


def aot_specs() -> list[Spec]:
    from fastgen.kernels import nearest_launch

    return nearest_launch.specs()
