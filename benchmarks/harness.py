"""One harness for every family: check against float64 first, then time in interleaved rounds, then measure memory."""

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]  # returns a tensor or a tuple of them: what is compared with the oracle


@dataclass(frozen=True)
class Work:
    """One thing to compute, and everybody who can compute it.

    inputs: device -> whatever the providers take; the same values at every call
    providers: name -> (inputs -> Run); `fastgen` is ours, `eager` the plain torch that users have today. The setup may
        raise ImportError: the provider is then listed as missing.
    oracle: inputs -> the float64 result, or None where only speed is at stake (noise)
    tolerance: of ‖result − oracle‖ / ‖oracle‖, for each returned tensor
    """

    family: str
    name: str
    inputs: Callable[[torch.device], Any]
    providers: dict[str, Callable[[Any], Run]]
    oracle: Callable[[Any], Any] | None
    tolerance: float = 1e-4


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _error(result: Any, expected: Any) -> float:
    worst = 0.0
    for got, want in zip(_tensors(result), _tensors(expected), strict=True):
        want = want.double().cpu()
        difference = (got.double().cpu() - want).norm() / want.norm().clamp_min(1e-300)
        worst = max(worst, float("inf") if difference.isnan() else float(difference))
    return worst


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Run, device: torch.device, at_least: float) -> float:
    """Seconds for one call, averaged over as many as fill `at_least` seconds."""
    calls, spent = 0, 0.0
    _synchronise(device)
    start = time.perf_counter()
    while spent < at_least or calls == 0:
        run()
        calls += 1
        if device.type == "cpu" or calls % 16 == 0:
            _synchronise(device)
            spent = time.perf_counter() - start
    _synchronise(device)
    return (time.perf_counter() - start) / calls


def measure(
    work: Work, device: torch.device, *, rounds: int = 5, at_least: float = 0.05, memory: bool = True
) -> list[dict[str, Any]]:
    """A row for each provider: status, error, seconds (min, 20/50/80 % quantiles), extra peak memory in bytes."""
    inputs = work.inputs(device)
    expected = work.oracle(inputs) if work.oracle is not None else None
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Run] = {}
    for name, setup in work.providers.items():
        row = rows[name] = {"family": work.family, "work": work.name, "provider": name}
        try:
            run = setup(inputs)
            result = run()
        except ImportError as error:
            row |= {"status": "missing", "reason": str(error)}
            continue
        except Exception as error:  # a peer that fails is a row that says so
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
            continue
        if expected is not None:
            row["error"] = _error(result, expected)
            if not row["error"] <= work.tolerance:
                row["status"] = "wrong"
                continue
        row["status"] = "ok"
        ready[name] = run
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):  # interleaved, so that a drifting machine favours nobody
        for name, run in ready.items():
            times[name].append(_seconds(run, device, at_least))
    for name, taken in times.items():
        ordered = torch.tensor(sorted(taken), dtype=torch.float64)
        quantiles = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        rows[name] |= {"seconds": min(taken), "quantiles": quantiles}
        if memory:
            rows[name]["peak_bytes"] = _peak_bytes(work, name, device)
    return list(rows.values())


def _peak_bytes(work: Work, provider: str, device: torch.device) -> int | None:
    """Extra memory at the peak of one call. On the CPU a fresh process measures its resident set."""
    if device.type == "cuda":
        run = work.providers[provider](work.inputs(device))
        run()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    command = [sys.executable, "-m", "benchmarks", "_memory", work.family, work.name, provider]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else None


def memory_probe(work: Work, provider: str) -> int:
    """Runs in the fresh process: the growth of the peak resident set from the ready inputs through one warm call."""
    inputs = work.inputs(torch.device("cpu"))
    run = work.providers[provider](inputs)
    with open("/proc/self/clear_refs", "w") as reset, contextlib.suppress(OSError):
        reset.write("5")  # peak := current, so that imports do not hide what follows
    before = _high_water()
    run()
    return _high_water() - before


def _high_water() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
            name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), name)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the ratio is against the plain torch code of the same work."""
    lines = ["| work | provider | time | against eager | extra memory | error |", "|---|---|---|---|---|---|"]
    eager = {row["work"]: row["seconds"] for row in rows if row["provider"] == "eager" and "seconds" in row}
    for row in rows:
        if row["status"] != "ok":
            why = row.get("error", row.get("reason", ""))
            lines.append(f"| {row['work']} | {row['provider']} | {row['status']} | | | {why} |")
            continue
        base = eager.get(row["work"])
        ratio = f"{base / row['seconds']:.1f}×" if base else ""
        memory = f"{row['peak_bytes'] / 2**20:.1f} MiB" if row.get("peak_bytes") is not None else ""
        error = f"{row['error']:.1e}" if "error" in row else ""
        lines.append(f"| {row['work']} | {row['provider']} | {_time(row['seconds'])} | {ratio} | {memory} | {error} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.3g} µs"
    )


def save(path: str, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Written beside and renamed: a kill leaves the old file whole."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".part", "w") as out:
        json.dump({"machine": machine(device), "rows": rows}, out, indent=1)
    os.replace(path + ".part", path)
