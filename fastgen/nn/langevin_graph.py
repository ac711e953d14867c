"""Chains in CUDA graphs that live from call to call.

The first call of a kind takes its first step as it is, which also warms up what a recording may not, then records one
step and replays it. A second call of the kind records as many steps as a graph should have, `block` of them, and where
they are all, start and end with them: from the third on a chain is one launch.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastgen.nn.cuda_graph import Graph, captured, capturing
from fastgen.nn.langevin_chains import Chains

MIN_STEPS = 4  # fewer are not worth recording for one call
KEPT = 4  # graphs of a sampler: of as many shapes, say
SHARE = 16  # and of the device's memory no more than one part in so many

Record = Callable[[torch.device, Callable[[], None], Any], tuple[Graph, int]]
_streams: dict[torch.device, Any] = {}


def recorder(device: torch.device) -> Record | None:
    """What records on a device: (device, work, an earlier graph or None) -> the graph, and the bytes that it holds."""
    return _record if device.type == "cuda" else None


def memory(device: torch.device) -> int:
    """Of the device, in bytes."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def _record(device: torch.device, work: Callable[[], None], earlier: Graph) -> tuple[Graph, int]:
    pool = torch.cuda.graph_pool_handle() if earlier is None else earlier.pool()  # they never run at once
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    with capturing, torch.cuda.device(device), captured(pool, _streams[device]) as graph:
        before = torch.cuda.memory_reserved(device)
        work()
        grown = torch.cuda.memory_reserved(device) - before
    return graph, grown


class Recorded:
    """Chains, and the graphs of their steps."""

    def __init__(self, chains: Chains, record: Record | None, must: bool) -> None:
        self.chains, self.record, self.must = chains, record, must
        self.graphs: dict[int, Graph] = {}  # by the number of steps; None where there can be none
        self.calls = self.bytes = 0

    def steps(self, each: bool) -> Iterator[int]:
        """Runs the chains; yields how many steps are done, after each one where `each`."""
        chains, n = self.chains, self.chains.n_steps
        first, self.calls = self.calls == 0, self.calls + 1
        plain = first and n < MIN_STEPS and not self.must
        size = 1 if first or each else chains.block
        if size > 1 and self.graph(size) is None:
            size = 1
        whole = size == n and not first and self.graph(size) is not None
        if not whole:
            chains.start()
        done = 0
        while done < n:
            count = size if size <= n - done else 1
            chains.load(done, count)
            graph = None if plain or (first and done == 0) else self.graph(count)
            if graph is None:
                chains.recorded_step(0)
            else:
                graph.replay()
            chains.collect(done, count)
            done += count
            yield done
        if not whole:
            chains.settle(chains.found)

    def graph(self, size: int) -> Graph:
        if size not in self.graphs:
            self.graphs[size] = self.made(size)
        return self.graphs[size]

    def made(self, size: int) -> Graph:
        chains, whole = self.chains, size == self.chains.n_steps

        def work() -> None:
            if whole:
                chains.start()
            for row in range(size):
                chains.recorded_step(row)
            if whole:
                chains.settle(chains.energies)

        assert self.record is not None
        earlier = next((graph for graph in self.graphs.values() if graph is not None), None)
        try:
            graph, held = self.record(chains.x.device, work, earlier)
        except RuntimeError as error:
            if self.must:
                raise
            if not self.graphs:
                what = str(error).splitlines()[0]
                text = f"LangevinSampler: the energy cannot be captured, the plain loop runs: {what}"
                warnings.warn(text, stacklevel=5)
            return None
        self.bytes += held
        return graph


class Kept:
    """The graphs of one sampler, the latest last. A copy of it has none: they are of this process and its device."""

    def __init__(self) -> None:
        self.found: dict[Hashable, Recorded] = {}

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()

    @contextmanager
    def lent(self, key: Hashable | None, make: Callable[[], Recorded]) -> Iterator[Recorded]:
        """What was recorded for `key`, or a new one, to nobody else meanwhile; kept after a call that ended."""
        recorded = None if key is None else self.found.pop(key, None)
        if recorded is None:
            recorded = make()
        try:
            yield recorded
        except FloatingPointError:  # the chains', of what they found at the end
            self.keep(key, recorded)
            raise
        self.keep(key, recorded)

    def keep(self, key: Hashable | None, recorded: Recorded) -> None:
        budget = 0 if key is None else memory(recorded.chains.x.device) // SHARE
        if key is None or recorded.bytes > budget:
            return
        # The sampler holds this: without the circle its death gives the memory back at once.
        recorded.chains.sampler = recorded.chains.freeze = None
        self.found[key] = recorded
        while len(self.found) > KEPT or sum(r.bytes for r in self.found.values()) > budget:
            del self.found[next(iter(self.found))]
