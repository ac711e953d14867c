"""The Triton kernels' formulas over their whole range, their launch table, their machine code on sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastgen.kernels import mmd_kernels, mmd_launch, mmd_slab, mmd_units

from fastgen.ops.mmd import inverse_pairs


@triton.jit
def _evaluated(
    u_ptr, out_ptr, parameters, KIND: tl.constexpr, FORM: tl.constexpr, COUNT: tl.constexpr, SECOND: tl.constexpr
) -> None:
    place = tl.arange(0, COUNT)
    u = tl.load(u_ptr + place)
    if KIND <= mmd_kernels.IMQ:
        u += 1.0
    k, w = mmd_kernels._evaluate(u, parameters, KIND, FORM, False)
    tl.store(out_ptr + place, k)
    tl.store(out_ptr + COUNT + place, w)
    if SECOND:
        tl.store(out_ptr + 2 * COUNT + place, mmd_slab._bend(u, parameters, KIND, FORM, False))


WAE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
FORMULAS = {
    "imq": lambda d2, c: c / (c + d2),
    "rbf": lambda d2, g: torch.exp(-g * d2),
    "laplacian": lambda d2, g: torch.exp(-g * d2.sqrt()),
    "rational_quadratic": lambda d2, alpha: torch.exp(-alpha * torch.log1p(d2 / (2 * alpha))),
}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("imq", (2.0,)),
        ("imq", (3.0, 1.0)),
        ("imq", (0.3, 1.0, 4.0)),
        ("imq", WAE),
        ("imq", (1.0, 1.0, 1.0, 1.0, 7.0, 7.0)),  # a group of five would be one too many
        ("imq", tuple(1.7**i for i in range(9))),  # two groups of four
        ("imq", (1e-6, 1e-5, 1.0, 1e5, 1e6)),  # whose product is too small for one
        ("rbf", (0.5,)),
        ("rbf", (4.0, 1.0, 0.25, 16.0, 64.0)),
        ("rbf", (1.0, 2.0, 4.0, 8.0, 3.0, 6.0)),
        ("rbf", (1e-12, 1.0, 1e12)),
        ("laplacian", (0.5, 1.0, 2.0, 4.0, 8.0, 5.0)),
        ("rational_quadratic", (0.2, 0.5, 1.0, 2.0, 5.0)),
        ("rational_quadratic", (30.0, 1e3)),
        ("rational_quadratic", (1e4, 1e6, 1e9)),
    ],
)
def test_the_kernels_over_their_whole_range(kind: str, values: tuple[float, ...]) -> None:
    """k, −dk/du and d²k/du² in float32 from u = 0 to 1e30 and at infinity; float64 says what they are."""
    pairs = inverse_pairs(values) if kind == "imq" else None
    second = kind != "laplacian" and pairs is None
    parameters = (1.0, *values) if kind == "rational_quadratic" else values
    name, base, units, form, slope = mmd_units.in_units(kind, parameters, pairs, second)
    u = torch.cat([torch.zeros(1), torch.logspace(-9, 30, 3000), torch.rand(1092) * 5, torch.full((3,), float("inf"))])
    got = torch.zeros(3, 4096)
    _evaluated[(1,)](u, got, units, KIND=mmd_kernels.KINDS[name], FORM=form, COUNT=4096, SECOND=second)
    d2 = (u[:-3].double() * base).requires_grad_()
    value = sum(FORMULAS[kind](d2, v) for v in values)
    (first,) = torch.autograd.grad(value.sum(), d2, create_graph=True)
    (bend,) = torch.autograd.grad(first.sum(), d2)
    wanted = (value, first * (-base / slope), bend * (base / slope) ** 2)
    bounds = (4e-7, 6e-7 if pairs is None else 1.7e-6, 8e-7)
    for i, want in enumerate(wanted[: 2 + second]):
        error, want = (got[i, :-3].double() - want.detach()).abs(), want.detach().abs()
        scale = want.max()
        if kind == "laplacian" and i:  # whose slope has no bound near zero, and no digits far out
            near = (u[:-3] > 0) & (u[:-3] < 30)
            error, scale = error[near], want[near]
        worst = float((error / scale).max())
        assert worst <= bounds[i], (i, worst)
        assert not got[i, -3:].any()
    got.fill_(1.0)
    _evaluated[(1,)](u * float("nan"), got, units, KIND=mmd_kernels.KINDS[name], FORM=form, COUNT=4096, SECOND=second)
    assert got[: 2 + second].isnan().all()


def test_which_exponentials_are_squares() -> None:
    squarings = mmd_units.squarings
    assert squarings((1.0, 4.0, 16.0, 64.0, 256.0)) == (0, 2, 0, 2, 0)
    assert squarings((1.0, 2.0, 4.0, 8.0, 16.0, 32.0)) == (0, 1, 1, 0, 1, 1)
    assert squarings((1.0, 2.1, 8.4, 8.4)) == (0, 0, 2, 0)


def test_the_launch_table_keeps_tiles_whole() -> None:
    for dp in (16, 32, 64, 128, 256, 4096):
        for kernel in ("grad", "value", "slope", "pull"):
            for kind in ("imq", "rational_quadratic"):
                for on in ("sm_80", "sm_90", "sm_100", "gfx942"):
                    blocks = mmd_launch.blocks(kernel, dp, kind, "bf16x6", on)
                    assert blocks["BLOCK_M"] == mmd_launch.ROWS
                    assert (dp if kernel == "pull" else mmd_launch.ROWS) % blocks["BLOCK_N"] == 0
    single, double = torch.float32, torch.float64
    fits = mmd_launch.fits
    assert [fits(single, "rbf", [1.0]), fits(double, "rbf", [1.0]), fits(single, "energy", [])] == [True, False, True]
    assert [fits(single, k, p, second=True) for k, p in (("rbf", [1.0]), ("laplacian", [1.0]))] == [True, False]
    assert [fits(single, "polynomial", [p, 1.0, 1.0]) for p in (16.0, 17.0)] == [True, False]


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
    kernels = ("grad", "value", "pack", "slope", "pull", "small")
    assert set(compiled) == {(kernel, target) for kernel in kernels for target in targets}
    for (kernel, target), row in compiled.items():
        assert row["shared"] <= (64 if target == "gfx942" else 163) * 1024, (kernel, target)


@pytest.mark.parametrize(
    ("kernel", "columns", "products"),
    # Four bf16 products of 16 coordinates an instruction, three of 16 columns for the gradient, and one of the norms;
    # slabs take three, 64 coordinates at a time, and have their norms apart.
    [("grad", 32, 4 * 64 // 16 + 1 + 3 * 32 // 16), ("value", 64, 4 * 64 // 16 + 1), ("slope", 64, 3 * 64 // 16)],
)
def test_machine_code_on_sm_90(
    compiled: dict[tuple[str, str], dict[str, Any]], kernel: str, columns: int, products: int
) -> None:
    row = compiled[kernel, "sm_90"]
    opcodes = row["opcodes"]
    assert row["stack"] == 0
    assert row["shared"] <= 227 * 1024
    assert opcodes["HGMMA"] == products
    pairs = 128 * columns // 256  # of one thread in one step
    # Two reciprocals a pair, and again where a tile does not count for the value; the estimator's few float64 divisions
    # stand outside the loop.
    ways = 2 if kernel == "grad" else 1
    assert 2 * ways * pairs <= opcodes["MUFU"] <= 2 * ways * pairs + 6
    if kernel != "slope":  # which splits its own rows too
        # 25 of a pair that counts and 13 more where it does not, and the gradient's own at the end.
        assert sum(opcodes[name] for name in ("FFMA", "FMUL", "FADD")) <= (48 if kernel == "grad" else 16) * pairs
    if kernel == "grad":  # two programs on a multiprocessor, and nothing goes back to shared memory within the loop
        assert row["registers"] <= 128
        assert row["shared"] <= 113 * 1024
        assert opcodes["LDGSTS"] > 0
    assert "ATOM" not in opcodes
    assert "RED" not in opcodes


CODE = """
import json
from fastgen.kernels import aot, mmd_specs

specs = {spec.name: spec for spec in mmd_specs.specs()}
for name in ("grad imq D=64 bf16x3", "grad rbf D=64 bf16x3", "bend imq D=64 bf16x3"):
    print(json.dumps(aot.check(specs[name], "sm_90")))
for name in ("grad imq_pairs D=64 tf32x3 sm_80", "value imq_pairs D=64 tf32x3 sm_80", "bend imq D=64 bf16x3 sm_80"):
    print(json.dumps(aot.check(specs[name], "sm_80")))
"""


def test_reciprocals_and_exponentials_are_shared() -> None:
    """Seven scales that are no pairs take three reciprocals a pair, RBF's default ladder of five three exponentials;
    the Hessian's product of those scales takes no more. On Ampere what needs most registers is in smaller blocks."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["stack"] for row in rows if row["stack"] > 8] == []  # Triton 3.6 keeps two registers of one there
    assert len(rows) == 6
    for row in rows[:3]:
        pairs = 128 * 32 // 256
        assert 3 * pairs <= row["opcodes"]["MUFU"] <= 3 * pairs + 6, row["kernel"]


def test_the_slabs_product_on_sm_90(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    row = compiled["pull", "sm_90"]
    assert row["stack"] == 0
    assert row["opcodes"]["HGMMA"] == 3 * (32 // 16)
    assert "MUFU" not in row["opcodes"]
