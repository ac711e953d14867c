"""How the nearest-neighbour kernels are launched, and the bound that their answer is proved by."""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from fastgen.kernels import relaunch, tuned
from fastgen.kernels.aot import Spec
from torch import Tensor

BLOCK_M = 128
TILE = 128  # rows whose scores are looked at together: four groups of 32 (kernels/nearest.py)
BLOCK_K = 64
BLOCK = 32  # rows that are packed together
SLABS = 64  # parts of the points that are looked through beside each other for their centre
KEPT = 16  # groups of a query in each part of the database: four of each class
WIDEST = 8192  # columns: the float64 sums then err by less than the bound allows for
PAIRS = 8  # distances of a program
APART: dict[str, Any] = {"enable_fp_fusion": False}  # products and sums round apart: the order is the definition


class Found(NamedTuple):
    index: Tensor  # [N] int64
    distance: Tensor  # [N] float32
    open: Tensor  # [N] bool: the bound does not prove this one, or something is not finite


def fits(points: Tensor, mask: Tensor | None) -> bool:
    return points.dtype != torch.float64 and points.shape[1] <= WIDEST and (mask is None or mask.ndim == 1)


def resident(blocks: int) -> int:
    """Width up to which a tile of queries stays in shared memory, as the kernel wants it; 0 beyond."""
    return blocks * BLOCK_K if blocks in (1, 2) else 0


class Chip(NamedTuple):
    """What of a GPU decides how the filter is launched."""

    multiprocessors: int
    shared: int  # bytes that a program may have
    hip: bool


H100 = Chip(132, 227 * 1024, hip=False)
A100 = Chip(108, 163 * 1024, hip=False)
MI300 = Chip(304, 64 * 1024, hip=True)


@functools.cache
def chip(device: int) -> Chip:
    """Of the CPU, where kernels are interpreted, an H100's."""
    if device < 0:
        return H100
    about = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    shared = getattr(about, "shared_memory_per_block_optin", MI300.shared if hip else A100.shared)
    return Chip(about.multi_processor_count, shared, hip)


def filter_options(width: int, of: Chip = H100) -> dict[str, int]:
    """BLOCK_N, num_warps and num_stages of `_nearest_filter_kernel` for queries that are `width` columns resident.

    Where queries are read again, L2 is what limits: each SM of an H100 gets some 39 bytes a clock, tiles of 128 x 128
    want 64 of them for 2048 products, tiles of 128 x 256 only 48. Where they stay, two programs share a multiprocessor
    and one multiplies while the other looks at its scores: 128 columns in two stages are 96 KiB."""
    if (found := tuned.find("nearest_filter", f"RESIDENT={width}")) is not None:
        return found
    if of.hip:
        return {"BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    if width == 0 and of.shared >= 200 * 1024:
        return {"BLOCK_N": 256, "num_warps": 8, "num_stages": 4}
    return {"BLOCK_N": 128, "num_warps": 8, "num_stages": 2 if width == 128 else 3}


def splits(n: int, tiles: int, programs: int) -> tuple[int, int]:
    """How many parts of the database are searched beside each other, and tiles in each; `programs` run at a time.

    Of the numbers of parts the one whose last wave ends first; a part begins with what takes some two tiles."""
    of_queries = -(-n // BLOCK_M)

    def ends(parts: int) -> tuple[int, int]:
        return -(-of_queries * parts // programs) * (-(-tiles // parts) + 2), parts

    parts = min(range(1, max(1, min(tiles // 8, 8 * programs // of_queries, 128)) + 1), key=ends)
    each = -(-tiles // parts)
    return -(-tiles // each), each


def search(query: Tensor, database: Tensor, mask: Tensor | None) -> Found:
    """The nearest row of each query, [N, D] and [M, D] of one dtype but float64, D ≤ WIDEST; without a host
    synchronisation. Where `mask` [M] allows no row, nothing is proved.

    With x̂ the rounded points, δ what rounding took away and ‖·‖ as measured (all in units of the scales),
        |score − (½‖b'‖² − q'·b')| ≤ E = ‖δq‖ max‖b'‖ + ‖q̂‖ max‖δb‖ + a ‖q̂‖ max‖b̂‖ + r (‖q'‖ + max‖b'‖)²:
    a = (2 D + 8) 2⁻²³ allows each of the tensor core's D additions a unit in the last place of the largest, once for
    adding and once for aligning what is added; r = 2⁻²² the rounding of scores to float32 and of two distances.
    """
    query, database = query.contiguous(), database.contiguous()
    allowed = database if mask is None else mask.contiguous().view(torch.int8)
    n, m, d = *query.shape[:1], *database.shape
    blocks = -(-d // BLOCK_K)
    of = chip(query.get_device())
    with torch.cuda.device_of(query):
        options = filter_options(resident(blocks), of)
    block_n = options["BLOCK_N"]
    padded_n, tiles = -(-n // BLOCK_M) * BLOCK_M, -(-m // block_n)
    parts, each = splits(n, tiles, programs(resident(blocks), of))
    query_programs, row_programs = padded_n // BLOCK, tiles * block_n // BLOCK

    wide = functools.partial(query.new_empty, dtype=torch.float64)
    partial, centre, extent, scale = wide(8, SLABS, d), wide(d), wide(2, WIDEST // BLOCK_K), wide(3)
    length, lost, norm, most = wide(padded_n), wide(padded_n), wide(padded_n), wide(2, row_programs)
    q, b = (query.new_empty(rows, blocks * BLOCK_K, dtype=torch.float16) for rows in (padded_n, tiles * block_n))
    half = query.new_empty(tiles * block_n, dtype=torch.float32)
    value = query.new_empty(padded_n, parts, KEPT, dtype=torch.float32)
    tile = query.new_empty(padded_n, parts, KEPT, dtype=torch.int32)
    dropped = query.new_empty(padded_n, parts, dtype=torch.float32)
    index = query.new_empty(n, dtype=torch.int64)
    distance = query.new_empty(n, dtype=torch.float32)
    doubtful = query.new_empty(n, dtype=torch.bool)

    # Points of one dtype and shape are launched as they were before; what torch allocates is aligned.
    aligned = relaunch.aligned(query, database, None if mask is None else allowed)
    key = (query.dtype, query.get_device(), aligned, n, m, d, tuned.changes())
    masked = {"MASKED": mask is not None, "BLOCK": BLOCK, "BLOCK_K": BLOCK_K}
    columns = {"BLOCK_K": BLOCK_K, "WIDEST": WIDEST // BLOCK_K}
    filtered = {"RESIDENT": resident(blocks), "BLOCK_M": BLOCK_M, "BLOCK_K": BLOCK_K, **options}
    with torch.cuda.device_of(query):
        points = (query, database, allowed)
        _launch("extent", key, (blocks, SLABS, 2), (*points, partial, n, m, d), {**masked, "SLABS": SLABS})
        _launch("centre", key, (blocks,), (partial, centre, extent, d), {**columns, "SLABS": SLABS})
        packed = (*points, centre, extent, q, b, length, lost, norm, half, most, scale)
        sizes = (n, m, d, blocks, query_programs, row_programs)
        _launch("pack", key, (query_programs + row_programs,), (*packed, *sizes), {**masked, **columns})
        scored = (q, b, half, value, tile, dropped, tiles, each, parts, blocks)
        _launch("filter", key, (padded_n // BLOCK_M, parts), scored, filtered)
        bound = (length, lost, norm, most.amax(1), scale)
        ranked = (query, database, half, value, tile, dropped, *bound, index, distance, doubtful, d, blocks, parts)
        _launch("rank", key, (n,), ranked, {"BLOCK_K": BLOCK_K, **rank_options(n, of)})
    return Found(index, distance, doubtful)


def programs(width: int, of: Chip) -> int:
    """How many of the filter run at a time."""
    return of.multiprocessors * (2 if width else 1)


def rank_options(n: int, of: Chip) -> dict[str, Any]:
    """Few queries wait for their rows, many for memory's throughput. Left to itself ptxas spills for more programs."""
    options = {"num_warps": 4 if n <= 32 * of.multiprocessors else 1, **APART}
    return options if of.hip else {**options, "maxnreg": 128}


@functools.cache
def _launcher(name: str) -> relaunch.Relaunch:
    from fastgen.kernels import nearest as kernels

    return relaunch.Relaunch(getattr(kernels, f"_nearest_{name}_kernel"))


def _launch(name: str, key: Hashable, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Any) -> None:
    launcher = _launcher(name)
    if not launcher.again(key, arguments):
        launcher.first(key, grid, arguments, options)


def distance(query: Tensor, database: Tensor, index: Tensor) -> Tensor:
    """float32 distances [N, k] of each query to the rows `index` [N, k], all dtypes."""
    query, database, index = query.contiguous(), database.contiguous(), index.contiguous()
    out = query.new_empty(index.shape, dtype=torch.float32)
    pairs, (k, d) = index.numel(), (index.shape[1], query.shape[1])
    if pairs:
        key = (query.dtype, query.get_device(), relaunch.aligned(query, database, index), pairs, k, d)
        with torch.cuda.device_of(query):
            arguments = (query, database, index, out, pairs, k, d)
            _launch("distance", key, (-(-pairs // PAIRS),), arguments, {"BLOCK": PAIRS, "num_warps": 1, **APART})
    return out


def specs() -> list[Spec]:
    """What the tests compile ahead of time."""
    from fastgen.kernels import nearest as kernels

    integers = ("queries", "rows", "d", "blocks", "query_programs", "row_programs", "tiles", "tiles_each", "parts")
    types = {
        **dict.fromkeys((*integers, "pairs", "k"), "i32"),
        **dict.fromkeys(("q_ptr", "b_ptr", "packed_query_ptr", "packed_ptr"), "*fp16"),
        **dict.fromkeys(("half_ptr", "value_ptr", "dropped_ptr", "distance_ptr"), "*fp32"),
        **dict.fromkeys(("partial_ptr", "centre_ptr", "extent_ptr", "scale_ptr", "norm_ptr"), "*fp64"),
        **dict.fromkeys(("length_ptr", "lost_ptr", "most_ptr"), "*fp64"),
        **dict.fromkeys(("allowed_ptr", "open_ptr"), "*i8"),
        "tile_ptr": "*i32",
        "index_ptr": "*i64",
    }
    columns = {"BLOCK_K": BLOCK_K, "WIDEST": WIDEST // BLOCK_K}
    listed = []
    # Where a program has less shared memory, wide points come in smaller tiles.
    for name, width, of, never in (
        ("filter 128", 128, H100, ()),
        ("filter wide", 0, H100, ("sm_80", "gfx942")),
        ("filter wide sm_80", 0, A100, ("sm_90", "sm_100")),
        ("filter 64", 64, H100, ()),
    ):
        options = dict(filter_options(width, of))
        constants = {"BLOCK_M": BLOCK_M, "BLOCK_N": options.pop("BLOCK_N"), "BLOCK_K": BLOCK_K, "RESIDENT": width}
        launch = {**options, "hip": {"num_stages": 2}, "never": never}
        known = types
        if width == BLOCK_K:  # `blocks` is 1, which the launcher makes a constant
            known, constants = {k: v for k, v in types.items() if k != "blocks"}, {**constants, "blocks": 1}
        listed.append(_spec(name, kernels._nearest_filter_kernel, known, constants, **launch))
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        points = {**types, **dict.fromkeys(("query_ptr", "database_ptr"), f"*{dtype}")}
        for divisible, warps in ((("d",), 1), ((), 1), (("d",), 4), ((), 4)):
            name = f"{dtype}{' of sixteens' * len(divisible)}"
            launch = {"divisible": divisible, "options": APART}
            if warps == 1:
                kernel = kernels._nearest_distance_kernel
                listed.append(_spec(f"distance {name}", kernel, points, {"BLOCK": PAIRS}, num_warps=1, **launch))
            if dtype != "fp64":
                kernel, constants = kernels._nearest_rank_kernel, {"BLOCK_K": BLOCK_K}
                launch["options"] = {**APART, "maxnreg": 128}
                listed.append(_spec(f"rank {name} {warps}", kernel, points, constants, num_warps=warps, **launch))
        for masked in (False, True) if dtype != "fp64" else ():
            name = f"{dtype}{' masked' * masked}"
            constants = {"MASKED": masked, "BLOCK": BLOCK, **columns}
            listed.append(_spec(f"pack {name}", kernels._nearest_pack_kernel, points, constants))
            constants = {"MASKED": masked, "BLOCK": BLOCK, "SLABS": SLABS, "BLOCK_K": BLOCK_K}
            listed.append(_spec(f"extent {name}", kernels._nearest_extent_kernel, points, constants))
    listed.append(_spec("centre", kernels._nearest_centre_kernel, types, {**columns, "SLABS": SLABS}))
    return listed


def _spec(name: str, kernel: object, types: dict, constants: dict, **launch: object) -> Spec:  # type: ignore[type-arg]
    signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}  # type: ignore[attr-defined]
    return Spec(name, kernel, signature, constants, **launch)  # type: ignore[arg-type]
