"""Exact nearest neighbours of shards: every process keeps its own, the smaller side goes round."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen import check
from fastgen.functional.nearest import Nearest, nearest
from fastgen.search.streaming import merged

_LAST = torch.iinfo(torch.int64).max


def ring_nearest(
    query_shard: Tensor, database_shard: Tensor, k: int = 1, *, mask: Tensor | None = None, group: Any = None
) -> Nearest:
    """The k nearest rows of all processes' databases to each of this process's queries: min over (‖q − b‖², id).

    Every process of the group calls it, with its shard of the queries and its shard of the database.

    Args:
        query_shard: [N_r, D] floating point as `functional.nearest` takes it; N_r may differ from process to process
            and may be 0.
        database_shard: [M_r, D], dtype and device of the queries; M_r may differ and may be 0, but not everywhere.
        k: neighbours for each query, the same number on all processes, 1 (default) to the rows that they allow in all.
        mask: [M_r] bool, True = may be chosen, on the processes that have one; None (default) allows all. Other rows
            do not travel, are not looked at and may hold anything.
        group: a torch.distributed process group (gloo for the CPU, NCCL for CUDA); None (default) is the default group.

    Returns:
        Nearest(distance [N_r, k] float32, index [N_r, k] int64): the index counts the rows of the shards laid one after
        the other by rank, masked ones too.

    Raises:
        TypeError, ValueError: bad input, on every process, naming the rank that has it; a shard of which k rows, or all
            where it has fewer, do not lie within float32 (3.4e38) of some query, though another's may.
        RuntimeError: no process group; a process that died, or that sent nothing within the group's time-out.

    Notes:
        The shards of the side with fewer rows in all go from rank to rank; while one is on its way the one before is
        searched. Rows that travel carry their ids, queries their best (distance, id), and come home in the end. A
        process holds its own two shards and two more of the travelling side, padded to its largest, and of a masked
        database a copy of the allowed rows. The minimum of (distance, id) is associative: the bits are those of one
        `functional.nearest` over everything, for any number of processes and any split. Not differentiable: fetch the
        winners and recompute their distances for a gradient.

    Source:
        IMLE (Li & Malik 2018), algorithm 1, on shards; the ring of parallel N-body codes.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: expected torch.distributed to be initialised (torchrun, init_process_group)")
    # NCCL sends objects by the current device.
    with torch.cuda.device_of(query_shard if isinstance(query_shard, Tensor) else torch.empty(0)):
        return _nearest(_Ring(group), query_shard, database_shard, k, mask)


def _nearest(ring: "_Ring", query_shard: Tensor, database_shard: Tensor, k: int, mask: Tensor | None) -> Nearest:
    problem, width, dtype = "", 0, ""
    database, ids = database_shard, torch.empty(0, dtype=torch.int64)
    try:
        check.tensor("query_shard", query_shard, ndim=(2,))
        check.tensor("database_shard", database_shard, ndim=(2,))
        check.same("database_shard", database_shard, "query_shard", query_shard)
        k = check.integer("k", k, least=1)
        width, dtype = query_shard.shape[1], check.short(query_shard.dtype)
        if database_shard.shape[1] != width or width == 0:
            raise ValueError(
                f"database_shard: expected shape [M, {width or 'D >= 1'}], got {list(database_shard.shape)}"
            )
        ids = torch.arange(len(database_shard), device=database_shard.device)
        if mask is not None:
            check.tensor("mask", mask, dtypes=(torch.bool,), ndim=(1,))
            if len(mask) != len(ids) or mask.device != ids.device:
                raise ValueError(f"mask: expected [{len(ids)}] on {ids.device}, got {check.describe(mask)}")
            database, ids = database_shard[mask], ids[mask]
        for name, points, number in (("query_shard", query_shard, None), ("database_shard", database, ids)):
            finite = check.finite_rows(points)
            if not finite.all():
                row = int((~finite).nonzero()[0, 0])
                row = row if number is None else int(number[row])
                raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {row}")
    except (TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    # One process's bad input must not leave the others waiting: all learn of it, and all raise.
    size = (0, 0, 0, 0) if problem else (k, len(query_shard), len(database), len(database_shard))
    told: list[tuple[str, int, str, int, int, int, int]] = ring.gather((problem, width, dtype, *size))
    for rank, (wrong, *_) in enumerate(told):
        if wrong:
            raise (TypeError if wrong.startswith("TypeError") else ValueError)(
                f"rank {rank}: {wrong.split(': ', 1)[1]}"
            )
    if len({row[1:3] for row in told}) > 1:
        listed = ", ".join(f"rank {rank} {dtype} [*, {d}]" for rank, (_, d, dtype, *_) in enumerate(told))
        raise ValueError(f"query_shard, database_shard: expected one dtype and width on all ranks, got {listed}")
    _, _, _, numbers, rows, columns, whole = (list(column) for column in zip(*told, strict=True))
    if len(set(numbers)) > 1:
        raise ValueError(f"k: expected one number on all ranks, got {numbers}")
    if sum(whole) == 0:
        raise ValueError("database_shard: expected at least one row on some rank, got none on any")
    if sum(columns) < k:
        raise ValueError(f"k: expected at most the {sum(columns)} rows of database that all ranks allow, got {k}")
    query, database, ids = query_shard.detach(), database.detach(), ids + sum(whole[: ring.rank])
    if sum(columns) <= sum(rows):
        best = _database_goes_round(ring, query, database, ids, columns, k)
    else:
        best = _queries_go_round(ring, query, database, ids, rows, k)
    for rank, wrong in enumerate(ring.gather(ring.problem)):
        if wrong:
            raise ValueError(f"rank {rank}: {wrong}")
    return best


class _Ring:
    """Neighbours of this process in the group, and errors that say what happened."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.problem = ""  # what this process's search ran into: it goes on passing shards, and tells in the end
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("group: expected a group that this process is in")

    def gather(self, value: Any) -> list[Any]:
        out: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(out, value, group=self.group)
        except RuntimeError as error:
            self.lost(error)
        return out

    def pass_on(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> list[Any]:
        """Start sending to the next process and receiving from the one before; `wait` for what it returns."""
        if self.size == 1:
            for source, target in zip(send, receive, strict=True):
                target.copy_(source)
            return []
        ranks = dist.get_process_group_ranks(self.group)
        after, before = ranks[(self.rank + 1) % self.size], ranks[self.rank - 1]
        steps = [dist.P2POp(dist.isend, x, after, self.group) for x in send]
        steps += [dist.P2POp(dist.irecv, x, before, self.group) for x in receive]
        try:
            return list(dist.batch_isend_irecv(steps))
        except RuntimeError as error:
            self.lost(error)

    def wait(self, works: Sequence[Any]) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self.lost(error)

    def lost(self, error: RuntimeError) -> NoReturn:
        raise RuntimeError(
            f"ring_nearest: rank {self.rank} of {self.size} lost a neighbour: a process of the group died, or sent "
            f"nothing within the group's time-out ({error})"
        ) from error


def _start(n: int, k: int, device: torch.device) -> Nearest:
    distance = torch.full((n, k), torch.inf, dtype=torch.float32, device=device)
    return Nearest(distance, torch.full((n, k), _LAST, device=device))


def _search(ring: _Ring, query: Tensor, database: Tensor, ids: Tensor, best: Nearest) -> Nearest:
    if len(query) == 0 or len(database) == 0:
        return best
    k = best.index.shape[1]
    try:
        found = nearest(query, database, min(k, len(database)))
    except ValueError as error:  # beyond float32
        ring.problem = str(error).replace("query, database", "query_shard, database_shard")
        return best
    return merged(best, Nearest(found.distance, ids[found.index]), k)


def _padded(values: Tensor, rows: int) -> Tensor:
    """Contiguous [rows, ...]: every message of a side has one size."""
    out = values.new_zeros(rows, *values.shape[1:])
    out[: len(values)] = values
    return out


def _database_goes_round(
    ring: _Ring, query: Tensor, database: Tensor, ids: Tensor, columns: list[int], k: int
) -> Nearest:
    best = _start(len(query), k, query.device)
    here = [_padded(x, max(columns)) for x in (database, ids)]
    there = [torch.empty_like(x) for x in here]
    for step in range(ring.size):
        m = columns[(ring.rank - step) % ring.size]
        works = ring.pass_on(here, there) if step + 1 < ring.size else []
        best = _search(ring, query, here[0][:m], here[1][:m], best)
        ring.wait(works)
        here, there = there, here
    return best


def _queries_go_round(ring: _Ring, query: Tensor, database: Tensor, ids: Tensor, rows: list[int], k: int) -> Nearest:
    most = max(rows)
    here, best = _padded(query, most), _start(most, k, query.device)
    there, spare = torch.empty_like(here), _start(most, k, query.device)
    for step in range(ring.size):
        n = rows[(ring.rank - step) % ring.size]
        works = ring.pass_on([here], [there]) if step + 1 < ring.size else []
        found = _search(ring, here[:n], database, ids, Nearest(best.distance[:n], best.index[:n]))
        best.distance[:n], best.index[:n] = found
        ring.wait(works)
        ring.wait(ring.pass_on(best, spare))  # after the last step the queries' answers go home
        here, there, best, spare = there, here, spare, best
    n = len(query)
    return Nearest(best.distance[:n].clone(), best.index[:n].clone())
