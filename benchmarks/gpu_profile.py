"""The stage `profile` of `make gpu`: where a call's time goes, and the counters of the slowest kernels.

The timeline is torch's own profiler's, which needs no rights: of each work that something is asked of the wall and the
host's time of a call, and its kernels. What it shows first is whether the host or the kernels keep a call waiting. The
counters are ncu's, where that is installed and may read them.
"""

import csv
import gc
import json
import re
import time
from typing import Any

import torch

from benchmarks import bars, results
from benchmarks.families import works
from benchmarks.harness import Run
from benchmarks.stages import Stage, again, outcome_of, ran, tool

METRICS = {
    "seconds": "gpu__time_duration.sum",
    "dram bytes": "dram__bytes.sum",
    "dram share": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue share": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "fp32 share": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "tensor share": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "mufu share": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
PROFILED_LAUNCHES = 20
TIMED_CALLS, TIMED_SECONDS = 20, 1.0
LISTED = 12  # kernels of a timeline


def profile(stage: Stage) -> int:
    """The timelines of the works that something is asked of, then ncu's counters for each family's slowest work."""
    content = results.load(stage.file) if stage.file.exists() else {"rows": []}
    slowest = slowest_works(content["rows"])
    asked = {(bar.family, bar.work) for bar in bars.BARS if bar.on == bars.GPU}
    timed = [(r["family"], r["work"]) for r in content["rows"] if r["provider"] == "fastgen" and r["status"] == "ok"]
    works = {f"{family}: {work}": (family, work) for family, work in timed if (family, work) in asked}
    if not slowest and not works:
        raise ValueError("profile: expected rows of `make gpu STAGE=bench` in the result file, got none")

    def profiled(family: str) -> Any:
        if (ncu := tool("ncu")) is None:
            return {"status": "missing", "says": "no ncu on the PATH"}
        metrics = set(METRICS.values())
        while True:
            # The clocks are left alone: a bench's are, too, and the machine may be others' as well.
            command = [ncu, "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none"]
            command += ["--launch-count", str(PROFILED_LAUNCHES), "--metrics", ",".join(sorted(metrics))]
            done = ran([*command, *again("once", family, slowest[family])], {}, stage.left())
            if done is None or not (unknown := unknown_metrics(done.stdout + done.stderr, metrics)):
                break
            metrics -= unknown  # what another chip has
        outcome = stage.kept(family, done, outcome_of(done, (0,)))
        if outcome is None or done is None:
            return None
        return outcome | {"work": slowest[family], "kernels": counters(done.stdout)}

    timelines(stage, works)
    stage.each(list(slowest), profiled)
    return 1 if any(outcome["status"] == "failed" for outcome in stage.done.values()) else 0


def timelines(stage: Stage, works: dict[str, tuple[str, str]]) -> None:
    """Of all works in one process, which takes longer to begin than most of them; where one ends it, of the rest in
    another."""
    told = stage.file.with_name(f"{stage.file.stem}-timelines.jsonl")
    while (left := [step for step in works if step not in stage.done]) and stage.left() > 0:
        print(f"{stage.name}: timelines of {', '.join(left)}", flush=True)
        told.unlink(missing_ok=True)
        done = ran(again("timelines", str(told), *(part for step in left for part in works[step])), {}, stage.left())
        lines = told.read_text() if told.exists() else ""
        for line in lines[: lines.rfind("\n") + 1].splitlines():
            stage.record(left.pop(0), json.loads(line))
        if done is None:
            break
        if left:
            stage.record(left[0], stage.kept(left[0], done, outcome_of(done, ())))
    told.unlink(missing_ok=True)
    stage.say(list(works))


def unknown_metrics(said: str, metrics: set[str]) -> set[str]:
    """Those that ncu complains about."""
    errors = [line for line in said.splitlines() if line.startswith("==ERROR==") and "metric" in line]
    return {metric for metric in metrics if any(metric.split(".")[0] in line for line in errors)}


def slowest_works(rows: list[dict[str, Any]]) -> dict[str, str]:
    """family -> the work of ours that took longest, of those that were measured more than once."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        slowest = found.get(row["family"], {"seconds": 0.0})["seconds"]
        if row["provider"] == "fastgen" and row.get("rounds", 1) > 1 and row["seconds"] > slowest:
            found[row["family"]] = row
    return {family: row["work"] for family, row in found.items()}


def counters(text: str) -> list[dict[str, Any]]:
    """ncu's CSV: a line of names, a line of units, then a launch a line; what it prints before is skipped."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found = []
    table = list(csv.DictReader(lines[start:]))
    units = table[0] if table else {}
    for launch in table[1:]:
        entry: dict[str, Any] = {"kernel": re.sub(r"\(.*", "", launch["Kernel Name"])}
        for name, metric in METRICS.items():
            if launch.get(metric):
                entry[name] = float(launch[metric].replace(",", "")) * _scale(units.get(metric, ""))
        found.append(entry)
    return sorted(found, key=lambda entry: -entry.get("seconds", 0.0))


def _scale(unit: str) -> float:
    """To seconds and bytes; shares stay per cent."""
    scales = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "second": 1.0}
    return (scales | {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}).get(unit, 1.0)


def _ready(family: str, name: str) -> Run:
    """A warm call of ours."""
    work = next(w for w in works(family, "huge") if w.name == name)
    run = work.provider("fastgen").setup(work.inputs(torch.device("cuda")))
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    return run


def once(family: str, name: str) -> int:
    """One warm call of ours between a start and a stop of the profiler: backward's kernels are another thread's."""
    run = _ready(family, name)
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def each_timeline(told: str, *named: str) -> int:
    """Of families and works in turn: a line of JSON for each in the file `told`. An error ends the process: it may be
    the device's."""
    with open(told, "w", buffering=1) as file:
        for family, name in zip(named[::2], named[1::2], strict=True):
            file.write(json.dumps({"status": "passed", **timeline(family, name)}) + "\n")
            gc.collect()
            torch.cuda.empty_cache()
    return 0


def timeline(family: str, name: str) -> dict[str, Any]:
    """The seconds of a call, those of them before it returned (`host`), and what `kernels` says."""
    run, device = _ready(family, name), torch.device("cuda")
    started = time.perf_counter()
    calls = 0
    while calls < TIMED_CALLS and (calls == 0 or time.perf_counter() - started < TIMED_SECONDS):
        run()
        calls += 1
    host = time.perf_counter() - started
    torch.cuda.synchronize(device)
    found: dict[str, Any] = {"seconds": (time.perf_counter() - started) / calls, "host": host / calls}
    with torch.profiler.profile() as profiler:
        run()
        torch.cuda.synchronize(device)
    return found | kernels(profiler.key_averages())


def kernels(events: Any) -> dict[str, Any]:
    """What ran on the device: in all, and each kernel, the longest first."""
    ran_there = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    each = [{"kernel": e.key[:100], "seconds": e.self_device_time_total / 1e6, "launches": e.count} for e in ran_there]
    each.sort(key=lambda entry: -entry["seconds"])
    sums = {f"kernel_{what}": sum(entry[what] for entry in each) for what in ("seconds", "launches")}
    return sums | {"kernels": each[:LISTED]}
