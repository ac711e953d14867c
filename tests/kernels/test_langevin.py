"""The Triton kernel: the reference's bits under the interpreter, and what the compiler makes of it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.ops import langevin as ops
from fastgen.reference import langevin as reference

pytest.importorskip("triton")

INF = float("inf")
ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from fastgen.kernels import langevin

    return langevin


def noise(kernels: ModuleType, shape: tuple[int, ...], chain_id: Tensor | None, **given: Any) -> Tensor:
    out = torch.full(shape, float("nan"))
    tensors = given.get("seed_tensor"), given.get("step_tensor")
    kernels.noise_(out, chain_id, *tensors, given.get("seed", 0), given.get("step", 0), given.get("table"))
    return out


@interpreted
@pytest.mark.parametrize("key", reference.KNOWN_ANSWERS)
def test_known_answers(kernels: ModuleType, key: tuple[int, int, int]) -> None:
    seed, step, chain = key
    signed = seed - 2**64 if seed >= 2**63 else seed
    found = noise(kernels, (1, 8), torch.tensor([chain]), seed=signed, step=step)
    bits = " ".join(f"{int(b) & 0xFFFFFFFF:08x}" for b in found.view(torch.int32).flatten())
    assert bits == reference.KNOWN_ANSWERS[key][1]


# Every way that chains lie in programs: (elements, table), one chain a program and many, whole groups and not.
@interpreted
@pytest.mark.parametrize(
    ("shape", "table"),
    [
        ((2, 8192), (2048, True)), ((2, 8192), (2048, False)), ((3, 5003), (1024, True)), ((3, 5003), (2048, False)),
        ((900, 7), None), ((5, 1), None), ((130, 64), None), ((300, 4), (64, False)), ((2, 3072), None),
        ((1, 784), None),
    ],
)  # fmt: skip
def test_normals_are_the_references_bits(
    kernels: ModuleType, shape: tuple[int, int], table: tuple[int, bool] | None
) -> None:
    for chain_id in (None, torch.randint(2**62, (shape[0],))):
        expected = reference.normals(shape[1], torch.arange(shape[0]) if chain_id is None else chain_id, 2**64 - 3, 7)
        assert torch.equal(noise(kernels, shape, chain_id, seed=-3, step=7, table=table), expected)


@interpreted
def test_seed_and_step_may_lie_on_the_device(kernels: ModuleType) -> None:
    expected = noise(kernels, (2, 64), None, seed=-(2**63) + 5, step=9)
    found = noise(
        kernels, (2, 64), None, seed_tensor=torch.tensor(-(2**63) + 5), step_tensor=torch.tensor(9 + 3 * 2**28)
    )
    assert torch.equal(found, expected)
    assert torch.equal(expected, reference.normals(64, torch.arange(2), 2**63 + 5, 9))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"precision": 4.0, "low": -0.5, "high": 0.25},
    {"noise_scale": 0.0, "precision": 1 / 0.3**2},
    {"grad_clip": 0.3, "low": -0.7, "noise_first": True},
    {"step_size": "chain", "noise_scale": "chain", "lookahead": 0.37, "grad_clip": 1.0, "precision": 0.1},
]


@interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_updates_are_the_references_bits(kernels: ModuleType, dtype: torch.dtype, options: dict[str, Any]) -> None:
    for shape, table in (((41, 7), None), ((2, 1024), None), ((1, 4099), (2048, True))):
        x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        x.view(-1)[3], grad.view(-1)[-2] = float("nan"), float("nan")
        chosen: dict[str, Any] = {
            "step_size": 0.013, "noise_scale": 0.11, "precision": 0.0, "grad_clip": INF, "low": -INF, "high": INF,
            "lookahead": 0.0, "noise_first": False, **options,
        }  # fmt: skip
        per_chain: list[Tensor | None] = [None, None]
        for i, name in enumerate(("step_size", "noise_scale")):
            if chosen[name] == "chain":
                compute = ops.compute_dtype(dtype)
                chosen[name], per_chain[i] = 0.0, torch.linspace(0.01, 0.4, len(x), dtype=compute) * (i + 1)
        ahead = torch.zeros_like(x) if "lookahead" in options else None
        state = x.clone()
        kernels.step_(state, grad, ahead, None, None, *per_chain, None, None, *chosen.values(), 99, 5, table)

        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        expected, expected_ahead = x.to(wide), torch.zeros_like(x, dtype=wide)
        scalars = {name: chosen[name] for name in ("precision", "grad_clip", "low", "high", "noise_first")}
        reference.step_(
            expected,
            grad.to(wide),
            torch.arange(len(x)),
            chosen["step_size"] if per_chain[0] is None else per_chain[0],
            chosen["noise_scale"] if per_chain[1] is None else per_chain[1],
            **scalars,
            seed=99,
            step=5,
            lookahead=chosen["lookahead"],
            lookahead_out=None if ahead is None else expected_ahead,
        )
        for got, want in ((state, expected), (ahead, expected_ahead)):
            if got is None:
                continue
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(), want.to(dtype).nan_to_num())
        assert state.isnan().sum() == 2


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("shape", "noise_first"), [((5, 7), True), ((2, 1027), False), ((1, 9000), True)])
def test_statistics_are_the_references(
    kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, int], noise_first: bool
) -> None:
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x[0, 3], grad[-1, 5] = float("nan"), INF
    scalars = (0.4, 0.3, 0.5, INF, -0.8, 1.0, 0.0, noise_first, 99, 5)
    state, plain, expected = x.clone(), x.clone(), x.clone()
    found, wanted = torch.zeros(shape[0], 3, dtype=torch.float64), torch.zeros(shape[0], 3, dtype=torch.float64)
    kernels.step_(state, grad, None, found, None, None, None, None, None, *scalars)
    kernels.step_(plain, grad, None, None, None, None, None, None, None, *scalars)
    reference.step_(expected, grad, torch.arange(shape[0]), *scalars[:6], noise_first, 99, 5, stats=wanted)
    assert torch.equal(state.nan_to_num(), plain.nan_to_num())
    assert torch.equal(state.nan_to_num(), expected.nan_to_num())
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0, equal_nan=True)
    assert found[0, 2] >= 1
    assert found[-1, 0] == INF


@interpreted
def test_statistics_count_what_overflows_as_stored(kernels: ModuleType) -> None:
    x, grad = torch.full((2, 6), 60000.0).half(), torch.zeros(2, 6).half()
    grad[1, 2:5] = -20000.0  # 70000 is finite until it is rounded to float16
    found = torch.zeros(2, 3, dtype=torch.float64)
    scalars = (0.5, 0.0, 0.0, INF, -INF, INF, 0.0, False, 99, 5)
    kernels.step_(x, grad, None, found, None, None, None, None, None, *scalars)
    assert found[:, 2].tolist() == [0, 3]
    assert x.isinf().sum(1).tolist() == [0, 3]


@interpreted
@pytest.mark.parametrize("shape", [(3, 1), (70, 4), (2, 5003)])
def test_raw_words(kernels: ModuleType, shape: tuple[int, int]) -> None:
    out = torch.zeros(shape, dtype=torch.int32)
    for step_tensor in (None, torch.tensor(8 + 2**28)):
        kernels.noise_(out, None, None, step_tensor, 5, 8, purpose=3)
        expected = reference.words(shape[1], torch.arange(shape[0]), 5, 8, 3).flatten(1)[:, : shape[1]]
        assert torch.equal(out.long() % 2**32, expected)


def test_table_wastes_at_most_an_eighth_of_a_long_chain() -> None:
    from fastgen.kernels import launch

    assert launch.langevin(3 * 32 * 32) == (256, True)
    assert launch.langevin(3 * 64 * 64) == (512, True)
    assert launch.langevin(64) == (256, False)
    for elements in range(1, 20000, 37):
        groups, one_chain = launch.langevin(elements)
        padded = -(-elements // (4 * groups)) * 4 * groups
        assert not one_chain or padded <= elements * 9 / 8


MORE = """
import json
from fastgen.kernels import aot, langevin
for spec in langevin.aot_specs():
    if spec.name.startswith("step") or spec.name == "accept_copy_fp32":
        print(json.dumps(aot.check(spec, "sm_90")))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment}
    done = subprocess.run([sys.executable, "-m", "fastgen.kernels.aot", "langevin"], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    more = subprocess.run([sys.executable, "-c", MORE], **run)  # type: ignore[call-overload]
    assert more.returncode == 0, more.stdout + more.stderr
    rows = map(json.loads, (done.stdout + more.stdout).splitlines())
    return {f"{row['kernel']} {row['target']}": row for row in rows}


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_ahead_of_time(compiled: dict[str, dict[str, Any]], target: str) -> None:
    assert compiled[f"step_fp32 {target}"]["shared"] == 0
    for name in ("accept_whole_fp32", "accept_sums_fp32"):
        assert compiled[f"{name} {target}"]["shared"] <= 64


def test_machine_code_for_hopper(compiled: dict[str, dict[str, Any]]) -> None:
    row = compiled["step_fp32 sm_90"]
    opcodes, elements = row["opcodes"], 8  # a thread's: 1024 in a program of 128 threads
    assert row["stack"] == 0
    assert row["registers"] <= 64
    # All of global memory goes in 16 bytes: 2 loads each of x and grad, 2 stores.
    assert opcodes["LDG"] + opcodes["STG"] == row["wide_accesses"] == 6
    # The polynomials and the update hold no fused multiply-add: √, correctly rounded, takes two for each pair of
    # normals and three in its shared slow path.
    assert opcodes["FFMA"] == 2 * elements // 2 + 3
    # Two 64-bit products a round for each four normals; an XOR of three words is one instruction.
    assert opcodes["IMAD"] <= 2 * 10 * elements // 4 + 16
    executed = sum(count for name, count in opcodes.items() if name != "NOP")
    assert executed / elements <= 76


@pytest.mark.parametrize("kind", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["step", "step_short", "step_stats"])
def test_one_load_of_each_and_one_store(compiled: dict[str, dict[str, Any]], layout: str, kind: str) -> None:
    """Chains longer than a program, chains put together, and sums over a chain; in 16 bytes, whatever the type."""
    row, size = compiled[f"{layout}_{kind} sm_90"], {"fp64": 8, "fp32": 4}.get(kind, 2)
    assert row["stack"] == 0
    # Where a thread's 16 bytes are not four elements, they change places by way of shared memory.
    assert row["shared"] <= (64 if kind == "fp32" else 8192)
    assert row["registers"] <= 128
    # 8 elements a thread: x, its gradient, the new x.
    assert row["wide_accesses"] == 3 * 8 * size // 16
    partial = 3 if layout == "step_stats" else 0  # one number each a program
    assert row["opcodes"]["LDG"] + row["opcodes"]["STG"] == row["wide_accesses"] + partial


def test_nothing_spills(compiled: dict[str, dict[str, Any]]) -> None:
    assert all(row["stack"] == 0 for row in compiled.values() if row["target"].startswith("sm_"))


def test_acceptance_for_hopper(compiled: dict[str, dict[str, Any]]) -> None:
    for name, wide in (("accept_whole_fp32", 24), ("accept_sums_fp32", 16), ("accept_copy_fp32", 16)):
        row = compiled[f"{name} sm_90"]
        assert row["stack"] == 0
        assert row["shared"] <= 64
        # 16 elements a thread: x, grad, y, y_grad read and x, grad written; the sums' reads alone; the copies'.
        assert row["wide_accesses"] == wide


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 1), (1000, 7), (64, 3, 32, 32), (3, 5003), (7, 64), (2, 3, 224, 224)])
def test_compiled_bits_on_a_gpu(kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from fastgen import functional as F

    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    options: dict[str, Any] = {
        "step_size": 0.01, "noise_scale": 0.1, "prior_scale": 0.4, "grad_clip": 1.5, "clamp": (-1.0, 1.0),
        "seed": 2**63 + 9,
    }  # fmt: skip
    chain_id = torch.randint(2**62, (shape[0],))
    for extra in ({}, {"noise_first": True}, {"chain_id": chain_id}, {"noise_scale": 0.0}):
        on_cpu = F.langevin_step_(x.clone(), grad, step=3, **options | extra)
        moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in extra.items()}
        on_gpu = F.langevin_step_(x.cuda(), grad.cuda(), step=3, **options | moved)
        assert torch.equal(on_gpu.cpu(), on_cpu)
    expected = reference.normals(x[0].numel(), torch.arange(shape[0]), 2**63 + 9, 3).view(shape).to(dtype)
    assert torch.equal(F.langevin_noise(x.cuda(), seed=2**63 + 9, step=3).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
def test_a_cuda_graph_advances_its_step() -> None:
    from fastgen import functional as F

    x, step = torch.randn(16, 3072, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    start = x.clone()

    def once() -> None:
        F.langevin_step_(x, x.sin(), step_size=0.01, seed=4, step=step)
        step.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # `start` is a copy of x before the first step
    with torch.cuda.stream(side):
        once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    x.copy_(start)
    step.zero_()
    for _ in range(3):
        graph.replay()
    for k in range(3):
        F.langevin_step_(start, start.sin(), step_size=0.01, seed=4, step=k)
    assert torch.equal(x, start)


def test_rows_are_counted_in_64_bits_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("fastgen.kernels.langevin")
    constants, flags = kernel._constants, kernel._NOISE_ALONE
    assert [constants(flags, torch.float32, n, 7, 64, False)["ROW"] for n in (2**30 - 1, 2**30)] == [
        kernel.tl.int32,
        kernel.tl.int64,
    ]
    few, many = torch.zeros(5, 7), torch.zeros(5, 7)
    kernel.noise_(few, None, None, None, 3, 5)
    monkeypatch.setattr(kernel, "_constants", lambda flags, dtype, _, *rest: constants(flags, dtype, 2**30, *rest))
    kernel.noise_(many, None, None, None, 3, 5)
    assert torch.equal(few, many)
