"""Processes that share a search: search.ring_nearest by 1, 2 and 4 of them, and what a billion points would cost so.

`python -m benchmarks.nearest_ring FOLDER PACKAGE RANK SIZE` is one of the processes that a `Team` starts.
"""

import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import traceback
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import machine, results
from benchmarks.harness import Provider, Row, seconds_text

PROCESSES = (1, 2, 4)
SERIES = "top-1 by processes"
# What is assumed of the link of each GPU or machine, bytes a second each way; everything else is measured.
LINKS = {"cuda": ("InfiniBand of 400 Gb/s", 50e9), "cpu": ("Ethernet of 25 Gb/s", 3.125e9)}


def providers() -> dict[str, Provider]:
    """One thread a process: the first is what the others are compared with."""
    return {
        "fastgen" if size == 1 else f"fastgen, {size} processes": Provider(partial(Team, size), ("cpu",), apart=True)
        for size in PROCESSES
    }


class Team:
    """`size` processes that hold their shards and a group: a call is one ring_nearest and nothing else."""

    def __init__(self, size: int, inputs: tuple[Tensor, Tensor]) -> None:
        import fastgen

        folder = tempfile.TemporaryDirectory(prefix="fastgen-ring-")
        torch.save(inputs, f"{folder.name}/inputs")
        self.found = _answers(folder.name, len(inputs[0]))
        package = str(Path(fastgen.__file__).parents[1])
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.nearest_ring", folder.name, package, str(rank), str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=machine.ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                text=True,
            )
            for rank in range(size)
        ]
        weakref.finalize(self, _dismiss, self.processes, folder)
        self._wait()

    def __call__(self) -> tuple[Tensor, Tensor]:
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # one that has ended: _wait says so
                process.stdin.write("\n")
                process.stdin.flush()
        self._wait()
        return self.found

    def _wait(self) -> None:
        for rank, process in enumerate(self.processes):
            assert process.stdout is not None
            said = process.stdout.readline().strip()
            if said != "ready":
                raise RuntimeError(f"process {rank} of {len(self.processes)}: {said or 'ended'}")


def _answers(folder: str, n: int) -> tuple[Tensor, Tensor]:
    """Distances and rows [n] in files that all processes map."""
    distance = torch.from_file(f"{folder}/distance", shared=True, size=n, dtype=torch.float32)
    return distance, torch.from_file(f"{folder}/index", shared=True, size=n, dtype=torch.int64)


def _dismiss(processes: list[subprocess.Popen[str]], folder: "tempfile.TemporaryDirectory[str]") -> None:
    for process in processes:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    folder.cleanup()


def serve(folder: str, package: str, rank: int, size: int) -> None:
    """One process: a line in, a search, a line out."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path.insert(0, package)  # where --base measures another version, that one
    try:
        from fastgen.search import ring_nearest

        torch.set_num_threads(1)
        meet, limit = f"file://{folder}/meet", datetime.timedelta(minutes=2)
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, timeout=limit)
        inputs = torch.load(f"{folder}/inputs")
        found = [part.tensor_split(size)[rank] for part in _answers(folder, len(inputs[0]))]
        query, database = (x.tensor_split(size)[rank].clone() for x in inputs)
        del inputs
        answers.write("ready\n")
        for _ in sys.stdin:
            for part, new in zip(found, ring_nearest(query, database), strict=True):
                part.copy_(new[:, 0])
            answers.write("ready\n")
        dist.destroy_process_group()
    except Exception as problem:
        traceback.print_exc()
        answers.write(f"{type(problem).__name__}: {problem}".splitlines()[0] + "\n")


def text(rows: list[Row]) -> str:
    """The table of processes; empty where none was measured."""
    timed = {r["provider"]: r for r in rows if r["series"] == SERIES and "seconds" in r}
    own = {size: timed[name] for size, name in zip(PROCESSES, providers(), strict=True) if name in timed}
    if len(own) < 2 or 1 not in own:
        return ""
    lines = [f"{own[1]['work']}.", "", "| processes | time | times faster than one |", "|---|---|---|"]
    for size, row in own.items():
        lines.append(f"| {size} | {seconds_text(row['seconds'])} | {own[1]['seconds'] / row['seconds']:.2f} |")
    return "\n".join(lines)


def billion(
    rate: float, link: float, *, n: float = 1e9, m: float = 1e9, d: int = 128, workers: int = 64
) -> dict[str, float]:
    """A ring of `workers`, on paper. rate: operations a second that one is measured at, 2 for a coordinate of a pair.

    shard  = min(n, m) / workers · (4 d + 8) bytes        that travels: float32 rows and int64 ids
    search = 2 n m d / (workers · rate)
    send   = (workers − 1) · shard / link                 each worker sends a shard in every step but the last
    total  = max(search, send) + shard / link             a step's message is sent while its shard is searched; the
                                                          last term is room for the first
    memory = (n + m) / workers · 4 d + 2 shard            its own two shards, and two that travel
    """
    shard = min(n, m) / workers * (4 * d + 8)
    search, send = 2 * n * m * d / (workers * rate), (workers - 1) * shard / link
    found = {"search": search, "send": send, "total": max(search, send) + shard / link}
    return found | {"traffic": (workers - 1) * shard, "memory": (n + m) / workers * 4 * d + 2 * shard}


def on_paper(content: dict[str, Any]) -> str:
    """The cost of a billion points at this file's rate; empty where it has none."""
    d, workers = 128, 64
    measured = [
        r
        for r in content["rows"]
        if r["family"] == "nearest" and r["series"] == "top-1" and r["provider"] == "fastgen" and "seconds" in r
    ]
    if not measured:
        return ""
    row = min(measured, key=lambda r: (abs(r["size"]["D"] - d), -r["operations"]))
    name, link = LINKS[content["machine"]["type"]]
    cost = billion(row["operations"] / row["seconds"], link, d=d, workers=workers)
    return (
        f"A billion queries against a billion rows of {d} float32 by {workers} of these, each at the rate of "
        f'"{row["work"]}", {row["operations"] / row["seconds"] / 1e12:.3g} T operations/s: '
        f"{_long(cost['search'])} of search. Each sends {results.bytes_text(cost['traffic'])} in all, "
        f"{_long(cost['send'])} over {name} (assumed), while it searches: {_long(cost['total'])} together, with "
        f"{results.bytes_text(cost['memory'])} of shards in memory."
    )


def _long(seconds: float) -> str:
    for unit, scale in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return seconds_text(seconds)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
