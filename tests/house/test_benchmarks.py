"""The harness: a wrong result gets no time, a missing peer is a row, and memory is the call's own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.harness

    return benchmarks.harness


def test_rows(harness: Any) -> None:
    def missing(x: Any) -> Any:
        raise ImportError("No module named 'peer'")

    def broken(x: Any) -> Any:
        raise RuntimeError("out of luck")

    work = harness.Work(
        family="mmd",
        name="sum",
        inputs=lambda device: torch.arange(1000.0),
        providers={
            "fastgen": lambda x: lambda: x.sum(),
            "eager": lambda x: lambda: (x.sum(), x.sum())[0],
            "wrong": lambda x: lambda: x.sum() * 1.01,
            "nan": lambda x: lambda: x.sum() * float("nan"),
            "missing": missing,
            "broken": broken,
        },
        oracle=lambda x: x.double().sum(),
    )
    measured = harness.measure(work, torch.device("cpu"), rounds=2, at_least=0.001, memory=False)
    rows = {r["provider"]: r for r in measured}
    statuses = {"fastgen": "ok", "eager": "ok", "wrong": "wrong", "nan": "wrong"}
    statuses |= {"missing": "missing", "broken": "failed"}
    assert {name: row["status"] for name, row in rows.items()} == statuses
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert all(("seconds" in row) == (row["status"] == "ok") for row in rows.values())
    assert rows["fastgen"]["seconds"] <= rows["fastgen"]["quantiles"][1]
    table = harness.table(list(rows.values()))
    assert "| sum | wrong | wrong |" in table
    assert "No module named 'peer'" in table


def test_memory_probe_sees_what_a_call_takes(harness: Any) -> None:
    def hungry(x: Any) -> Any:
        return lambda: torch.ones(2**26).sum()  # 256 MiB, gone before the call returns

    work = harness.Work("mmd", "hungry", lambda device: None, {"hungry": hungry, "frugal": lambda x: lambda: 1}, None)
    assert harness.memory_probe(work, "hungry") == pytest.approx(2**28, rel=0.05)
    assert harness.memory_probe(work, "frugal") < 2**22


def test_save_is_whole(harness: Any, tmp_path: Path) -> None:
    harness.save(str(tmp_path / "deep" / "a.json"), [{"work": "w"}], torch.device("cpu"))
    saved = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert saved["rows"] == [{"work": "w"}]
    assert saved["machine"]["torch"] == torch.__version__


def test_every_family_sets_its_work_up(harness: Any) -> None:
    """Each work of the demo runs once with fastgen and agrees with its own oracle."""
    from benchmarks.__main__ import FAMILIES, works

    for family in FAMILIES:
        found = works(family, "demo")
        assert found
        for scale in ("quick", "full"):
            names = [work.name for work in works(family, scale)]
            assert len(names) == len(set(names))
        for work in found:
            assert {"fastgen", "eager"} <= set(work.providers)


def test_command_line_refuses_a_missing_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks", "mmd", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
