"""How cost grows: exponents fitted to a run's rows, and the largest N that fits a given memory."""

import argparse
import contextlib
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import memory, results
from benchmarks.families import FAMILIES, module
from benchmarks.harness import Row, Work, forget_compiled, seconds_text
from benchmarks.harness import size_of as size_of_inputs

POINTS = 3  # the largest sizes, where fixed costs count least
PROBE_SECONDS, TIMEOUT = 4.0, 30.0  # what a call may be expected to take, and it with its compiler
PRECISION = 1.05  # the search ends when the least N that does not fit is within this factor
STEP = 4  # times what fits: the farthest N to try next
LATE = 1.5  # likewise where the least N is out of reach


def exponent(sizes: list[float], costs: list[float]) -> float:
    """The slope of log cost over log size by least squares."""
    x, y = ([math.log(v) for v in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def exponents(rows: list[Row]) -> list[Row]:
    """For each series and provider, along N at one D and along D at one N: exponents of time and of memory."""
    found = []
    for along, fixed in (("N", "D"), ("D", "N")):
        lines: dict[tuple[str, str, str, int], list[Row]] = {}
        for row in rows:
            if row["status"] == "ok" and along in row["size"] and row["series"]:
                if row["size"].get("M", row["size"]["N"]) != row["size"]["N"]:
                    continue
                key = row["family"], row["series"], row["provider"], row["size"].get(fixed, 0)
                lines.setdefault(key, []).append(row)
        for (family, series, provider, at), line in lines.items():
            if len({row["size"][along] for row in line}) < 2:
                continue
            largest = sorted(line, key=lambda row: row["size"][along])[-POINTS:]
            sizes = [float(row["size"][along]) for row in largest]
            entry: Row = {"family": family, "series": series, "provider": provider, "along": along}
            entry |= {"fixed": f"{fixed} = {at}" if at else "", "from": int(sizes[0]), "to": int(sizes[-1])}
            entry["time"] = exponent(sizes, [row["seconds"] for row in largest])
            if all(row.get("peak_bytes") for row in largest):
                entry["memory"] = exponent(sizes, [row["peak_bytes"] for row in largest])
            found.append(entry)
    return found


def text(rows: list[Row]) -> str:
    """The exponents as a Markdown table; empty where no series has two sizes."""
    found = exponents(rows)
    if not found:
        return ""
    lines = ["| series | provider | along | time grows as | memory grows as |", "|---|---|---|---|---|"]
    for e in found:
        where = f"{e['along']} = {e['from']} to {e['to']}" + (f", {e['fixed']}" if e["fixed"] else "")
        grown = f"{e['along']}^{e['memory']:.2f}" if "memory" in e else ""
        lines.append(
            f"| {e['family']}: {e['series']} | {e['provider']} | {where} | {e['along']}^{e['time']:.2f} | {grown} |"
        )
    return "\n".join(lines)


def search(peak: Callable[[int], float | str], limit: float, first: int, most: int = 1 << 24) -> tuple[int, str]:
    """The largest N whose peak is within the limit, to PRECISION, and what ended the search: "memory", or a reason
    and then to LATE.

    Bisection, whose next N is where the last two peaks' growth meets the limit.
    peak: N -> bytes, inf where they cannot be had, or a string that says why an N is out of reach
    """
    low, high, ended, n, within = 0, most + 1, "the end of the search", first, PRECISION
    known: list[tuple[int, float]] = []
    while high > max(low * within, low + 1):
        answer = peak(n)
        if isinstance(answer, str):
            high, ended, within = n, answer, LATE  # where exactly time ends it is worth no more of it
        elif answer <= limit:
            low = n
        else:
            high, ended, within = n, "memory", PRECISION
        if not low and math.inf == answer:
            break
        if not isinstance(answer, str) and 0 < answer < math.inf:
            known.append((n, answer))
        n = math.isqrt(low * high) if low and isinstance(answer, str) else _next(low, high, known, limit)
    return low, ended


def _next(low: int, high: int, known: list[tuple[int, float]], limit: float) -> int:
    """Within a step of what fits; just below where the limit is expected, then just above what fits."""
    middle = (low + high) // 2
    if not known or len(known) > 8:
        return min(middle, STEP * low or middle)
    growth = 1.0
    if len(known) > 1 and known[-1][0] != known[-2][0]:
        growth = min(3.0, max(0.5, exponent(*([float(v) for v in values] for values in zip(*known[-2:], strict=True)))))
    expected = known[-1][0] * (limit / known[-1][1]) ** (1 / growth)
    n = int(min(expected / PRECISION**0.5, STEP * low or expected))
    n = n if n > low * PRECISION**0.5 else int(low * PRECISION)
    return n if low < n < high else middle


def forecast(took: list[tuple[float, float]], size: float) -> float:
    """Seconds of a call from the line through the least and the largest known, no more than in proportion: what a call
    takes at any size, as a first one does, is not multiplied. 0 where that cannot be told: TIMEOUT ends what then takes
    too long."""
    if len({known for known, _ in took}) < 2:
        return 0.0
    (least, a), (most, b) = min(took), max(took)
    return min(b * size / most, b + max(0.0, (b - a) / (most - least)) * max(0.0, size - most))


def largest(family: str, limit: int, device: torch.device, server: memory.Server | None) -> list[Row]:
    """For each series that `benchmarks/<family>.py` lets grow and each provider: the largest N whose inputs and peak
    stay within `limit` bytes."""
    of = module(family)
    found = []
    for series, first in of.GROWING.items():
        for name in of.growing(series, first).names(device.type):
            why: dict[str, str] = {}
            took: list[tuple[float, float]] = []  # operations and seconds of what was tried

            def peak(
                n: int,
                name: str = name,
                series: str = series,
                why: dict[str, str] = why,
                took: list[tuple[float, float]] = took,
            ) -> float | str:
                work: Work = of.growing(series, n)
                size = work.operations or work.moved
                expected = forecast(took, size)
                if expected > PROBE_SECONDS:
                    return f"time: a call would take about {seconds_text(expected)}"
                answer = _peak(work, family, series, n, name, device, server)
                if "slow" in answer:
                    took.append((size, TIMEOUT))  # so that those between are not tried for as long
                    return f"time: a call takes longer than {TIMEOUT:.0f} s"
                if "failed" in answer:
                    why["failed"] = answer["failed"]
                    return math.inf
                took.append((size, answer["seconds"]))
                return float(answer["bytes"] + answer["inputs"])

            n, ended = search(peak, limit, first)
            row: Row = {"family": family, "series": series, "provider": name, "limit": limit, "largest": n}
            row["ended"] = ended if n else why.get("failed", ended)
            print(f"{family}: {series}, {name}: N = {n} ({row['ended']})", file=sys.stderr, flush=True)
            found.append(row)
    return found


def _peak(
    work: Work, family: str, series: str, n: int, name: str, device: torch.device, server: memory.Server | None
) -> dict[str, Any]:
    if server is not None:
        return server.ask({"family": family, "make": series, "n": n, "provider": name, "timeout": TIMEOUT})
    forget_compiled()
    try:
        inputs = work.inputs(device)
        run = work.provider(name).setup(inputs)
        run()
        torch.cuda.synchronize(device)
        started = time.monotonic()
        peak = memory.cuda_probe(work, name, inputs, run, device)
    except Exception as error:  # out of memory among them
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    return {"bytes": peak or 0, "inputs": size_of_inputs(inputs), "seconds": time.monotonic() - started}


def size_of(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB)", text)
    if not found:
        raise ValueError(f"--memory: expected a number with KiB, MiB or GiB, got {text!r}")
    return int(float(found[1]) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]])


def largest_text(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = ["| series | provider | memory | largest N | ended by |", "|---|---|---|---|---|"]
    for row in rows:
        at_least = "" if row["ended"] == "memory" or not row["largest"] else "at least "
        cells = [f"{row['family']}: {row['series']}", row["provider"], results.bytes_text(row["limit"])]
        lines.append("| " + " | ".join([*cells, f"{at_least}{row['largest']:,}", row["ended"]]) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks largest", description=__doc__)
    parser.add_argument("family", nargs="?", choices=FAMILIES, help="all by default")
    parser.add_argument("--memory", default="256MiB", help="inputs and peak together (default 256MiB)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", metavar="FILE.json", help="a result file, to which this is added")
    arguments = parser.parse_args(argv)
    limit = size_of(arguments.memory)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    families = [arguments.family] if arguments.family else FAMILIES
    content = results.load(arguments.out) if arguments.out else {}
    started = time.monotonic()
    rows: list[Row] = []
    with memory.server("demo") if device.type == "cpu" else contextlib.nullcontext() as server:
        for family in families:
            rows += largest(family, limit, device, server)
    print(largest_text(rows))
    if arguments.out:
        content["largest"] = [r for r in content.get("largest", []) if r["family"] not in families] + rows
        spent = content.setdefault("spent", {})
        spent["largest"] = round(spent.get("largest", 0.0) + time.monotonic() - started, 2)
        results.save(arguments.out, content)
    return 0
