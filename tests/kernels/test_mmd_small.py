"""MMDs of small samples in one launch: the Triton kernel, interpreted; its machine code; on a GPU its streams."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fastgen.kernels import mmd_launch, mmd_small
from torch import Tensor

from fastgen import functional as F
from fastgen.ops.mmd import coefficients, inverse_pairs

KERNELS = {
    "imq_pairs": ("imq", [s * 9.0 for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]),
    "imq": ("imq", [0.9, 3.0, 20.0]),
    "rbf": ("rbf", [0.01, 0.1, 1.0]),
    "rational_quadratic": ("rational_quadratic", [2.0, 0.2, 1.0, 5.0]),
    "laplacian": ("laplacian", [0.2, 1.0]),
    "energy": ("energy", []),
    "polynomial": ("polynomial", [3.0, 0.1, 1.0]),
    "linear": ("polynomial", [1.0, 0.3, 0.0]),
}
TERMS = (mmd_launch.XX, mmd_launch.YY, mmd_launch.XY)


@pytest.fixture(autouse=True)
def counters() -> Iterator[None]:
    """Whatever was launched leaves them at zero."""
    yield
    for _, made in mmd_small._kept.values():
        assert not made.any()


def run(x: Tensor, y: Tensor, name: str, estimator: str, sides: int, **more: Any) -> tuple[Tensor, ...]:
    kind, parameters = KERNELS[name]
    pairs = inverse_pairs(parameters) if kind == "imq" else None
    assert (pairs is not None) == (name == "imq_pairs")
    assert mmd_small.fits(x, y)
    return mmd_launch.mmd(x, y, sides, more.pop("precision", "ieee"), pairs, kind, parameters, estimator, **more)


def holds(got: tuple[Tensor, ...], want: tuple[Tensor, ...], parameters: list[float], relative: float = 5e-6) -> None:
    assert [g.dtype for g in got] == [torch.float32] * len(got)
    size = max(len(parameters), 1) + want[0].abs().max()
    assert (got[0].double() - want[0]).abs().max() <= 4e-7 * size
    for g, w in zip(got[1:], want[1:], strict=False):
        assert g.shape == w.shape
        assert (g.double() - w).norm() <= relative * w.norm()


# (N, M, D): less than a tile, one tile and one more, tiles of both and D no power of two
@pytest.mark.parametrize(("n", "m", "d"), [(5, 3, 1), (64, 65, 16), (70, 130, 33)])
@pytest.mark.parametrize("name", KERNELS)
def test_against_the_oracle(name: str, n: int, m: int, d: int, oracle: ModuleType) -> None:
    kind, parameters = KERNELS[name]
    # Together every estimator with every side, on the small shape and on large ones.
    cases = {
        1: [("unbiased", 0), ("unbiased", 1), ("biased", 2), ("u_statistic", 2)],
        16: [("biased", 0), ("biased", 1), ("unbiased", 2)],
        33: [("u_statistic", 0), ("u_statistic", 1), ("unbiased", 1)],
    }
    for estimator, sides in cases[d]:
        x, y = torch.randn(n, d), torch.randn(n if estimator == "u_statistic" else m, d) * 1.2 + 0.3
        got = run(x, y, name, estimator, sides)
        assert len(got) == sides + 1
        # On a line there are close points, which pull at each other by w z_j − w z_i with a large w.
        relative = 5e-5 if d == 1 and kind in mmd_launch.ROOTED else 5e-6
        holds(got, oracle.mmd(x, y, kind, tuple(parameters), estimator), parameters, relative)


@pytest.mark.parametrize("name", [name for name, (kind, _) in KERNELS.items() if kind not in mmd_launch.EXACT])
def test_in_the_default_precision(name: str, oracle: ModuleType) -> None:
    """Products of halves in bfloat16, far from the origin; on a line every pair is close, and there are few of them."""
    kind, parameters = KERNELS[name]
    for items, n, m, d, estimator in ((30, 5, 3, 1, "biased"), (1, 40, 30, 8, "unbiased"), (1, 70, 40, 64, "biased")):
        x, y = torch.randn(items, n, d) + 100, torch.randn(items, m, d) * 1.2 + 100.3
        want = oracle.mmd(x, y, kind, tuple(parameters), estimator)
        got = run(x, y, name, estimator, 2, precision="bf16x3")
        bound = 1e-5 * want[0].abs() + 1e-6 * len(parameters)
        assert ((got[0].double() - want[0]).abs() <= bound).all()
        for g, w in zip(got[1:], want[1:], strict=True):
            assert (g.double() - w).norm() <= 1e-4 * w.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_weights(name: str, oracle: ModuleType) -> None:
    """Those of `F.mmd` sum to one, and the coefficients are of what is left of them."""
    kind, parameters = KERNELS[name]
    x, y = torch.randn(2, 21, 3), torch.randn(2, 70, 3) * 1.2
    p = torch.rand(21, dtype=torch.float64)  # the same for each of a batch
    q = torch.rand(2, 70, dtype=torch.float64)
    q[..., 3] = 0
    p, q = p / p.sum(), q / q.sum(-1, keepdim=True)
    want = oracle.mmd(x, y, kind, tuple(parameters), "biased", p, q)
    more = {"x_weight": p.float(), "y_weight": q.float(), "coefficients": torch.ones(3, dtype=torch.float64)}
    for sides in (1, 2):
        holds(run(x, y, name, "biased", sides, **more), want, parameters)
    want = oracle.mmd(x, y, kind, tuple(parameters), "biased", None, q)
    more = {"y_weight": q.float(), "coefficients": torch.tensor([1 / 21**2, 1, 1 / 21], dtype=torch.float64)}
    holds(run(x[0], y[0], name, "biased", 0, **{**more, "y_weight": q[0].float()}), (want[0][0],), parameters)


@pytest.mark.parametrize("name", ["imq_pairs", "energy", "polynomial"])
def test_terms_and_coefficients(name: str, oracle: ModuleType) -> None:
    """Each of the three sums alone, times a coefficient that is given; together they are the whole."""
    kind, parameters = KERNELS[name]
    n, m = 70, 15
    x, y = torch.randn(n, 3), torch.randn(m, 3) + 0.5
    a = torch.tensor([0.007, 0.002, 0.004], dtype=torch.float64)
    for estimator, sides in (("unbiased", 0), ("biased", 1), ("biased", 0), ("unbiased", 2)):
        own = torch.tensor(coefficients(n, m, estimator), dtype=torch.float64)
        whole = run(x, y, name, estimator, sides)
        parts = [run(x, y, name, estimator, sides, terms=t) for t in TERMS]
        for g, w in zip(whole, zip(*parts, strict=True), strict=True):
            assert (g - sum(w)).norm() <= 2e-6 * sum(part.norm() for part in w)
        scaled = run(x, y, name, estimator, sides, coefficients=a)
        for g, w in zip(scaled, zip(*parts, strict=True), strict=True):
            w = [part * float(f) for part, f in zip(w, a / own, strict=True)]
            assert (g - sum(w)).norm() <= 2e-6 * sum(part.norm() for part in w)
    b, c = x.double().requires_grad_(), y.double().requires_grad_()
    between = (oracle.kernel_matrix(b, c, kind, parameters) * (-2 / (n * m))).sum()
    want = (between.detach(), *torch.autograd.grad(between, (b, c)))
    holds(run(x, y, name, "unbiased", 2, terms=mmd_launch.XY), want, parameters)


def test_batches_and_dtypes(oracle: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(3, 70, 6).bfloat16(), torch.randn(3, 33, 6).bfloat16()
    want = oracle.mmd(x, y, *KERNELS["imq_pairs"], "unbiased")
    whole = run(x.mT.contiguous().mT, y, "imq_pairs", "unbiased", 2)
    assert whole[0].shape == (3,)
    holds(whole, want, KERNELS["imq_pairs"][1])
    for item in range(3):
        for a, b in zip(whole, run(x[item], y[item], "imq_pairs", "unbiased", 2), strict=True):
            assert torch.equal(a[item], b)
    monkeypatch.setattr(mmd_launch, "LARGEST_BATCH", 2)  # one too many for a launch
    for a, b in zip(whole, run(x, y, "imq_pairs", "unbiased", 2), strict=True):
        assert torch.equal(a, b)
    x, y = x.half(), y.half()
    holds(run(x, y, "energy", "unbiased", 2), oracle.mmd(x, y, "energy", (), "unbiased"), [])
    assert run(x[:0], y[:0], "energy", "unbiased", 1)[1].shape == (0, 70, 6)


@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_points_give_nan(name: str, bad: float, precision: str) -> None:
    precision = "ieee" if KERNELS[name][0] in mmd_launch.EXACT else precision
    for where, row in ((0, 0), (0, 7), (1, 7), (1, 21)):
        pair = [torch.randn(20, 3), torch.randn(22, 3)]
        pair[where][row, 1] = bad
        value, gx = run(*pair, name, "unbiased", 1, precision=precision)
        assert value.isnan(), (where, row)
        assert not gx.isfinite().all()  # of a linear kernel it is a sum of points, and may be infinite
    assert run(*pair, name, "unbiased", 0, precision=precision)[0].isnan()


def test_points_out_of_reach_vanish() -> None:
    x, y = torch.randn(10, 2), torch.randn(12, 2) + 1e12
    for name in ("imq_pairs", "imq", "rbf", "rational_quadratic", "laplacian"):
        within_x = run(x, x[:2], name, "unbiased", 0)[0]
        assert within_x.isfinite()
        value, gx = run(x, y, name, "unbiased", 1)
        assert value.isfinite()
        assert gx.isfinite().all()
    for name in ("energy", "polynomial"):  # which do not: what overflows, points or pairs, is no number
        assert not run(x, y * 1e8, name, "unbiased", 0)[0].isfinite()
    apart = torch.eye(2) * 1.45e19  # whose distance alone overflows
    assert run(torch.zeros(2, 2), apart, "energy", "unbiased", 0)[0].isnan()


def test_close_pairs_keep_their_distance(oracle: ModuleType) -> None:
    """Clusters far from the centre: expanded, their distances would be rounding alone; equal points pull nowhere."""
    centre = torch.randn(4, 20) * 3
    x = (centre[:, None] + 1e-3 * torch.randn(4, 20, 20)).flatten(0, 1)
    y = (centre[:, None] + 1e-3 * torch.randn(4, 8, 20)).flatten(0, 1)
    y[:5] = x[:5]
    for name in ("laplacian", "energy"):
        kind, parameters = KERNELS[name]
        x64, y64 = x.double(), y.double()
        value, gx, gy = oracle.mmd(x64, y64, kind, tuple(parameters), "unbiased")
        got = run(x, y, name, "unbiased", 2)
        assert abs(float(got[0]) - float(value)) <= 2e-6 * abs(float(value)) + 1e-6
        assert (got[1].double() - gx).norm() <= 2e-3 * gx.norm()
        assert (got[2].double() - gy).norm() <= 2e-3 * gy.norm()
    same = torch.zeros(2, 3)
    value, gx, gy = run(same, same, "energy", "biased", 2)
    assert float(value) == 0
    assert not gx.any()
    assert not gy.any()


def test_the_largest_samples(oracle: ModuleType) -> None:
    n = mmd_small.MOST - 2
    assert -(-n // mmd_small.ROWS) + 1 <= mmd_small.SLOTS
    x, y = torch.randn(n, 2), torch.randn(2, 2)
    holds(run(x, y, "rbf", "unbiased", 1), oracle.mmd(x, y, *KERNELS["rbf"], "unbiased"), KERNELS["rbf"][1])
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
from fastgen.kernels import aot, mmd_small

for spec in mmd_small.specs():
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
@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
@pytest.mark.parametrize("name", KERNELS)
def test_on_the_gpu(name: str, precision: str, oracle: ModuleType) -> None:
    """Compiled: sides, weights, dtypes and odd shapes."""
    kind, parameters = KERNELS[name]
    pairs = inverse_pairs(parameters) if kind == "imq" else None
    for n, m, d, dtype in ((5, 3, 1, torch.float32), (128, 128, 8, torch.float32), (500, 300, 64, torch.bfloat16)):
        x, y = torch.randn(2, n, d).to(dtype), (torch.randn(2, m, d) * 1.2 + 0.3).to(dtype)
        p, q = (torch.rand(2, k, dtype=torch.float64) for k in (n, m))
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        ones = torch.ones(3, dtype=torch.float64)
        cuda = [t.cuda() for t in (x, y, p.float(), q.float(), ones)]
        for sides in (0, 1, 2):
            for weights in ((), (p, q)):
                want = oracle.mmd(x, y, kind, tuple(parameters), "biased", *weights)
                given = cuda[2:] if weights else []
                got = mmd_launch.mmd(*cuda[:2], sides, precision, pairs, kind, parameters, "biased", *given)
                size = max(len(parameters), 1) + float(want[0].abs().max())
                assert (got[0].cpu().double() - want[0]).abs().max() <= 1e-5 * size
                for g, w in zip(got[1:], want[1:], strict=False):
                    assert (g.cpu().double() - w).norm() <= 1e-4 * w.norm()


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
