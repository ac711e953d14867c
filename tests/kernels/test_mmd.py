"""The Triton kernels: their meaning under the interpreter, their machine code by ahead-of-time compilation."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fastgen.kernels import launch

from fastgen.ops.mmd import inverse_pairs

KERNELS = {
    "imq_pairs": ("imq", [s * 9.0 for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]),
    "imq": ("imq", [0.9, 3.0, 20.0]),
    "rbf": ("rbf", [0.01, 0.1, 1.0]),
    "rational_quadratic": ("rational_quadratic", [2.0, 0.2, 1.0, 5.0]),
}


def run(x: torch.Tensor, y: torch.Tensor, name: str, estimator: str, sides: int) -> tuple[torch.Tensor, ...]:
    kind, parameters = KERNELS[name]
    pairs = inverse_pairs(parameters) if kind == "imq" else None
    assert (pairs is not None) == (name == "imq_pairs")
    return launch.mmd(x, y, kind, parameters, pairs, estimator, "ieee", sides)


# (N, M, D): less than a tile, one tile and one more, two tiles of X, D below the least and no power of two
@pytest.mark.parametrize(("n", "m", "d"), [(5, 3, 1), (128, 129, 16), (140, 130, 33)])
@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u_statistic"])
@pytest.mark.parametrize("name", KERNELS)
def test_against_the_oracle(name: str, estimator: str, n: int, m: int, d: int, oracle: ModuleType) -> None:
    kind, parameters = KERNELS[name]
    x, y = torch.randn(n, d), torch.randn(n if estimator == "u_statistic" else m, d) * 1.2 + 0.3
    value, gx, gy = oracle.mmd(x, y, kind, tuple(parameters), estimator)
    for sides in (0, 1, 2):
        got = run(x, y, name, estimator, sides)
        assert [g.dtype for g in got] == [torch.float32] * (sides + 1)
        assert abs(float(got[0]) - float(value)) <= 4e-7 * len(parameters), sides
        for g, want in zip(got[1:], (gx, gy), strict=False):
            assert (g.double() - want).norm() <= 5e-6 * want.norm(), sides


def test_batches_and_dtypes(oracle: ModuleType) -> None:
    x, y = torch.randn(3, 20, 6).bfloat16(), torch.randn(3, 33, 6).bfloat16()
    value, gx, gy = oracle.mmd(x, y, *KERNELS["imq_pairs"], "unbiased")
    got = run(x.mT.contiguous().mT, y, "imq_pairs", "unbiased", 2)
    assert got[0].shape == (3,)
    assert (got[0] - value).abs().max() < 1e-6
    for g, want in zip(got[1:], (gx, gy), strict=True):
        assert (g.double() - want).norm() <= 5e-6 * want.norm()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_points_give_nan(name: str, bad: float) -> None:
    for where in (0, 1):
        for row in (0, 7):
            pair = [torch.randn(20, 3), torch.randn(22, 3)]
            pair[where][row, 1] = bad
            assert run(*pair, name, "unbiased", 0)[0].isnan(), (where, row)
            value, gx = run(*pair, name, "unbiased", 1)
            assert value.isnan()
            assert gx.isnan().any()


def test_points_out_of_reach_vanish() -> None:
    x, y = torch.randn(10, 2), torch.randn(12, 2) + 1e12
    for name in KERNELS:
        within_x = run(x, x[:2], name, "unbiased", 0)[0]
        assert within_x.isfinite()
        value, gx = run(x, y, name, "unbiased", 1)
        assert value.isfinite()
        assert gx.isfinite().all()


def test_the_same_bits_every_time() -> None:
    x, y = torch.randn(140, 5), torch.randn(9, 5)
    first, second = (run(x, y, "imq_pairs", "unbiased", 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_launch_table_keeps_tiles_whole() -> None:
    for dp in (16, 32, 64, 128):
        for kernel in ("grad", "value"):
            blocks = launch.mmd_blocks(kernel, dp)
            assert blocks["BLOCK_M"] == launch.MMD_ROWS
            assert launch.MMD_ROWS % blocks["BLOCK_N"] == 0
    fits = [launch.mmd_fits(torch.empty(2, d, dtype=t)) for d in (128, 129) for t in (torch.float32, torch.float64)]
    assert fits == [True, False, False, False]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgen.kernels.aot", "mmd"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).resolve().parents[2]
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.stderr[-2000:], [row for row in rows if "error" in row])
    return {(row["kernel"].split()[0], row["target"]): row for row in rows}


def test_compiles_for_every_target(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    assert set(compiled) == {(kernel, target) for kernel in ("grad", "value", "pack") for target in targets}


@pytest.mark.parametrize(("kernel", "columns", "products"), [("grad", 32, 2), ("value", 64, 1)])
def test_machine_code_on_sm_90(
    compiled: dict[tuple[str, str], dict[str, Any]], kernel: str, columns: int, products: int
) -> None:
    row = compiled[kernel, "sm_90"]
    opcodes = row["opcodes"]
    assert row["stack"] == 0
    assert row["shared"] <= 227 * 1024
    # Three bf16 products of 16 coordinates, or of 16 columns, an instruction.
    assert opcodes["HGMMA"] == 3 * (64 // 16) + (3 * (columns // 16) if products == 2 else 0)
    pairs = 128 * columns // 256  # of one thread in one step
    # Two reciprocals a pair; the estimator's few float64 divisions stand outside the loop.
    assert 2 * pairs <= opcodes["MUFU"] <= 2 * pairs + 6
    assert sum(opcodes[name] for name in ("FFMA", "FMUL", "FADD")) <= 45 * pairs
    assert "ATOM" not in opcodes
    assert "RED" not in opcodes
