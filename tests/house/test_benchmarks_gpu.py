"""What needs no GPU of the GPU's stages: the search of launch tables, resuming, parsing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def profile(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("gpu_profile")


@pytest.fixture
def gpu(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("gpu")


def test_the_search_takes_the_fastest_that_works(gpu: ModuleType) -> None:
    default = {"BLOCK_N": 32}
    seconds = {16: 3.0, 32: 2.0, 64: 1.0, 128: 0.5}

    def usable(c: dict[str, int]) -> str | None:
        return "spills 8 bytes" if c["BLOCK_N"] == 128 else None

    def timed(c: dict[str, int]) -> float:
        if c["BLOCK_N"] == 256:
            raise ValueError("wrong: 0.01")
        return seconds[c["BLOCK_N"]]

    candidates = [{"BLOCK_N": n} for n in (16, 32, 64, 128, 256)]
    found = gpu.search(candidates, default, usable, timed)
    assert found["best"] == {"BLOCK_N": 64}
    assert found["default_seconds"] == 2.0
    refused = {e["configuration"]["BLOCK_N"]: e["refused"] for e in found["tried"] if "refused" in e}
    assert refused == {128: "spills 8 bytes", 256: "ValueError: wrong: 0.01"}
    seconds[64] = 1.99  # not worth a change
    assert gpu.search(candidates, default, usable, timed)["best"] == default
    with pytest.raises(ValueError, match="no configuration works"):
        gpu.search(candidates, default, lambda c: "does not compile", timed)

    def deadly(c: dict[str, int]) -> float:
        raise gpu.ContextLost("an illegal memory access")

    with pytest.raises(gpu.ContextLost):
        gpu.search(candidates, default, usable, deadly)


def forget(tuned: ModuleType) -> None:
    tuned._table.cache_clear()
    tuned._table_of.cache_clear()


def on_device(tuned: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tuned.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(tuned.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuned.torch.cuda, "get_device_name", lambda index: name)
    forget(tuned)


def test_what_the_search_wrote_is_launched(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen.kernels import launch, mmd_launch, tuned

    known = gpu.searches()
    own, value = mmd_launch.blocks("grad", 64), mmd_launch.blocks("value", 64)
    stage = gpu.Stage("tune", tmp_path / "a.json", about())
    best = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 3}
    stage.record("mmd_grad D=64", {"best": best})
    stage.record("mmd_value D=16", {"best": known["mmd_value D=16"][3]})
    stage.record("langevin groups", {"best": {"largest_first": [128]}})
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    gpu.write_table(tuned.FOLDER / "a-gpu.json", stage, known)
    try:
        on_device(tuned, monkeypatch, "A GPU")
        assert mmd_launch.blocks("grad", 64) == {"BLOCK_M": mmd_launch.ROWS, **best}
        assert mmd_launch.blocks("value", 64) == value
        assert launch.langevin(4 * 512) == (128, True)
        with tuned.forced("mmd_grad", "D=64", {"BLOCK_N": 128}):
            assert mmd_launch.blocks("grad", 64)["BLOCK_N"] == 128
        table = json.loads((tuned.FOLDER / "a-gpu.json").read_text())["configurations"]
        assert set(table) == {"mmd_grad", "langevin"}  # what is the table's own already is left out
        with tuned.alone():
            assert mmd_launch.blocks("grad", 64) == own
            assert gpu.searches() == known
        on_device(tuned, monkeypatch, "another")
        assert mmd_launch.blocks("grad", 64) == own
    finally:
        forget(tuned)


def test_every_family_is_searched(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timing made up: the least work is a tile of 2048 elements, four warps and two stages."""
    from fastgen.kernels import aot, launch, mmd_launch, nearest_launch, tuned

    known = gpu.searches()
    for kernel, key, candidates, default, family, spec, _ in known.values():
        assert default in candidates
        assert not spec or spec in [s.name for s in aot.specs((family,), True)]
        with tuned.forced(kernel, key, candidates[0]):  # what is searched for is what is compiled
            made = next((s for s in aot.specs((family,), True) if s.name == spec), None)
        if made is not None:
            given = {**made.constexprs, **made.options, "num_warps": made.num_warps, "num_stages": made.num_stages}
            assert candidates[0].items() <= given.items()

    def timed(work: str) -> float:
        family, kernel, size = work.split()
        if family == "perceptual":
            blocks = launch.lpips_blocks(int(size))
            return blocks["BLOCK_P"] * blocks["BLOCK_C"] + abs(blocks["num_warps"] - 4)
        if family == "nearest":
            loop = nearest_launch.filter_options({64: 64, 128: 128, 784: 0}[int(size)])
        elif family == "mmd":
            loop = mmd_launch.blocks(kernel, int(size))
        else:
            return 1.0
        return 1.0 + abs(loop["num_warps"] - 4) + abs(loop["num_stages"] - 2)

    monkeypatch.setattr(gpu, "_timed", timed)
    monkeypatch.setattr(gpu, "_refusals", lambda *of: [None] * len(of[-1]))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    # What would not compile on a device, whose launcher does not ask for it, must not end the search there.
    for device, missing in (("sm_100", {"mmd_grad D=128"}), ("sm_90", set())):
        monkeypatch.setattr(gpu, "target", lambda device=device: device)
        stage = gpu.Stage("tune", tmp_path / f"{device}.json", about())
        gpu.tune(stage)
        assert set(known) - set(stage.done) == missing
    try:
        on_device(tuned, monkeypatch, "A GPU")
        assert [launch.lpips_blocks(c)["BLOCK_P"] for c in (64, 100, 512)] == [32, 16, 4]
        assert nearest_launch.filter_options(0) == {"BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
        assert mmd_launch.blocks("slope", 512)["num_warps"] == 4
        # Kernels and precisions that need more than what was timed keep their own.
        assert mmd_launch.blocks("grad", 64, "energy", "bf16x6")["num_warps"] == 8
        assert mmd_launch.blocks("grad", 64, "imq", "tf32x3")["num_warps"] == 8
        # A search that goes on where its own table is in use already, with one step left to do.
        table = (tuned.FOLDER / "a-gpu.json").read_text()
        del stage.done["lpips C=64"]
        gpu.tune(stage)
        assert json.loads((tuned.FOLDER / "a-gpu.json").read_text()) == json.loads(table)
    finally:
        forget(tuned)


def test_what_a_search_times_is_of_its_size(gpu: ModuleType) -> None:
    import torch

    for kernel, *_, named in gpu.searches().values():
        work = gpu._work(named)
        assert "fastgen" in work.providers
        if kernel == "lpips":
            inputs = work.inputs(torch.device("cpu"))
            assert [f.shape[1] for f in inputs["f0"]] == [int(named.split()[-1])]
            break


def about(commit: str = "abc") -> dict[str, Any]:
    return {"device": "A GPU", "torch": "2", "versions": {}, "commit": commit, "date": "2026-01-01", "type": "cuda"}


def test_a_stage_that_was_cut_off_goes_on(gpu: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    first = gpu.Stage("test", file, about())
    done = []
    for step in first.steps(["a", "b", "c"]):
        first.record(step, {"status": "passed"})
        done.append(step)
        if step == "b":
            break
    again = gpu.Stage("test", file, about())
    assert list(again.steps(["a", "b", "c"])) == ["c"]
    assert list(gpu.Stage("test", file, about("def")).steps(["a", "b"])) == ["a", "b"]
    assert list(gpu.Stage("test", file, about(), seconds=-1).steps(["d"])) == []
    other = gpu.Stage("profile", file, about())
    other.record("mmd", {"status": "missing"})
    kept = json.loads(file.read_text())
    assert set(kept) == {"machine", "rows", "test", "profile"}
    assert set(kept["test"]["done"]) == {"a", "b"}


def test_a_peer_that_ends_the_process_is_left_out_of_the_rest(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import harness, results

    file = tmp_path / "a.json"
    kept = {"family": "mmd", "work": "before", "provider": "keops", "status": "ok"}
    work = harness.Work("mmd", "after", lambda device: None, {}, lambda inputs: None)
    asked: list[list[str]] = []

    def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        asked.append([part for part in command if part.startswith("--without")])
        assert command[command.index("--work") + 1] == "16384"
        if len(asked) == 2:  # a kill from outside says nothing about a peer
            results.note_begun(file, work, "fastgen")
            return subprocess.CompletedProcess(command, -11)
        if len(asked) == 3:
            results.note_begun(file, work, "eager")
            return subprocess.CompletedProcess(command, -9)
        results.save(file, {"machine": {}, "rows": [kept]})
        results.note_begun(file, work, "keops")
        return subprocess.CompletedProcess(command, -11)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.bench(file, 60.0, 1.0, ["--work", "16384"]) == -9
    assert asked == [[], ["--without=keops"], ["--without=keops"]]  # ours is left out of that work alone
    first, row, own = json.loads(file.read_text())["rows"]
    assert first == kept
    assert (row["work"], row["provider"], row["status"], row["lost"]) == ("after", "keops", "failed", True)
    assert (own["work"], own["provider"], own["status"], own["lost"]) == ("after", "fastgen", "failed", True)
    assert row["reason"] == "it ended the process: SIGSEGV"
    asked.clear()
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, cwd: subprocess.CompletedProcess(command, -11))
    results.save(file, {"machine": {}, "rows": [kept]})
    assert gpu.bench(file, 60.0, 1.0) == 1  # nobody's: not again, nor by what a killed run left
    assert json.loads(file.read_text())["rows"] == [kept]


def test_steps_beside_each_other(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What takes longer than is left is gone with all that it started, and is not recorded as done."""
    stage = gpu.Stage("test", tmp_path / "a.json", about())
    pid = tmp_path / "pid"
    sleeping = f"p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    commands = {
        "quick": (100.0, "print('fine'); raise SystemExit(5)"),
        "wrong": (100.0, "raise SystemExit('why')"),
        "slow": (3.0, f"import subprocess; {sleeping}"),
    }

    def do(name: str) -> Any:
        seconds, code = commands[name]
        done = gpu.ran([sys.executable, "-c", code], {}, seconds)
        return stage.kept(name, done, gpu.outcome_of(done, (0, 5)))

    stage.each(list(commands), do, together=3)
    done = json.loads((tmp_path / "a.json").read_text())["test"]["done"]
    assert done == {"quick": {"status": "passed", "says": "fine"}, "wrong": {"status": "failed", "says": "why"}}
    assert "out of time, 1 steps are left: slow" in capsys.readouterr().out
    assert (tmp_path / "a-test.log").read_text() == "==== wrong\nwhy\n\n"
    if pid.exists() and pid.read_text():
        stat = Path(f"/proc/{pid.read_text()}/stat")
        for _ in range(100):
            if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                break
            time.sleep(0.05)
        else:
            raise AssertionError("its child lives")
    gpu.Stage("test", tmp_path / "a.json", about(), seconds=-1).each(["slow"], do)
    assert "1 steps are left" in capsys.readouterr().out


def test_a_failed_step_names_what_failed(gpu: ModuleType) -> None:
    """However much its workers warn of."""
    out = "\n".join([*(f"trace {i}" for i in range(40)), "FAILED test_a", "FAILED test_b", "2 failed"])
    warned = "\n".join(f"warning {i}" for i in range(40))
    says = gpu.outcome_of(subprocess.CompletedProcess([], 1, out, warned), (0,))["says"].splitlines()
    assert says[-6:] == ["FAILED test_a", "FAILED test_b", "2 failed", "warning 37", "warning 38", "warning 39"]
    assert len(says) == 15
    says = gpu.outcome_of(subprocess.CompletedProcess([], 1, "", warned), (0,))["says"].splitlines()
    assert says == [f"warning {i}" for i in range(25, 40)]


def test_the_counters_of_ncu(profile: ModuleType) -> None:
    metric = profile.METRICS
    names = ["ID", "Process ID", "Kernel Name", metric["seconds"], metric["dram bytes"], metric["mufu share"]]
    lines = [
        "==PROF== Connected to process 1",
        ",".join(f'"{n}"' for n in names),
        '"","","","us","Mbyte","%"',
        '"0","1","_pack(float*)","12.5","1,024.5","3.25"',
        '"1","1","_mmd_grad_kernel(float*, int)","1,500","2","61"',
    ]
    found = profile.counters("\n".join(lines))
    assert [k["kernel"] for k in found] == ["_mmd_grad_kernel", "_pack"]
    assert found[0]["seconds"] == pytest.approx(1.5e-3)
    assert found[0]["dram bytes"] == pytest.approx(2e6)
    assert found[1]["dram bytes"] == pytest.approx(1.0245e9)
    assert found[1]["mufu share"] == 3.25
    assert profile.counters("==ERROR== no permission") == []
    said = "==ERROR== Failed to find metric regex:^sm__pipe_tensor_cycles_active(\\.|$)\n==PROF== dram__bytes.sum"
    assert profile.unknown_metrics(said, set(metric.values())) == {metric["tensor share"]}
    assert profile.unknown_metrics("==ERROR== The application returned an error code", set(metric.values())) == set()


def test_the_slowest_work_of_each_family_is_profiled(profile: ModuleType) -> None:
    def row(family: str, work: str, seconds: float, rounds: int = 5, provider: str = "fastgen") -> dict[str, Any]:
        return {"family": family, "work": work, "seconds": seconds, "rounds": rounds, "provider": provider}

    rows = [row("mmd", "a", 1), row("mmd", "b", 2), row("mmd", "once", 9, 1), row("mmd", "eager", 8, 5, "eager")]
    rows += [row("langevin", "c", 0.1), {"family": "nearest", "work": "d", "provider": "fastgen", "status": "failed"}]
    assert profile.slowest_works(rows) == {"mmd": "b", "langevin": "c"}


def test_a_timeline_adds_up_its_kernels(profile: ModuleType) -> None:
    device = torch.autograd.DeviceType
    events = [
        SimpleNamespace(key="aten::mul", device_type=device.CPU, self_device_time_total=50.0, count=9),
        SimpleNamespace(key="short", device_type=device.CUDA, self_device_time_total=2.0, count=3),
        SimpleNamespace(key="long" * 40, device_type=device.CUDA, self_device_time_total=30.0, count=1),
    ]
    found = profile.kernels(events)
    assert found["kernel_seconds"] == pytest.approx(32e-6)
    assert found["kernel_launches"] == 4
    assert [(k["kernel"], k["launches"]) for k in found["kernels"]] == [("long" * 25, 1), ("short", 3)]


def test_the_profile_has_a_timeline_of_each_work_of_the_bars(
    profile: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the counters of each family's slowest work, where ncu is there."""
    from benchmarks import bars, results, stages

    asked = next(bar for bar in bars.BARS if bar.on == bars.GPU)
    row = {"family": asked.family, "provider": "fastgen", "status": "ok", "seconds": 1.0, "rounds": 5}
    rows = [row | {"work": asked.work}, row | {"work": "another", "seconds": 2.0}]
    results.save(tmp_path / "a.json", {"machine": {}, "rows": rows})
    commands: list[list[str]] = []

    def ran(command: list[str], environment: dict[str, str], seconds: float) -> Any:
        commands.append(command[-3:])
        if command[-3].endswith(".jsonl"):
            Path(command[-3]).write_text(json.dumps({"status": "passed", "seconds": 2.0, "kernels": []}) + "\n")
        return subprocess.CompletedProcess(command, 0, "loaded\n", "")

    monkeypatch.setattr(profile, "ran", ran)
    monkeypatch.setattr(profile, "tool", lambda name: None)
    stage = stages.Stage("profile", tmp_path / "a.json", about())
    assert profile.profile(stage) == 0
    assert [command[1:] for command in commands] == [[asked.family, asked.work]]
    assert stage.done[f"{asked.family}: {asked.work}"] == {"status": "passed", "seconds": 2.0, "kernels": []}
    assert stage.done[asked.family]["status"] == "missing"
    monkeypatch.setattr(profile, "tool", lambda name: "/bin/ncu")
    assert profile.profile(stages.Stage("profile", tmp_path / "a.json", about("def"))) == 0
    assert commands[-1] == ["once", asked.family, "another"]


def test_a_work_that_ends_the_process_is_alone_without_a_timeline(
    profile: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import stages

    works = {name: ("family", name) for name in "abcde"}
    asked = []

    def ran(command: list[str], environment: dict[str, str], seconds: float) -> Any:
        names = command[command.index("timelines") + 3 :: 2]
        asked.append("".join(names))
        rest = names[: names.index("b")] if "b" in names else names[:1]
        lines = "".join(json.dumps({"status": "passed", "seconds": ord(name)}) + "\n" for name in rest)
        Path(command[command.index("timelines") + 1]).write_text(lines + '{"status": "pas')  # cut off while writing
        return subprocess.CompletedProcess(command, -11, "", "Segmentation fault") if "b" in names else None

    monkeypatch.setattr(profile, "ran", ran)
    stage = stages.Stage("profile", tmp_path / "a.json", about())
    profile.timelines(stage, works)
    assert asked == ["abcde", "cde"]
    assert stage.done["b"] == {"status": "failed", "says": "Segmentation fault"}
    assert {name: outcome["seconds"] for name, outcome in stage.done.items() if name != "b"} == {"a": 97, "c": 99}
    assert "2 steps are left: d, e" in capsys.readouterr().out
    assert [file.name for file in tmp_path.glob("*timelines*")] == []


@pytest.mark.gpu
def test_a_timeline_on_the_gpu(profile: ModuleType, tmp_path: Path) -> None:
    from benchmarks import bars

    asked = next(bar for bar in bars.BARS if bar.family == "langevin" and bar.on == bars.GPU)
    assert profile.each_timeline(str(tmp_path / "told"), asked.family, asked.work) == 0
    found = json.loads((tmp_path / "told").read_text())
    assert found["kernel_launches"] == 1
    assert found["kernels"][0]["kernel"] == "_langevin_kernel"
    assert 0 < found["kernel_seconds"] < found["seconds"]


def test_the_stages_need_a_gpu(gpu: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for stage in ("test", "bench", "tune", "profile"):
        with pytest.raises(ValueError, match="no CUDA device"):
            gpu.main([stage])


LAUNCHED = """
import json, torch
from benchmarks import gpu
from fastgen.kernels import aot, launch, mmd_launch, nearest_launch, tuned

def call(kernel, size):
    if kernel.startswith("mmd"):
        points = torch.zeros(8192, size), torch.zeros(8192, size)
        sides = 0 if kernel == "mmd_value" else 2
        return mmd_launch.mmd, *points, sides, "bf16x3", (1.0, 8.1, 3.2, 0.5), "imq", (), "unbiased", None, None, None
    if kernel == "lpips":
        maps = torch.zeros(2, size, 128, 128), torch.zeros(2, size, 128, 128), torch.ones(size)
        return launch.lpips_layer, *maps, 1e-10, False, False, torch.ones(2), 1
    return nearest_launch.search, torch.zeros(256, size), torch.zeros(4096, size), None

for step, (kernel, key, candidates, default, family, name, work) in gpu.searches().items():
    if name:
        with tuned.forced(kernel, key, candidates[-1]):
            listed = next(gpu._on("sm_90", family, name))
            made = [s for s in aot.launched(*call(kernel, int(work.split()[-1]))) if s.kernel is listed.kernel]
        both = [
            {"signature": dict(sorted(s.signature.items())), "warps": s.num_warps, "stages": s.num_stages,
             "constants": {k: str(v) for k, v in sorted(s.constexprs.items()) if k != "PTX"}, "options": s.options,
             "divisible": sorted(set(s.divisible) & set(s.signature))}
            for s in (listed, made[0])
        ]
        print(json.dumps([step, *both]))
"""


def test_what_the_search_compiles_is_what_it_times() -> None:
    """To the key in Triton's cache: else each candidate would be compiled once more, alone, while the GPU waits."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 14
    for step, listed, launched in rows:
        assert listed == launched, step


def test_what_bench_does_not_know_it_hands_on(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.machine, "describe", lambda device: {"device": "A GPU"})
    monkeypatch.setattr(gpu, "bench", lambda *given: given)
    options = ["--results", str(tmp_path), "--seconds", "9"]
    given = gpu.main(["bench", *options, "--work", "16384", "--provider", "eager"])
    assert given == (tmp_path / "a-gpu.json", 9.0, gpu.PATIENCE, ["--work", "16384", "--provider", "eager"])
    with pytest.raises(SystemExit):
        gpu.main(["tune", *options, "--work", "16384"])
    assert "unrecognized arguments: --work 16384" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mmd", "langevin", "perceptual", "nearest"])
def test_small_calls(gpu: ModuleType, family: str) -> None:
    assert gpu.small(family) == 0


@pytest.mark.gpu
def test_timings_on_the_gpu(gpu: ModuleType, tmp_path: Path) -> None:
    from benchmarks.__main__ import measure

    out = tmp_path / "a.json"
    assert measure(["mmd", "--device", "cuda", "--quick", "--provider", "fastgen", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows
    assert all(row["status"] == "ok" and row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
