"""ring_nearest in processes of its own: the same bits for 1, 2 and 4 of them, and an end when one dies."""

import multiprocessing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastgen import functional as F

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120  # seconds that the group gives a silent process
PRELUDE = """
import datetime, os, sys, time
sys.path.insert(0, root)
sys.stdout, sys.stderr = (open(f"{folder}/{name}{rank}", "w", buffering=1) for name in ("out", "err"))
import torch, torch.distributed as dist
from fastgen.search import ring_nearest
torch.set_num_threads(1)
torch.manual_seed(rank)
dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size,
                        timeout=datetime.timedelta(seconds=timeout))
"""


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(folder: Path, size: int, body: str) -> list[Done]:
    """`body` in `size` processes, forked from a server that has torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed"])
    names = {"folder": str(folder), "size": size, "root": str(ROOT), "timeout": TIMEOUT}
    processes = [context.Process(target=exec, args=(PRELUDE + body, {**names, "rank": rank})) for rank in range(size)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        return [
            Done(process.exitcode, *((folder / f"{name}{rank}").read_text() for name in ("out", "err")))
            for rank, process in enumerate(processes)
        ]
    finally:
        for process in processes:
            process.kill()
            process.join()


SEARCH = """
for name in ("database", "queries", "ties", "empty"):
    query, database = torch.load(f"{folder}/{name}.pt")
    # Uneven shards, some of them empty.
    cuts = {1: [], 2: [0.7], 4: [0.1, 0.1, 0.6]}[size]
    part = lambda x: x[slice(*[int(len(x) * e) for e in [0, *cuts, 1]][rank:rank + 2])]
    found = ring_nearest(part(query), part(database) if name != "empty" else database[:len(database) * (rank == 0)])
    torch.save(tuple(found), f"{folder}/{name}.{size}.{rank}.out")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ring")
    torch.manual_seed(0)
    made = {
        "database": (torch.randn(300, 9), torch.randn(101, 9)),  # the database is smaller: it goes round
        "queries": (1000 + 0.01 * torch.randn(41, 9), 1000 + 0.01 * torch.randn(500, 9)),
        "ties": (torch.randint(-1, 2, (60, 3)).double(), torch.randint(-1, 2, (230, 3)).double()),
        "empty": (torch.randn(30, 5).bfloat16(), torch.randn(50, 5).bfloat16()),
    }
    for name, tensors in made.items():
        torch.save(tensors, folder / f"{name}.pt")
    return folder, made


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_one_search(problems, oracle, size):
    folder, made = problems
    for one in run(folder, size, SEARCH):
        assert one.returncode == 0, one.stderr
    for name, (query, database) in made.items():
        parts = [torch.load(folder / f"{name}.{size}.{rank}.out") for rank in range(size)]
        whole, expected = F.nearest(query, database), oracle.nearest(query, database)
        for got, single, want in zip(zip(*parts, strict=True), whole, expected, strict=True):
            assert torch.equal(torch.cat(got), single), name
            assert torch.equal(single, want), name


DIES = """
query, database = torch.randn(200, 8), torch.randn({rows}, 8)
ring_nearest(query, database)
if rank == 1:
    import fastgen.search.ring as module
    def dying(*arguments):
        print(time.time())
        os.kill(os.getpid(), 9)
    module._search = dying
try:
    ring_nearest(query, database)
except RuntimeError:
    print(time.time())
    raise
"""


@pytest.mark.parametrize("rows", [100, 400], ids=["database-travels", "queries-travel"])
def test_a_killed_process_ends_the_others(tmp_path, rows):
    done = run(tmp_path, 3, DIES.format(rows=rows))
    assert [one.returncode for one in done] == [1, -9, 1], done
    died = float(done[1].stdout)
    for rank in (0, 2):
        assert float(done[rank].stdout) - died < TIMEOUT / 4
        assert f"RuntimeError: ring_nearest: rank {rank} of 3 lost a neighbour: a process of the group died" in (
            done[rank].stderr
        )


BAD = """
def refused(query, database):
    try:
        ring_nearest(query, database)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "answered"

good = torch.randn(5, 4)
told = [
    refused(good, good.index_fill(0, torch.tensor([3]), torch.nan) if rank == 1 else good),
    refused(good, good[:, :3] if rank == 0 else good),
    refused(good, [1.0] if rank == 1 else good),
    refused(good[:, :3 + rank], good[:, :3 + rank]),
    refused(good.double() if rank else good, good.double() if rank else good),
    refused(good, good[:0]),
    refused(good, good + (1e20 if rank == 0 else 2e20)),
]
dist.barrier()
print("\\n".join(told))
print(ring_nearest(good, good).index.flatten().tolist())
"""


def test_bad_input_is_told_to_all(tmp_path):
    first, second = run(tmp_path, 2, BAD)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[:-1] == second.stdout.splitlines()[:-1]
    differ = "ValueError: query_shard, database_shard: expected one dtype and width on all ranks, got "
    expected = [
        "ValueError: rank 1: database_shard: expected finite values, got NaN or infinity in row 3",
        "ValueError: rank 0: database_shard: expected shape [M, 4], got [5, 3]",
        "TypeError: rank 1: database_shard: expected a torch.Tensor, got list",
        f"{differ}rank 0 float32 [*, 3], rank 1 float32 [*, 4]",
        f"{differ}rank 0 float32 [*, 4], rank 1 float64 [*, 4]",
        "ValueError: database_shard: expected at least one row on some rank, got none on any",
    ]
    assert lines[: len(expected)] == expected
    assert lines[6].startswith("ValueError: rank 0: query, database: expected squared distances within float32")


def test_needs_a_process_group():
    from fastgen.search import ring_nearest

    with pytest.raises(RuntimeError, match=r"group: expected torch\.distributed to be initialised"):
        ring_nearest(torch.randn(2, 3), torch.randn(2, 3))
