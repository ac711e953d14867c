"""The Triton kernels: their meaning under the interpreter, their machine code by ahead-of-time compilation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fastgen.kernels import nearest_launch as launch
from fastgen.kernels import tuned

from fastgen import functional as F
from fastgen.ops import backend
from fastgen.reference import nearest as reference


def assert_proved(found: launch.Found, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What the bound calls proved is right to the bit."""
    proved = ~found.open
    assert torch.equal(found.index[proved], expected[1][proved, 0])
    assert torch.equal(found.distance[proved], expected[0][proved, 0])


# (N, M, D): less than a tile; parts of several tiles; resident in two blocks; widths that are read again for each tile
@pytest.mark.parametrize(("n", "m", "d"), [(3, 5, 1), (9, 2500, 7), (5, 300, 65), (7, 1100, 130), (3, 257, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_oracle(n: int, m: int, d: int, dtype: torch.dtype, oracle: ModuleType) -> None:
    query, database = torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype)
    found = launch.search(query, database, None)
    assert_proved(found, oracle.nearest(query, database))
    assert not found.open.any()


def test_several_splits_and_tiles_of_queries(oracle: ModuleType) -> None:
    query, database = torch.randn(131, 3), torch.randn(2500, 3)
    assert launch.splits(131, 20, launch.programs(64, launch.H100)) == (2, 10)
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
        got = F.nearest(query, database)
    assert torch.equal(got.index, expected[1])
    assert torch.equal(got.distance, expected[0])  # of the open ones, too


@pytest.mark.parametrize("scale", [1e16, 1.0, 1e-10, 1e-22])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_scales_and_offsets(scale: float, shift: float, oracle: ModuleType) -> None:
    query, database = (scale * (shift + torch.randn(n, 5)) for n in (6, 800))
    found = launch.search(query, database, None)
    assert_proved(found, oracle.nearest(query, database))
    if scale > 1e-20:
        assert not found.open.any()


@pytest.mark.parametrize("crowded", [0, 1])
def test_what_any_part_of_the_database_dropped_counts(crowded: int) -> None:
    """One part has more rows at one distance than are kept, the other only rows farther off."""
    away = torch.nn.functional.normalize(torch.randn(20 * launch.TILE, 4), dim=1)
    far = torch.arange(len(away)) // (10 * launch.TILE) != crowded
    assert launch.splits(2, 20, launch.programs(64, launch.H100)) == (2, 10)
    found = launch.search(torch.zeros(2, 4), torch.where(far[:, None], 5 * away, away), None)
    assert found.open.all()
    assert not far[found.index].any()


def test_queries_in_the_centre_of_far_rows(oracle: ModuleType) -> None:
    """Scales as far apart as float32's ends would make scores infinite."""
    database = 2.0**60 * torch.tensor([[1.0, 2], [-1, -2], [3, 1], [-3, -1]])
    found = launch.search(torch.zeros(3, 2), database, None)
    assert_proved(found, oracle.nearest(torch.zeros(3, 2), database))
    assert not found.open.any()


def test_mask_hides_non_finite_rows(oracle: ModuleType) -> None:
    query, database = torch.randn(6, 5), torch.randn(900, 5)
    mask = torch.rand(900) > 0.5
    hidden = database.masked_fill(~mask[:, None], torch.nan)
    assert_proved(launch.search(query, hidden, mask), oracle.nearest(query, database, 1, mask))


def test_a_mask_leaves_the_centre_to_the_rows_that_may_be_chosen(oracle: ModuleType) -> None:
    """Clusters far off, close together; what is hidden lies farther off still and would spoil float16's grid."""
    centres = 1000 + torch.randn(7, 20)
    query, database = (centres[torch.randint(7, (size,))] + 0.1 * torch.randn(size, 20) for size in (6, 900))
    mask = torch.rand(900) > 0.5
    hidden = torch.where(mask[:, None], database, -1e6)
    found = launch.search(query, hidden, mask)
    assert_proved(found, oracle.nearest(query, hidden, 1, mask))
    assert not found.open.any()


@pytest.mark.parametrize(("d", "block_n"), [(5, 256), (70, 256), (130, 128)])
def test_other_tiles_are_the_same_answer(d: int, block_n: int, oracle: ModuleType) -> None:
    query, database = torch.randn(5, d), torch.randn(700, d)
    key = f"RESIDENT={launch.resident(-(-d // launch.BLOCK_K))}"
    with tuned.forced("nearest_filter", key, {"BLOCK_N": block_n, "num_warps": 8, "num_stages": 2}):
        found = launch.search(query, database, None)
    assert_proved(found, oracle.nearest(query, database))
    assert not found.open.any()


def test_duplicates_are_told_apart_by_their_row(oracle: ModuleType) -> None:
    """Of one class, of another, of another tile: every row comes twice or more."""
    database = torch.randn(300, 9)[torch.randint(300, (1000,))]
    query = database[torch.randint(1000, (12,))] + 1e-3
    found = launch.search(query, database, None)
    assert_proved(found, oracle.nearest(query, database))
    assert not found.open.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m", "d", "k"), [(3, 5, 1, 2), (11, 40, 33, 3), (5, 7, 8, 1), (1, 3, 100, 1)])
def test_distances_are_the_defined_ones_to_the_bit(n: int, m: int, d: int, k: int, dtype: torch.dtype) -> None:
    query, database, index = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype), torch.randint(m, (n, k))
    expected = reference.nearest_distance(query, database, index)
    assert torch.equal(launch.distance(query, database, index), expected)
    with backend.force("triton"):
        assert torch.equal(torch.ops.fastgen.nearest_distance(query, database.T.contiguous().T, index), expected)


def test_the_order_of_a_distance_shows_in_float32() -> None:
    """2^54 + 2^30 lies halfway between two floats: which small squares meet before the large one decides."""
    query = torch.zeros(64, 43, dtype=torch.float64)
    query[:, 0], query[:, 1] = 2.0**27, 2.0**15
    query[:, 2:] = 1.4 * torch.rand(64, 41).lt(0.1)
    origin, index = torch.zeros_like(query[:1]), torch.zeros(64, 1, dtype=torch.int64)
    expected = reference.nearest_distance(query, origin, index)
    assert len(expected.unique()) == 2
    assert torch.equal(launch.distance(query, origin, index), expected)


def test_a_mask_that_hides_all_is_refused() -> None:
    query, database = torch.randn(3, 4), torch.randn(200, 4)
    with backend.force("triton"), pytest.raises(ValueError, match=r"k: .* that mask allows, 0, got 1"):
        F.nearest(query, database, mask=torch.zeros(200, dtype=torch.bool))


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


KERNELS = ("extent", "centre", "pack", "filter", "rank", "distance")


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
    assert set(compiled) == {(kernel, target) for kernel in KERNELS for target in targets}
    for (_, target), row in compiled.items():
        assert target != "sm_90" or row["stack"] == 0
        assert row["shared"] <= {"sm_80": 163, "sm_90": 227, "sm_100": 227}[target] * 1024


def test_every_configuration_fits_a_cdna_3() -> None:
    rows = aot("--all", "--target=gfx942")
    assert {row["kernel"] for row in rows} == {spec.name for spec in launch.specs() if "gfx942" not in spec.never}
    assert all(row["shared"] <= 64 * 1024 for row in rows), rows


def test_machine_code_on_sm_90(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    opcodes = compiled["filter", "sm_90"]["opcodes"]
    pairs = 128 * 128 // 256  # of one thread in one step
    assert opcodes["HGMMA"] == 128 // 16
    assert pairs <= opcodes["FMNMX"] <= pairs + 8
    assert opcodes["FADD"] == pairs
    assert sum(opcodes.values()) < 12 * pairs
    for kernel in ("rank", "distance"):
        direct = compiled[kernel, "sm_90"]["opcodes"]
        assert "DFMA" not in direct  # products and sums round apart: the order is the definition
        assert direct["DMUL"] >= 8
    for kernel in KERNELS:
        assert not {"ATOM", "ATOMG", "RED"} & set(compiled[kernel, "sm_90"]["opcodes"])


def test_every_configuration_on_sm_90() -> None:
    rows = {row["kernel"]: row for row in aot("--all", "--target=sm_90")}
    assert not [name for name, row in rows.items() if row["stack"]]
    # The widest product that a warpgroup has, of tiles that are on their way while the last one is multiplied.
    wide = rows["filter wide"]
    assert wide["opcodes"]["HGMMA"] == 64 // 16
    assert wide["opcodes"]["FADD"] == 128 * 256 // 256
    assert 3 * 48 * 1024 < wide["shared"] <= 227 * 1024
    # Two programs of 256 threads share a multiprocessor.
    for name in ("filter 64", "filter 128"):
        assert rows[name]["registers"] <= 128
        assert 2 * (rows[name]["shared"] + 1024) <= 228 * 1024


SASS = """
from fastgen.kernels import aot, nearest_launch

spec = next(spec for spec in nearest_launch.specs() if spec.name == "filter wide")
print(aot.disassemble(aot.compile_spec(spec, "sm_90")))
"""


def test_products_on_their_way_are_left_alone() -> None:
    """The wide filter does not wait for its products before it loads the next tile. Nothing may touch their registers
    until it has: Triton's own code sets them to zero without a wait, unless LLVM takes that into the branch that has
    one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SASS]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).resolve().parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    products = [i for i, text in enumerate(code) if "HGMMA.64x256x16.F32" in text]
    assert len(products) == 64 // 16
    first = int(re.findall(r"\bR(\d+)", code[products[-1]])[0])
    seen: set[int] = set()
    left = [products[-1] + 1]
    while left:  # wherever it may go from there without a wait
        i = left.pop()
        if i in seen or "DEPBAR.LE gsb0, 0x0" in code[i] or "HGMMA" in code[i]:
            continue
        seen.add(i)
        if target := re.search(r"BRA `\((.*)\)", code[i]):
            left.append(labels[target[1]])
        if target is None or code[i].startswith("@"):
            left.append(i + 1)
    assert any("LDGSTS" in code[i] for i in seen)
    touched = [code[i] for i in seen if any(first <= int(r) < first + 128 for r in re.findall(r"\bR(\d+)", code[i]))]
    assert not touched


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1000, 20_000, 64), (3000, 5001, 129), (50, 100_003, 800)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_kernels(n: int, m: int, d: int, dtype: torch.dtype, oracle: ModuleType) -> None:
    query, database = torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype)
    found = launch.search(query.cuda(), database.cuda(), None)
    assert_proved(launch.Found(*(x.cpu() for x in found)), oracle.nearest(query, database))
    assert found.open.float().mean() < 0.01
    index = torch.randint(m, (n, 3))
    distances = launch.distance(query.cuda(), database.cuda(), index.cuda())
    assert torch.equal(distances.cpu(), reference.nearest_distance(query, database, index))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [3, 100, 200])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_compiled_kernels_refuse_what_is_not_finite(d: int, bad: float) -> None:
    points, spoilt = torch.randn(500, d).cuda(), torch.randn(500, d).cuda()
    spoilt[137, d - 1] = bad
    with pytest.raises(ValueError, match="query: expected finite values, got NaN or infinity in row 137"):
        F.nearest(spoilt, points)
    with pytest.raises(ValueError, match="database: expected finite values, got NaN or infinity in row 137"):
        F.nearest(points, spoilt)
    mask = (torch.arange(500) != 137).cuda()
    hidden, shown = F.nearest(points, spoilt, mask=mask), F.nearest(points, spoilt.masked_fill(~mask[:, None], 1e9))
    assert torch.equal(hidden.index, shown.index)
