"""Nearest's benchmark: the team of processes, the cost on paper, and the rows on which peers are wrong."""

import re
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastgen import functional as F

CPU = torch.device("cpu")


@pytest.fixture
def ring(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("nearest_ring")


def test_a_team_answers_and_goes_home(ring: ModuleType) -> None:
    from benchmarks import machine

    query, database = torch.randn(31, 5), torch.randn(70, 5)
    load = machine.Load()
    team = ring.Team(2, (query, database))
    processes = team.processes
    spent = load._read()[2] - load.started[2]
    assert spent > 0.5  # their imports: what a team does is not other people's load
    whole = F.nearest(query, database)
    for _ in range(2):
        for part in team.found:
            part.zero_()
        distance, index = team()
        assert torch.equal(distance, whole.distance[:, 0])
        assert torch.equal(index, whole.index[:, 0])
    processes[1].kill()
    processes[1].wait()
    with pytest.raises(RuntimeError, match=r"process [01] of 2: "):
        team()
    del team
    deadline = time.monotonic() + 20
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [process.poll() is None for process in processes] == [False, False]


def row(provider: str, seconds: float, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"family": "nearest", "work": "w", "provider": provider, "series": "top-1", "status": "ok"}
    return found | {"seconds": seconds, "operations": 1e9, "size": {"N": 9, "M": 9, "D": 128}} | more


def test_the_table_of_processes(ring: ModuleType) -> None:
    times = {"fastgen": 0.3, "fastgen, 2 processes": 0.16, "fastgen, 4 processes": 0.1, "eager": 1.0}
    rows = [row(name, seconds, series=ring.SERIES) for name, seconds in times.items()]
    assert ring.text(rows).splitlines()[-3:] == [
        "| 1 | 300 ms | 1.00 |",
        "| 2 | 160 ms | 1.88 |",
        "| 4 | 100 ms | 3.00 |",
    ]
    assert ring.text(rows[:1]) == ring.text(rows[1:]) == ring.text([row("fastgen", 1.0)]) == ""


def test_a_billion_points_on_paper(ring: ModuleType) -> None:
    """Two workers by hand: 8 rows and 4 rows of 2 numbers, 16 bytes and an id each; 128 operations."""
    cost = ring.billion(4.0, 5.0, n=8, m=4, d=2, workers=2)
    shard = 2 * (2 * 4 + 8)
    assert cost == {
        "search": 128 / (2 * 4.0),
        "send": shard / 5.0,
        "total": 128 / 8 + shard / 5.0,
        "traffic": shard,
        "memory": (4 + 2) * 8 + 2 * shard,
    }
    assert ring.billion(4e9, 5.0, n=8, m=4, d=2, workers=2)["total"] == 2 * shard / 5.0
    rows = [row("fastgen", 1.0, size={"D": 64}), row("fastgen", 2e-6), row("eager", 1e-9)]
    said = ring.on_paper({"machine": {"type": "cuda"}, "rows": rows})
    assert "0.0005 T operations/s" not in said
    assert 'the rate of "w", 500 T operations/s: 2.22 hours of search' in said  # 2e18 · 128 / 64 / 5e14 = 8,000 s
    assert "Each sends 477 GiB in all, 10.2 s over" in said  # 63/64 · 10⁹ · 520 bytes = 511.9e9
    assert ring.on_paper({"machine": {"type": "cpu"}, "rows": rows[2:]}) == ""


def test_rows_on_which_faiss_is_wrong(ring: ModuleType) -> None:
    pytest.importorskip("faiss")
    from benchmarks import nearest, results
    from benchmarks.harness import Measurer

    for work in (nearest._offset_work(2000, 3000, 64), nearest._masked_work(2000, 3000, 64)):
        run = Measurer(CPU, rounds=1, at_least=0.0)
        rows = {r["provider"]: r for r in run.measure(work, ["fastgen", "faiss", "faiss, rows copied"])}
        assert rows["fastgen"]["status"] == "ok"
        assert rows["fastgen"]["right"] == 1.0
        assert rows["faiss"]["status"] == "wrong"
        assert rows["faiss"]["right"] < 0.5
        assert rows.get("faiss, rows copied", {"right": 1.0})["right"] == 1.0
        assert "% right |" in results.table([rows["faiss"]]).splitlines()[-1]


def test_rows_of_processes(ring: ModuleType) -> None:
    """Checked against float64 as every row; the memory of one's own process says nothing of others'."""
    from benchmarks import nearest
    from benchmarks.harness import Measurer

    run = Measurer(CPU, rounds=2, at_least=0.0, memory=lambda work, provider: 1)
    rows = {r["provider"]: r for r in run.measure(nearest._ring_work(200, 300, 5), ["fastgen, 2 processes", "eager"])}
    assert {r["status"] for r in rows.values()} == {"ok"}
    assert not any("peak_bytes" in r for r in rows.values())


def test_streamed_rows(ring: ModuleType) -> None:
    """Each provider meets the same chunks, the last of them a short one; a few queries are checked in float64."""
    from benchmarks import nearest, report
    from benchmarks.harness import Measurer

    run = Measurer(CPU, rounds=1, at_least=0.0)
    rows = {r["provider"]: r for r in run.measure(nearest._streamed_work(150, 2 * nearest.CHUNK + 7, 8))}
    assert {r["status"] for name, r in rows.items() if name != "faiss"} == {"ok"}
    assert rows["faiss"]["status"] in ("ok", "missing")
    assert (rows["fastgen"]["right"], rows["fastgen"]["checked"]) == (1.0, 100)
    names = {scale: [work.name for work in nearest.works(scale)] for scale in ("full", "huge")}
    assert "top-1 of 1000 x 10000000 x 64, streamed" in names["huge"]
    assert {work for _, family, work in report.README_ROWS if family == "nearest"} <= set(names["full"])


def test_the_readme_s_ten_million_rows(
    ring: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command as written, but over two chunks, and without the memory, which is measured in other processes."""
    from benchmarks import __main__ as command
    from benchmarks import machine, memory, nearest

    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (words,) = re.findall(r"`python -m benchmarks (.*? --huge .*?)`", readme)
    streamed, small = nearest._streamed_work, partial(nearest.stream, 1000, nearest.CHUNK + 7, 64)
    monkeypatch.setattr(nearest, "_streamed_work", lambda *size: replace(streamed(*size), inputs=small))
    monkeypatch.setattr(memory, "limit_process", lambda: None)
    monkeypatch.setattr(machine, "limits", lambda device, quick: {})
    assert command.main([*shlex.split(words), "--no-memory"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"top-1 of 1000 x 10000000 x 64, streamed \| fastgen \| .*100.*% right", said), said
