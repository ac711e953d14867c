"""The harness: a wrong result gets no time, a missing peer is a row, and memory is the call's own."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import functional as F

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def summing(harness: ModuleType, **more: Any) -> Any:
    def missing(x: Any) -> Any:
        raise ImportError("No module named 'peer'")

    def broken(x: Any) -> Any:
        raise RuntimeError("out of luck")

    arguments: dict[str, Any] = {
        "family": "mmd",
        "name": "sum",
        "inputs": lambda device: torch.arange(1000.0),
        "providers": {
            "fastgen": lambda x: lambda: x.sum(),
            "eager": lambda x: lambda: (x.sum(), x.sum())[0],
            "wrong": lambda x: lambda: x.sum() * 1.01,
            "nan": lambda x: lambda: x.sum() * float("nan"),
            "infinite": lambda x: lambda: x.sum() / 0.0,
            "shape": lambda x: lambda: x.sum()[None],
            "missing": missing,
            "broken": broken,
            "elsewhere": harness.Provider(broken, ("cuda",)),
        },
        "oracle": lambda x: x.double().sum(),
        "series": "sum",
        "size": {"N": 1000},
        "operations": 1e3,
        "moved": 4e3,
    }
    return harness.Work(**(arguments | more))


def test_rows(harness: ModuleType, measurer: Callable[..., Any]) -> None:
    run = measurer(memory=lambda work, provider: len(provider))
    rows = {r["provider"]: r for r in run.measure(summing(harness))}
    statuses = dict.fromkeys(("fastgen", "eager"), "ok") | dict.fromkeys(("wrong", "nan", "infinite"), "wrong")
    statuses |= {"missing": "missing", "broken": "failed", "shape": "failed"}
    assert {name: row["status"] for name, row in rows.items()} == statuses
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert all(("seconds" in row) == (row["status"] == "ok") for row in rows.values())
    assert all(row.get("peak_bytes") == (len(name) if row["status"] == "ok" else None) for name, row in rows.items())
    own = rows["fastgen"]
    assert own["rounds"] == 4
    assert own["seconds"] <= own["quantiles"][0] <= own["quantiles"][1] <= own["quantiles"][2]
    assert own["bytes_per_second"] == pytest.approx(4e3 / own["seconds"])
    assert own["share_of_matmul"] == pytest.approx(1e3 / own["seconds"] / 1e9)
    from benchmarks import results

    table = results.table(list(rows.values()))
    assert "| sum | wrong | **wrong** |" in table
    assert "No module named 'peer'" in table


def test_rounds_are_interleaved_and_the_check_comes_first(harness: ModuleType) -> None:
    calls: list[str] = []

    def provider(name: str) -> Callable[[Any], Any]:
        def run(x: Tensor) -> Tensor:
            calls.append(name)
            return x.sum()

        return lambda x: lambda: run(x)

    run = harness.Measurer(CPU, rounds=3, at_least=0.0)
    run.measure(summing(harness, providers={"a": provider("a"), "b": provider("b")}))
    # A check and a warm call each, then the rounds in turn.
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 3]


def test_a_call_beyond_patience_is_skipped_and_says_so(harness: ModuleType, measurer: Callable[..., Any]) -> None:
    run = measurer(patience=0.5)
    of = {"series": "sum", "operations": 10.0, "moved": 0.0, "size": {"N": 10}}
    run.rows = [of | {"provider": "eager", "status": "ok", "seconds": 0.01}]
    run.rows.append(of | {"provider": "fastgen", "status": "wrong"})
    rows = {r["provider"]: r for r in run.measure(summing(harness))}
    assert rows["eager"]["status"] == "skipped"
    assert rows["eager"]["expected_seconds"] == pytest.approx(1.0)
    assert "seconds" not in rows["eager"]
    assert rows["fastgen"]["status"] == "ok"
    assert run.measure(summing(harness), ["fastgen"])[0]["provider"] == "fastgen"


def test_what_is_expected_comes_from_the_same_dimension(harness: ModuleType) -> None:
    """Distances of D coordinates need not cost D times those of one: N alone is scaled where it can be."""
    of = {"provider": "eager", "series": "sum", "status": "ok", "moved": 0.0}
    rows = [
        of | {"size": {"N": 100, "D": 64}, "operations": 1e4, "seconds": 0.01},
        of | {"size": {"N": 900, "D": 8}, "operations": 9e5, "seconds": 2.0},
    ]
    work = summing(harness, size={"N": 1000, "D": 64}, operations=1e6)
    assert harness.expected_seconds(work, "eager", rows) == pytest.approx(1.0)
    assert harness.expected_seconds(work, "eager", rows[1:]) == pytest.approx(2.0 * 10 / 9)
    assert harness.expected_seconds(work, "fastgen", rows) == 0.0


def test_a_long_warm_call_is_a_round(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, measurer: Callable[..., Any]
) -> None:
    calls: list[str] = []
    times = iter(range(0, 10_000, 2))  # each look at the clock comes two seconds after the one before
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(times))
    work = summing(harness, providers={"slow": lambda x: lambda: (calls.append("call"), x.sum())[1]})
    row = measurer().measure(work)[0]
    assert len(calls) == 3  # the check, the warm call, one round more
    assert row["rounds"] == 2
    calls.clear()
    assert measurer().measure(dataclasses.replace(work, once=True))[0]["rounds"] == 1
    assert len(calls) == 2
    assert row["spent"] > 0


def test_out_of_time_leaves_providers(harness: ModuleType, measurer: Callable[..., Any]) -> None:
    from benchmarks.__main__ import to_do

    row = measurer(until=0.0).measure(summing(harness), ["fastgen"])[0]
    assert row["status"] == "skipped"
    assert "out of time" in row["reason"]
    assert to_do(row, 1e-9)
    assert to_do({"status": "skipped", "expected_seconds": 5.0}, 10.0)
    assert not to_do({"status": "skipped", "expected_seconds": 5.0}, 1.0)
    assert not to_do({"status": "failed"}, math.inf)
    work = summing(harness)
    assert harness.expected_seconds(work, "fastgen", [row]) == 0.0


def test_a_call_that_fails_while_it_is_timed(harness: ModuleType) -> None:
    """As where memory runs out by what all providers hold: the others are timed."""

    def failing(x: Tensor) -> Callable[[], Tensor]:
        calls = iter(range(3))

        def run() -> Tensor:
            if next(calls) == 2:
                raise RuntimeError("out of memory")
            return x.sum()

        return run

    providers = {"eager": failing, "fastgen": lambda x: lambda: x.sum()}
    rows = {
        r["provider"]: r for r in harness.Measurer(CPU, at_least=0.0).measure(summing(harness, providers=providers))
    }
    assert rows["eager"]["status"] == "failed"
    assert "out of memory" in rows["eager"]["reason"]
    assert "seconds" not in rows["eager"]
    assert rows["fastgen"]["seconds"] > 0


def test_memory_is_measured_where_the_run_is_ready(harness: ModuleType) -> None:
    """As on CUDA: nothing is set up, and compiled, a second time for it."""
    setups: list[str] = []

    def setup(x: Tensor) -> Callable[[], Tensor]:
        setups.append("now")
        return lambda: x.sum()

    def memory(work: Any, name: str, inputs: Tensor, run: Callable[[], Tensor]) -> int:
        if name == "eager":
            raise RuntimeError("out of memory")
        assert run() == inputs.sum()
        return 17

    work = summing(harness, providers={"fastgen": setup, "eager": lambda x: lambda: x.sum()})
    rows = {r["provider"]: r for r in harness.Measurer(CPU, at_least=0.0, memory_here=memory).measure(work)}
    assert len(setups) == 1
    assert rows["fastgen"]["peak_bytes"] == 17
    assert "peak_bytes" not in rows["eager"]
    assert rows["eager"]["seconds"] > 0


def test_providers_are_announced_before_each_turn(harness: ModuleType, measurer: Callable[..., Any]) -> None:
    seen: list[str] = []

    def setup(x: Tensor) -> Callable[[], Tensor]:
        seen.append("set up")
        return lambda: x.sum()

    work = summing(harness, providers={"fastgen": setup, "eager": setup}, once=True)
    measurer(begins=lambda work, name: seen.append(name)).measure(work)
    assert seen == ["fastgen", "set up", "eager", "set up", "fastgen", "eager"]


def test_an_oracle_without_memory_is_a_row(harness: ModuleType, measurer: Callable[..., Any]) -> None:
    def oracle(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    rows = measurer().measure(summing(harness, oracle=oracle), ["fastgen", "eager"])
    assert [(r["status"], r["reason"]) for r in rows] == [("failed", "the oracle: RuntimeError: out of memory")] * 2


def test_checked_in_float32_and_timed_as_users_have_it(harness: ModuleType) -> None:
    seen: list[bool] = []

    def setup(x: Tensor) -> Callable[[], Tensor]:
        return lambda: (seen.append(torch.backends.cudnn.allow_tf32), x.sum())[1]

    assert torch.backends.cudnn.allow_tf32
    harness.Measurer(CPU, rounds=2, at_least=0.0).measure(summing(harness, providers={"fastgen": setup}))
    assert seen == [False, True, True, True]


def test_a_lost_device_ends_the_run_and_is_not_tried_again(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An illegal access fails every later call of its process: the row that did it is kept, and left out next time."""
    from benchmarks import __main__ as command
    from benchmarks import machine

    lost: list[str] = []

    def deadly(x: Any) -> Any:
        lost.append("now")
        raise RuntimeError("an illegal memory access was encountered")

    def synchronise(device: torch.device) -> None:
        if lost:
            raise RuntimeError("still")

    works = [summing(harness, providers={"fastgen": lambda x: lambda: x.sum(), "faiss": deadly}, name=n) for n in "ab"]
    monkeypatch.setattr(machine, "synchronise", synchronise)
    monkeypatch.setattr(machine, "limits", lambda device, quick: {})
    monkeypatch.setattr(command, "works", lambda family, scale: works if family == "mmd" else [])
    arguments = ["mmd", "--no-memory", "--resume", "--out", str(tmp_path / "a.json")]
    seen = []
    for _ in range(3):  # once for each work, then through
        lost.clear()
        status = command.measure(arguments)
        rows = json.loads((tmp_path / "a.json").read_text())["rows"]
        seen.append((status, [(r["work"], r["provider"], r["status"]) for r in rows]))
    first, second = ("a", "faiss", "failed"), ("b", "faiss", "failed")
    assert seen[0] == (command.LOST, [first])
    assert seen[1] == (command.LOST, [first, ("a", "fastgen", "ok"), second])
    assert seen[2] == (0, [first, ("a", "fastgen", "ok"), second, ("b", "fastgen", "ok")])


def test_what_is_asked_of_a_gpu_is_measured_first(harness: ModuleType) -> None:
    from benchmarks import bars
    from benchmarks.families import FAMILIES, works

    found = bars.urgent_first([work for family in FAMILIES for work in works(family, "huge")])
    asked = {(bar.family, bar.work) for bar in bars.BARS if bar.on == bars.GPU}
    ahead = [(work.family, work.name) for work in found[: len(asked) + len(bars.SMALLER)]]
    assert set(ahead) == asked | set(bars.SMALLER)
    assert [name for _, name in ahead[-4:]] == [
        f"top-1 of {n} x {n} x {d}" for n in (100_000, 1_000_000) for d in (128, 800)
    ]


def test_memory_probe_sees_what_a_call_takes(harness: ModuleType) -> None:
    from benchmarks.memory import probe

    def hungry(x: Any) -> Any:
        return lambda: torch.ones(2**26).sum()  # 256 MiB, gone before the call returns

    work = harness.Work("mmd", "hungry", lambda d: None, {"hungry": hungry, "frugal": lambda x: lambda: 1}, lambda x: 0)
    assert probe(work, "hungry") == pytest.approx(2**28, rel=0.05)
    assert probe(work, "frugal") < 2**22


def test_memory_server_and_another_version(harness: ModuleType) -> None:
    """Both ends of both pipes; the other version is this checkout itself."""
    from benchmarks import memory
    from benchmarks.base import Other
    from benchmarks.families import works

    with memory.server("quick") as server:
        question = {"family": "nearest", "make": "top-1, D = 64", "n": 2000, "timeout": 60}
        answer = server.ask(question | {"provider": "torch.cdist"})
        assert answer["inputs"] == 2 * 2000 * 64 * 4
        assert 2000 * 2000 * 4 * 0.9 < answer["bytes"] < 2000 * 2000 * 4 * 4
        assert "failed" in server.ask(question | {"provider": "nobody"})
        assert "slow" in server.ask(question | {"provider": "torch.cdist", "n": 20_000, "timeout": 0.0})
    work = next(w for w in works("langevin", "quick") if w.name.startswith("noise"))
    other = Other(ROOT, "quick", CPU)
    try:
        ready = other.ready(work, "fastgen")
        torch.testing.assert_close(ready.result(), F.langevin_noise(work.inputs(CPU)[0], seed=0), rtol=0, atol=0)
        assert 0 < ready.seconds(0.0) < 60
        with pytest.raises(RuntimeError, match="nobody"):
            other.ready(work, "nobody")
    finally:
        other.close()


def test_load_of_others_is_seen(harness: ModuleType) -> None:
    from benchmarks import machine, results

    load = machine.Load()
    spinning = subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < .3: pass"])
    assert spinning.returncode == 0
    own = load._read()[2] - load.started[2]
    assert own > 0.1  # a finished child counts as ours, and so not as others'
    assert results.warning([{"other_load": 0.5}]).startswith("Warning")
    assert results.warning([{"other_load": 0.01}, {}]) == ""
