"""What Triton's own launcher makes of real calls: every kind of them compiles, and the ahead-of-time list is like it.

A GPU is where a call is compiled, with integers that are 1 turned into constants and offsets of 64 bits where they are
large; the interpreter does neither.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

CALLS = """
import json, math, torch
from fastgen.kernels import aot, langevin, langevin_mala

INF = math.inf


def step(chains, elements, dtype=torch.float32, seed=3, step=5, everything=False, stats=False, meta=False):
    x = torch.zeros(chains, elements, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    each, ids = torch.ones(chains, dtype=compute), torch.arange(chains)
    number = torch.zeros((), dtype=torch.int64)
    tensors = (x.clone(), ids, each, each, number, number) if everything else (None,) * 6
    found = torch.zeros(chains, 3, dtype=torch.float64) if stats else None
    scalars = (0.01, 0.1, 4.0, 1.0 if everything else INF, -1.0, 1.0, 0.1, everything)
    return aot.launched(langevin.step_, x, x.clone(), tensors[0], found, *tensors[1:], *scalars, seed, step)


def accept(chains, elements, dtype=torch.float32, seed=3, step=5, everything=False):
    x, energy = torch.zeros(chains, elements, dtype=dtype), torch.zeros(chains, dtype=torch.float64)
    each, number = torch.ones(chains, dtype=dtype), torch.zeros((), dtype=torch.int64)
    tensors = (torch.arange(chains), each, each, number, number) if everything else (None,) * 5
    decided = (torch.zeros_like(energy), torch.zeros(chains, dtype=torch.bool))
    scalars = (0.01, 0.1, 4.0, 1.0 if everything else INF)
    return aot.launched(langevin_mala.accept_, x, x, x, x, energy, energy, *tensors, *scalars, seed, step, *decided)


def noise(chains, elements, dtype=torch.float32):
    return aot.launched(langevin.noise_, torch.zeros(chains, elements, dtype=dtype), None, None, None, 3, 5)
"""


def run(code: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CALLS + code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


COMPILED = """
KERNELS = langevin._langevin_kernel, langevin_mala._accept_kernel
SWITCHES = [name for kernel in KERNELS for name in kernel.arg_names if name.isupper()]
calls = [
    *(step(2, 3072, seed=s, step=k) for s in (0, 1, 2**32, 2**32 + 1, -1) for k in (0, 1, 16)),
    *(step(1, e, seed=1, step=1) for e in (1, 4, 3072)),
    *(step(1, e, stats=True, everything=True) for e in (1, 4, 3072)),
    *(accept(1, e, seed=s, step=s) for e in (1, 9000) for s in (1, 2**32)),
    noise(1, 1), noise(1, 4, torch.int32),
]
kinds = {}
for call in calls:
    for spec in call:
        key = repr((spec.kernel.__name__, spec.signature, spec.constexprs, spec.divisible))
        kinds.setdefault(key, spec)
for spec in kinds.values():
    row = aot.check(spec, "sm_90")
    ones = [k for k in spec.signature if k not in SWITCHES and spec.constexprs.get(k) == 1]
    print(json.dumps({"kernel": spec.name, "stack": row["stack"], "ones": ones}))
"""


def test_every_kind_of_call_compiles() -> None:
    rows = run(COMPILED)
    assert {row["kernel"] for row in rows} == {"_langevin_kernel", "_sums_kernel", "_accept_kernel"}
    assert all(row["stack"] == 0 for row in rows)
    # Neither seed nor step nor the number of chains makes a kernel of its own.
    assert {name for row in rows for name in row["ones"]} == {"elements"}


LISTED = """
kinds = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
made = {}
for kind, dtype in kinds.items():
    made[f"step_{kind}"] = step(2, 3072, dtype)
    made[f"step_short_{kind}"] = step(2, 64, dtype)
    made[f"step_stats_{kind}"] = step(2, 3072, dtype, stats=True)
    made[f"noise_{kind}"] = noise(2, 3072, dtype)
made["noise_i32"] = noise(2, 3072, torch.int32)
made["step_everything"] = step(2, 3072, everything=True, stats=True)
made["step_short_everything"] = step(2, 64, everything=True)
made["step_short_stats"] = step(2, 64, everything=True, stats=True)
made["step_odd"] = step(2, 7, everything=True)
made["step_long_odd"] = step(2, 28 * 28 * 3 + 1)
for kind, everything in (("fp32", False), ("fp64", True)):
    made[f"accept_whole_{kind}"] = accept(2, 1024, kinds[kind], everything=everything)
    sums, copy = accept(2, 3 * 64 * 64, kinds[kind], everything=everything)
    made[f"accept_sums_{kind}"], made[f"accept_copy_{kind}"] = [sums], [copy]
listed = {spec.name: spec for spec in langevin.aot_specs()}
print(json.dumps(sorted(set(made) ^ set(listed))))
for name, (call,) in made.items():
    spec = listed[name]
    ours, theirs = (
        {"kernel": s.kernel.__name__, "signature": dict(sorted(s.signature.items())), "warps": s.num_warps,
         "constants": {k: str(v) for k, v in sorted(s.constexprs.items())}, "divisible": list(s.divisible),
         "options": s.options}
        for s in (spec, call)
    )
    print(json.dumps({"name": name, "listed": ours, "launched": theirs}))
"""


def test_the_list_is_what_is_launched() -> None:
    missing, *rows = run(LISTED)
    assert missing == []
    for row in rows:
        assert row["listed"] == row["launched"], row["name"]
