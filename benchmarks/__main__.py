"""Time, memory and error of fastgen beside its peers: python -m benchmarks mmd --device cpu --out FILE.json"""

import argparse
import importlib
import sys
from dataclasses import replace

import torch

from benchmarks import harness

FAMILIES = ("mmd", "langevin", "perceptual", "nearest")


def works(family: str, scale: str) -> list[harness.Work]:
    """What `benchmarks/<family>.py` measures at a scale: demo (seconds), quick, full."""
    found: list[harness.Work] = importlib.import_module(f"benchmarks.{family}").works(scale)
    return found


def _memory(family: str, name: str, provider: str) -> int:
    for scale in ("full", "quick", "demo"):
        for work in works(family, scale):
            if work.name == name:
                print(harness.memory_probe(work, provider))
                return 0
    return 1


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["_memory"]:
        return _memory(*argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=[*FAMILIES, "all", "demo"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--provider", action="append", help="only these")
    parser.add_argument("--out", metavar="FILE.json")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    device = torch.device(arguments.device)
    scale = "demo" if arguments.what == "demo" else "quick" if arguments.quick else "full"
    rows = []
    for family in FAMILIES if arguments.what in ("all", "demo") else (arguments.what,):
        for work in works(family, scale):
            if arguments.provider:
                work = replace(work, providers={k: v for k, v in work.providers.items() if k in arguments.provider})
            rows += harness.measure(work, device, rounds=7 if scale == "full" else 3)
            print(f"{work.family}: {work.name}", file=sys.stderr, flush=True)
            if arguments.out:
                harness.save(arguments.out, rows, device)
    print(harness.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
