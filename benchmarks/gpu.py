"""The stages of `make gpu`: test, bench, tune, profile. Each can be cut off and taken up again.

All write into RESULTS/<device>.json as they go, what matters most first. What is there for the same commit is not done
again. A stage ends of itself and says what it left. Where the compiler would be waited for it runs on several cores:
test files run beside each other, a search's candidates are compiled together.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_profile, machine, results
from benchmarks.families import FAMILIES
from benchmarks.harness import LOST, ContextLost
from benchmarks.stages import SECONDS, Stage, again, outcome_of, ran, tool

PATIENCE = 20.0
WORTH = 1.02  # a configuration has to be this much faster than the table's to replace it
CRASHES = [-s for s in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)]
OF_THE_BARS = ("mmd_grad D=64", "nearest_filter RESIDENT=128", "nearest_filter RESIDENT=0", "langevin groups")  # first
SANITIZERS = ("memcheck", "racecheck")
TOGETHER, WORKERS = 3, 6  # test files at a time, and processes for each: they wait for the compiler most of the time


def target() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def test(stage: Stage) -> int:
    """pytest's gpu tests file by file, the kernels' first; then the sanitizers over one small call of each family."""
    files = [
        str(f.relative_to(machine.ROOT))
        for f in sorted((machine.ROOT / "tests").rglob("test_*.py"), key=lambda f: (f.parent.name != "kernels", f))
        if "mark.gpu" in f.read_text()
    ]

    def tested(file: str) -> Any:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", file]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
        done = ran(command, {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "2"}, stage.left())
        return stage.kept(file, done, outcome_of(done, (0, 5)))

    def sanitized(name: str) -> Any:
        if (sanitizer := tool("compute-sanitizer")) is None:
            return {"status": "missing", "says": "no compute-sanitizer on the PATH"}
        # Torch's caching allocator hides overruns between its blocks.
        command = [sanitizer, "--tool", name, "--error-exitcode", "9", *again("small", "all")]
        done = ran(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, stage.left())
        return stage.kept(name, done, outcome_of(done, (0,)))

    stage.each(files, tested, TOGETHER)
    stage.each(list(SANITIZERS), sanitized, len(SANITIZERS))
    failed = [step for step, outcome in stage.done.items() if outcome["status"] == "failed"]
    for step in failed:
        print(f"failed: {step}\n{stage.done[step]['says']}", file=sys.stderr)
    return 1 if failed else 0


def small(family: str) -> int:
    """One call of each of a family's kernels on small, odd shapes, checked: what the sanitizers watch."""
    if family == "all":
        return max([_small(each) for each in FAMILIES])
    from fastgen import functional as F

    def close(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-3, atol=1e-5)

    torch.manual_seed(0)
    x, y = torch.randn(131, 7), torch.randn(67, 7)
    cuda = [t.cuda() for t in (x, y)]
    if family == "mmd":
        x.requires_grad_()
        cuda[0].requires_grad_()
        values = [F.mmd(a, b) for a, b in ((x, y), (cuda[0], cuda[1]))]
        close(*values)
        close(*(torch.autograd.grad(v, t)[0] for v, t in zip(values, (x, cuda[0]), strict=True)))
        close(F.mmd(x.detach(), y), F.mmd(cuda[0].detach(), cuda[1]))
    elif family == "langevin":
        steps = [F.langevin_step_(t.clone(), t, step_size=0.1, clamp=(-1, 1), seed=3) for t in (x, cuda[0])]
        assert torch.equal(steps[0], steps[1].cpu())
    elif family == "nearest":
        found = [F.nearest(a, b) for a, b in ((x, y), (cuda[0], cuda[1]))]
        assert torch.equal(found[0].index, found[1].index.cpu())
    else:
        maps = [torch.rand(2, 5, 9, 9) for _ in "ab"]
        weight = [torch.rand(5)]
        first, second = ([t.cuda()] for t in maps)
        close(F.lpips_distance([maps[0]], [maps[1]], weight), F.lpips_distance(first, second, [weight[0].cuda()]))
    torch.cuda.synchronize()
    return 0


def _small(family: str) -> int:
    """The exit status; a family that fails does not hide the next."""
    try:
        return small(family)
    except Exception as error:
        print(f"{family}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


Configuration = dict[str, Any]


def search(
    candidates: list[Configuration],
    default: Configuration,
    usable: Callable[[Configuration], str | None],
    seconds: Callable[[Configuration], float],
) -> dict[str, Any]:
    """The fastest configuration, the table's own where none is WORTH its place; what was not tried, and why.

    usable: why a configuration must not run (it spills, or does not compile), or None. seconds: time of a checked
    result, or an exception."""
    tried: list[dict[str, Any]] = []
    for candidate in _default_first(candidates, default):
        entry: dict[str, Any] = {"configuration": candidate}
        why = usable(candidate)
        if why is None:
            try:
                entry["seconds"] = seconds(candidate)
            except ContextLost:
                raise  # what came after would be refused for nothing
            except Exception as error:
                why = f"{type(error).__name__}: {error}"[:200]
        if why is not None:
            entry["refused"] = why
        tried.append(entry)
    timed = [entry for entry in tried if "seconds" in entry]
    if not timed:
        raise ValueError(f"no configuration works, the table's neither: {tried[0]['refused']}")
    best = min(timed, key=lambda entry: entry["seconds"])
    own = tried[0].get("seconds")
    if own is not None and own < best["seconds"] * WORTH:
        best = tried[0]
    return {"best": best["configuration"], "seconds": best["seconds"], "default_seconds": own, "tried": tried}


def _default_first(candidates: list[Configuration], default: Configuration) -> list[Configuration]:
    return [default, *(c for c in candidates if c != default)]


def searches() -> dict[str, tuple[str, str, list[Configuration], Configuration, str, str, str]]:
    """step -> kernel, key, candidates, the table's own, family, name of the ahead-of-time spec, work to time."""
    from fastgen.kernels import launch, mmd_launch, nearest_launch

    found: dict[str, tuple[str, str, list[Configuration], Configuration, str, str, str]] = {}
    loops = [{"num_warps": warps, "num_stages": stages} for warps in (4, 8) for stages in (1, 2, 3, 4)]
    grid = [{"BLOCK_N": n, **loop} for n in (16, 32, 64, 128) for loop in loops]
    for kernel, sizes in (("grad", (16, 64, 128)), ("value", (16, 64, 128)), ("slope", (512,))):
        for dp in sizes:
            default = {k: v for k, v in mmd_launch.blocks(kernel, dp).items() if k != "BLOCK_M"}
            spec, work = f"{kernel} imq_pairs D={dp} bf16x3{' both' * (kernel != 'value')}", f"mmd {kernel} {dp}"
            # Where the table asks for fewer registers, with them first.
            fewer = [{**each, "maxnreg": default["maxnreg"]} for each in grid if "maxnreg" in default]
            found[f"mmd_{kernel} D={dp}"] = (f"mmd_{kernel}", f"D={dp}", fewer + grid, default, "mmd", spec, work)
    orders = [{"largest_first": list(order)} for order in ((1024, 512, 256, 128), (512, 256, 128), (256, 128), (128,))]
    found["langevin groups"] = ("langevin", "groups", orders, orders[1], "langevin", "", "langevin step 0")
    for channels in (64, 128, 256, 512):
        pixels = [{"BLOCK_P": tile // channels, "num_warps": w} for tile in (2048, 4096, 8192) for w in (2, 4, 8)]
        default = {k: v for k, v in launch.lpips_blocks(channels).items() if k != "BLOCK_C"}
        spec, work = f"grad fp32 C={channels} planes", f"perceptual layer {channels}"
        found[f"lpips C={channels}"] = ("lpips", f"C={channels}", pixels, default, "perceptual", spec, work)
    tiles = [{"BLOCK_N": n, **loop} for n in (128, 256) for loop in loops if loop["num_warps"] * 64 >= 2 * n]
    tiles = [tile for tile in tiles if tile["num_stages"] > 1]
    of = nearest_launch.chip(torch.cuda.current_device() if torch.cuda.is_available() else -1)
    for width, d in ((64, 64), (128, 128), (0, 784)):
        default = nearest_launch.filter_options(width, of)
        spec, work = f"filter {width or 'wide'}", f"nearest filter {d}"
        key = f"RESIDENT={width}"
        found[f"nearest_filter {key}"] = ("nearest_filter", key, tiles, default, "nearest", spec, work)
    return {step: found[step] for step in (*OF_THE_BARS, *found)}


def tune(stage: Stage) -> int:
    """Search after search; the table is written after each, so that what was found stands when the rest is cut off."""
    from fastgen.kernels import tuned

    with tuned.alone():  # an earlier search's finds are no launcher's own: the table would be written without them
        known = searches()
    name = f"{tuned.slug(stage.about['device'])}.json"
    context = multiprocessing.get_context("spawn")
    left = [
        step for step, (*_, family, spec, _) in known.items() if step not in stage.done and not _never(family, spec)
    ]
    compiling: dict[str, Iterator[str | None]] = {}
    workers = max(1, (os.cpu_count() or 1) - 2)  # the rest is for the calls that are timed meanwhile
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_without_a_gpu)
    try:
        for step in stage.steps(left):
            for soon in left[left.index(step) :][:2]:  # the next one's beside this one's timings
                if soon not in compiling:
                    kernel, key, candidates, default, family, spec, _ = known[soon]
                    compiling[soon] = _refusals(pool, kernel, key, family, spec, _default_first(candidates, default))
            kernel, key, candidates, default, *_, work = known[step]
            several, why = _default_first(candidates, default), list(compiling[step])

            def usable(candidate: Configuration, why: list[Any] = why, several: list[Any] = several) -> str | None:
                found: str | None = why[several.index(candidate)]
                return found

            def seconds(candidate: Configuration, kernel: str = kernel, key: str = key, work: str = work) -> float:
                with tuned.forced(kernel, key, candidate):
                    try:
                        return _timed(work)
                    except Exception:
                        _end_where_lost(f"{key}, {candidate}")
                        raise

            outcome = search(candidates, default, usable, seconds)
            stage.record(step, outcome)
            # Beside the results too: what is written elsewhere may not come back from a machine.
            for folder in (tuned.FOLDER, stage.file.parent / "tuned"):
                write_table(folder / name, stage, known)
    finally:
        pool.shutdown(cancel_futures=True)
    return 0


def _end_where_lost(what: str) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise ContextLost(f"{what}: {error}") from None


def _without_a_gpu() -> None:
    """For a process that only compiles: a context on the GPU would take half a gigabyte of it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("TRITON_INTERPRET", None)


def _refusals(
    pool: concurrent.futures.Executor, kernel: str, key: str, family: str, spec: str, candidates: list[Configuration]
) -> Iterator[str | None]:
    """Of each candidate why it must not run, or None; all are being compiled from now on."""
    return pool.map(partial(_refused, target(), kernel, key, family, spec), candidates)


def write_table(file: Path, stage: Stage, known: dict[str, Any]) -> None:
    """Only what differs from what the launchers choose by themselves."""
    table: dict[str, dict[str, Configuration]] = {}
    for step, outcome in stage.done.items():
        kernel, key, _, default, *_ = known[step]
        if outcome["best"] != default:
            table.setdefault(kernel, {})[key] = outcome["best"]
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {k: stage.about[k] for k in ("device", "torch", "versions", "commit", "date")}
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"searched": about, "configurations": table}, indent=1) + "\n")
    os.replace(part, file)


def _never(family: str, name: str) -> bool:
    """Whether the launcher chooses no spec of that name on this GPU."""
    return bool(name) and not list(_on(target(), family, name))


def _on(device: str, family: str, name: str) -> Iterator[Any]:
    """The spec of that name on such a GPU, which may have one of its own."""
    from fastgen.kernels import aot

    names = (name, f"{name} {device}")
    return (spec for spec in aot.specs((family,), True) if spec.name in names and device not in spec.never)


def _refused(device: str, kernel: str, key: str, family: str, name: str, candidate: Configuration) -> str | None:
    """Why the spec of that name must not run so on such a GPU: compiled, and its machine code read."""
    from fastgen.kernels import aot, tuned

    if not name or device not in aot.TARGETS:
        return None
    with tuned.forced(kernel, key, candidate):
        spec = next(_on(device, family, name), None)
    if spec is None:
        return None
    try:
        row = aot.check(spec, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return f"spills {row['stack']} bytes" if row["stack"] else None


def _work(named: str) -> Any:
    """What a search times: one family's benchmark in which the kernel that it is about does most."""
    from benchmarks import langevin, mmd, nearest, perceptual

    family, kernel, size = named.split()
    if family == "langevin":
        return langevin._step((1024, 3, 64, 64), torch.float32, "step")
    if family == "mmd":
        return mmd._imq(8192, 8192, int(size), 0 if kernel == "value" else 2)
    if family == "nearest":
        return nearest._work(16_384, 131_072, int(size))
    whole = perceptual._epilogue_work(16, 128, False)
    layer = perceptual.CHANNELS.index(int(size))

    def inputs(device: torch.device) -> dict[str, Any]:
        return {name: maps[layer : layer + 1] for name, maps in whole.inputs(device).items()}

    return dataclasses.replace(whole, name=f"LPIPS from {size} channels", inputs=inputs)


@cache
def _prepared(work: str) -> tuple[Any, Any, Any]:
    found = _work(work)
    inputs = found.inputs(torch.device("cuda"))
    return found, inputs, found.oracle(inputs)


def _timed(work: str) -> float:
    """Of a right result on this GPU, the least of five rounds."""
    from benchmarks.harness import Local, checked

    found, inputs, expected = _prepared(work)
    row: dict[str, Any] = {}
    ready = Local(found, "fastgen", inputs, torch.device("cuda"))
    if not checked(found, "fastgen", ready, inputs, expected, row):
        raise ValueError(f"{row['status']}: {row.get('reason', row.get('error'))}")
    return min(ready.seconds(0.05) for _ in range(5))


def bench(file: Path, seconds: float, patience: float, more: Sequence[str] = ()) -> int:
    """`python -m benchmarks all --device cuda --huge`, with `more` arguments; where a kernel took the device with it,
    again without that, and where a provider took the process with it, without that: a peer everywhere, ours in that
    work."""
    until = time.monotonic() + seconds
    without: list[str] = []
    results.begun(file).unlink(missing_ok=True)  # what a killed run left
    while True:
        left = until - time.monotonic()
        command = [sys.executable, "-m", "benchmarks", "all", "--device", "cuda", "--huge", "--resume"]
        command += ["--patience", f"{patience:g}", "--out", str(file), "--seconds", f"{max(left, 1):.0f}", *more]
        status = subprocess.run([*command, *(f"--without={name}" for name in without)], cwd=machine.ROOT).returncode
        if status in CRASHES:
            crashed = results.blame(file, signal.Signals(-status).name)
            if crashed is None or crashed in without:
                return 1
            print(f"bench: {crashed} ended the process, on without it", file=sys.stderr)
            if not results.ours(crashed):
                without.append(crashed)
        elif status != LOST:
            return status
        if until - time.monotonic() < 0:
            return status


def main(argv: list[str]) -> int:
    if argv[:1] == ["small"]:
        return small(argv[1])
    if argv[:1] == ["once"]:
        return gpu_profile.once(argv[1], argv[2])
    if argv[:1] == ["timelines"]:
        return gpu_profile.each_timeline(*argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["test", "bench", "tune", "profile"])
    parser.add_argument("--results", default=str(machine.ROOT / "benchmarks" / "results"), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"that the stage may take (default {SECONDS:g})")
    said = f"seconds that a call may take in the stage bench (default {PATIENCE:g})"
    parser.add_argument("--patience", type=float, default=PATIENCE, help=said)
    arguments, more = parser.parse_known_args(argv)
    if more and arguments.stage != "bench":  # which hands them on: --work, --provider
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    for name in ("seconds", "patience"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(arguments, name):g}")
    if not torch.cuda.is_available():
        raise ValueError(f"gpu {arguments.stage}: torch finds no CUDA device here")
    from fastgen.kernels.tuned import slug

    from fastgen.ops import backend

    if backend.extension() is None:
        raise ValueError("gpu: fastgen._C is not built, `python3 setup.py build_ext --inplace` does it")
    about = machine.describe(torch.device("cuda"))
    file = Path(arguments.results).absolute() / f"{slug(about['device'])}.json"
    if arguments.stage == "bench":
        return bench(file, arguments.seconds, arguments.patience, more)
    stage = Stage(arguments.stage, file, about, arguments.seconds)
    return {"test": test, "tune": tune, "profile": gpu_profile.profile}[arguments.stage](stage)
