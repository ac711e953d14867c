"""Processes that share a search: time of search.ring_nearest for 1, 2 and 4 of them, one thread each.

    python -m benchmarks.nearest_ring [--n 8000] [--m 40000] [--d 64] [--processes 1 2 4] [--rounds 5]

prints one JSON object a line: seconds (the minimum over rounds, of the slowest process) and the speed-up over the
first. The answers of all are compared bit by bit.
"""

import argparse
import datetime
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist


def work(rank: int, size: int, folder: str, arguments: argparse.Namespace) -> None:
    from fastgen.search import ring_nearest

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{size}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(minutes=5),
    )
    generator = torch.Generator().manual_seed(0)
    query, database = (torch.randn(rows, arguments.d, generator=generator) for rows in (arguments.n, arguments.m))
    mine = [x.tensor_split(size)[rank].clone() for x in (query, database)]
    seconds = []
    for _ in range(arguments.rounds):
        dist.barrier()
        start = time.perf_counter()
        found = ring_nearest(*mine)
        slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds.append(float(slowest))
    torch.save((min(seconds), tuple(found)), f"{folder}/{size}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("n", 8000), ("m", 40_000), ("d", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    first: tuple[float, torch.Tensor, torch.Tensor] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.processes:
            started = [context.Process(target=work, args=(rank, size, folder, arguments)) for rank in range(size)]
            for process in started:
                process.start()
            for process in started:
                process.join()
            if any(process.exitcode for process in started):
                raise SystemExit(f"{size} processes: exit codes {[process.exitcode for process in started]}")
            parts = [torch.load(Path(folder) / f"{size}.{rank}") for rank in range(size)]
            distance, index = (torch.cat([part[1][i] for part in parts]) for i in (0, 1))
            seconds = max(part[0] for part in parts)
            first = first or (seconds, distance, index)
            same = torch.equal(distance, first[1]) and torch.equal(index, first[2])
            row = {"processes": size, "n": arguments.n, "m": arguments.m, "d": arguments.d}
            print(json.dumps({**row, "seconds": seconds, "speedup": first[0] / seconds, "same_bits": same}), flush=True)


if __name__ == "__main__":
    main()
