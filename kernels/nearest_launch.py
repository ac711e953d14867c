"""How the nearest-neighbour kernels are launched, and the bound that their answer is proved by."""

from typing import NamedTuple

import torch
from fastgen.kernels import tuned
from fastgen.kernels.aot import Spec
from torch import Tensor

BLOCK_M = BLOCK_N = 128
BLOCK_K = 64
KEEP = 4  # tiles of rows that a query keeps of each split (kernels/nearest.py spells them out)
WIDEST = 8192  # columns: the float64 sums then err by less than the bound allows for
STAGES, STAGES_HIP = 3, 2  # of the filter's loop: AMD's CDNA 3 has 64 KiB of shared memory
PROGRAMS = 256  # fill the machine: few queries split the database


class Found(NamedTuple):
    index: Tensor  # [N] int64
    distance: Tensor  # [N] float32
    open: Tensor  # [N] bool: the bound does not prove this one
    status: Tensor  # [3] int64: queries and rows that are not finite, open queries


def fits(points: Tensor, mask: Tensor | None) -> bool:
    return points.dtype != torch.float64 and points.shape[1] <= WIDEST and (mask is None or mask.ndim == 1)


def resident(blocks: int) -> int:
    """Width up to which a tile of queries stays in shared memory, as the kernel wants it; 0 beyond."""
    return blocks * BLOCK_K if blocks in (1, 2) else 0


def filter_options(width: int) -> dict[str, int]:
    """num_warps and num_stages of `_nearest_filter_kernel` for queries that are `width` columns resident."""
    if (found := tuned.find("nearest_filter", f"RESIDENT={width}")) is not None:
        return found
    return {"num_warps": 8, "num_stages": STAGES if torch.version.hip is None else STAGES_HIP}


def splits(n: int, m: int) -> tuple[int, int]:
    """How many parts of the database are searched beside each other, and tiles in each."""
    tiles = -(-m // BLOCK_N)
    wanted = max(1, min(PROGRAMS // -(-n // BLOCK_M), tiles // (2 * KEEP), 64))
    each = -(-tiles // wanted)
    return -(-tiles // each), each


def _pack(points: Tensor, centre: Tensor, scale: Tensor, allowed: Tensor | None, block: int) -> tuple[Tensor, ...]:
    """float16 [padded, blocks · BLOCK_K], and float64 squares of rows and of their losses [padded], all scaled."""
    from fastgen.kernels import nearest as kernels

    rows, d = points.shape
    padded, blocks = -(-rows // block) * block, -(-d // BLOCK_K)
    packed = points.new_empty(padded, blocks * BLOCK_K, dtype=torch.float16)
    norm, loss = (points.new_empty(padded, dtype=torch.float64) for _ in range(2))
    kernels._nearest_pack_kernel[(padded // 32,)](
        points,
        centre,
        scale,
        points if allowed is None else allowed.view(torch.int8),
        packed,
        norm,
        loss,
        rows,
        d,
        blocks,
        MASKED=allowed is not None,
        BLOCK=32,
        BLOCK_K=BLOCK_K,
        num_warps=4,
    )
    return packed, norm, loss


def _scale(points: Tensor, centre: Tensor) -> Tensor:
    """The power of two that takes the largest centred coordinate to between 8 and 16."""
    least, most = points.amin(0).double(), points.amax(0).double()
    extent = torch.maximum((most - centre).abs().amax(), (least - centre).abs().amax()).clamp_min(1e-30)
    return torch.exp2(torch.floor(torch.log2(16 / extent)))


def search(query: Tensor, database: Tensor, mask: Tensor | None) -> Found:
    """The nearest row of each query, [N, D] and [M, D] of one dtype but float64, D ≤ WIDEST; without a host
    synchronisation. `mask` [M] allows a row at least.

    With x̂ the rounded points, δ what rounding took away and ‖·‖ as measured (all in units of the scales),
        |score − (½‖b'‖² − q'·b')| ≤ E = ‖δq‖ max‖b'‖ + ‖q̂‖ max‖δb‖ + a ‖q̂‖ max‖b̂‖ + r (‖q'‖ + max‖b'‖)²:
    a = (2 D + 8) 2⁻²³ allows each of the tensor core's D additions a unit in the last place of the largest, once for
    adding and once for aligning what is added; r = 2⁻²² the rounding of scores to float32 and of two distances.
    """
    from fastgen.kernels import nearest as kernels

    query, database = query.contiguous(), database.contiguous()
    n, m, d = *query.shape[:1], *database.shape
    shown = database if mask is None else torch.where(mask[:, None], database, 0)  # hidden rows may be NaN
    centre = shown.mean(0, dtype=torch.float64)
    s, t = _scale(query, centre), _scale(shown, centre)
    s, t = torch.minimum(s, t * 2.0**20), torch.minimum(t, s * 2.0**20)
    del shown
    q, query_norm, query_loss = _pack(query, centre, s, None, BLOCK_M)
    b, norm, loss = _pack(database, centre, t, None if mask is None else mask.contiguous(), BLOCK_N)
    half = (norm * (s / (2 * t))).float()
    half[m:] = torch.inf
    if mask is not None:
        half[:m].masked_fill_(~mask, torch.inf)

    length, lost = query_norm.sqrt(), query_loss.sqrt()
    radius, most_lost = norm.amax().sqrt(), loss.amax().sqrt()
    error = lost * radius + (length + lost) * most_lost
    error += (2 * q.shape[1] + 8) * 2.0**-23 * (length + lost) * (radius + most_lost)
    error += (2.0**-22 * (length / s + radius / t).square() + 2.0**-140) * (s * t)
    error *= 1 + 2.0**-20

    parts, each = splits(n, m)
    padded_n, tiles, blocks = len(q), len(b) // BLOCK_N, q.shape[1] // BLOCK_K
    value = query.new_empty(parts * KEEP, padded_n, dtype=torch.float32)
    tile = query.new_empty(parts * KEEP, padded_n, dtype=torch.int32)
    dropped = query.new_empty(parts, padded_n, dtype=torch.float32)
    kernels._nearest_filter_kernel[(padded_n // BLOCK_M, parts)](
        q,
        b,
        half,
        value,
        tile,
        dropped,
        tiles,
        each,
        padded_n,
        blocks,
        RESIDENT=resident(blocks),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        **filter_options(resident(blocks)),
    )
    index = query.new_empty(n, dtype=torch.int64)
    distance = query.new_empty(n, dtype=torch.float32)
    doubtful = query.new_empty(n, dtype=torch.bool)
    kernels._nearest_rank_kernel[(n,)](
        query,
        database,
        half,
        value,
        tile,
        dropped.amin(0),
        error,
        query_norm / s.square(),
        s * t / 2,
        index,
        distance,
        doubtful,
        d,
        parts * KEEP,
        padded_n,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=False,
    )
    status = torch.stack([(~query_norm[:n].isfinite()).sum(), (~norm[:m].isfinite()).sum(), doubtful.sum()])
    return Found(index, distance, doubtful, status)


def specs() -> list[Spec]:
    """What the tests compile ahead of time."""
    from fastgen.kernels import nearest as kernels

    integers = dict.fromkeys(("rows", "d", "blocks", "tiles", "tiles_each", "padded_n", "candidates"), "i32")
    types = {
        **integers,
        **dict.fromkeys(("q_ptr", "b_ptr", "packed_ptr"), "*fp16"),
        **dict.fromkeys(("half_ptr", "value_ptr", "dropped_ptr", "distance_ptr"), "*fp32"),
        **dict.fromkeys(("centre_ptr", "scale_ptr", "norm_ptr", "loss_ptr", "error_ptr", "unit_ptr"), "*fp64"),
        **dict.fromkeys(("allowed_ptr", "open_ptr"), "*i8"),
        "tile_ptr": "*i32",
        "index_ptr": "*i64",
    }
    listed = []
    pack, filtering, rank = (kernels._nearest_pack_kernel, kernels._nearest_filter_kernel, kernels._nearest_rank_kernel)
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
    for width in (128, 0, 64):
        constants = {**blocks, "RESIDENT": width}
        launch = {**filter_options(width), "hip": {"num_stages": STAGES_HIP}}
        listed.append(_spec(f"filter {width or 'wide'}", filtering, types, constants, **launch))
    for dtype in ("fp32", "bf16", "fp16"):
        points = {**types, **dict.fromkeys(("x_ptr", "query_ptr", "database_ptr"), f"*{dtype}")}
        options = {"enable_fp_fusion": False}
        listed.append(_spec(f"rank {dtype}", rank, points, {"BLOCK_N": BLOCK_N}, options=options))
        for masked in (False, True):
            constants = {"MASKED": masked, "BLOCK": 32, "BLOCK_K": BLOCK_K}
            listed.append(_spec(f"pack {dtype}{' masked' * masked}", pack, points, constants))
    return listed


def _spec(name: str, kernel: object, types: dict, constants: dict, **launch: object) -> Spec:  # type: ignore[type-arg]
    signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}  # type: ignore[attr-defined]
    return Spec(name, kernel, signature, constants, **launch)  # type: ignore[arg-type]
