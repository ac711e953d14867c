"""The C++ kernel for every instruction set, close to float64 at the sizes where blocks and tiles end."""

from types import ModuleType

import pytest
import torch

from fastgen.ops import backend
from fastgen.ops import mmd as ops

ISAS = ["baseline", "avx2", "avx512"]
KERNELS = {
    "imq_pairs": ("imq", [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]),
    "imq": ("imq", [0.3, 1.0, 4.0]),
    "rbf": ("rbf", [0.01, 0.1, 1.0, 30.0]),
    "rbf_ladder": ("rbf", [16.0, 0.02, 0.04, 0.08, 0.32, 1.28, 1.0, 4.0, 2.0]),
    "laplacian": ("laplacian", [0.1, 1.0, 7.0]),
    "energy": ("energy", []),
    "rational_quadratic": ("rational_quadratic", [0.8, 0.2, 1.0, 5.0]),
    "polynomial": ("polynomial", [3.0, 0.7, 1.0]),
    "polynomial_linear": ("polynomial", [1.0, 0.7, 0.0]),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_oracle(isa: str, dtype: torch.dtype, name: str, oracle: ModuleType) -> None:
    kind, parameters = KERNELS[name]
    assert (kind == "imq" and ops.inverse_pairs(parameters) is not None) == (name == "imq_pairs")
    relative = 1e-11 if dtype == torch.float64 else 1e-5
    absolute = (1e-13 if dtype == torch.float64 else 5e-7) * max(1, len(parameters))
    if kind == "polynomial":  # some values are far above one
        relative = 4 * relative
    for n, m, d in [(2, 3, 1), (31, 32, 7), (33, 65, 16), (129, 127, 33), (513, 520, 4), (70, 60, 130), (33, 40, 257)]:
        x = torch.randn(n, d, dtype=dtype) / d**0.5
        y = torch.randn(m, d, dtype=dtype) * 1.5 / d**0.5 + 0.2
        p, q = torch.rand(n).double() + 0.1, torch.rand(m).double() + 0.1
        p, q = ((w / w.sum()).to(dtype) for w in (p, q))
        for estimator, weighted in (("unbiased", False), ("biased", False), ("biased", True)):
            given = (p, q, torch.ones(3, dtype=torch.float64)) if weighted else ()
            value, gx, gy = oracle.mmd(x, y, kind, tuple(parameters), estimator, *given[:2])
            bound = absolute * max(1, abs(float(value)))
            got, got_x, got_y = ops.value_grad(x, y, kind, parameters, estimator, "ieee", *given)
            assert abs(float(got) - float(value)) <= bound, (n, m, d, estimator, weighted)
            for g, want in ((got_x, gx), (got_y, gy)):
                close(g, want, relative)
            one, one_x = ops.value_grad_x(x, y, kind, parameters, estimator, "ieee", *given)
            assert abs(float(one) - float(value)) <= bound
            close(one_x, gx, relative)
            assert abs(float(ops.value(x, y, kind, parameters, estimator, "ieee", *given)) - float(value)) <= bound


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    # The energy of very few points on a line has a gradient of zero.
    assert (got.double() - want).norm() <= tolerance * (want.norm() + 0.01)


@pytest.mark.parametrize(("kind", "parameters"), [("laplacian", [1.0]), ("energy", [])])
@pytest.mark.parametrize("d", [1, 2])
def test_close_points_of_few_coordinates(
    isa: str, kind: str, parameters: list[float], d: int, oracle: ModuleType
) -> None:
    x, y = torch.randn(700, d), torch.randn(650, d) + 0.3  # in one dimension many pairs are 1e-5 apart
    _, gx, gy = oracle.mmd(x, y, kind, tuple(parameters), "unbiased")
    _, got_x, got_y = ops.value_grad(x, y, kind, parameters, "unbiased", "ieee")
    for g, want in ((got_x, gx), (got_y, gy)):
        assert (g.double() - want).norm() <= 2e-6 * want.norm()
    total = got_x.double().sum(0) + got_y.double().sum(0)  # nothing changes when all move together
    assert total.norm() <= 2e-6 * gx.norm()


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("imq", [8.0, 8e3]),
        ("imq", [8.0, 8.0, 8e20]),
        ("rbf", [0.5, 5e-41]),
        ("rbf", [5e39, 0.5]),
        ("laplacian", [1.0, 1e-20]),
        ("laplacian", [1e10, 1.0]),
        ("rational_quadratic", [1.0, 1e4]),
        ("rational_quadratic", [1.0, 1e10]),
    ],
)
def test_parameters_far_apart(isa: str, kind: str, parameters: list[float], oracle: ModuleType) -> None:
    """What is beyond the points (padding) must have vanished for the widest kernel, and not overflow for the least."""
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    value, gx, _ = oracle.mmd(x, y, kind, tuple(parameters), "biased")
    got, got_x = ops.value_grad_x(x, y, kind, parameters, "biased", "ieee")
    assert abs(float(got) - float(value)) <= 2e-6
    assert (got_x.double() - gx).norm() <= 1e-5 * gx.norm()


def test_terms_and_coefficients(isa: str) -> None:
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.randn(45, 5, dtype=torch.float64)
    for kind, parameters in (KERNELS["imq_pairs"], KERNELS["energy"], KERNELS["polynomial"]):
        for estimator in ("unbiased", "biased"):
            whole = ops.value_grad(x, y, kind, parameters, estimator, "ieee")
            parts = [
                ops.value_grad(x, y, kind, parameters, estimator, "ieee", None, None, None, terms)
                for terms in (1, 2, 4)
            ]
            for got, want in zip(zip(*parts, strict=True), whole, strict=True):
                torch.testing.assert_close(sum(got), want, rtol=1e-12, atol=1e-14)
            assert not parts[0][2].any()
            assert not parts[1][1].any()
            with backend.force("reference"):
                a = torch.tensor([0.3, 0.0, 2.0], dtype=torch.float64)
                want = ops.value_grad(x, y, kind, parameters, estimator, "ieee", None, None, a, 5)
            got = ops.value_grad(x, y, kind, parameters, estimator, "ieee", None, None, a, 5)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_powers_over_their_whole_range(isa: str, dtype: torch.dtype) -> None:
    # As below for the exponential: 2 − 2·(1 + u/2α)^−α.
    y = torch.cat([torch.linspace(0, 3, 2001), torch.logspace(-3, 12, 800)]).to(dtype)
    for alpha in (0.1, 0.5, 1.0, 20.0):
        parameters = [1.0, alpha]
        got = ops.value(
            torch.zeros(len(y), 1, 1, dtype=dtype), y[:, None, None], "rational_quadratic", parameters, "biased", "ieee"
        )
        want = 2 - 2 * (1 + y.double().square() / (2 * alpha)) ** -alpha
        assert ((got.double() - want).abs() <= (2 + alpha) * (3e-7 if dtype == torch.float32 else 6e-16)).all(), alpha


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_roots_over_their_whole_range(isa: str, dtype: torch.dtype) -> None:
    y = torch.cat([torch.zeros(1), torch.logspace(-15, 15, 3001)]).to(dtype)
    x = torch.zeros(len(y), 1, 1, dtype=dtype)
    got, gx = ops.value_grad_x(x, y[:, None, None], "energy", [], "biased", "ieee")
    want = 2 * y.double()
    assert ((got.double() - want).abs() <= (3e-7 if dtype == torch.float32 else 1e-15) * want).all()
    slope = torch.where(y > 0, -2.0, 0.0)
    assert ((gx.flatten() - slope).abs() <= (1e-6 if dtype == torch.float32 else 1e-14)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exp_over_its_whole_range(isa: str, dtype: torch.dtype) -> None:
    # With x = 0 alone and y = √u, the biased MMD² is 2 − 2·exp(−u); two batches keep it to one pair each.
    u = torch.cat([torch.linspace(0, 100, 4001), torch.tensor([1e-7, 86.9, 87.1, 200.0, 707.0, 709.0, 1e4, 1e30])])
    y = u.to(dtype).sqrt()
    got = ops.value(torch.zeros(len(u), 1, 1, dtype=dtype), y[:, None, None], "rbf", [1.0], "biased", "ieee")
    want = 2 - 2 * torch.exp(-y.double().square())
    # The coordinates are halved about their mean and squared in the working precision before the exponential.
    tolerance = (want * 0 + 1) * (8e-7 if dtype == torch.float32 else 2e-15)
    assert ((got.double() - want).abs() <= tolerance).all()


def test_value_with_and_without_gradients_is_the_same_number(isa: str) -> None:
    x, y = torch.randn(200, 20), torch.randn(180, 20)
    parameters = KERNELS["imq_pairs"][1]
    alone = ops.value(x, y, "imq", parameters, "unbiased", "ieee")
    assert torch.equal(alone, ops.value(x, y, "imq", parameters, "unbiased", "ieee"))
    assert float(ops.value_grad(x, y, "imq", parameters, "unbiased", "ieee")[0]) == pytest.approx(
        float(alone), abs=1e-7
    )
