"""What one call takes beyond its ready inputs, at its peak.

On CUDA torch's allocator knows. On the CPU a fresh process does, one for each measurement: a server that has only
imported what all of them need is forked, and the child resets the kernel's high-water mark and calls. Where that call
left more behind than a trace (what it loaded, compiled or keeps), it was a warm-up, and the child calls again.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import families, machine
from benchmarks.harness import Run, Work, size_of

MMAP_THRESHOLD = 65536  # larger blocks go back to the system when freed, and are fresh, hence counted, when made
SHARE_OF_MACHINE = 0.8
TRACE = 0.02  # of its peak: what a call may leave behind and still be as any other


def limit_process() -> None:
    """A provider that asks for more than the machine has fails with an exception, and does not kill the run."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = int(SHARE_OF_MACHINE * machine.available()) + _field("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard < 0 else min(most, hard), hard))


def probe(work: Work, provider: str) -> int:
    """In a process of its own: bytes at the peak of one warm call above the ready inputs."""
    return int(probe_both(work, provider)["bytes"])


def probe_both(work: Work, provider: str) -> dict[str, float]:
    inputs = work.inputs(torch.device("cpu"))
    run = work.provider(provider).setup(inputs)
    peak, left, seconds = peak_of(run)
    if left > TRACE * peak:
        peak, _, seconds = peak_of(run)
    return {"bytes": peak, "inputs": size_of(inputs), "seconds": seconds}


def peak_of(run: Run) -> tuple[int, int, float]:
    """Bytes above what there is at the peak of a call, and after it; what the call took."""
    _give_back()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # peak := current
    before = _field("VmHWM")
    started = time.monotonic()
    result = run()
    seconds = time.monotonic() - started
    peak = _field("VmHWM") - before
    del result
    _give_back()
    return max(peak, 0), max(_field("VmRSS") - before, 0), seconds


def _give_back() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cuda_probe(work: Work, provider: str, inputs: Any, run: Run, device: torch.device) -> int | None:
    """From torch's allocator, of a run that has been called before; what a library allocates past it is the change of
    the device's free memory by a new one."""
    gc.collect()
    if work.provider(provider).outside:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        run = work.provider(provider).setup(inputs)
        run()
        torch.cuda.synchronize(device)
        return max(0, int(free - torch.cuda.mem_get_info(device)[0]))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _field(name: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if name == "VmHWM" else 0


class Server:
    """The parent's end: `peak_bytes(work, provider)` in a fork of a process that has done nothing yet."""

    def __init__(self, scale: str, timeout: float = 120.0) -> None:
        self.timeout = timeout
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "_memory", scale],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=machine.ROOT,
            env=environment,
            text=True,
        )
        self._answer()  # that it is ready: what it imports would take processors from the first timings

    def peak_bytes(self, work: Work, provider: str) -> int | None:
        timeout = self.timeout * (10 if work.once else 1)
        answer = self.ask({"family": work.family, "work": work.name, "provider": provider, "timeout": timeout})
        if "bytes" not in answer:
            said = answer.get("failed") or f"no answer in {answer['slow']:.0f} s"
            print(f"\nno memory of {provider}: {said}", end="", file=sys.stderr)
        return answer.get("bytes")

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that measures memory ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def server(scale: str) -> Iterator[Server]:
    serving = Server(scale)
    try:
        yield serving
    finally:
        serving.close()


def serve(scale: str) -> int:
    """The other end: questions come as lines of JSON. Imports here are shared by all children."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a peer prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer: this end stops with it
    known: dict[tuple[str, str], Work] = {}
    for family in families.FAMILIES:
        known |= {(family, work.name): work for work in families.works(family, scale)}
    for name in ("fastgen.functional", "fastgen.nn", "torch._inductor.compile_fx"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(Exception):
        torch.compile(torch.sin)(torch.ones(1))  # what compilers load; too small for threads, which do not fork
    gc.collect()
    gc.freeze()  # a child that collects its garbage need not look at all of that again
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "make" in question:  # a work of a size that no list has
            work = families.module(question["family"]).growing(question["make"], question["n"])
        else:
            work = known[question["family"], question["work"]]
        print(json.dumps(_in_a_child(work, question["provider"], question["timeout"])), file=answers, flush=True)
    return 0


def _in_a_child(work: Work, provider: str, timeout: float) -> dict[str, Any]:
    """{"bytes"} or {"failed": why} or {"slow": seconds}"""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            limit_process()
            answer: dict[str, Any] = dict(probe_both(work, provider))
        except BaseException as problem:
            answer = {"failed": f"{type(problem).__name__}: {problem}"[:200]}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    started = time.monotonic()
    answer = {"failed": "the process died"}
    if select.select([reader], [], [], timeout)[0]:
        if sent := os.read(reader, 4096):
            answer = json.loads(sent)
    else:
        os.kill(child, signal.SIGKILL)
        answer = {"slow": time.monotonic() - started}
    os.close(reader)
    os.waitpid(child, 0)
    return answer
