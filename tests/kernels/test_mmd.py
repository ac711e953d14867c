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
import triton
import triton.language as tl
from fastgen.kernels import mmd, mmd_launch, mmd_slab, mmd_small, mmd_units
from torch import Tensor

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
def no_sample_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmd_small, "MOST", 0)


def run(
    x: Tensor, y: Tensor, name: str, estimator: str, sides: int, precision: str = "ieee", **more: Any
) -> tuple[Tensor, ...]:
    kind, parameters = KERNELS[name]
    pairs = inverse_pairs(parameters) if kind == "imq" else None
    assert (pairs is not None) == (name == "imq_pairs")
    return mmd_launch.mmd(x, y, sides, precision, pairs, kind, parameters, estimator, **more)


def holds(got: tuple[Tensor, ...], want: tuple[Tensor, ...], parameters: list[float], relative: float = 5e-6) -> None:
    assert [g.dtype for g in got] == [torch.float32] * len(got)
    size = max(len(parameters), 1) + want[0].abs().max()
    assert (got[0].double() - want[0]).abs().max() <= 4e-7 * size
    for g, w in zip(got[1:], want[1:], strict=False):
        assert (g.double() - w).norm() <= relative * w.norm()


# (N, M, D): less than a tile, one tile and one more, two tiles of X, D below the least and no power of two
@pytest.mark.parametrize(("n", "m", "d"), [(5, 3, 1), (128, 129, 16), (140, 130, 33)])
@pytest.mark.parametrize("name", KERNELS)
def test_against_the_oracle(name: str, n: int, m: int, d: int, oracle: ModuleType) -> None:
    kind, parameters = KERNELS[name]
    # Together every estimator, and every side, on the small shape and on large ones.
    cases = {
        1: [("unbiased", 0), ("unbiased", 1), ("biased", 2), ("u_statistic", 2)],
        16: [("biased", 0), ("biased", 1)],
        33: [("u_statistic", 0), ("unbiased", 2)],
    }
    for estimator, sides in cases[d]:
        x, y = torch.randn(n, d), torch.randn(n if estimator == "u_statistic" else m, d) * 1.2 + 0.3
        got = run(x, y, name, estimator, sides)
        assert len(got) == sides + 1
        # On a line there are close points, which pull at each other by w z_j − w z_i with a large w.
        relative = 5e-5 if d == 1 and kind in mmd_launch.ROOTED else 5e-6
        holds(got, oracle.mmd(x, y, kind, tuple(parameters), estimator), parameters, relative)


@pytest.mark.parametrize("name", [name for name, (kind, _) in KERNELS.items() if kind not in mmd_launch.EXACT])
def test_halves(name: str, oracle: ModuleType) -> None:
    """In the default precision points are pairs of bfloat16: held to what is asked of it, far from the origin, of
    several tiles of rows and columns, weighted, of one side and in a batch."""
    kind, parameters = KERNELS[name]
    # Within X, between the two, and within Y tiles meet from both sides, and a tile itself.
    n, m, d = 260, 270, 20
    x, y = torch.randn(n, d) + 10, torch.randn(m, d) * 1.2 + 10.3
    p = torch.rand(n, dtype=torch.float64) + 0.1
    p /= p.sum()
    q = torch.full((m,), 1 / m, dtype=torch.float64)
    more = {"x_weight": p.float(), "y_weight": q.float(), "coefficients": torch.ones(3, dtype=torch.float64)}
    cases: list[tuple[str, int, dict[str, Any]]] = [("unbiased", 2, {}), ("unbiased", 1, {}), ("biased", 2, more)]
    for estimator, sides, options in cases:
        want = oracle.mmd(x, y, kind, tuple(parameters), estimator, *((p, q) if options else ()))
        got = run(x, y, name, estimator, sides, "bf16x3", **options)
        assert abs(float(got[0]) - float(want[0])) <= 1e-5 * abs(float(want[0])) + 2e-7 * len(parameters)
        for g, w in zip(got[1:], want[1:], strict=False):
            assert (g.double() - w).norm() <= 1e-4 * w.norm()
    batch = run(torch.stack([y[:3], x[:3]]), torch.stack([x[:4], y[:4]]), name, "unbiased", 0, "bf16x3")[0]
    alone = [run(a, b, name, "unbiased", 0, "bf16x3")[0] for a, b in ((y[:3], x[:4]), (x[:3], y[:4]))]
    assert torch.equal(batch, torch.stack(alone))


def test_what_halves_are_not_exact_enough_for() -> None:
    """Roots and polynomials take better products where these are asked for."""
    for kind in ("energy", "laplacian", "polynomial"):
        got = [mmd_launch.product_precision(kind, p) for p in ("tf32", "bf16x3", "tf32x3", "ieee")]
        assert got == ["bf16x6", "bf16x6", "tf32x3", "ieee"]
    assert mmd_launch.product_precision("imq", "bf16x3") == "bf16x3"


@pytest.mark.parametrize("name", ["imq_pairs", "rbf"])
def test_halves_keep_what_is_no_number_and_what_is_far(name: str) -> None:
    for bad in (float("nan"), float("inf"), 1e18):
        x, y = torch.randn(20, 3), torch.randn(22, 3)
        y[7, 1] = bad
        for sides in (0, 1):
            assert run(x, y, name, "unbiased", sides, "bf16x3")[0].isnan()
    far = run(x[:9], torch.cat([y[8:9], y[8:9] + 1e12]), name, "unbiased", 1, "bf16x3")
    assert all(part.isfinite().all() for part in far)


@pytest.mark.parametrize("name", KERNELS)
def test_weights(name: str, oracle: ModuleType) -> None:
    """Those of `F.mmd` sum to one, and the coefficients are of what is left of them."""
    kind, parameters = KERNELS[name]
    x, y = torch.randn(2, 21, 3), torch.randn(2, 30, 3) * 1.2
    p = torch.rand(21, dtype=torch.float64)  # the same for each of a batch
    q = torch.rand(2, 30, dtype=torch.float64)
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
    n, m = 20, 15
    x, y = torch.randn(n, 3), torch.randn(m, 3) + 0.5
    a = torch.tensor([0.007, 0.002, 0.004], dtype=torch.float64)
    for estimator, sides in (("unbiased", 0), ("biased", 1), ("unbiased", 2)):
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
    x, y = torch.randn(3, 20, 6).bfloat16(), torch.randn(3, 33, 6).bfloat16()
    want = oracle.mmd(x, y, *KERNELS["imq_pairs"], "unbiased")
    whole = run(x.mT.contiguous().mT, y, "imq_pairs", "unbiased", 2)
    assert whole[0].shape == (3,)
    holds(whole, want, KERNELS["imq_pairs"][1])
    monkeypatch.setattr(mmd_launch, "LARGEST_BATCH", 2)  # one too many for a launch
    for a, b in zip(whole, run(x, y, "imq_pairs", "unbiased", 2), strict=True):
        assert torch.equal(a, b)
    x, y = x.half(), y.half()
    holds(run(x, y, "energy", "unbiased", 2), oracle.mmd(x, y, "energy", (), "unbiased"), [])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_points_give_nan(name: str, bad: float) -> None:
    for where, row in ((0, 0), (0, 7), (1, 7)):
        pair = [torch.randn(20, 3), torch.randn(22, 3)]
        pair[where][row, 1] = bad
        value, gx = run(*pair, name, "unbiased", 1)
        assert value.isnan(), (where, row)
        assert not gx.isfinite().all()  # of a linear kernel it is a sum of points, and may be infinite
    assert run(*pair, name, "unbiased", 0)[0].isnan()


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
    flat = ("rational_quadratic", (2.0**-0.5, 0.01))  # a hundredth power: not small even there
    assert mmd_launch.mmd(torch.zeros(2, 2), apart, 0, "ieee", None, *flat, "unbiased")[0].isnan()


def test_close_pairs_keep_their_distance(oracle: ModuleType) -> None:
    """Clusters far from the centre: expanded, their distances would be rounding alone; equal points pull nowhere."""
    centre = torch.randn(4, 20) * 3
    x = (centre[:, None] + 1e-3 * torch.randn(4, 10, 20)).flatten(0, 1)
    y = (centre[:, None] + 1e-3 * torch.randn(4, 8, 20)).flatten(0, 1)
    y[:5] = x[:5]
    for name in ("laplacian", "energy"):
        kind, parameters = KERNELS[name]
        x64, y64 = x.double(), y.double()
        value, gx, _ = oracle.mmd(x64, y64, kind, tuple(parameters), "unbiased")
        got = run(x, y, name, "unbiased", 1)
        assert abs(float(got[0]) - float(value)) <= 2e-6 * abs(float(value)) + 1e-6
        assert (got[1].double() - gx).norm() <= 2e-3 * gx.norm()
    same = torch.zeros(2, 3)
    value, gx, gy = run(same, same, "energy", "biased", 2)
    assert float(value) == 0
    assert not gx.any()
    assert not gy.any()


@triton.jit
def _evaluated(
    u_ptr, out_ptr, parameters, KIND: tl.constexpr, FORM: tl.constexpr, COUNT: tl.constexpr, SECOND: tl.constexpr
) -> None:
    place = tl.arange(0, COUNT)
    u = tl.load(u_ptr + place)
    if KIND <= mmd.IMQ:
        u += 1.0
    k, w = mmd._evaluate(u, parameters, KIND, FORM, False)
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
    _evaluated[(1,)](u, got, units, KIND=mmd.KINDS[name], FORM=form, COUNT=4096, SECOND=second)
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
    _evaluated[(1,)](u * float("nan"), got, units, KIND=mmd.KINDS[name], FORM=form, COUNT=4096, SECOND=second)
    assert got[: 2 + second].isnan().all()


def test_which_exponentials_are_squares() -> None:
    squarings = mmd_units.squarings
    assert squarings((1.0, 4.0, 16.0, 64.0, 256.0)) == (0, 2, 0, 2, 0)
    assert squarings((1.0, 2.0, 4.0, 8.0, 16.0, 32.0)) == (0, 1, 1, 0, 1, 1)
    assert squarings((1.0, 2.1, 8.4, 8.4)) == (0, 0, 2, 0)


def test_the_same_bits_every_time() -> None:
    x, y = torch.randn(140, 5), torch.randn(9, 5)
    first, second = (run(x, y, "imq_pairs", "unbiased", 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
    # Three bf16 products of 16 coordinates an instruction, of 16 columns for the gradient, and one of the norms; slabs
    # go 64 at a time, and have their norms apart.
    [("grad", 32, 3 * 64 // 16 + 1 + 3 * 32 // 16), ("value", 64, 3 * 64 // 16 + 1), ("slope", 64, 3 * 64 // 16)],
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
from fastgen.kernels import aot, mmd_launch

specs = {spec.name: spec for spec in mmd_launch.specs()}
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
    assert [row["stack"] for row in rows] == [0] * 6
    for row in rows[:3]:
        pairs = 128 * 32 // 256
        assert 3 * pairs <= row["opcodes"]["MUFU"] <= 3 * pairs + 6, row["kernel"]


def test_the_slabs_product_on_sm_90(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    row = compiled["pull", "sm_90"]
    assert row["stack"] == 0
    assert row["opcodes"]["HGMMA"] == 3 * (32 // 16)
    assert "MUFU" not in row["opcodes"]
