"""One harness for every family: check against float64 first, then time in interleaved rounds, then measure memory."""

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import machine

Run = Callable[[], Any]  # returns a tensor or a tuple of them: what is compared with the oracle
Setup = Callable[[Any], Run]
Row = dict[str, Any]
DEVICES = ("cpu", "cuda")
COPIES = 8  # of the inputs at most: beyond that they are small enough to stay in the cache in use, too
PATIENCE = 10.0  # seconds that one call may take
LONG = 1.0  # seconds: a warm call that takes longer is a round


@dataclass(frozen=True)
class Provider:
    """One way to compute a work, as its users would call it.

    setup: inputs -> Run. ImportError lists the provider as missing, any other exception as failed.
    devices: where it can run at all; elsewhere it has no row.
    outside: it allocates device memory that torch's allocator does not see (FAISS, KeOps)
    apart: it computes in processes of its own, or beside such: its memory is not measured
    check: (inputs, result) -> its error by a standard of its own, and the tolerance of that
    """

    setup: Setup
    devices: tuple[str, ...] = DEVICES
    outside: bool = False
    apart: bool = False
    check: Callable[[Any, Any], float] | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Work:
    """One thing to compute, and everybody who can compute it.

    inputs: device -> whatever the providers take; the same values at every call
    providers: name -> Provider or its setup; `fastgen` is ours, `eager` the plain torch that users have today
    oracle: inputs -> the float64 result
    tolerance: of the error
    error: (result, expected) -> how far off; None is the greatest ‖result − expected‖ / ‖expected‖ of the tensors
    facts: (result, expected) -> more that its row says, such as the share of right indices
    series, size: works of one series differ in `size` alone, {"N": 4096, "D": 64}: a curve of the pictures
    operations, moved: the arithmetic and the bytes that the mathematics, as it is written, asks for at the least, for
        the shares of what the machine can do; a provider that does more of either reaches less, one that needs fewer
        products (Winograd's convolutions) or narrower ones (nearest) more than all
    once: too long for quantiles
    """

    family: str
    name: str
    inputs: Callable[[torch.device], Any]
    providers: Mapping[str, Provider | Setup]
    oracle: Callable[[Any], Any]
    tolerance: float = 1e-4
    error: Callable[[Any, Any], float] | None = None
    facts: Callable[[Any, Any], dict[str, Any]] | None = None
    series: str = ""
    size: dict[str, int] = field(default_factory=dict)
    operations: float = 0.0
    moved: float = 0.0
    once: bool = False

    def provider(self, name: str) -> Provider:
        found = self.providers[name]
        return found if isinstance(found, Provider) else Provider(found)

    def names(self, device: str, only: Sequence[str] | None = None) -> list[str]:
        """Of the providers that can run on a device, and of those in `only` where it is given."""
        return [n for n in self.providers if device in self.provider(n).devices and (not only or n in only)]


LOST = 3  # the exit status where a kernel took the device with it


class ContextLost(Exception):
    """A kernel went wrong in a way that no later call of this process on the device survives."""


def forget_compiled() -> None:
    """What torch.compile made for other sizes. Between works, never between the providers of one: what was set up first
    would compile again while it is timed."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


class Ready(Protocol):
    """A provider that is set up: here, or in the process that has another version of fastgen."""

    def result(self) -> Any: ...

    def seconds(self, at_least: float) -> float: ...


def tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def relative_error(result: Any, expected: Any) -> float:
    """max over the tensors of ‖result − expected‖ / ‖expected‖; inf where anything is not finite."""
    worst = 0.0
    for got, want in zip(tensors(result), tensors(expected), strict=True):
        want = want.double().cpu()
        if got.shape != want.shape:
            raise ValueError(f"the result has shape {list(got.shape)}, not {list(want.shape)}")
        difference = (got.double().cpu() - want).norm() / want.norm().clamp_min(1e-300)
        worst = max(worst, float("inf") if not difference.isfinite() else float(difference))
    return worst


class Local:
    """Set up in this process. On CUDA with as many copies of the inputs as do not fit the L2 cache together."""

    def __init__(self, work: Work, name: str, inputs: Any, device: torch.device) -> None:
        self.device = device
        setup = work.provider(name).setup
        self.runs = [setup(inputs)]
        self.cache = "warm"
        if device.type == "cuda":
            size = size_of(inputs)
            l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
            copies = -(-2 * l2 // max(size, 1)) + 1
            if copies <= COPIES:
                self.runs += [setup(work.inputs(device)) for _ in range(copies - 1)]
                self.cache = "cold"

    def result(self) -> Any:
        """In true float32: torch lets cuDNN round float32 convolutions to TF32, as everybody has it and is timed with
        it here, but that moves a network's gradient by as much as what the check is to find."""
        rounds = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            result = self.runs[0]()
            machine.synchronise(self.device)
        finally:
            torch.backends.cudnn.allow_tf32 = rounds
        return result

    def seconds(self, at_least: float) -> float:
        if self.device.type == "cuda":
            return self._cuda_seconds(at_least)
        calls, spent, run = 0, 0.0, self.runs[0]
        start = time.perf_counter()
        while spent < at_least or calls == 0:
            run()
            calls += 1
            spent = time.perf_counter() - start
        return spent / calls

    def _cuda_seconds(self, at_least: float) -> float:
        """Between two events around calls over the rotated inputs: launches count where they are slower."""
        events = [torch.cuda.Event(enable_timing=True) for _ in "ab"]
        calls = 1
        while True:
            torch.cuda.synchronize(self.device)
            events[0].record()
            for i in range(calls):
                self.runs[i % len(self.runs)]()
            events[1].record()
            events[1].synchronize()
            spent = events[0].elapsed_time(events[1]) / 1e3
            if spent >= at_least or calls >= 1 << 16:
                return spent / calls
            calls = max(calls * 2, int(calls * min(100.0, 1.1 * at_least / max(spent, 1e-6))))


def _walk(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    return [t for part in value for t in _walk(part)] if not isinstance(value, (str, int, float, type(None))) else []


def size_of(inputs: Any) -> int:
    """Bytes of all tensors in it."""
    return sum(t.nbytes for t in _walk(inputs))


def checked(work: Work, name: str, ready: Ready, inputs: Any, expected: Any, row: Row) -> bool:
    """Whether the result is right; the row says what it was else. Nothing is timed before this."""
    provider = work.provider(name)
    tolerance = work.tolerance if provider.tolerance is None else provider.tolerance
    try:
        result = ready.result()
        error: float
        if provider.check is not None:
            error = provider.check(inputs, result)
        else:
            error = (work.error or relative_error)(result, expected)
        row |= work.facts(result, expected) if work.facts else {}
    except ImportError as problem:
        row.update(status="missing", reason=str(problem))
        return False
    except Exception as problem:  # a peer that fails is a row that says so
        row.update(status="failed", reason=_reason(problem))
        return False
    row["error"] = error if error == error else float("inf")
    row["status"] = "ok" if error <= tolerance else "wrong"
    return row["status"] == "ok"


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:200]


def _seconds(ready: Ready, at_least: float, row: Row) -> float | None:
    """None where a call fails that did not before, for want of memory, say; the row says so."""
    try:
        return ready.seconds(at_least)
    except Exception as problem:
        row.update(status="failed", reason=_reason(problem))
        return None


def expected_seconds(work: Work, provider: str, earlier: list[Row]) -> float:
    """What one call may take, from the work of the same series nearest in size that was measured or given up: of the
    same D if there is one, since few who work pair by pair take D times the time."""
    size = work.operations or work.moved
    known = [
        (row["size"].get("D") != work.size.get("D"), abs(math.log(size / (row["operations"] or row["moved"]))), row)
        for row in earlier
        if size
        and row["provider"] == provider
        and row["series"] == work.series
        and ("seconds" in row or "expected_seconds" in row)
    ]
    if not known:
        return 0.0
    row = min(known, key=lambda of: of[:2])[2]
    took = row["seconds"] if "seconds" in row else row["expected_seconds"]
    return float(took) * size / float(row["operations"] or row["moved"])


@dataclass
class Measurer:
    """What a whole run shares.

    rounds: of interleaved timings, fewer where one call takes long; patience: seconds that a call may take, else it is
    skipped, and the row says so; until: when, on the monotonic clock, no provider is set up any more. memory: (work,
    provider) -> bytes or None, or where it is of this process, on CUDA, (work, provider, inputs, a run that is ready).
    base: name -> a Ready of another version. begins: told before each of a provider's turns, which may end the process.
    """

    device: torch.device
    rounds: int = 9
    at_least: float = 0.05
    budget: float = 1.5
    patience: float = PATIENCE
    until: float = math.inf
    memory: Callable[[Work, str], int | None] | None = None
    memory_here: Callable[[Work, str, Any, Run], int | None] | None = None
    base: Callable[[Work, str], Ready] | None = None
    begins: Callable[[Work, str], None] | None = None
    base_name: str = ""
    limits: dict[str, float] = field(default_factory=dict)
    children: Callable[[], list[int]] = list  # process ids whose load is ours
    rows: list[Row] = field(default_factory=list)

    def measure(self, work: Work, only: list[str] | None = None) -> list[Row]:
        """A row for each provider: status, error, seconds, quantiles, memory, rates, shares of the machine's best, and
        what it took to get them (`spent`, of wall time)."""
        names = work.names(self.device.type, only)
        if not names:
            return []
        forget_compiled()
        inputs = work.inputs(self.device)
        expected: Any = None
        rows: dict[str, Row] = {}
        ready: dict[str, Ready] = {}
        times: dict[str, list[float]] = {}
        if self.base is not None and "fastgen" in names:
            names = [self.base_name, *names]
        load = machine.Load(self.children())
        for name in names:
            row = rows[name] = {"family": work.family, "work": work.name, "provider": name, "series": work.series}
            row |= {"size": work.size, "operations": work.operations, "moved": work.moved, "spent": 0.0}
            expects = expected_seconds(work, name, self.rows)
            if expects > self.patience:
                row |= {"status": "skipped", "expected_seconds": expects}
                row["reason"] = f"about {seconds_text(expects)} a call expected; --patience or --huge waits for it"
                continue
            if time.monotonic() > self.until:
                row |= {"status": "skipped", "left": True, "reason": "out of time; --resume goes on"}
                continue
            if expected is None:
                try:
                    expected = work.oracle(inputs)
                except RuntimeError as problem:  # no memory for float64, say
                    row |= {"status": "failed", "reason": f"the oracle: {_reason(problem)}"}
                    self._end_where_lost(row)
                    continue
            self._begin(work, name)
            with _spending(row):
                of = self._set_up(work, name, inputs, row)
                if of and checked(work, "fastgen" if name == self.base_name else name, of, inputs, expected, row):
                    warm = _seconds(of, 0.0, row)
                    if warm is not None:
                        ready[name], times[name] = of, [warm] if warm > LONG else []
                        row["rounds"] = max(2, min(self.rounds, int(self.budget / max(warm, self.at_least))))
                        row["rounds"] = 1 if work.once else row["rounds"]
            self._end_where_lost(row)
        del expected
        self._time(work, rows, ready, times, load if work.once else machine.Load(self.children()))
        for name, row in rows.items():
            if work.once and row.get("seconds", 0.0) > LONG and not name.startswith("fastgen"):
                continue  # of a peer that takes as long again smaller works tell
            if row["status"] == "ok" and self.memory_here is not None and isinstance(of := ready[name], Local):
                self._begin(work, name)
                with _spending(row), contextlib.suppress(RuntimeError):  # out of memory, say
                    row["peak_bytes"] = self.memory_here(work, name, inputs, of.runs[0])
        ready.clear()
        del inputs
        gc.collect()
        for name, row in rows.items():
            apart = name == self.base_name or work.provider(name).apart
            if row["status"] == "ok" and self.memory is not None and not apart:
                with _spending(row):
                    row["peak_bytes"] = self.memory(work, name)
        self.rows += rows.values()
        return list(rows.values())

    def _begin(self, work: Work, name: str) -> None:
        if self.begins is not None:
            self.begins(work, name)

    def _end_where_lost(self, row: Row) -> None:
        """Of a failed row, where it took the device with it: the row is kept, and nothing else of its work."""
        if row["status"] != "failed":
            return
        try:
            machine.synchronise(self.device)
        except RuntimeError:
            self.rows.append(row | {"lost": True})
            raise ContextLost(f"{row['family']}: {row['work']}, {row['provider']}: {row['reason']}") from None

    def _set_up(self, work: Work, name: str, inputs: Any, row: Row) -> Ready | None:
        try:
            if name == self.base_name and self.base is not None:
                return self.base(work, "fastgen")
            if self.device.type == "cuda" and work.provider(name).outside:
                torch.cuda.empty_cache()  # what torch keeps for itself is not there for it
            of = Local(work, name, inputs, self.device)
            row["cache"] = of.cache
            return of
        except ImportError as problem:
            row |= {"status": "missing", "reason": str(problem)}
        except Exception as problem:
            row |= {"status": "failed", "reason": _reason(problem)}
        return None

    def _time(
        self,
        work: Work,
        rows: dict[str, Row],
        ready: dict[str, Ready],
        times: dict[str, list[float]],
        load: machine.Load,
    ) -> None:
        for _ in range(max((rows[name]["rounds"] for name in ready), default=0)):
            for name, of in list(ready.items()):  # interleaved, so that a drifting machine favours nobody
                if len(times[name]) < rows[name]["rounds"]:
                    self._begin(work, name)
                    with _spending(rows[name]):
                        seconds = _seconds(of, self.at_least, rows[name])
                    self._end_where_lost(rows[name])
                    if seconds is None:
                        del ready[name], times[name]
                    else:
                        times[name].append(seconds)
        other = load.others()
        for name, taken in times.items():
            ordered = torch.tensor(sorted(taken), dtype=torch.float64)
            quantiles = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
            row = rows[name]
            row |= {"seconds": min(taken), "quantiles": quantiles, "rounds": len(taken), "other_load": round(other, 3)}
            row |= machine.rates(row["operations"], row["moved"], min(taken), self.limits)


@contextlib.contextmanager
def _spending(row: Row) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        row["spent"] = round(row["spent"] + time.perf_counter() - started, 2)


def seconds_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale * 0.9995 or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError
