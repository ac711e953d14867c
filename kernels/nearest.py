"""Exact nearest neighbours on the GPU, k = 1: half-precision products find tiles, float64 decides, a bound proves.

With c a point about the mean, q' = q − c, b' = b − c:  ½‖q − b‖² = ½‖q'‖² + (½‖b'‖² − q'·b').
`_nearest_pack_kernel` rounds s·q' and t·b' (s, t powers of two) to float16, which has TF32's mantissa at bfloat16's
speed, and measures what rounding took away. `_nearest_filter_kernel` scores all pairs, st·½‖b'‖² − q̂·b̂, on the tensor
cores and keeps of each query the four tiles of rows with the smallest minimum, and the smallest minimum of those it
dropped: two instructions a pair, since no index is carried, and nothing of size N·M is written. `_nearest_rank_kernel`
measures the rows of the tiles that the bound leaves, in the defined order of float64 sums, and says whether a dropped
tile could hold the answer; such queries are searched again (ops/nearest.py). kernels/nearest_launch.py has the bound.
"""

import triton
import triton.language as tl
from fastgen.kernels.aot import Spec


@triton.jit(do_not_specialize=["rows", "d", "blocks"])
def _nearest_pack_kernel(
    x_ptr,
    centre_ptr,
    scale_ptr,
    allowed_ptr,
    packed_ptr,
    norm_ptr,
    loss_ptr,
    rows,
    d,
    blocks,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float16 of (x − centre)·scale, zeros beyond; the squares of what was rounded and of what rounding took away."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    read = row < rows
    if MASKED:
        read = read & (tl.load(allowed_ptr + row, mask=read, other=0) != 0)
    scale = tl.load(scale_ptr)
    norm = tl.zeros([BLOCK], tl.float64)
    loss = tl.zeros([BLOCK], tl.float64)
    for block in range(blocks):
        column = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = read[:, None] & (column < d)[None, :]
        x = tl.load(x_ptr + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float64)
        centre = tl.load(centre_ptr + column, mask=column < d, other=0.0)
        exact = tl.where(inside, (x - centre[None, :]) * scale, 0.0)
        rounded = exact.to(tl.float32).to(tl.float16)
        tl.store(packed_ptr + row[:, None] * (blocks * BLOCK_K) + column[None, :], rounded)
        off = exact - rounded.to(tl.float64)
        norm += tl.sum(exact * exact, 1)
        loss += tl.sum(off * off, 1)
    tl.store(norm_ptr + row, norm)
    tl.store(loss_ptr + row, loss)


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


@triton.jit(do_not_specialize=["tiles", "tiles_each", "padded_n"])
def _nearest_filter_kernel(
    q_ptr,
    b_ptr,
    half_ptr,
    value_ptr,
    tile_ptr,
    dropped_ptr,
    tiles,
    tiles_each,
    padded_n,
    blocks,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of queries against one split of the database. RESIDENT is the width where the queries stay in shared
    memory, 0 where they are read again for each tile."""
    split = tl.program_id(1)
    query = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_K)
    width = blocks * BLOCK_K
    if RESIDENT > 0:
        wide = tl.arange(0, RESIDENT)
        q = tl.load(q_ptr + query[:, None] * RESIDENT + wide[None, :])
    v0 = tl.full([BLOCK_M], float("inf"), tl.float32)
    v1 = v0
    v2 = v0
    v3 = v0
    dropped = v0
    t0 = tl.zeros([BLOCK_M], tl.int32)
    t1 = t0
    t2 = t0
    t3 = t0
    first = split * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        start = tl.cast(tile, tl.int64) * BLOCK_N
        half = tl.load(half_ptr + start + column)
        if RESIDENT > 0:
            b = tl.load(b_ptr + start * RESIDENT + column[:, None] * RESIDENT + wide[None, :])
            product = tl.dot(q, tl.trans(b))
        else:
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for block in range(blocks):
                here = block * BLOCK_K + dim
                part = tl.load(q_ptr + query[:, None] * width + here[None, :])
                b = tl.load(b_ptr + (start + column)[:, None] * width + here[None, :])
                product = tl.dot(part, tl.trans(b), product)
        score = half[None, :] - product
        low = tl.min(score, 1)
        here_tile = tl.zeros([BLOCK_M], tl.int32) + tile
        v0, t0, low, here_tile = _insert(low, here_tile, v0, t0)
        v1, t1, low, here_tile = _insert(low, here_tile, v1, t1)
        v2, t2, low, here_tile = _insert(low, here_tile, v2, t2)
        v3, t3, low, here_tile = _insert(low, here_tile, v3, t3)
        dropped = tl.minimum(dropped, low)
    place = query + (split * 4).to(tl.int64) * padded_n
    tl.store(value_ptr + place, v0)
    tl.store(value_ptr + place + padded_n, v1)
    tl.store(value_ptr + place + 2 * padded_n, v2)
    tl.store(value_ptr + place + 3 * padded_n, v3)
    tl.store(tile_ptr + place, t0)
    tl.store(tile_ptr + place + padded_n, t1)
    tl.store(tile_ptr + place + 2 * padded_n, t2)
    tl.store(tile_ptr + place + 3 * padded_n, t3)
    tl.store(dropped_ptr + query + split.to(tl.int64) * padded_n, dropped)


@triton.jit(do_not_specialize=["d", "candidates", "padded_n"])
def _nearest_rank_kernel(
    query_ptr,
    database_ptr,
    half_ptr,
    value_ptr,
    tile_ptr,
    dropped_ptr,
    error_ptr,
    norm_ptr,
    unit_ptr,
    index_ptr,
    distance_ptr,
    open_ptr,
    d,
    candidates,
    padded_n,
    BLOCK_N: tl.constexpr,
):
    """The winner of one query among its tiles, and whether a dropped tile could hold a better row. Products and sums
    must round apart: launched with enable_fp_fusion=False."""
    query = tl.program_id(0).to(tl.int64)
    error = tl.load(error_ptr + query)
    least = tl.full([], float("inf"), tl.float32)
    for c in range(candidates):
        least = tl.minimum(least, tl.load(value_ptr + query + tl.cast(c, tl.int64) * padded_n))
    limit = least.to(tl.float64) + 2.0 * error
    best = tl.full([], float("inf"), tl.float32)
    best_row = tl.full([], 9223372036854775807, tl.int64)
    lane = tl.arange(0, 8)
    for c in range(candidates):
        place = query + tl.cast(c, tl.int64) * padded_n
        value = tl.load(value_ptr + place)
        if (value.to(tl.float64) <= limit) & (value < float("inf")):
            row = tl.load(tile_ptr + place).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            half = tl.load(half_ptr + row)
            real = half < float("inf")
            part = tl.zeros([BLOCK_N, 8], tl.float64)
            for start in range(0, d, 8):
                column = start + lane
                inside = column < d
                q = tl.load(query_ptr + query * d + column, mask=inside, other=0.0).to(tl.float64)
                b = tl.load(
                    database_ptr + row[:, None] * d + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
                ).to(tl.float64)
                step = q[None, :] - b
                square = step * step
                part += tl.where(inside[None, :], square, 0.0)
            four = tl.sum(tl.reshape(part, [BLOCK_N, 2, 4]), 1)
            two = tl.sum(tl.reshape(four, [BLOCK_N, 2, 2]), 1)
            distance = tl.where(real, tl.sum(two, 1).to(tl.float32), float("inf"))
            low = tl.min(distance, 0)
            low_row = tl.min(tl.where(distance == low, row, 9223372036854775807), 0)
            better = (low < best) | ((low == best) & (low_row < best_row))
            best = tl.where(better, low, best)
            best_row = tl.where(better, low_row, best_row)
    # A row as near as the best has a score at or below this.
    reach = (best.to(tl.float64) - tl.load(norm_ptr + query)) * tl.load(unit_ptr) + error
    tl.store(index_ptr + query, best_row)
    tl.store(distance_ptr + query, best)
    tl.store(open_ptr + query, (tl.load(dropped_ptr + query).to(tl.float64) > reach).to(tl.int8) == 0)


def aot_specs() -> list[Spec]:
    from fastgen.kernels import nearest_launch

    return nearest_launch.specs()
