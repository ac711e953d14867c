"""The Triton epilogue: its meaning under the interpreter, its machine code by ahead-of-time compilation."""

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

from fastgen.ops import backend
from fastgen.ops import perceptual as ops

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
EPS = {"lpips": (1e-10, False), "torchmetrics": (1e-8, True)}
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def maps(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = torch.channels_last if last else torch.contiguous_format
    f0, f1 = (torch.randn(shape).relu().to(dtype).contiguous(memory_format=layout) for _ in "01")
    f0[0, :, 0, 0], f1[0, :, -1, -1] = 0, 0
    return f0, f1, torch.rand(shape[1]), torch.randn(shape[0])


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).norm()) <= tolerance * max(float(want.norm()), 0.1)


# less than a tile, a tile torn in pixels and in channels, widths of all three nets
@interpreted
@pytest.mark.parametrize("eps_mode", list(EPS))
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 64, 9, 9), (1, 192, 3, 7), (1, 512, 3, 4), (1, 1, 1, 1)], ids=str)
def test_lpips_layer(oracle: ModuleType, shape: tuple[int, ...], last: bool, eps_mode: str) -> None:
    f0, f1, weight, upstream = maps(shape, torch.float32, last)
    with backend.force("triton"):
        value = ops.lpips_layer(f0, f1, weight, *EPS[eps_mode])
        both = ops.lpips_layer_backward_both(upstream, f0, f1, weight, *EPS[eps_mode])
        one = ops.lpips_layer_backward(upstream, f0, f1, weight, *EPS[eps_mode])
        other = ops.lpips_layer_backward(upstream, f1, f0, weight, *EPS[eps_mode])
        zero = ops.lpips_layer(f0, f0.clone(), weight, *EPS[eps_mode])
        mixed = ops.lpips_layer(f0, f1.contiguous() if last else f1.mT.contiguous().mT, weight, *EPS[eps_mode])
    close(value, oracle.lpips_layer(f0, f1, weight, eps_mode), 1e-6)
    want = oracle.lpips_layer_gradients(f0, f1, weight, upstream, eps_mode)
    for got, expected in zip(both, want, strict=False):
        close(got, expected, 3e-6)
        assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert torch.equal(one, both[0])
    assert torch.equal(other, both[1])
    assert torch.equal(mixed, value)
    assert torch.equal(zero, torch.zeros(shape[0]))
    if eps_mode == "lpips":
        assert not both[0][0, :, 0, 0].any()


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_sum_in_float32(oracle: ModuleType, dtype: torch.dtype) -> None:
    f0, f1, weight, upstream = maps((2, 40, 4, 5), dtype, False)
    f0, f1 = f0 * 200, f1 * 200  # squares overflow float16
    with backend.force("triton"):
        value = ops.lpips_layer(f0, f1, weight, 1e-10, False)
        (grad,) = [ops.lpips_layer_backward(upstream, f0, f1, weight, 1e-10, False)]
        far = ops.feature_distance(f0, f1, True)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    close(value, oracle.lpips_layer(f0, f1, weight, "lpips"), 1e-6)
    close(grad * 200.0, 200 * oracle.lpips_layer_gradients(f0, f1, weight, upstream, "lpips")[0], 1e-2)
    close(far, oracle.feature_distance([f0], [f1], "l2", [1.0]), 1e-6)


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e19], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("eps_mode", list(EPS))
def test_not_finite(eps_mode: str, bad: float) -> None:
    f0, f1, weight, _ = maps((2, 9, 3, 3), torch.float32, False)
    f0[1, 4, 1, 2] = bad
    with backend.force("triton"):
        for a, b in ((f0, f1), (f1, f0)):
            value = ops.lpips_layer(a, b, weight, *EPS[eps_mode])
            assert value.isnan().tolist() == [False, True]
            grad = ops.lpips_layer_backward(torch.ones(2), a, b, weight, *EPS[eps_mode])
            assert grad[1, :, 1, 2].isnan().all()
            assert grad[0].isfinite().all()


@interpreted
@pytest.mark.parametrize("squared", [False, True], ids=["l1", "l2"])
@pytest.mark.parametrize("shape", [(2, 5), (3, 7, 5, 3), (2, 3, 50, 31), (0, 3)], ids=str)
def test_feature_distance(oracle: ModuleType, shape: tuple[int, ...], squared: bool) -> None:
    f0, f1, upstream = torch.randn(shape), torch.randn(shape), torch.randn(shape[0])
    if shape[0]:
        f0[0, 1], f1[0, 1] = 0.5, 0.5  # a tie
    before = f1.clone()
    with backend.force("triton"):
        value = ops.feature_distance(f0, f1, squared)
        grad = ops.feature_distance_backward(upstream, f0, f1, squared)
        f1.view(-1)[-1:] = torch.nan
        lost = ops.feature_distance_backward(upstream, f0, f1, squared)
        gone = ops.feature_distance(f0, f1, squared)
    f1 = before
    close(value, oracle.feature_distance([f0], [f1], "l2" if squared else "l1", [1.0]), 1e-6)
    difference = f0.double() - f1.double()
    slope = 2 * difference if squared else difference.sign()
    want = slope * upstream.double().reshape(-1, *[1] * (len(shape) - 1)) / (f0[0].numel() if shape[0] else 1)
    close(grad, want, 1e-6)
    assert gone.isnan().tolist() == [i == shape[0] - 1 for i in range(shape[0])]
    assert lost.isnan().sum() == min(shape[0], 1)


@interpreted
def test_what_does_not_fit_goes_to_the_reference() -> None:
    from fastgen.kernels import launch

    fits = [
        launch.lpips_fits(torch.empty(1, c, 1, 1, dtype=t)) for c in (2048, 2049) for t in (torch.half, torch.double)
    ]
    assert fits == [True, False, False, False]
    f0, f1 = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    with backend.force("triton"):
        got = ops.lpips_layer(f0, f1, torch.ones(3), 1e-10, False)
    assert torch.equal(got, ops.reference.lpips_layer(f0, f1, torch.ones(3), 1e-10, False))


def test_the_launch_table() -> None:
    from fastgen.kernels import launch

    for channels in (1, 3, 64, 128, 192, 256, 384, 512, 2048):
        blocks = launch.lpips_blocks(channels)
        assert blocks["BLOCK_C"] >= channels
        assert blocks["BLOCK_C"] * blocks["BLOCK_P"] <= launch.LPIPS_TILE
        assert channels > 512 or blocks["BLOCK_P"] >= 8  # a sector of 32 bytes of each channel's plane


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgen.kernels.aot", "perceptual"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, (done.stderr[-2000:], done.stdout[-2000:])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["kernel"].split()[0], row["target"]): row for row in rows}


def test_compiles_for_every_target(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    kernels = ("value", "grad", "l1", "scale", "project", "unproject")
    assert set(compiled) == {(kernel, target) for kernel in kernels for target in targets}


@pytest.mark.parametrize(("kernel", "accesses"), [("value", 16), ("grad", 24), ("scale", 8)])
def test_machine_code_for_hopper(compiled: dict[tuple[str, str], dict[str, Any]], kernel: str, accesses: int) -> None:
    row = compiled[kernel, "sm_90"]
    assert row["stack"] == 0
    assert row["shared"] <= 16 * 1024
    # 32 elements of each map a thread: 8 accesses of 16 bytes each to f0, f1 and (grad) what is written.
    assert row["wide_accesses"] == accesses
    assert "ATOM" not in row["opcodes"]
    assert "RED" not in row["opcodes"]


def test_the_projection_on_hopper(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    row = compiled["project", "sm_90"]
    assert row["stack"] == 0
    assert row["shared"] <= 16 * 1024
    assert not {"ATOM", "ATOMG", "RED"} & set(row["opcodes"])
    # Triton 3.6 gives a warp parts of four runs, later ones one run: its ten rounds of Philox are there once, beside 32
    # loads of a map and 32 of scales.
    assert 64 <= row["opcodes"]["LDG"] <= 72
    assert row["opcodes"]["IMAD"] < 500


def test_the_projection_s_gradient_on_hopper(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    row = compiled["unproject", "sm_90"]
    assert row["stack"] == 0
    assert row["shared"] <= 16 * 1024
    assert not {"ATOM", "ATOMG", "RED"} & set(row["opcodes"])


@pytest.mark.gpu
@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 33, 31), (3, 192, 13, 13), (2, 384, 7, 5), (2, 512, 8, 8)], ids=str)
def test_on_a_gpu(oracle: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    f0, f1, weight, upstream = maps(shape, dtype, last)
    g0, g1, w, u = (t.cuda() for t in (f0, f1, weight, upstream))
    with backend.force("reference"):
        want = ops.lpips_layer(f0.double(), f1.double(), weight.double(), 1e-10, False)
        grads = ops.lpips_layer_backward_both(
            upstream.double(), f0.double(), f1.double(), weight.double(), 1e-10, False
        )
        far = ops.feature_distance(f0.double(), f1.double(), False)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    close(ops.lpips_layer(g0, g1, w, 1e-10, False).cpu(), want, 1e-6)
    for got, expected in zip(ops.lpips_layer_backward_both(u, g0, g1, w, 1e-10, False), grads, strict=True):
        close(got.cpu(), expected, tolerance)
    assert torch.equal(ops.lpips_layer(g0, g0.clone(), w, 1e-10, False).cpu(), torch.zeros(shape[0]))
    with backend.force("reference"):
        sketch = ops.lpips_project(f0.double(), weight.double(), 300, 5, 1, 1e-10, False)
        pull = torch.randn(shape[0], 300)
        back = ops.lpips_project_backward(pull.double(), f0.double(), weight.double(), 5, 1, 1e-10, False)
    close(ops.lpips_project(g0, w, 300, 5, 1, 1e-10, False).cpu(), sketch, 1e-6)
    close(ops.lpips_project_backward(pull.cuda(), g0, w, 5, 1, 1e-10, False).cpu(), back, tolerance)
    close(ops.feature_distance(g0, g1, False).cpu(), far, 1e-6)


# runs of 64 pixels torn at the end, more than a tile of them, buckets that wrap, several blocks of buckets
@interpreted
@pytest.mark.parametrize("eps_mode", list(EPS))
@pytest.mark.parametrize(
    ("shape", "dim", "last"),
    [
        ((2, 5, 8, 17), 100, False),
        ((2, 5, 8, 17), 100, True),
        ((1, 3, 1, 1), 65, False),
        ((1, 9, 4, 16), 1500, False),
        ((0, 3, 2, 2), 64, False),
    ],
    ids=str,
)
def test_projection(oracle: ModuleType, shape: tuple[int, ...], dim: int, last: bool, eps_mode: str) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    f, weight = torch.randn(shape).relu().contiguous(memory_format=layout), torch.rand(shape[1])
    if shape[0]:
        f[0, :, 0, 0] = 0
    for seed, layer in ((0, 0), (2**64 - 3, 4), (0x90ABCDEF12345678, 1)):
        signed = seed - 2**64 if seed >= 2**63 else seed
        with backend.force("triton"):
            got = ops.lpips_project(f, weight, dim, signed, layer, *EPS[eps_mode])
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), oracle.projection(f, weight, dim, seed, layer, eps_mode), rtol=1e-5, atol=1e-6
        )
        cpu = ops.lpips_project(f, weight, dim, signed, layer, *EPS[eps_mode])
        torch.testing.assert_close(got, cpu, rtol=1e-5, atol=1e-6)
        upstream = torch.randn(shape[0], dim)
        with backend.force("triton"):
            back = ops.lpips_project_backward(upstream, f, weight, signed, layer, *EPS[eps_mode])
        assert back.stride() == f.stride()
        want = oracle.projection_gradient(f, weight, upstream, dim, seed, layer, eps_mode)
        torch.testing.assert_close(back.double(), want, rtol=1e-4, atol=1e-6)


@interpreted
def test_projection_of_half_types_and_of_nan() -> None:
    f, weight = torch.randn(2, 4, 5, 6), torch.rand(4)
    for dtype in (torch.bfloat16, torch.float16):
        g = (f * 200).to(dtype)  # squares overflow float16
        with backend.force("triton"):
            got = ops.lpips_project(g, weight, 64, 1, 0, 1e-10, False)
        torch.testing.assert_close(
            got, ops.lpips_project(g.float(), weight, 64, 1, 0, 1e-10, False), rtol=1e-5, atol=1e-6
        )
        upstream = torch.randn(2, 64)
        with backend.force("triton"):
            back = ops.lpips_project_backward(upstream, g, weight, 1, 0, 1e-10, False)
        assert back.dtype == dtype
        want = ops.lpips_project_backward(upstream, g.float(), weight, 1, 0, 1e-10, False)
        torch.testing.assert_close(back.float(), want, rtol=1e-2, atol=1e-6)
    f[1, 2, 3, 4] = torch.nan
    with backend.force("triton"):
        back = ops.lpips_project_backward(torch.randn(2, 64), f, weight, 1, 0, 1e-10, False)
        assert back.isnan().flatten(2).any(1).sum(1).tolist() == [0, 1]
        assert ops.lpips_project(f, weight, 64, 1, 0, 1e-10, False).isnan().any(1).tolist() == [False, True]
