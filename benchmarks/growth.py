"""How cost grows: exponents fitted to a run's rows, and the largest N that fits a given memory."""

import argparse
import importlib
import math
import re
import sys
from typing import Any

import torch

from benchmarks import memory, results
from benchmarks.harness import Row, Work
from benchmarks.harness import size_of as size_of_inputs

POINTS = 3  # the largest sizes, where fixed costs count least
PROBE_SECONDS = 20.0
PRECISION = 1.05  # the search ends when the least N that does not fit is within this factor


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


def bisect(fits: Any, first: int = 256, most: int = 1 << 24) -> tuple[int, str]:
    """The largest N that fits, to within PRECISION, and what ended the search: "memory" or the reason of a probe.

    fits: N -> True, False, or a string that says why it cannot be told (the search then ends below it)
    """
    low, high, ended = 0, None, ""
    n = first
    while n <= most:
        answer = fits(n)
        if isinstance(answer, str):  # time and not memory: where exactly is worth no more of it
            return low, answer
        if answer is not True:
            high, ended = n, "memory"
            break
        low, n = n, 2 * n
    if high is None:
        return low, "the end of the search"
    while high > max(low * PRECISION, low + 1):
        n = (low + high) // 2
        answer = fits(n)
        if answer is True:
            low = n
        else:
            high, ended = n, answer if isinstance(answer, str) else "memory"
    return low, ended


def largest(family: str, limit: int, device: torch.device, server: memory.Server | None) -> list[Row]:
    """For each series that `benchmarks/<family>.py` lets grow and each provider: the largest N whose inputs and peak
    stay within `limit` bytes."""
    module = importlib.import_module(f"benchmarks.{family}")
    found = []
    for series in getattr(module, "GROWING", ()):
        for name in module.growing(series, 256).providers:
            if device.type not in module.growing(series, 256).provider(name).devices:
                continue
            why: dict[str, str] = {}

            def fits(n: int, name: str = name, series: str = series, why: dict[str, str] = why) -> bool | str:
                work: Work = module.growing(series, n)
                answer = _peak(work, family, series, n, name, device, server)
                if "slow" in answer:
                    return f"time: a call takes longer than {PROBE_SECONDS:.0f} s"
                if "failed" in answer:
                    why["failed"] = answer["failed"]
                    return False
                return bool(answer["bytes"] + answer["inputs"] <= limit)

            n, ended = bisect(fits)
            row: Row = {"family": family, "series": series, "provider": name, "limit": limit, "largest": n}
            row["ended"] = ended if n else why.get("failed", ended)
            print(f"{family}: {series}, {name}: N = {n} ({row['ended']})", file=sys.stderr, flush=True)
            found.append(row)
    return found


def _peak(
    work: Work, family: str, series: str, n: int, name: str, device: torch.device, server: memory.Server | None
) -> dict[str, Any]:
    if server is not None:
        return server.ask({"family": family, "make": series, "n": n, "provider": name, "timeout": PROBE_SECONDS})
    try:
        return {"bytes": memory.cuda_probe(work, name, device) or 0, "inputs": size_of_inputs(work.inputs(device))}
    except torch.cuda.OutOfMemoryError as error:
        return {"failed": str(error)[:200]}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


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
    parser.add_argument("family", nargs="?", choices=["mmd", "perceptual", "nearest"], help="all three by default")
    parser.add_argument("--memory", default="256MiB", help="inputs and peak together (default 256MiB)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", metavar="FILE.json", help="a result file, to which this is added")
    arguments = parser.parse_args(argv)
    limit = size_of(arguments.memory)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    families = [arguments.family] if arguments.family else ["mmd", "perceptual", "nearest"]
    rows: list[Row] = []
    if device.type == "cpu":
        with memory.server("demo") as server:
            for family in families:
                rows += largest(family, limit, device, server)
    else:
        for family in families:
            rows += largest(family, limit, device, None)
    print(largest_text(rows))
    if arguments.out:
        content = results.load(arguments.out)
        kept = [r for r in content.get("largest", []) if r["family"] not in families]
        content["largest"] = kept + rows
        results.save(arguments.out, content)
    return 0
