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
from fastgen.kernels import nearest_launch as launch

from fastgen import functional as F
from fastgen.ops import backend


def assert_proved(found: launch.Found, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What the bound calls proved is right to the bit."""
    proved = ~found.open
    assert torch.equal(found.index[proved], expected[1][proved, 0])
    assert torch.equal(found.distance[proved], expected[0][proved, 0])
    assert found.status.tolist() == [0, 0, int(found.open.sum())]


# (N, M, D): less than a tile; several splits of several tiles; a width that is read again for each tile
@pytest.mark.parametrize(("n", "m", "d"), [(3, 5, 1), (9, 2500, 7), (7, 700, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_oracle(n: int, m: int, d: int, dtype: torch.dtype, oracle: ModuleType) -> None:
    query, database = torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype)
    found = launch.search(query, database, None)
    assert_proved(found, oracle.nearest(query, database))
    assert not found.open.any()


def test_several_splits_and_tiles_of_queries(oracle: ModuleType) -> None:
    query, database = torch.randn(131, 3), torch.randn(2500, 3)
    assert launch.splits(131, 2500) == (2, 10)
    found = launch.search(query.T.contiguous().T, database, None)
    assert_proved(found, oracle.nearest(query, database))
    assert found.open.float().mean() < 0.1


def test_ties_between_tiles_and_splits(oracle: ModuleType) -> None:
    """A tie over more tiles than are kept is open, never a wrong id."""
    query, database = torch.randint(-2, 3, (9, 4)).float(), torch.randint(-2, 3, (1500, 4)).float()
    expected = oracle.nearest(query, database)
    assert_proved(launch.search(query, database, None), expected)
    few = launch.search(query, database[:400], None)
    assert_proved(few, oracle.nearest(query, database[:400]))
    assert not few.open.any()
    with backend.force("triton"):
        assert torch.equal(F.nearest(query, database).index, expected[1])


@pytest.mark.parametrize(("m", "opened"), [(500, False), (1500, True)])
def test_near_ties_within_the_rounding(m: int, opened: bool, oracle: ModuleType) -> None:
    """Rows on half a sphere about the queries: float16 products cannot tell them apart, and the bound must say so."""
    away = torch.nn.functional.normalize(torch.randn(m, 16).abs(), dim=1)
    query, database = 1e-7 * torch.randn(8, 16), away * (1 + 1e-6 * torch.rand(m, 1))
    found, expected = launch.search(query, database, None), oracle.nearest(query, database)
    assert_proved(found, expected)
    assert found.open.all() if opened else not found.open.any()
    with backend.force("triton"):
        assert torch.equal(F.nearest(query, database).index, expected[1])


@pytest.mark.parametrize("scale", [1e16, 1.0, 1e-10, 1e-22])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_scales_and_offsets(scale: float, shift: float, oracle: ModuleType) -> None:
    query, database = (scale * (shift + torch.randn(n, 5)) for n in (6, 800))
    found = launch.search(query, database, None)
    assert_proved(found, oracle.nearest(query, database))
    if scale > 1e-20:
        assert not found.open.any()


def test_mask_hides_non_finite_rows(oracle: ModuleType) -> None:
    query, database = torch.randn(6, 5), torch.randn(900, 5)
    mask = torch.rand(900) > 0.5
    hidden = database.masked_fill(~mask[:, None], torch.nan)
    assert_proved(launch.search(query, hidden, mask), oracle.nearest(query, database, 1, mask))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_points_are_refused(bad: float) -> None:
    points, spoilt = torch.randn(5, 3), torch.randn(5, 3).index_fill(0, torch.tensor([2]), bad)
    with backend.force("triton"):
        with pytest.raises(ValueError, match="query: expected finite values, got NaN or infinity in row 2"):
            F.nearest(spoilt, points)
        with pytest.raises(ValueError, match="database: expected finite values, got NaN or infinity in row 2"):
            F.nearest(points, spoilt)
        with pytest.raises(ValueError, match="within float32"):
            F.nearest(points, points + 1e20)


def test_what_the_kernels_do_not_take_is_the_same_answer(oracle: ModuleType) -> None:
    query, database = torch.randn(5, 3), torch.randn(300, 3)
    masks = torch.rand(5, 300) > 0.5
    assert not launch.fits(query.double(), None)
    assert not launch.fits(query, masks)
    with backend.force("triton"):
        for points, rows, k, mask, radius in (
            (query.double(), database.double(), 1, None, None),
            (query, database, 1, masks, None),
            (query, database, 3, None, None),
            (query, database, 1, None, 0.5),
        ):
            got = F.nearest(points, rows, k, mask=mask, exclude_radius=radius)
            assert torch.equal(got.index, oracle.nearest(points, rows, k, mask, radius)[1])


def aot(*arguments: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastgen.kernels.aot", "nearest", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).resolve().parents[2]
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.stderr[-2000:], [row for row in rows if "error" in row])
    return rows


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict[str, Any]]:
    targets = [f"--target={target}" for target in ("sm_80", "sm_90", "sm_100")]
    return {(row["kernel"].split()[0], row["target"]): row for row in aot(*targets)}


def test_compiles_for_every_target(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    targets = ("sm_80", "sm_90", "sm_100")
    assert set(compiled) == {(kernel, target) for kernel in ("filter", "rank", "pack") for target in targets}
    for (_, target), row in compiled.items():
        assert target != "sm_90" or row["stack"] == 0
        assert row["shared"] <= {"sm_80": 163, "sm_90": 227, "sm_100": 227}[target] * 1024


def test_every_configuration_fits_a_cdna_3() -> None:
    rows = aot("--all", "--target=gfx942")
    assert {row["kernel"] for row in rows} == {spec.name for spec in launch.specs()}
    assert all(row["shared"] <= 64 * 1024 for row in rows), rows


def test_machine_code_on_sm_90(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    opcodes = compiled["filter", "sm_90"]["opcodes"]
    pairs = 128 * 128 // 256  # of one thread in one step
    assert opcodes["HGMMA"] == 128 // 16
    assert pairs <= opcodes["FMNMX"] <= pairs + 8
    assert opcodes["FADD"] == pairs
    assert sum(opcodes.values()) < 12 * pairs
    rank = compiled["rank", "sm_90"]["opcodes"]
    assert "DFMA" not in rank  # products and sums round apart: the order is the definition
    assert rank["DMUL"] >= 8
    for kernel in ("filter", "rank", "pack"):
        assert not {"ATOM", "ATOMG", "RED"} & set(compiled[kernel, "sm_90"]["opcodes"])


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1000, 20_000, 64), (3000, 5001, 129), (50, 100_003, 800)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_kernels(n: int, m: int, d: int, dtype: torch.dtype, oracle: ModuleType) -> None:
    query, database = torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype)
    found = launch.search(query.cuda(), database.cuda(), None)
    assert_proved(launch.Found(*(x.cpu() for x in found)), oracle.nearest(query, database))
    assert found.open.float().mean() < 0.01
