"""ring_nearest in processes of its own: the same bits for 1, 2 and 4 of them, and an end when one dies."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastgen import functional as F

TIMEOUT = 120  # seconds that the group gives a silent process
PRELUDE = """
import datetime, os, time
import torch, torch.distributed as dist
from fastgen.search import ring_nearest
torch.manual_seed(rank)
dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size,
                        timeout=datetime.timedelta(seconds=timeout))
"""


@pytest.fixture
def run(run_apart: Callable[..., list[Any]]) -> Callable[[Path, int, str], list[Any]]:
    """`run(folder, size, body)`: `body` in the processes of a group."""
    return lambda folder, size, body: run_apart(PRELUDE + body, size, folder, TIMEOUT, size=size, timeout=TIMEOUT)


SEARCH = """
for name, (query, database, k, mask) in torch.load(f"{folder}/problems.pt").items():
    # Uneven shards, some of them empty.
    cuts = {1: [], 2: [0.7], 4: [0.1, 0.1, 0.6]}[size] if name != "first" else [1.0] * (size - 1)
    part = lambda x: x[slice(*[int(len(x) * e) for e in [0, *cuts, 1]][rank:rank + 2])]
    mine = None if mask is None or part(mask).all() else part(mask)
    found = ring_nearest(part(query), part(database), k, mask=mine)
    torch.save(tuple(found), f"{folder}/{name}.{size}.{rank}.out")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Any, ...]]]:
    folder = tmp_path_factory.mktemp("ring")
    torch.manual_seed(0)
    ties = torch.randint(-1, 2, (60, 3)).double(), torch.randint(-1, 2, (230, 3)).double()
    few = torch.arange(230) % 11 == 4
    few[150:161] = True  # a whole shard of four, in part
    hidden = torch.randn(120, 9).masked_fill((torch.arange(120) % 3 == 0)[:, None], torch.nan)
    made = {
        "database": (torch.randn(300, 9), torch.randn(101, 9), 1, None),  # the database is smaller: it goes round
        "queries": (1000 + 0.01 * torch.randn(41, 9), 1000 + 0.01 * torch.randn(500, 9), 1, None),
        "ties": (*ties, 1, None),
        "first": (torch.randn(30, 5).bfloat16(), torch.randn(50, 5).bfloat16(), 1, None),  # all on the first rank
        "several": (*ties, 40, None),  # more than some shards have
        "several-round": (torch.randint(-1, 2, (290, 3)).double(), ties[1], 40, None),
        "masked": (ties[0][:20], ties[1], 3, few),
        "masked-round": (ties[0], ties[1], 3, few),
        "hidden": (torch.randn(50, 9), hidden, 1, ~hidden[:, 0].isnan()),
    }
    torch.save(made, folder / "problems.pt")
    return folder, made


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_one_search(problems, oracle, run, size):
    folder, made = problems
    for one in run(folder, size, SEARCH):
        assert one.returncode == 0, one.stderr
    for name, (query, database, k, mask) in made.items():
        parts = [torch.load(folder / f"{name}.{size}.{rank}.out") for rank in range(size)]
        whole, expected = F.nearest(query, database, k, mask=mask), oracle.nearest(query, database, k, mask)
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
def test_a_killed_process_ends_the_others(tmp_path, run, rows):
    done = run(tmp_path, 3, DIES.format(rows=rows))
    assert [one.returncode for one in done] == [1, -9, 1], done
    died = float(done[1].stdout)
    for rank in (0, 2):
        assert float(done[rank].stdout) - died < TIMEOUT / 4
        assert f"RuntimeError: ring_nearest: rank {rank} of 3 lost a neighbour: a process of the group died" in (
            done[rank].stderr
        )


BAD = """
def refused(query, database, k=1, mask=None):
    try:
        ring_nearest(query, database, k, mask=mask)
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
    refused(good, good, 1 + rank),
    refused(good, good, 0 if rank else 1),
    refused(good, good, 4, torch.arange(5) < 3 * rank),
    refused(good, good, 1, torch.ones(5 - rank, dtype=torch.bool)),
    refused(good, good, 1, torch.ones(5) if rank == 0 else None),
    refused(good, good.index_fill(0, torch.tensor([1, 3]), torch.inf), 1, torch.arange(5) > 1 + 2 * rank),
    refused(good, good + (1e20 if rank == 0 else 2e20)),
]
dist.barrier()
print("\\n".join(told))
print(ring_nearest(good, good).index.flatten().tolist())
"""


def test_bad_input_is_told_to_all(tmp_path, run):
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
        "ValueError: k: expected one number on all ranks, got [1, 2]",
        "ValueError: rank 1: k: expected an integer >= 1, got 0",
        "ValueError: k: expected at most the 3 rows of database that all ranks allow, got 4",
        "ValueError: rank 1: mask: expected [5] on cpu, got bool [4] on cpu",
        "TypeError: rank 0: mask: expected bool, got float32",
        "ValueError: rank 0: database_shard: expected finite values, got NaN or infinity in row 3",
    ]
    assert lines[: len(expected)] == expected
    assert lines[len(expected)].startswith(
        "ValueError: rank 0: query_shard, database_shard: expected squared distances within float32"
    )


def test_needs_a_process_group():
    from fastgen.search import ring_nearest

    with pytest.raises(RuntimeError, match=r"group: expected torch\.distributed to be initialised"):
        ring_nearest(torch.randn(2, 3), torch.randn(2, 3))


def test_objects_go_by_the_points_own_device(monkeypatch):
    """NCCL sends them from the current device, which need not be where the shards are."""
    from fastgen.search import ring, ring_nearest

    told, gather = [], ring._Ring.gather

    @contextlib.contextmanager
    def device_of(points):
        told.append(("on", points.device.type))
        yield
        told.append("off")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(ring._Ring, "gather", lambda self, value: told.append("gather") or gather(self, value))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        points = torch.randn(5, 3)
        assert ring_nearest(points, points).index.flatten().tolist() == [0, 1, 2, 3, 4]
    finally:
        dist.destroy_process_group()
    assert told[0] == ("on", "cpu")
    assert told[-1] == "off"
    assert told.count("gather") == 2
