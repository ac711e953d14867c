"""The machine that figures are taken on: what it is, what it can do at best, and whether somebody else uses it."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("triton", "numpy", "faiss-cpu", "faiss-gpu", "pykeops", "geomloss", "torchebm", "lpips", "flash-kmeans")
BUSY = 0.1  # cores of other people's load that earn a warning


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit, date."""
    from fastgen.ops import backend

    versions = {}
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    extension = backend.extension()
    return {
        "device": name_of(device),
        "type": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": "triton" if device.type == "cuda" else extension.isa() if extension else "reference",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), name)
    return name


def commit() -> str | None:
    """The short hash, with + where sources differ from it; what FASTGEN_COMMIT says where it is set, for a copy of a
    checkout; else None outside one."""
    if said := os.environ.get("FASTGEN_COMMIT"):
        return said
    command = ["git", "-C", str(ROOT)]
    with contextlib.suppress(OSError):
        head = subprocess.run([*command, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        if head.returncode == 0:
            paths = ["fastgen", "kernels", "csrc", "benchmarks", ":!benchmarks/results"]
            changed = subprocess.run([*command, "status", "--porcelain", "--", *paths], capture_output=True, text=True)
            return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    return None


def limits(device: torch.device, *, quick: bool = False) -> dict[str, float]:
    """The most that this device was seen to do, in this run: bytes a second of a copy (read and written) too large for
    its caches, operations a second of square matrix products in each arithmetic."""
    cuda = device.type == "cuda"
    count = (2**30 if cuda else 2**26) // (8 if quick else 1)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / _best(partial(target.copy_, source), device)}
    del source, target
    n = 8192 if cuda else 2048
    before = torch.get_float32_matmul_precision()
    kinds = {"float32": ("highest", torch.float32)}
    if cuda:
        kinds |= {"tf32": ("high", torch.float32), "bfloat16": ("highest", torch.bfloat16)}
    try:
        for kind, (precision, dtype) in kinds.items():
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            found[kind] = 2 * n**3 / _best(partial(torch.mm, a, b, out=out), device)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def _best(run: Any, device: torch.device, rounds: int = 5) -> float:
    run()
    taken = []
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def rates(operations: float, moved: float, seconds: float, limits: dict[str, float]) -> dict[str, float]:
    """Achieved rates, and the shares of the copy and of the fastest matrix product."""
    found = {}
    if moved:
        found["bytes_per_second"] = moved / seconds
        if "copy" in limits:
            found["share_of_copy"] = moved / seconds / limits["copy"]
    if operations:
        found["operations_per_second"] = operations / seconds
        best = max((v for k, v in limits.items() if k != "copy"), default=0.0)
        if best:
            found["share_of_matmul"] = operations / seconds / best
    return found


def available() -> int:
    """Bytes of main memory that could be used without swapping."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as info:
        for line in info:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


class Load:
    """Cores that others kept busy between making this and asking `others()`; 0 where /proc does not tell."""

    def __init__(self, ours: list[int] | None = None) -> None:
        self.ours = [os.getpid(), *(ours or [])]
        self.started = self._read()

    def others(self) -> float:
        elapsed, busy, own = (b - a for a, b in zip(self.started, self._read(), strict=True))
        return max(0.0, (busy - own) / elapsed) if elapsed > 0.1 else 0.0

    def _read(self) -> tuple[float, float, float]:
        tick = os.sysconf("SC_CLK_TCK")
        busy = own = 0.0
        with contextlib.suppress(OSError):
            fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
            busy = (sum(fields) - fields[3] - fields[4]) / tick  # all but idle and waiting for a disk
        for process in {p for ours in self.ours for p in _descendants(ours)}:
            with contextlib.suppress(OSError):
                after = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
                own += sum(int(f) for f in after[11:15]) / tick  # itself and its finished children
        return time.perf_counter(), busy, own


def _descendants(process: int) -> list[int]:
    """The process and all that it has started, and those again."""
    found = [process]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            found += [p for child in (task / "children").read_text().split() for p in _descendants(int(child))]
    return found
