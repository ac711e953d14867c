"""Exact nearest neighbours over a pool that is never whole in memory."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.nearest import Nearest, nearest, nearest_or_none, rejected

_LAST = torch.iinfo(torch.int64).max


def merged(one: Nearest, two: Nearest, k: int) -> Nearest:
    """The k least by (distance, index) of both: associative and commutative, so that splits and orders agree."""
    if k == 1 and one.index.shape[1] == two.index.shape[1] == 1:
        wins = (one.distance < two.distance) | ((one.distance == two.distance) & (one.index < two.index))
        return Nearest(torch.where(wins, one.distance, two.distance), torch.where(wins, one.index, two.index))
    distance, (index, order) = torch.cat([one.distance, two.distance], 1), torch.cat([one.index, two.index], 1).sort(1)
    distance, order = distance.gather(1, order).sort(dim=1, stable=True)
    return Nearest(distance[:, :k], index.gather(1, order)[:, :k])


class StreamingNearest:
    """The nearest of all rows that ever came by, min over (‖q − b‖², id).

    `StreamingNearest(query).update(chunk).update(chunk).result()`

    The state is one distance and one id for each query, 12 bytes, whatever the size of the pool: for IMLE over
    generated samples, only the winners' ids need be kept and their latents made again.

    Args:
        query: [N, D] floating point, as `functional.nearest` takes it; kept, not copied: leave it unchanged. Or a numpy
            array, as np.load(path, mmap_mode="r") or np.memmap gives it, of float32, float64 or float16: it stays where
            it is and is read once for each chunk, `block` rows at a time, so that the queries need not fit in memory.
        device: where the search runs for a numpy array, default "cpu"; a tensor's is its own.
        exclude_radius: as `functional.nearest` has it, None (default) for none: a row nearer than this to any query is
            no query's answer. With several blocks of queries each chunk is searched twice.
        block: rows of a numpy array at a time, default 65,536.
        overlap: on CUDA, search each chunk on a stream of its own, and only when the next has been handed in, so that
            generating that one and the search run at the same time; errors come with it, a chunk late. One chunk more
            is kept. Default False; no difference on the CPU.

    Raises:
        TypeError, ValueError: as `functional.nearest`; `update` refuses a chunk of another dtype, width or device, and
            one of which no row lies within float32 (3.4e38) of some query, though another chunk's may.

    Notes:
        The minimum of (distance, id) is associative, so that any chunks in any order give the bits of one
        `functional.nearest` over all rows. Not differentiable: recompute the winners' distances for a gradient.

    Source:
        IMLE (Li & Malik 2018), algorithm 1, with the pool as a stream.
    """

    def __init__(
        self,
        query: Tensor | np.ndarray,
        *,
        device: str | torch.device | None = None,
        exclude_radius: float | None = None,
        block: int = 1 << 16,
        overlap: bool = False,
    ) -> None:
        self._array: np.ndarray | None = None
        if isinstance(query, np.ndarray):
            self._array, self._device = check.rows("query", query), torch.device("cpu" if device is None else device)
            self._like = torch.from_numpy(np.empty((0, query.shape[1]), query.dtype)).to(self._device)
        else:
            check.tensor("query", query, ndim=(2,))
            if device is not None and torch.device(device) != query.device:
                raise ValueError(f"device: expected that of query, {query.device}, got {device}")
            self._query, self._device, self._like = query.detach(), query.device, query.detach()[:0]
        n = len(query)
        self._radius = None if exclude_radius is None else check.number("exclude_radius", exclude_radius, above=0)
        step = check.integer("block", block, least=1) if self._array is not None else max(n, 1)
        self._blocks = [slice(i, min(i + step, n)) for i in range(0, n, step)]
        with torch.inference_mode(False):  # what is made in that mode could be written to in it alone
            self._best = Nearest(
                torch.full((n, 1), torch.inf, dtype=torch.float32, device=self._device),
                torch.full((n, 1), _LAST, device=self._device),
            )
        self._next_id, self._rows = 0, 0
        self._stream = torch.cuda.Stream(self._device) if overlap and self._device.type == "cuda" else None
        self._waiting: tuple[Tensor, int, torch.cuda.Event] | None = None

    def update(self, chunk: Tensor | np.ndarray, *, first_id: int | None = None) -> "StreamingNearest":
        """Take [M, D] rows with the ids first_id … first_id + M − 1, by default from where the last chunk ended.

        A numpy array, as a part of a memory map is one, is copied to the device.
        """
        start = self._next_id if first_id is None else check.integer("first_id", first_id, least=0)
        if isinstance(chunk, np.ndarray):
            chunk = torch.from_numpy(np.array(check.rows("chunk", chunk))).to(self._device)
        check.tensor("chunk", chunk, ndim=(2,))
        check.same("chunk", chunk, "query", self._like)
        if chunk.shape[1] != self._like.shape[1]:
            raise ValueError(f"chunk: expected shape [M, {self._like.shape[1]}], got {list(chunk.shape)}")
        if start + len(chunk) > _LAST:
            raise ValueError(f"first_id: expected ids below {_LAST}, got {start} for {len(chunk)} rows")
        if len(chunk) and self._stream is None:
            self._search(chunk.detach(), start)
        if len(chunk) == 0 or self._stream is None:
            self._next_id = start + len(chunk)  # only now: a chunk that was refused has no ids
            return self
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        self._finish()
        self._waiting = (chunk.detach(), start, ready)
        self._next_id = start + len(chunk)
        return self

    def result(self) -> Nearest:
        """Nearest(distance [N, 1] float32, index [N, 1] int64) over every chunk so far; ValueError before the first,
        and where the radius has left a query without a row."""
        self._finish()
        if self._rows == 0:
            raise ValueError("result: expected at least one chunk of at least one row before it")
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if self._best.distance.isinf().any():
            row = int(self._best.distance.isinf().nonzero()[0, 0])
            raise ValueError(
                f"result: expected a row outside exclude_radius={self._radius} for each query, but none of the "
                f"{self._rows} so far is left for query {row}"
            )
        return Nearest(self._best.distance.clone(), self._best.index.clone())

    def _finish(self) -> None:
        """Search the chunk that waits, on the side stream: what the caller has queued since runs beside it."""
        if self._waiting is None or self._stream is None:
            return
        (chunk, start, ready), self._waiting = self._waiting, None
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            chunk.record_stream(self._stream)
            self._search(chunk, start)

    def _load(self, rows: slice) -> Tensor:
        if self._array is None:
            return self._query
        return torch.from_numpy(np.array(self._array[rows])).to(self._device)  # a copy: memory maps are read-only

    @contextlib.contextmanager
    def _named(self, rows: slice, chunk: Tensor) -> Iterator[None]:
        """An error of `nearest` in the names and numbers of here: it knows a block of the queries alone."""
        try:
            yield
        except ValueError as error:
            check.finite("query", self._load(rows), rows.start)
            check.finite("chunk", chunk)
            raise ValueError(str(error).replace("database", "chunk")) from None

    def _search(self, chunk: Tensor, start: int) -> None:
        mask = None
        if self._radius is not None and len(self._blocks) > 1:
            mask = torch.ones(len(chunk), dtype=torch.bool, device=chunk.device)
            for rows in self._blocks:
                with self._named(rows, chunk):
                    mask &= ~rejected(self._load(rows), chunk, self._radius)
        best = []  # taken over as a whole: a chunk that is refused at a later block leaves no trace
        for rows in self._blocks if mask is None or mask.any() else ():
            with self._named(rows, chunk):
                if self._radius is None or mask is not None:
                    found = nearest(self._load(rows), chunk, mask=mask)
                else:
                    found = nearest_or_none(self._load(rows), chunk, self._radius)
            found = Nearest(found.distance, torch.where(found.distance.isinf(), _LAST, found.index + start))
            best.append((rows, merged(Nearest(self._best.distance[rows], self._best.index[rows]), found, 1)))
        for rows, one in best:
            self._best.distance[rows], self._best.index[rows] = one
        self._rows += len(chunk)
