"""What Triton's own launcher makes of real calls: every kind of them compiles, with integers that are 1 and tensors
that are None turned into constants. A GPU would compile at the call; the interpreter does neither."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CODE = """
import json, torch
from fastgen.kernels import aot, mmd_launch

IMQ = ("imq", [1.0, 2.0, 3.0], "biased")
ONE = torch.ones(3, dtype=torch.float64)


def points(n, m, d, dtype=torch.float32):
    return torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)


def mmd(n, m, d, sides, *options, precision="bf16x3", dtype=torch.float32):
    return aot.launched(mmd_launch.mmd, *points(n, m, d, dtype), sides, precision, None, *options)


calls = {
    "weights": mmd(140, 3, 20, 2, *IMQ, torch.ones(140), None, ONE),
    "single points": mmd(1, 1, 1, 1, *IMQ, dtype=torch.bfloat16),
    "of many coordinates": mmd(1, 140, 129, 1, "polynomial", [3.0, 1.0, 1.0], "biased", None, torch.ones(140), ONE),
    "directions": aot.launched(mmd_launch.hessian_product, *points(9, 2, 200), *points(9, 2, 200), "bf16x3", *IMQ),
}
for call, specs in calls.items():
    for spec in specs:
        row = aot.check(spec, "sm_90")  # the second time out of Triton's cache
        print(json.dumps({"call": call, "kernel": spec.name, "stack": row["stack"]}))
"""


def test_every_kind_of_call_compiles() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if row["stack"]]
    made: dict[str, list[str]] = {}
    for row in rows:
        made.setdefault(row["call"], []).append(row["kernel"].removeprefix("_mmd_").removesuffix("_kernel"))
    assert made == {
        "weights": ["pack", "grad"],
        "single points": ["pack", "grad", "value"],
        "of many coordinates": ["pack", "slope", "pull", "value"],
        "directions": ["pack", "pack", *["slope", "pull", "pull"] * 2],
    }
