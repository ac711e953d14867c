"""The harness: a wrong result gets no time, a missing peer is a row, and memory is the call's own."""

import dataclasses
import json
import math
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
    run = measurer(harness, memory=lambda work, provider: len(provider))
    rows = {r["provider"]: r for r in run.measure(summing(harness))}
    statuses = dict.fromkeys(("fastgen", "eager"), "ok") | dict.fromkeys(("wrong", "nan", "infinite"), "wrong")
    statuses |= {"missing": "missing", "broken": "failed", "shape": "failed"}
    assert {name: row["status"] for name, row in rows.items()} == statuses
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert all(("seconds" in row) == (row["status"] == "ok") for row in rows.values())
    assert all(row.get("peak_bytes") == (len(name) if row["status"] == "ok" else None) for name, row in rows.items())
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
    of = {"series": "sum", "operations": 10.0, "moved": 0.0, "size": {"N": 10}}
    run.rows = [of | {"provider": "eager", "status": "ok", "seconds": 0.01}]
    run.rows.append(of | {"provider": "fastgen", "status": "wrong"})
    rows = {r["provider"]: r for r in run.measure(summing(harness))}
    assert rows["eager"]["status"] == "skipped"
    assert rows["eager"]["expected_seconds"] == pytest.approx(1.0)
    assert "seconds" not in rows["eager"]
    assert rows["fastgen"]["status"] == "ok"
    assert run.measure(summing(harness), ["fastgen"])[0]["provider"] == "fastgen"


def test_what_is_expected_comes_from_the_same_dimension(harness: ModuleType) -> None:
    """Distances of D coordinates need not cost D times those of one: N alone is scaled where it can be."""
    of = {"provider": "eager", "series": "sum", "status": "ok", "moved": 0.0}
    rows = [
        of | {"size": {"N": 100, "D": 64}, "operations": 1e4, "seconds": 0.01},
        of | {"size": {"N": 900, "D": 8}, "operations": 9e5, "seconds": 2.0},
    ]
    work = summing(harness, size={"N": 1000, "D": 64}, operations=1e6)
    assert harness.expected_seconds(work, "eager", rows) == pytest.approx(1.0)
    assert harness.expected_seconds(work, "eager", rows[1:]) == pytest.approx(2.0 * 10 / 9)
    assert harness.expected_seconds(work, "fastgen", rows) == 0.0


def test_a_long_warm_call_is_a_round(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    times = iter(range(0, 10_000, 2))  # each look at the clock comes two seconds after the one before
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(times))
    work = summing(harness, providers={"slow": lambda x: lambda: (calls.append("call"), x.sum())[1]})
    row = measurer(harness).measure(work)[0]
    assert len(calls) == 3  # the check, the warm call, one round more
    assert row["rounds"] == 2
    calls.clear()
    assert measurer(harness).measure(dataclasses.replace(work, once=True))[0]["rounds"] == 1
    assert len(calls) == 2
    assert row["spent"] > 0


def test_out_of_time_leaves_providers(harness: ModuleType) -> None:
    from benchmarks.__main__ import to_do

    row = measurer(harness, until=0.0).measure(summing(harness), ["fastgen"])[0]
    assert row["status"] == "skipped"
    assert "out of time" in row["reason"]
    assert to_do(row, 1e-9)
    assert to_do({"status": "skipped", "expected_seconds": 5.0}, 10.0)
    assert not to_do({"status": "skipped", "expected_seconds": 5.0}, 1.0)
    assert not to_do({"status": "failed"}, math.inf)
    work = summing(harness)
    assert harness.expected_seconds(work, "fastgen", [row]) == 0.0


def test_a_call_that_fails_while_it_is_timed(harness: ModuleType) -> None:
    """As where memory runs out by what all providers hold: the others are timed."""

    def failing(x: Tensor) -> Callable[[], Tensor]:
        calls = iter(range(3))

        def run() -> Tensor:
            if next(calls) == 2:
                raise RuntimeError("out of memory")
            return x.sum()

        return run

    providers = {"eager": failing, "fastgen": lambda x: lambda: x.sum()}
    rows = {
        r["provider"]: r for r in harness.Measurer(CPU, at_least=0.0).measure(summing(harness, providers=providers))
    }
    assert rows["eager"]["status"] == "failed"
    assert "out of memory" in rows["eager"]["reason"]
    assert "seconds" not in rows["eager"]
    assert rows["fastgen"]["seconds"] > 0


def test_memory_is_measured_where_the_run_is_ready(harness: ModuleType) -> None:
    """As on CUDA: nothing is set up, and compiled, a second time for it."""
    setups: list[str] = []

    def setup(x: Tensor) -> Callable[[], Tensor]:
        setups.append("now")
        return lambda: x.sum()

    def memory(work: Any, name: str, inputs: Tensor, run: Callable[[], Tensor]) -> int:
        if name == "eager":
            raise RuntimeError("out of memory")
        assert run() == inputs.sum()
        return 17

    work = summing(harness, providers={"fastgen": setup, "eager": lambda x: lambda: x.sum()})
    rows = {r["provider"]: r for r in harness.Measurer(CPU, at_least=0.0, memory_here=memory).measure(work)}
    assert len(setups) == 1
    assert rows["fastgen"]["peak_bytes"] == 17
    assert "peak_bytes" not in rows["eager"]
    assert rows["eager"]["seconds"] > 0


def test_peers_are_announced_before_they_are_set_up(harness: ModuleType) -> None:
    seen: list[str] = []

    def setup(x: Tensor) -> Callable[[], Tensor]:
        seen.append("set up")
        return lambda: x.sum()

    work = summing(harness, providers={"fastgen": setup, "eager": setup})
    measurer(harness, begins=lambda work, name: seen.append(name)).measure(work)
    assert seen == ["set up", "eager", "set up"]


def test_an_oracle_without_memory_is_a_row(harness: ModuleType) -> None:
    def oracle(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    rows = measurer(harness).measure(summing(harness, oracle=oracle), ["fastgen", "eager"])
    assert [(r["status"], r["reason"]) for r in rows] == [("failed", "the oracle: RuntimeError: out of memory")] * 2


def test_checked_in_float32_and_timed_as_users_have_it(harness: ModuleType) -> None:
    seen: list[bool] = []

    def setup(x: Tensor) -> Callable[[], Tensor]:
        return lambda: (seen.append(torch.backends.cudnn.allow_tf32), x.sum())[1]

    assert torch.backends.cudnn.allow_tf32
    harness.Measurer(CPU, rounds=2, at_least=0.0).measure(summing(harness, providers={"fastgen": setup}))
    assert seen == [False, True, True, True]


def test_a_lost_device_ends_the_run_and_is_not_tried_again(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An illegal access fails every later call of its process: the row that did it is kept, and left out next time."""
    from benchmarks import __main__ as command
    from benchmarks import machine

    lost: list[str] = []

    def deadly(x: Any) -> Any:
        lost.append("now")
        raise RuntimeError("an illegal memory access was encountered")

    def synchronise(device: torch.device) -> None:
        if lost:
            raise RuntimeError("still")

    works = [summing(harness, providers={"fastgen": lambda x: lambda: x.sum(), "faiss": deadly}, name=n) for n in "ab"]
    monkeypatch.setattr(machine, "synchronise", synchronise)
    monkeypatch.setattr(machine, "limits", lambda device, quick: {})
    monkeypatch.setattr(command, "works", lambda family, scale: works if family == "mmd" else [])
    arguments = ["mmd", "--no-memory", "--resume", "--out", str(tmp_path / "a.json")]
    seen = []
    for _ in range(3):  # once for each work, then through
        lost.clear()
        status = command.measure(arguments)
        rows = json.loads((tmp_path / "a.json").read_text())["rows"]
        seen.append((status, [(r["work"], r["provider"], r["status"]) for r in rows]))
    first, second = ("a", "faiss", "failed"), ("b", "faiss", "failed")
    assert seen[0] == (command.LOST, [first])
    assert seen[1] == (command.LOST, [first, ("a", "fastgen", "ok"), second])
    assert seen[2] == (0, [first, ("a", "fastgen", "ok"), second, ("b", "fastgen", "ok")])


def test_what_is_asked_of_a_gpu_is_measured_first(harness: ModuleType) -> None:
    from benchmarks import bars
    from benchmarks.__main__ import FAMILIES, works

    found = bars.urgent_first([work for family in FAMILIES for work in works(family, "huge")])
    asked = {(bar.family, bar.work) for bar in bars.BARS if bar.on == bars.GPU}
    ahead = [(work.family, work.name) for work in found[: len(asked) + len(bars.SMALLER)]]
    assert set(ahead) == asked | set(bars.SMALLER)
    assert [name for _, name in ahead[-4:]] == [
        f"top-1 of {n} x {n} x {d}" for n in (100_000, 1_000_000) for d in (128, 800)
    ]


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


WORKS = {
    "mmd": lambda of: of._imq(40, 50, 8, 2),
    "mmd, Gaussian": lambda of: of._gaussian(40, 50, 8, 1),
    "langevin, step": lambda of: of._step((16, 3, 8, 8), torch.float32, "step"),
    "langevin, step in bf16": lambda of: of._step((256, 3, 32, 32), torch.bfloat16, "step"),
    "langevin, noise": lambda of: of._step((16, 3, 8, 8), torch.float32, "noise"),
    "langevin, chain": lambda of: of._chain("small", (8, 3, 32, 32)),
    "perceptual, epilogue": lambda of: of._epilogue_work(1, 16, True),
    "perceptual, LPIPS": lambda of: of._lpips_work("alex", 1, 64),
    "perceptual, GLANN's loss": lambda of: of._glann_work(1, 32),
    "perceptual, step": lambda of: of._step_work(2, 28),
    "nearest": lambda of: of._work(60, 80, 5),
    "nearest, streamed": lambda of: of._streamed_work(60, 80, 5),
    "nearest, far off": lambda of: of._offset_work(60, 80, 5),
    "nearest, masked": lambda of: of._masked_work(60, 80, 5),
}


@pytest.mark.parametrize("kind", WORKS)
def test_one_percent_of_any_part_is_refused(kind: str, harness: ModuleType) -> None:
    """Of the value and of each gradient, whatever the family: by a share of all of it that a provider is off by."""
    import importlib

    work = WORKS[kind](importlib.import_module(f"benchmarks.{kind.split(',')[0]}"))
    provider = work.provider("fastgen")

    def off(part: int, inputs: Any) -> Callable[[], Any]:
        run = provider.setup(inputs)

        def wrong() -> Any:
            result = run()
            parts = [t.clone() for t in harness.tensors(result)]
            parts[part] = parts[part] * 1.01
            return tuple(parts) if isinstance(result, tuple) else parts[0]

        return wrong

    def status(setup: Callable[[Any], Any]) -> str:
        changed = dataclasses.replace(work, providers={"fastgen": dataclasses.replace(provider, setup=setup)})
        row = harness.Measurer(CPU, rounds=1, at_least=0.0).measure(changed)[0]
        assert ("seconds" in row) == (row["status"] == "ok")
        return str(row["status"])

    inputs = work.inputs(CPU)
    expected = work.oracle(inputs)
    work = dataclasses.replace(work, oracle=lambda inputs: expected)
    parts = [t for t in harness.tensors(provider.setup(inputs)()) if t.is_floating_point()]
    assert status(provider.setup) == "ok"
    for part in range(len(parts)):
        assert status(lambda inputs, part=part: off(part, inputs)) == "wrong", part


def test_a_small_part_of_a_step_that_is_off_is_seen(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One percent of the noise, or of the step, is much less than one percent of the state."""
    right = F.langevin_step_
    for name in ("noise_scale", "step_size"):

        def off(*args: Any, name: str = name, **kwargs: Any) -> Any:
            return right(*args, **(kwargs | {name: kwargs[name] * 1.01}))

        monkeypatch.setattr(F, "langevin_step_", off)
        assert measurer(harness).measure(tiny("langevin"), ["fastgen"])[0]["status"] == "wrong", name


def test_a_wrong_row_does_not_hide_behind_the_right_distance(harness: ModuleType) -> None:
    from benchmarks import nearest

    work = nearest._work(60, 80, 5)
    inputs = work.inputs(CPU)
    distance, index = work.provider("fastgen").setup(inputs)()
    order = torch.cdist(*(t.double() for t in inputs)).argsort(1)
    assert torch.equal(order[:, 0], index)
    expected = work.oracle(inputs)
    for at in (range(60), range(59, 60)):
        wrong = index.clone()
        wrong[list(at)] = order[list(at), 1]
        assert work.error((distance, index), expected) < 1e-6
        assert work.error((distance, wrong), expected) > work.tolerance
        assert work.facts((distance, wrong), expected)["right"] == pytest.approx(1 - len(at) / 60)
    query = 100 * torch.eye(3, 5)
    twins = query, torch.cat([query + 1, query + 1])  # the same distance twice: either is right
    expected = nearest.oracle(lambda inputs: [inputs[1]], twins)
    assert nearest.error((torch.full((3,), 5.0), torch.tensor([0, 4, 2])), expected) < 1e-6


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
    from benchmarks import perceptual_networks as networks

    for net in networks.NETS:
        assert networks.parameters(net) == sum(v.numel() for v in networks.trunk_state(net).values())
    # 15.35 G multiply-adds a forward pass of VGG16 at 224, and as many back to the pixels.
    assert networks.operations("vgg", 1, 224) == pytest.approx(2 * 2 * 15.35e9, rel=0.01)


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
        question = {"family": "nearest", "make": "top-1, D = 64", "n": 2000, "timeout": 60}
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
                # Plain torch takes seconds a call for a million streamed rows: there FAISS is the peer.
                peer = "faiss" if "streamed" in work.name else "eager"
                assert {"fastgen", peer} <= set(work.providers)
                assert work.series


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cuda"], "no CUDA device"),
        (["--provider", "nobody"], "expected one of"),
        (["--without", "nobody"], "--without: expected one of"),
        (["--work", "nothing"], "--work"),
        (["--resume"], "--out"),
        (["--provider", "torch.compile, CUDA graph"], "expected one of"),
        (["--seconds", "0"], "--seconds: expected more than 0"),
        (["--patience", "-1"], "--patience: expected more than 0"),
        (["--quick", "--out", "/dev/null/a.json"], "--out: expected a file that can be written"),
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


def test_what_a_resumed_run_keeps(harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import resumed

    about = {"device": "a", "threads": 2, "commit": "c", "torch": "2"}
    new: dict[str, Any] = {"machine": about, "scale": "full", "spent": {}, "rows": []}
    old = new | {"rows": [{"work": "w"}], "spent": {"mmd": 1.0}, "test": {"done": {}}}
    assert resumed(old, new) == {k: v for k, v in old.items() if k != "machine"}
    assert capsys.readouterr().err == ""
    assert resumed(old | {"scale": "quick"}, new) == {k: v for k, v in new.items() if k != "machine"} | {
        "test": {"done": {}}
    }
    assert "scale quick" in capsys.readouterr().err
    assert resumed(old | {"machine": about | {"commit": "d"}}, new) == {}
    assert "commit d" in capsys.readouterr().err
    assert resumed({"machine": about, "rows": []}, new) == {"rows": []}  # what a stage of `make gpu` wrote


def test_interrupted(harness: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import __main__ as command

    def stopped(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", stopped)
    assert command.main(["mmd"]) == 130
    assert "--resume goes on" in capsys.readouterr().err
