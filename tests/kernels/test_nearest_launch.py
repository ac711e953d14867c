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
from fastgen.kernels import aot, nearest_launch


def search(n, m, d, mask=None, dtype=torch.float32):
    return aot.launched(nearest_launch.search, torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype), mask)


calls = {
    "single points": search(1, 1, 1),
    "a mask": search(3, 200, 20, torch.arange(200) % 2 == 0, torch.bfloat16),
    "of many coordinates": search(130, 3000, 800),
}
for call, specs in calls.items():
    for spec in specs:
        row = aot.check(spec, "sm_90")
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
        made.setdefault(row["call"], []).append(row["kernel"].removeprefix("_nearest_").removesuffix("_kernel"))
    every = ["pack", "pack", "filter", "rank"]
    assert made == {"single points": every, "a mask": every, "of many coordinates": every}
