"""Time, memory and error of fastgen beside its peers.

    python -m benchmarks [mmd|langevin|perceptual|nearest|all]     measure
    python -m benchmarks report RESULTS...                         report.md, pictures, regressions
    python -m benchmarks largest [FAMILY] --memory 256MiB          the largest N that fits, for each provider
    python -m benchmarks static                                    what the Triton kernels cost on sm_90, without a GPU
    python -m benchmarks gpu test|bench|tune|profile               the stages of `make gpu`

Each says more with --help.
"""

import argparse
import contextlib
import importlib
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, memory, results
from benchmarks.bars import urgent_first
from benchmarks.families import FAMILIES, works
from benchmarks.harness import LOST, PATIENCE, ContextLost, Measurer, Row, seconds_text

DEMO_PROVIDERS = ["fastgen", "eager"]  # others are for those who ask: compiling and loading them takes its time
ROUNDS = {"demo": 5, "quick": 5, "full": 11, "huge": 11}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["_memory"]:
        return memory.serve(argv[1])
    if argv[:1] == ["_base"]:
        return int(importlib.import_module("benchmarks.base").serve(*argv[1:]))
    if argv[:1] and argv[0] in ("report", "largest", "static", "gpu"):
        module = {"largest": "growth"}.get(argv[0], argv[0])
        try:
            return int(importlib.import_module(f"benchmarks.{module}").main(argv[1:]))
        except ValueError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 2
        except ContextLost as error:
            print(f"benchmarks: the device was lost: {error}", file=sys.stderr)
            return LOST
        except KeyboardInterrupt:
            print("\nbenchmarks: interrupted; what was written as it came stands", file=sys.stderr)
            return 130
    try:
        return measure(argv)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted; --out has the works before this one, --resume goes on", file=sys.stderr)
        return 130


def resumed(earlier: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """What a new run keeps of an earlier file: nothing if it is of another machine or version."""
    differ = [k for k in ("device", "threads", "commit", "torch") if earlier["machine"].get(k) != content["machine"][k]]
    said = ", ".join(f"{k} {earlier['machine'].get(k)}" for k in differ)
    # The stages of `make gpu` keep what they found in the same file, whatever the scale.
    kept = {} if differ else {k: v for k, v in earlier.items() if k != "machine"}
    if kept.get("scale", content["scale"]) != content["scale"]:
        said = f"scale {kept['scale']}"
        kept |= {k: content[k] for k in ("scale", "spent", "rows")}
    if said:
        print(f"--resume: the file is of another run ({said}), this one begins anew", file=sys.stderr)
    return kept


def to_do(row: Row, patience: float) -> bool:
    """Whether an earlier run left it: out of time, or beyond a patience that was less."""
    return bool(row.get("left")) or ("expected_seconds" in row and row["expected_seconds"] <= patience)


def measure(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="all", choices=[*FAMILIES, "all", "demo"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few small sizes, fewer rounds")
    size.add_argument("--huge", action="store_true", help="the largest sizes too, each once; hours")
    parser.add_argument("--provider", action="append", help="only this one, and again for another")
    parser.add_argument("--without", action="append", default=[], metavar="PROVIDER", help="not this one, and again")
    parser.add_argument("--work", action="append", metavar="TEXT", help="only works whose names have it, and again")
    parser.add_argument("--base", metavar="GIT_REF", help="measure that ref's fastgen beside ours")
    said = f"seconds that one call may take (default {PATIENCE:.0f}, of --huge no end)"
    parser.add_argument("--patience", type=float, help=said)
    parser.add_argument("--seconds", type=float, help="begin no more after so many; --resume goes on")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--out", metavar="FILE.json", help="written as the rows come")
    parser.add_argument("--resume", action="store_true", help="leave out the works that FILE.json has already")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if arguments.resume and not arguments.out:
        parser.error("--resume: expected --out FILE.json with it")
    for name in ("patience", "seconds"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            parser.error(f"--{name}: expected more than 0, got {value:g}")
    started = time.monotonic()
    device = torch.device(arguments.device)
    scale = "demo" if arguments.what == "demo" else "quick" if arguments.quick else "huge" if arguments.huge else "full"
    families = FAMILIES if arguments.what in ("all", "demo") else (arguments.what,)
    chosen = [work for family in families for work in works(family, scale)]
    if device.type == "cuda":
        chosen = urgent_first(chosen)
    if arguments.work:
        chosen = [work for work in chosen if any(text in work.name for text in arguments.work)]
        if not chosen:
            raise ValueError(f"--work: expected part of a work's name, got {', '.join(arguments.work)}")
    known = sorted({name for work in chosen for name in work.names(device.type)})
    for option, names in (("--provider", arguments.provider or []), ("--without", arguments.without)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{option}: expected one of {', '.join(known)}, got {unknown[0]!r}")
    only = arguments.provider or (DEMO_PROVIDERS if scale == "demo" else known)
    only = [name for name in only if name not in arguments.without]
    if not only:
        raise ValueError(f"--without: expected something to be left, got {', '.join(arguments.without)}")
    content: dict[str, Any] = {"machine": machine.describe(device), "scale": scale, "spent": {}, "rows": []}
    if arguments.resume and Path(arguments.out).exists():
        content |= resumed(results.load(arguments.out), content)
    if arguments.out:
        try:
            results.save(arguments.out, content)
        except OSError as error:
            raise ValueError(f"--out: expected a file that can be written, got {arguments.out}: {error}") from None
    content["machine"]["limits"] = limits = machine.limits(device, quick=scale in ("demo", "quick"))
    with contextlib.ExitStack() as stack:
        run = Measurer(
            device,
            rounds=ROUNDS[scale],
            patience=arguments.patience or (float("inf") if scale == "huge" else PATIENCE),
            until=started + (arguments.seconds or math.inf),
            limits=limits,
            rows=content["rows"],
        )
        children: list[int] = []
        run.children = lambda: children
        if device.type == "cpu":
            if not arguments.no_memory:
                server = stack.enter_context(memory.server(scale))
                run.memory = server.peak_bytes
            memory.limit_process()
        else:
            if not arguments.no_memory:
                run.memory_here = partial(memory.cuda_probe, device=device)
            if arguments.out:
                run.begins = partial(results.note_begun, arguments.out)
                stack.callback(results.begun(arguments.out).unlink, missing_ok=True)
        if arguments.base:
            base = importlib.import_module("benchmarks.base")
            tree = stack.enter_context(base.worktree(arguments.base))
            other = base.Other(tree, scale, device)
            stack.callback(other.close)
            children.append(other.process.pid)
            run.base, run.base_name = other.ready, f"fastgen@{arguments.base}"
        spent = content["spent"]
        spent["setting up"] = round(spent.get("setting up", 0.0) + time.monotonic() - started, 2)
        for i, work in enumerate(chosen):
            names = work.names(device.type, only)
            wanted = {*names, run.base_name} if run.base and "fastgen" in names else set(names)
            earlier = [row for row in content["rows"] if (row["family"], row["work"]) == (work.family, work.name)]
            lost = [row for row in earlier if row.get("lost")]
            had = {row["provider"] for row in earlier if not to_do(row, run.patience)}
            if wanted <= had:
                continue
            if time.monotonic() > run.until:
                more = f" and up to {len(chosen) - i - 1} more" if i + 1 < len(chosen) else ""
                print(f"out of time before {work.family}: {work.name}{more}; --resume goes on", file=sys.stderr)
                break
            print(f"{work.family}: {work.name}", end="", file=sys.stderr, flush=True)
            kept = [row for row in content["rows"] if row not in earlier]  # one work, one run's rounds
            content["rows"][:] = kept + lost
            begun = time.monotonic()
            try:
                rows = run.measure(work, sorted({*names, *had} - {row["provider"] for row in lost}))
            except ContextLost as problem:
                if arguments.out:
                    results.save(arguments.out, content)
                print(f"\nthe device was lost by {problem}; --resume goes on without it", file=sys.stderr)
                return LOST
            spent[work.family] = round(spent.get(work.family, 0.0) + time.monotonic() - begun, 2)
            best = ", ".join(f"{r['provider']} {seconds_text(r['seconds'])}" for r in rows if "seconds" in r)
            print(f": {best or 'nothing to time'}", file=sys.stderr, flush=True)
            if arguments.out:
                results.save(arguments.out, content)
    print(results.table(content["rows"]))
    growth = importlib.import_module("benchmarks.growth").text(content["rows"])
    if growth:
        print("\n" + growth)
    if warned := results.warning(content["rows"]):
        print("\n" + warned, file=sys.stderr)
    wrong = [row for row in content["rows"] if row["status"] == "wrong" and results.ours(row["provider"])]
    for row in wrong:
        print(f"fastgen is wrong: {row['work']}, {row['provider']}: error {row['error']:.1e}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
