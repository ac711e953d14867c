"""Report and growth: the same files give the same bytes, regressions are named, the README says what was measured."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def report(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("report")


def row(provider: str, n: int, seconds: float, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"family": "mmd", "work": f"IMQ, N = {n}", "provider": provider, "series": "IMQ"}
    found |= {"size": {"N": n, "M": n, "D": 8}, "operations": 3e2 * n * n, "moved": 64.0 * n, "status": "ok"}
    found |= {"seconds": seconds, "quantiles": [seconds, seconds * 1.02, seconds * 1.04], "rounds": 5}
    found |= {"error": 1e-7, "peak_bytes": 40 * n, "other_load": 0.0}
    return found | more


def content(factor: float = 1.0) -> dict[str, Any]:
    rows = [row("fastgen", n, factor * 1e-9 * n**2) for n in (1000, 2000, 4000)]
    rows += [row("eager", n, 3e-8 * n**2, peak_bytes=60 * n**2) for n in (1000, 2000)]
    rows.append(row("torch.compile", 4000, 0.1))
    rows.append({k: v for k, v in row("keops", 4000, 1.0, status="wrong", error=0.3).items() if k != "seconds"})
    limits = {"copy": 2e10, "float32": 1e11}
    about = {"device": "A machine", "type": "cpu", "cores": 2, "threads": 2, "kernels": "avx2", "torch": "2"}
    about |= {"python": "3", "versions": {"numpy": "2"}, "commit": "abc", "date": "2026-01-01", "limits": limits}
    return {"machine": about, "scale": "full", "rows": rows}


def test_the_same_file_gives_the_same_bytes(report: ModuleType, tmp_path: Path) -> None:
    made = []
    for name in "ab":
        report.write(content(), tmp_path / name, [])
        made.append({f.name: f.read_bytes() for f in sorted((tmp_path / name).iterdir())})
    assert made[0] == made[1]
    assert set(made[0]) == {"report.md", "speedup.png", "time.png", "memory.png", "roofline.png"}
    assert all(data[:4] == b"\x89PNG" for file, data in made[0].items() if file.endswith("png"))
    text = made[0]["report.md"].decode()
    assert "| mmd: IMQ, N = 1000 | 1 ms | eager 30 ms | 30.0× | 30.0× |" in text
    assert "| mmd: IMQ | fastgen | N = 1000 to 4000, D = 8 | N^2.00 | N^1.00 |" in text
    assert "| mmd: IMQ | eager | N = 1000 to 2000, D = 8 | N^2.00 | N^2.00 |" in text
    assert "**wrong**" in text
    assert "Warning" not in text


def test_the_report_of_the_committed_results_is_always_the_same(tmp_path: Path) -> None:
    """Made by two processes that order their sets differently: text and pictures are equal byte for byte."""
    made = []
    for seed in "12":
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            "report",
            str(RESULTS / "cpu.json"),
            "--out",
            str(tmp_path / seed),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        assert done.returncode == 0, done.stderr
        made.append({f.name: f.read_bytes() for f in (tmp_path / seed).iterdir()})
    assert len(made[0]) == 5
    assert made[0] == made[1]


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_peers_of_a_work_have_colours_of_their_own(benchmark: Callable[[str], ModuleType], file: Path) -> None:
    pictures, results = benchmark("pictures"), benchmark("results")
    for (_, work), rows in results.grouped(json.loads(file.read_text())["rows"]).items():
        peers = [row["provider"] for row in rows if not results.ours(row["provider"])]
        assert len({pictures.colour(peer) for peer in peers}) == len(peers), (work, peers)


def test_bars(report: ModuleType) -> None:
    from benchmarks import bars

    work = "IMQ-7, 4096 x 4096 x 64, both gradients"
    measured = content()
    measured["rows"] = [
        row(p, 4096, s, work=work) for p, s in (("fastgen", 0.1), ("eager", 7.9), ("torch.compile", 1.2))
    ]
    measured["rows"].append(row("fastgen", 9, 0.03, work=bars.STEP, family="langevin"))
    measured["rows"].append(row("add", 9, 0.01, work=bars.STEP, family="langevin"))
    lines = [line.split(" | ")[2:] for line in bars.text(measured).splitlines() if line.startswith("| ")][1:]
    assert lines[:2] == [["torch.compile", "≥ 11×", "12.00×", "met |"], ["eager", "≥ 80×", "79.00×", "**not met** |"]]
    assert lines[2] == ["the best peer", "≥ 25×", "", "not measured |"]
    assert ["add", "≤ 2×", "3.00×", "**not met** |"] in lines
    assert "## Bars" in report.markdown(measured, [], [])
    measured["machine"]["type"] = "cuda"
    copy = row("fastgen", 9, 0.01, work=bars.STEP, family="langevin", share_of_copy=0.91)
    measured["rows"] = [copy, row("fastgen", 9, 1.6e-3, work=bars._imq(16_384, 64))]
    lines = [line.split(" | ")[2:] for line in bars.text(measured).splitlines()]
    assert ["a copy", "≥ 90%", "91.0%", "met |"] in lines
    assert ["1 ms, the floor", "≥ 50%", "62.5%", "met |"] in lines
    assert bars.text(content()) == ""  # none of its works


def test_every_bar_is_of_works_and_providers_that_there_are(report: ModuleType) -> None:
    from benchmarks import bars
    from benchmarks.families import works

    for on, scale, device in ((bars.CPU, "full", "cpu"), (bars.GPU, "huge", "cuda")):
        known = {(f, w.name): w.names(device) for f in report.FAMILIES for w in works(f, scale)}
        of = [bar for bar in bars.BARS if bar.on == on]
        assert len(of) >= 10
        for bar in of:
            names = known[bar.family, bar.work]
            assert bar.own in names
            assert bar.against in (*names, bars.BEST, *bars.SHARES)
            assert bool(bar.asked) != bool(bar.most)


def test_regressions_above_the_noise_are_named(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, factor in (("old", 1.0), ("same", 1.04), ("slow", 1.3)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content(factor)))
    against = ["--against", str(tmp_path / "old.json"), "--out", str(tmp_path / "out")]
    assert report.main([str(tmp_path / "same.json"), *against]) == 0
    assert report.main([str(tmp_path / "slow.json"), *against]) == 1
    said = capsys.readouterr().err
    assert said.count("slower: mmd: IMQ, N = ") == 3
    assert "1.30 times" in said
    assert "## Regressions" in (tmp_path / "out" / "report.md").read_text()
    slower_machine = content(1.3)  # of the works that eager has too; torch.compile's has kept its time
    for found in slower_machine["rows"]:
        if found["provider"] == "eager":
            found["seconds"] *= 1.25
    named = report.regressions(slower_machine["rows"], content()["rows"])
    assert [s.split(",")[1] for s in named] == [" N = 4000"]
    slower_machine = content(1.6)
    for found in slower_machine["rows"]:
        if found["provider"] == "eager":
            found["seconds"] *= 1.25
    assert (
        "its peers became up to 1.25 times slower" in report.regressions(slower_machine["rows"], content()["rows"])[0]
    )
    noisy = content(1.3)
    for found in noisy["rows"]:
        found["quantiles"] = [2.0, 2.0, 2.0]
    assert report.regressions(noisy["rows"], content()["rows"]) == []
    gone = content()["rows"]
    gone[0] = {k: v for k, v in gone[0].items() if k != "seconds"} | {"status": "wrong"}
    assert [s.split(": ")[-1] for s in report.regressions(gone, content()["rows"])] == ["was 1 ms, is wrong"]


def test_load_of_others_is_said(report: ModuleType) -> None:
    busy = content()
    busy["rows"][0]["other_load"] = 0.7
    said = report.markdown(busy, [], [])
    assert "up to 0.7 cores busy" in said
    assert "| mmd: IMQ, N = 1000 | 1 ms (busy) | eager 30 ms | 30.0× |" in said
    assert said.count("(busy)") == 2


def test_the_readme_is_what_the_result_files_say(report: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert [match[2] for match in report.MARKED.finditer(text)] == ["cpu", "gpu"]
    assert report.readme(text, RESULTS) == text, "run: python -m benchmarks report --readme"
    stored = report.results.load(RESULTS / "cpu.json")
    assert sum(line.startswith("| ") for line in report.readme_block("cpu", RESULTS).splitlines()) >= 5
    assert all(r["error"] <= 0.02 for r in stored["rows"] if r["status"] == "ok")


def test_a_readme_that_differs_is_seen(report: ModuleType, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    for file in RESULTS.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    assert report.readme(text, tmp_path) == text
    changed = json.loads((tmp_path / "cpu.json").read_text())
    for found in changed["rows"]:
        if "seconds" in found:
            found["seconds"] *= 1.1
    (tmp_path / "cpu.json").write_text(json.dumps(changed))
    assert report.readme(text, tmp_path) != text


def test_a_gpu_result_replaces_the_sentence(report: ModuleType, tmp_path: Path) -> None:
    assert report.readme_block("gpu", tmp_path) == "GPU speed is not measured yet."
    measured = content()
    measured["machine"] |= {"type": "cuda", "device": "A GPU"}
    measured["rows"][0] |= {"work": "IMQ-7, 4096 x 4096 x 64, both gradients"}
    (tmp_path / "a-gpu.json").write_text(json.dumps(measured))
    made = report.readme_block("gpu", tmp_path)
    assert "not measured" not in made
    assert "A GPU" in made
    assert "4096 × 4096 × 64 | **1 ms**" in made


def test_every_row_of_the_readme_is_a_work(report: ModuleType) -> None:
    from benchmarks.families import works

    known = {(f, w.name) for f in report.FAMILIES for scale in ("full", "huge") for w in works(f, scale)}
    assert {(family, work) for _, family, work in report.README_ROWS + report.README_GPU_ROWS} <= known


def test_exponents(report: ModuleType) -> None:
    from benchmarks import growth

    assert growth.exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2)
    assert growth.size_of("1.5GiB") == 3 * 2**29
    with pytest.raises(ValueError, match="--memory"):
        growth.size_of("12")


GROWTHS = {
    "as N": lambda n: 40.0 * n,
    "as N²": lambda n: 0.5 * n**2,
    "with a constant": lambda n: 40_000.0 + 3 * n,
    "by steps": lambda n: 65_536.0 * (1 + n // 4000),
    "backwards at first": lambda n: 9000.0 if n < 500 else 2.0 * n,
    "hardly": lambda n: 1.0,
}


@pytest.mark.parametrize("shape", GROWTHS)
@pytest.mark.parametrize("first", [1, 256, 1 << 20])
def test_the_largest_n_is_found(report: ModuleType, shape: str, first: int) -> None:
    from benchmarks import growth

    asked: list[int] = []

    def peak(n: int) -> float:
        asked.append(n)
        return GROWTHS[shape](n)

    most, limit = 1 << 22, 2.0**20
    found, ended = growth.search(peak, limit, first, most)
    assert peak(found) <= limit
    if shape == "hardly":
        assert found >= most / growth.PRECISION
        assert ended == "the end of the search"
    else:
        assert ended == "memory"
        assert peak(int(found * growth.PRECISION) + 1) > limit
    assert len(asked) < 25
    assert max(asked[:-2]) <= max(first, growth.STEP * found)


def test_a_search_that_something_else_ends(report: ModuleType) -> None:
    from benchmarks import growth

    asked: list[int] = []

    def slow(n: int) -> float | str:
        asked.append(n)
        return 8.0 * n if n <= most else "time"

    for most in (100, 1030, 3000, 5000):
        asked.clear()
        found, ended = growth.search(slow, 2**30, 100)
        assert ended == "time"
        assert most / growth.LATE <= found <= most
        assert sum(n <= most for n in asked) <= 3 + math.log(most / 100, growth.STEP)  # what is not tried costs nothing
    assert growth.search(lambda n: math.inf, 2**30, 100) == (0, "memory")
    assert growth.forecast([(1.0, 3.1)], 1e9) == 0.0
    assert growth.forecast([(16.0, 2.6), (1.0, 1.1)], 32.0) == pytest.approx(4.2)  # one second whatever the size
    assert growth.forecast([(1.0, 0.1), (15.9, 1.0), (16.0, 1.6)], 32.0) == pytest.approx(3.2)  # one of them slow
    assert growth.search(lambda n: 8.0 * n if n < 3000 else math.inf, 2**30, 100)[0] >= 2999 / growth.PRECISION
