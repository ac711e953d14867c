"""Exact nearest neighbours, certified."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.transforms import Function, apply, wanted
from fastgen.ops import backend
from fastgen.ops import nearest as ops  # registers them


class Nearest(NamedTuple):
    """`distance` [N, k] float32, squared L2, ascending; `index` [N, k] int64, rows of the database."""

    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index gives way


def nearest(
    query: Tensor,
    database: Tensor,
    k: int = 1,
    *,
    mask: Tensor | None = None,
    exclude_radius: float | None = None,
    precision: str = "certified",
) -> Nearest:
    """The k nearest rows of `database` to each row of `query` in squared L2, exact: min over (‖q − b‖², index).

    Args:
        query: [N, D] float32, float64, bfloat16 or float16, finite; N, D ≥ 1.
        database: [M, D], dtype and device of `query`. Rows that may be chosen must be finite.
        k: neighbours for each query, 1 (default) to the number of rows that may be chosen; a call's time grows with
            k, most of all beyond some thousands.
        mask: [M] or [N, M] bool, True = may be chosen; None (default) allows all. Rows that no query may choose are
            not read and may hold anything.
        exclude_radius: ε > 0, a length: no query may choose a row that lies nearer than ε to any query (that may choose
            it, where `mask` is [N, M]), as RS-IMLE rejects samples: float32 ‖q − b‖² < ε². None (default) rejects none.
        precision: how candidates are found; the answer is the same. "certified" (default): by products of rounded
            points, with a proof; "ieee": every pair is measured directly, to check the former by, far slower.

    Returns:
        Nearest(distance [N, k] float32, index [N, k] int64), ascending by (distance, index).

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: wrong shape or device, an empty operand, k above the number of rows that may be chosen, NaN or
            infinity in a query or in a row that may be chosen, a chosen distance beyond float32 (3.4e38), an
            exclude_radius that leaves some query fewer than k rows.

    Notes:
        The distance is float32 of Σ(q − b)², subtracted uncentred and summed in float64 in one fixed order (for float64
        points too: what float64 tells apart but float32 does not is a tie). A tie goes to the lowest index. So there is
        one answer for any tile, split, chunk, number of threads or device. On the CPU, 16-bit integers of the centred
        points find the candidates and a bound on their rounding proves that no other row can win or tie
        (csrc/nearest.cpp); for few queries (AVX-512: 96 in float32, 32 in float64) plain sums do, in one pass over
        the database as it is; elsewhere float64 matrix products. Neither N·M distances nor float atomics.
        Whether a row is open to doubt is data: on CUDA a call waits for the device and fits in no CUDA graph.
        `distance` is differentiable in query and database, any number of times, for fixed indices: the gradient is
        2 (q − b) and −2 (q − b), in float32 for half types. `index` carries no gradient.

    Source:
        the contract of faiss.IndexFlatL2 (Johnson, Douze, Jégou 2017), made exact; IMLE (Li & Malik 2018), algorithm 1;
        the rejection of RS-IMLE (Vashist, Peng & Li 2024).
    """
    check.tensor("query", query, ndim=(2,))
    check.tensor("database", database, ndim=(2,))
    check.same("database", database, "query", query)
    check.no_tangent("nearest", query, database)
    k = check.integer("k", k, least=1)
    check.choice("precision", precision, ("certified", "ieee"))
    if exclude_radius is not None:
        exclude_radius = check.number("exclude_radius", exclude_radius, above=0)
    n, m, width = query.shape[0], database.shape[0], query.shape[1]
    if n == 0 or width == 0:
        raise ValueError(f"query: expected at least one row and one column, got shape {list(query.shape)}")
    if m == 0 or database.shape[1] != width:
        raise ValueError(f"database: expected shape [M >= 1, {width}], got {list(database.shape)}")
    if k > m:
        raise ValueError(f"k: expected at most the {m} rows of database, got {k}")
    if mask is not None:
        check.tensor("mask", mask, dtypes=(torch.bool,), ndim=(1, 2))
        if mask.device != query.device:
            raise ValueError(f"mask: expected the device of query, {query.device}, got {mask.device}")
        if tuple(mask.shape) not in ((m,), (n, m)):
            raise ValueError(f"mask: expected shape [{m}] or [{n}, {m}], got {list(mask.shape)}")
    find = ops.direct if backend.runs_directly(query, database, mask) else ops.call
    distance, index = find(query.detach(), database.detach(), mask, k, exclude_radius, precision)
    if any(wanted(query, database)):
        distance = apply(_Distance, query, database, index, distance)
    return Nearest(distance, index)


def nearest_or_none(query: Tensor, database: Tensor, exclude_radius: float) -> Nearest:
    """The nearest row that no query rejects, or distance inf and index −1 (for search.StreamingNearest)."""
    index = ops.search(query, database, None, 1, exclude_radius, "certified")
    distance = torch.ops.fastgen.nearest_distance(query, database, index.clamp_min(0))
    return Nearest(distance.masked_fill(index < 0, torch.inf), index)


def rejected(query: Tensor, database: Tensor, exclude_radius: float) -> Tensor:
    """[M] bool: the rows that lie nearer than the radius to some query."""
    distance = nearest(database, query).distance[:, 0]
    return distance.double() < exclude_radius * exclude_radius


def rows_of(database: Tensor, index: Tensor) -> Tensor:
    """database[index], without a gradient, also where the database changes afterwards in place.

    Compiled, an op of our own: inductor takes rows again in the backward rather than keep them, from the database as it
    is by then.
    """
    if torch.compiler.is_compiling():
        rows: Tensor = torch.ops.fastgen.nearest_rows(database.detach(), index)
        return rows
    return database.detach().index_select(0, index)


def distances(query: Tensor, database: Tensor) -> Tensor:
    """[N, M] float32: all of them, to the bit as `nearest` has them."""
    index = torch.arange(len(database), device=query.device).expand(len(query), -1)
    out: Tensor = torch.ops.fastgen.nearest_distance(query, database, index)
    return out


class _Distance(Function):
    """‖q − b‖² of the chosen pairs, as found. The backward is plain torch, so autograd differentiates it again."""

    vmap = staticmethod(ops.no_vmap)

    @staticmethod
    def forward(ctx: Any, query: Tensor, database: Tensor, index: Tensor, distance: Tensor) -> Tensor:
        ctx.save_for_backward(query, database, index)
        return distance.detach()  # no view of its argument: it may be changed in place

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        query, database, index = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        flat = index.flatten()
        step = query.to(wide).unsqueeze(1) - database.index_select(0, flat).to(wide).view(*index.shape, -1)
        pull = 2 * upstream[0].to(wide).unsqueeze(-1) * step  # [N, k, D]
        grad_query = grad_database = None
        if ctx.needs_input_grad[0]:
            grad_query = pull.sum(1).to(query.dtype)
        if ctx.needs_input_grad[1]:
            grad_database = _add_rows(-pull.flatten(0, 1), flat, database.shape[0]).to(database.dtype)
        return grad_query, grad_database, None, None


def _add_rows(rows: Tensor, index: Tensor, m: int) -> Tensor:
    """out[index[i]] += rows[i], in the order of i on every device."""
    out = rows.new_zeros(m, rows.shape[1])
    if rows.device.type == "cuda":  # index_add adds atomically there; index_put sorts first
        return out.index_put((index,), rows, accumulate=True)
    return out.index_add(0, index, rows)
