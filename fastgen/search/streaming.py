"""Exact nearest neighbours over a pool that is never whole in memory."""

import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.nearest import Nearest, nearest


class StreamingNearest:
    """The nearest of all rows that ever came by, min over (‖q − b‖², id).

    `StreamingNearest(query).update(chunk).update(chunk).result()`

    The state is one distance and one id for each query, whatever the size of the pool: for IMLE over generated samples,
    only the winners' ids need be kept and their latents made again.

    Args:
        query: [N, D] floating point, as `functional.nearest` takes it; kept, not copied: leave it unchanged.

    Notes:
        The minimum of (distance, id) is associative, so that any chunks in any order give the bits of one
        `functional.nearest` over all rows. Not differentiable: recompute the winners' distances for a gradient.

    Source:
        IMLE (Li & Malik 2018), algorithm 1, with the pool as a stream.
    """

    def __init__(self, query: Tensor) -> None:
        check.tensor("query", query, ndim=(2,))
        self._query = query.detach()
        self._distance = torch.full((len(query), 1), torch.inf, device=query.device)
        self._index = torch.full((len(query), 1), torch.iinfo(torch.int64).max, device=query.device)
        self._next_id = 0

    def update(self, chunk: Tensor, *, first_id: int | None = None) -> "StreamingNearest":
        """Take [M, D] rows with the ids first_id … first_id + M − 1, by default from where the last chunk ended."""
        start = self._next_id if first_id is None else check.integer("first_id", first_id, least=0)
        check.tensor("chunk", chunk, ndim=(2,))
        check.same("chunk", chunk, "query", self._query)
        if chunk.shape[1] != self._query.shape[1]:
            raise ValueError(f"chunk: expected shape [M, {self._query.shape[1]}], got {list(chunk.shape)}")
        self._next_id = start + len(chunk)
        if len(chunk) == 0:
            return self
        distance, index = nearest(self._query, chunk.detach())
        index = index + start
        wins = (distance < self._distance) | ((distance == self._distance) & (index < self._index))
        self._distance = torch.where(wins, distance, self._distance)
        self._index = torch.where(wins, index, self._index)
        return self

    def result(self) -> Nearest:
        """Nearest(distance [N, 1] float32, index [N, 1] int64) over every chunk so far; ValueError before the first."""
        if self._distance.isinf().any():
            raise ValueError("result: expected at least one chunk of at least one row before it")
        return Nearest(self._distance.clone(), self._index.clone())
