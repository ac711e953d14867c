"""The harness: a wrong result gets no time, a missing peer is a row, and memory is the call's own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import functional as F

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def harness(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("harness")


def summing(harness: ModuleType, **more: Any) -> Any:
    def missing(x: Any) -> Any:
        raise ImportError("No module named 'peer'")

    def broken(x: Any) -> Any:
        raise RuntimeError("out of luck")

    arguments: dict[str, Any] = {
        "family": "mmd",
        "name": "sum",
        "inputs": lambda device: torch.arange(1000.0),
        "providers": {
            "fastgen": lambda x: lambda: x.sum(),
            "eager": lambda x: lambda: (x.sum(), x.sum())[0],
            "wrong": lambda x: lambda: x.sum() * 1.01,
            "nan": lambda x: lambda: x.sum() * float("nan"),
            "infinite": lambda x: lambda: x.sum() / 0.0,
            "shape": lambda x: lambda: x.sum()[None],
            "missing": missing,
            "broken": broken,
            "elsewhere": harness.Provider(broken, ("cuda",)),
        },
        "oracle": lambda x: x.double().sum(),
        "series": "sum",
        "size": {"N": 1000},
        "operations": 1e3,
        "moved": 4e3,
    }
    return harness.Work(**(arguments | more))


def measurer(harness: ModuleType, **more: Any) -> Any:
    return harness.Measurer(CPU, rounds=4, at_least=0.001, limits={"copy": 1e9, "float32": 1e9}, **more)


def test_rows(harness: ModuleType) -> None:
    rows = {r["provider"]: r for r in measurer(harness).measure(summing(harness))}
    statuses = dict.fromkeys(("fastgen", "eager"), "ok") | dict.fromkeys(("wrong", "nan", "infinite"), "wrong")
    statuses |= {"missing": "missing", "broken": "failed", "shape": "failed"}
    assert {name: row["status"] for name, row in rows.items()} == statuses
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert all(("seconds" in row) == (row["status"] == "ok") for row in rows.values())
    own = rows["fastgen"]
    assert own["rounds"] == 4
    assert own["seconds"] <= own["quantiles"][0] <= own["quantiles"][1] <= own["quantiles"][2]
    assert own["bytes_per_second"] == pytest.approx(4e3 / own["seconds"])
    assert own["share_of_matmul"] == pytest.approx(1e3 / own["seconds"] / 1e9)
    from benchmarks import results

    table = results.table(list(rows.values()))
    assert "| sum | wrong | **wrong** |" in table
    assert "No module named 'peer'" in table


def test_rounds_are_interleaved_and_the_check_comes_first(harness: ModuleType) -> None:
    calls: list[str] = []

    def provider(name: str) -> Callable[[Any], Any]:
        def run(x: Tensor) -> Tensor:
            calls.append(name)
            return x.sum()

        return lambda x: lambda: run(x)

    run = harness.Measurer(CPU, rounds=3, at_least=0.0)
    run.measure(summing(harness, providers={"a": provider("a"), "b": provider("b")}))
    # A check and a warm call each, then the rounds in turn.
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 3]


def test_a_call_beyond_patience_is_skipped_and_says_so(harness: ModuleType) -> None:
    run = measurer(harness, patience=0.5)
    run.rows = [
        {"provider": "eager", "series": "sum", "operations": 10.0, "moved": 0.0, "status": "ok", "seconds": 0.01},
        {"provider": "fastgen", "series": "sum", "operations": 10.0, "moved": 0.0, "status": "wrong"},
    ]
    rows = {r["provider"]: r for r in run.measure(summing(harness))}
    assert rows["eager"]["status"] == "skipped"
    assert rows["eager"]["expected_seconds"] == pytest.approx(1.0)
    assert "seconds" not in rows["eager"]
    assert rows["fastgen"]["status"] == "ok"
    assert run.measure(summing(harness), ["fastgen"])[0]["provider"] == "fastgen"


def tiny(family: str) -> Any:
    """A small work of each family's own making."""
    from benchmarks import langevin, mmd, nearest, perceptual

    return {
        "mmd": lambda: mmd._imq(40, 50, 8, 2),
        "mmd, Gaussian": lambda: mmd._gaussian(40, 50, 8, 1),
        "langevin": lambda: langevin._step((16, 3, 8, 8), torch.float32, "step"),
        "langevin, noise": lambda: langevin._step((16, 3, 8, 8), torch.float32, "noise"),
        "perceptual": lambda: perceptual._epilogue_work(1, 16, False),
        "nearest": lambda: nearest._work(60, 80, 5),
    }[family]()


OPS = {
    "mmd": "mmd",
    "mmd, Gaussian": "mmd",
    "langevin": "langevin_step_",
    "langevin, noise": "langevin_noise",
    "perceptual": "lpips_distance",
    "nearest": "nearest",
}


@pytest.mark.parametrize("family", OPS)
def test_a_kernel_that_is_off_by_one_percent_gets_no_time(
    family: str, harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["fastgen", "eager", "torch.cdist", "eager, as JEM", "eager, as UvA", "add"]
    sound = {r["provider"]: r for r in measurer(harness).measure(tiny(family), only)}
    assert {r["status"] for r in sound.values()} == {"ok"}, sound
    right = getattr(F, OPS[family])

    def off(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        if family == "nearest":
            return found._replace(distance=found.distance * 1.01)
        return found.mul_(1.01) if family == "langevin" else found * 1.01

    monkeypatch.setattr(F, OPS[family], off)
    broken = {r["provider"]: r for r in measurer(harness).measure(tiny(family), only)}
    assert broken["fastgen"]["status"] == "wrong"
    assert "seconds" not in broken["fastgen"]
    assert broken["eager"]["status"] == "ok"


def test_a_small_part_of_a_step_that_is_off_is_seen(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One percent of the noise, or of the step, is much less than one percent of the state."""
    right = F.langevin_step_
    for name in ("noise_scale", "step_size"):

        def off(*args: Any, name: str = name, **kwargs: Any) -> Any:
            return right(*args, **(kwargs | {name: kwargs[name] * 1.01}))

        monkeypatch.setattr(F, "langevin_step_", off)
        assert measurer(harness).measure(tiny("langevin"), ["fastgen"])[0]["status"] == "wrong", name


def test_moments_of_a_clipped_normal(harness: ModuleType) -> None:
    from benchmarks.langevin import clipped_moments, distribution_error

    mean = torch.linspace(-2, 2, 9, dtype=torch.float64)
    first, second = clipped_moments(mean, 0.7, -1.0, 1.0)
    t = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * t * t) * (t[1] - t[0]) / (2 * torch.pi) ** 0.5
    clipped = (mean[:, None] + 0.7 * t).clamp(-1, 1)
    want = (clipped * weight).sum(1)
    torch.testing.assert_close(first, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second, ((clipped - want[:, None]) ** 2 * weight).sum(1), rtol=1e-5, atol=1e-7)
    mean, variance = torch.randn(200_000).double(), torch.full((200_000,), 0.04).double()
    draw = mean + 0.2 * torch.randn(200_000)
    assert distribution_error(draw, (mean, variance)) < 0.005
    assert distribution_error(draw * 1.01, (mean, variance)) > 0.008
    assert distribution_error(mean + (draw - mean) * 1.02, (mean, variance)) > 0.015


def test_the_mmd_oracle_is_autograd_of_the_plain_code(harness: ModuleType) -> None:
    from benchmarks import mmd

    for kind, work in (("imq", mmd._imq(7, 9, 3, 2)), ("rbf", mmd._gaussian(9, 7, 3, 2))):
        inputs = work.inputs(CPU)
        x, y = (t.detach().double().requires_grad_() for t in inputs)
        value = (mmd._mmd if kind == "imq" else mmd._mmd_gaussian)(x, y)
        wanted = torch.autograd.grad(value, (x, y))
        got, _, gradients = work.oracle(inputs)
        torch.testing.assert_close(got, value.detach(), rtol=1e-9, atol=1e-12)
        for (index, gradient), want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, want[index], rtol=1e-9, atol=1e-12)


def test_counts_of_the_lpips_trunks(harness: ModuleType) -> None:
    from benchmarks import perceptual

    for net in perceptual.NETS:
        assert perceptual._parameters(net) == sum(v.numel() for v in perceptual.trunk_state(net).values())
    # 15.35 G multiply-adds a forward pass of VGG16 at 224, and as many back to the pixels.
    assert perceptual._operations("vgg", 1, 224) == pytest.approx(2 * 2 * 15.35e9, rel=0.01)


def test_memory_probe_sees_what_a_call_takes(harness: ModuleType) -> None:
    from benchmarks.memory import probe

    def hungry(x: Any) -> Any:
        return lambda: torch.ones(2**26).sum()  # 256 MiB, gone before the call returns

    work = harness.Work("mmd", "hungry", lambda d: None, {"hungry": hungry, "frugal": lambda x: lambda: 1}, lambda x: 0)
    assert probe(work, "hungry") == pytest.approx(2**28, rel=0.05)
    assert probe(work, "frugal") < 2**22


def test_memory_server_and_another_version(harness: ModuleType) -> None:
    """Both ends of both pipes; the other version is this checkout itself."""
    from benchmarks import memory
    from benchmarks.__main__ import works
    from benchmarks.base import Other

    with memory.server("quick") as server:
        question = {"family": "nearest", "make": "top-1", "n": 2000, "timeout": 60}
        answer = server.ask(question | {"provider": "torch.cdist"})
        assert answer["inputs"] == 2 * 2000 * 64 * 4
        assert 2000 * 2000 * 4 * 0.9 < answer["bytes"] < 2000 * 2000 * 4 * 4
        assert "failed" in server.ask(question | {"provider": "nobody"})
        assert "slow" in server.ask(question | {"provider": "torch.cdist", "n": 20_000, "timeout": 0.0})
    work = next(w for w in works("langevin", "quick") if w.name.startswith("noise"))
    other = Other(ROOT, "quick", CPU)
    try:
        ready = other.ready(work, "fastgen")
        torch.testing.assert_close(ready.result(), F.langevin_noise(work.inputs(CPU)[0], seed=0), rtol=0, atol=0)
        assert 0 < ready.seconds(0.0) < 60
        with pytest.raises(RuntimeError, match="nobody"):
            other.ready(work, "nobody")
    finally:
        other.close()


def test_load_of_others_is_seen(harness: ModuleType) -> None:
    from benchmarks import machine, results

    load = machine.Load()
    spinning = subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < .3: pass"])
    assert spinning.returncode == 0
    own = load._read()[2] - load.started[2]
    assert own > 0.1  # a finished child counts as ours, and so not as others'
    assert results.warning([{"other_load": 0.5}]).startswith("Warning")
    assert results.warning([{"other_load": 0.01}, {}]) == ""


def test_save_is_whole(harness: ModuleType, tmp_path: Path) -> None:
    from benchmarks import machine, results

    content = {"machine": machine.describe(CPU), "rows": [{"work": "w"}]}
    results.save(tmp_path / "deep" / "a.json", content)
    assert results.load(tmp_path / "deep" / "a.json") == json.loads(json.dumps(content))
    assert content["machine"]["torch"] == torch.__version__
    (tmp_path / "b.json").write_text('{"rows"')
    with pytest.raises(ValueError, match="RESULTS"):
        results.load(tmp_path / "b.json")


def test_every_family_lists_its_works(harness: ModuleType) -> None:
    from benchmarks.__main__ import FAMILIES, works

    for family in FAMILIES:
        for scale in ("demo", "quick", "full", "huge"):
            found = works(family, scale)
            names = [work.name for work in found]
            assert len(names) == len(set(names))
            for work in found:
                assert {"fastgen", "eager"} <= set(work.providers)
                assert work.series


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cuda"], "no CUDA device"),
        (["--provider", "nobody"], "expected one of"),
        (["--work", "nothing"], "--work"),
        (["--resume"], "--out"),
        (["--base", "no-such-ref", "--quick"], "git ref"),
    ],
)
def test_command_line_refuses(arguments: list[str], says: str) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks", "mmd", "--no-memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert says in done.stderr
