"""The nearest of a pool that is never stored, in any blocks, chunks and number of processes."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.models import processes
from fastgen.models.imle_pool import NONE, codes, search_own, search_pool

Apart = Callable[..., list[Any]]


def made(ids: Tensor) -> Tensor:
    """A pool whose samples can be looked at one by one; every fourth repeats an older one, so that there are ties."""
    return codes(ids - 2 * (ids % 4 == 3).long(), 5, 7) * torch.tensor([3.0, 2, 1, 1, 0.1])


def brute(query: Tensor, first: int, count: int, radius: float) -> tuple[Tensor, Tensor]:
    """Naively, in float64, with the distances rounded to float32 as the contract has them."""
    pool = made(torch.arange(first, first + count)).double()
    distance = (query.double()[:, None] - pool).square().sum(2).float()
    distance[:, (distance < radius**2).any(0)] = torch.inf
    best = distance.min(1)
    return best.values, (distance == best.values[:, None]).int().argmax(1) + first


@pytest.mark.parametrize("radius", [0.0, 1.2])
@pytest.mark.parametrize(("n", "count", "chunk", "block"), [(37, 211, 50, 37), (13, 64, 64, 5), (5, 3, 100, 1)])
def test_search_finds_the_nearest_of_all(n: int, count: int, chunk: int, block: int, radius: float) -> None:
    query = torch.randn(n, 5)
    radius = radius if count > 10 else 0.0
    most = 0

    def counted(ids: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(ids))
        return made(ids)

    found = search_pool(
        lambda: iter(query.split(block)), counted, first=10**12 + 2, count=count, chunk=chunk, radius=radius
    )
    distance, ids = brute(query, 10**12 + 2, count, radius)
    assert torch.equal(found.id, ids)
    torch.testing.assert_close(found.distance, distance)
    if radius:
        assert not torch.equal(ids, brute(query, 10**12 + 2, count, 0)[1])  # the radius did reject some
    assert most <= chunk


def test_a_pool_that_is_rejected_whole_has_no_winner() -> None:
    query = torch.randn(4, 5)
    found = search_pool(lambda: iter([query]), made, first=0, count=9, chunk=4, radius=100.0)
    assert found.distance.isinf().all()
    assert (found.id == NONE).all()


def test_own_samples() -> None:
    points = torch.randn(11, 5)
    rows = torch.randperm(40)[:11]
    asked = []

    def own(ids: Tensor, whose: Tensor) -> Tensor:
        asked.append(len(ids))
        return made(ids) + whose[:, None]

    found = search_own(lambda: zip(rows.split(4), points.split(4), strict=True), own, first=1000, pool=6, chunk=13)
    for row, point, distance, number in zip(rows.tolist(), points, *found, strict=True):
        ids = torch.arange(1000 + row * 6, 1000 + row * 6 + 6)
        all_distances = (point.double() - (made(ids) + row).double()).square().sum(1)
        assert number == ids[all_distances.argmin()]
        assert float(distance) == pytest.approx(float(all_distances.min()), rel=1e-6)
    assert max(asked) <= 13


SPLIT = """
import torch
from fastgen.models import processes
from fastgen.models.imle_pool import codes, search_own, search_pool
{made}
with processes.joined():
    torch.manual_seed(0)
    query = torch.randn(23, 5)
    for radius in (0.0, 1.2):
        found = search_pool(lambda: iter(query.split(9)), made, first=5, count=333, chunk=40, radius=radius)
        own = search_own(lambda: [(torch.arange(23), query)], lambda i, w: made(i), first=9, pool=4, chunk=9)
        torch.save([*found, *own], f"{{radius}}-{{rank}}.pt")
"""


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_finds_the_same(tmp_path: Path, run_apart: Apart, count: int) -> None:
    code = SPLIT.format(made=inspect.getsource(made)).replace("Tensor", "object")
    assert [done.returncode for done in run_apart(code, count, tmp_path)] == [0] * count
    torch.manual_seed(0)
    query = torch.randn(23, 5)
    for radius in (0.0, 1.2):
        one = search_pool(lambda: iter(query.split(9)), made, first=5, count=333, chunk=40, radius=radius)
        own = search_own(lambda: [(torch.arange(23), query)], lambda i, w: made(i), first=9, pool=4, chunk=9)
        for rank in range(count):
            found = torch.load(tmp_path / f"{radius}-{rank}.pt", weights_only=True)
            for a, b in zip((*one, *own), found, strict=True):
                assert torch.equal(a, b)


def test_on_gpus_processes_talk_before_they_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects and tensors of the CPU go by gloo: with NCCL alone they would pass through the first GPU."""
    asked: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.dist, "init_process_group", asked.append)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: None)
    with processes.joined() as told:
        assert (told["devices"], told["num_nodes"]) == (2, 1)
    assert asked == ["cpu:gloo,cuda:nccl"]
