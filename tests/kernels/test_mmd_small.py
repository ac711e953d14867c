"""MMDs of small samples in one launch: whom it serves, the room that launches share, machine code, streams.

What it computes is in test_mmd.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fastgen.kernels import mmd_launch, mmd_small

from fastgen import functional as F


def test_the_largest_samples(oracle: ModuleType) -> None:
    n = mmd_small.MOST - 2
    assert -(-n // mmd_small.ROWS) + 1 <= mmd_small.SLOTS
    x, y = torch.randn(n, 2), torch.randn(2, 2)
    value, gx = mmd_launch.mmd(x, y, 1, "ieee", None, "rbf", [0.01, 0.1, 1.0], "unbiased")
    want = oracle.mmd(x, y, "rbf", (0.01, 0.1, 1.0), "unbiased")
    assert abs(float(value) - float(want[0])) <= 2e-6
    assert (gx.double() - want[1]).norm() <= 5e-6 * want[1].norm()
    assert not mmd_small.fits(x, torch.randn(3, 2))
    assert not mmd_small.fits(torch.randn(2, 65), torch.randn(2, 65))


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches on a device's default stream share it; what goes elsewhere, or is large, has its own."""
    x = torch.zeros(4, 2)
    devices: list[int | None] = [0, 1, 0, None, None]
    monkeypatch.setattr(mmd_small, "_kept", {})
    monkeypatch.setattr(mmd_small, "_device", lambda x: devices.pop(0))
    first, other, again, *captured = (mmd_small._room(x, 2, 3) for _ in range(5))
    assert again is first
    places = [t.data_ptr() for pair in (first, other, *captured) for t in pair]
    assert len(set(places)) == len(places)
    assert all(len(partial) >= 6 and not counters.any() for partial, counters in (first, other, *captured))
    devices += [0, 0]
    large = mmd_small._room(x, mmd_small.KEPT, 2)
    assert len(large[0]) == 2 * mmd_small.KEPT
    assert not large[1].any()
    assert mmd_small._room(x, mmd_small.KEPT // 2, 2) is first


CODE = """
import json
from fastgen.kernels import aot, mmd_specs

for spec in mmd_specs.small_specs():
    if spec.name in NAMES:
        print(json.dumps(aot.check(spec, "sm_90")))
"""


def test_machine_code_on_sm_90() -> None:
    """At WAE's eight coordinates and at 64: on tensor cores, two reciprocals a pair, no spill, one counter."""
    names = ["small imq_pairs D=8 sides=1 bf16x3 fp32", "small imq_pairs D=64 sides=2 bf16x3 fp32"]
    names += ["small imq_pairs D=64 sides=0 bf16x3 fp32"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"NAMES = {names}\n{CODE}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["kernel"]: row for row in map(json.loads, done.stdout.splitlines())}
    pairs = 64 * 32 // 128  # of one thread in one step
    # Four products of the halves for the distance, three for the gradient, 16 coordinates or columns at a time.
    for name, products in zip(names, (4 + 3 * 2, 4 * 4 + 3 * 2, 4 * 4), strict=True):
        row = found[name]
        opcodes = row["opcodes"]
        assert row["stack"] == 0
        assert opcodes["HGMMA"] == products
        assert 2 * pairs <= opcodes["MUFU"] <= 2 * pairs + 6
        assert sum(opcodes.get(o, 0) for o in ("ATOM", "ATOMG", "RED")) == 1
        # What stands outside the loop, in it the columns' own norms: 64 of 64 coordinates are two a pair.
        assert sum(opcodes[o] for o in ("FFMA", "FMUL", "FADD")) <= (42 if "D=8" in name else 55) * pairs, name


@pytest.mark.gpu
def test_streams_and_graphs_on_the_gpu() -> None:
    """The same bits alone, from two streams at once, and out of two graphs replayed beside them."""
    points = [(torch.randn(400, 8, device="cuda"), torch.randn(500, 8, device="cuda")) for _ in range(2)]
    alone = [F.mmd(x, y) for x, y in points]
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs, captured = [], []
    for x, y in points:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append(F.mmd(x, y))
        graphs.append(graph)
    torch.cuda.synchronize()
    found = []
    for _ in range(200):
        for (x, y), stream, graph in zip(points, streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                found.append(F.mmd(x, y))
        for (x, y), stream in zip(points, reversed(streams), strict=True):
            with torch.cuda.stream(stream):
                found.append(F.mmd(x, y))
    torch.cuda.synchronize()
    for i, value in enumerate(found):
        assert torch.equal(value, alone[i % 2])
    for value, want in zip(captured, alone, strict=True):
        assert torch.equal(value, want)
