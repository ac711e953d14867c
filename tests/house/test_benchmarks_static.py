"""The static cost: the machine code's inner loop is found, and its instructions are counted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SASS = """
        .section        .text.kernel
.text.kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   FFMA R0, R1, R2, R3 ;
.L_x_0:
        /*0020*/                   LDS.64 R8, [R2] ;
        /*0030*/              @!P0 FADD R0, R1, R2 ;
        /*0040*/                   MUFU.RCP R0, R0 ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR44], RZ, !UPT ;
        /*0060*/                   HGMMA.64x64x8.F32.TF32 R24, R40, gdesc[UR44], R24, gsb0 ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/                   FMUL R0, R0, R0 ;
.L_x_2:
        /*0090*/              @!P1 BRA `(.L_x_0) ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3);
"""


@pytest.fixture
def static(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("static")


def test_the_inner_loop_is_found_and_counted(static: ModuleType) -> None:
    instructions, labels = static.parse(SASS)
    assert len(instructions) == 14
    loop = static.inner_loop(instructions, labels)
    assert [i.address for i in loop] == list(range(0x20, 0xA0, 0x10))
    cost = static.cost(loop, 8, streams=False)
    assert {k: cost["counts"][k] for k in ("HGMMA", "FADD", "FMUL", "MUFU", "LDS")} == {
        "HGMMA": 2,
        "FADD": 1,
        "FMUL": 1,
        "MUFU": 1,
        "LDS": 1,
    }
    cycles = cost["cycles"]
    assert cycles["fp32"] == 2 * 8 / 4
    assert cycles["mufu"] == 8 / 0.5
    assert cycles["issue"] == 8 * 8 / 4
    assert cycles["shared"] == 32 * 8 * 8 / 128
    # 64 x 32 x 16 and 64 x 64 x 8 multiply-adds of each four warps, the latter at half the rate.
    assert cycles["tensor"] == 2 * (64 * 32 * 16 / 2048 + 64 * 64 * 8 / 1024)
    straight = [i for i in instructions if i.opcode in ("LDG", "STG")]
    assert static.cost(straight, 4, streams=True)["cycles"]["global"] == pytest.approx(2 * 4 * 32 * 16 / 14.5)
    assert static.inner_loop(straight, {}) is None
    assert static.elements_of({"BLOCK_M": 128, "BLOCK_N": 32, "DP": 64}, True) == (4096, "pair")
    slab = {"BLOCK_M": 128, "BLOCK_N": 64, "DC": 64, "DP": 512}
    assert static.elements_of(slab, True) == (128 * 64 * 64, "product")
    assert static.elements_of({**slab, "DC": 512}, True) == (128 * 64, "pair")
    assert static.elements_of({**slab, "BLOCK_K": 32, "INNER": False}, True) == (128 * 64 * 32, "product")
    assert static.elements_of({"GROUPS": 256}, False) == (1024, "element")


def test_static_on_a_real_kernel() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = (
        "import json; from benchmarks import static; rows = [static.analyse('mmd', 0, False), "
        "static.analyse('langevin', 0, False)]; print(static.table(rows)); print(json.dumps(rows))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    mmd, langevin = json.loads(done.stdout.splitlines()[-1])
    assert "failed" not in mmd
    assert mmd["spill"] == langevin["spill"] == 0
    assert mmd["looped"]
    assert mmd["counts"]["HGMMA"] > 0
    pairs = mmd["elements"] / (32 * mmd["warps"])  # of one thread in one turn
    assert mmd["unit"] == "pair"
    assert mmd["counts"]["MUFU"] / pairs == 4  # two where a pair counts for the value, and two where it does not
    assert sum(mmd["counts"][name] for name in ("FFMA", "FMUL", "FADD")) / pairs <= 45
    # Products of 64 coordinates in four bf16 parts, 64 for the gradient in three, and 16 for the norms.
    assert mmd["cycles"]["tensor"] / mmd["elements"] == pytest.approx((4 * 64 + 3 * 64 + 16) / 2048)
    assert langevin["unit"] == "element"
    assert not langevin["looped"]
    assert langevin["counts"]["LDG"] * 32 * langevin["warps"] * 16 == langevin["elements"] * 8
    # Twelve bytes an element at 14.5 a clock: nothing else may be slower.
    assert langevin["cycles"]["global"] / langevin["elements"] == pytest.approx(12 / 14.5)
    assert langevin["busiest"] == "global"
