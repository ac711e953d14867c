"""The C++ Hessian-vector product for every instruction set: float64 oracle, sizes where blocks and tiles end, bits."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastgen.ops import backend
from fastgen.ops import mmd as ops

KERNELS = {
    "imq_pairs": ("imq", [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]),
    "imq": ("imq", [0.3, 4.0]),
    "rbf": ("rbf", [0.02, 1.0, 30.0]),
    "rbf_ladder": ("rbf", [0.5, 1.0, 4.0]),
    "laplacian": ("laplacian", [0.1, 1.0, 7.0]),
    "energy": ("energy", []),
    "rational_quadratic": ("rational_quadratic", [0.8, 0.2, 1.0, 5.0]),
    "polynomial": ("polynomial", [3.0, 0.7, 1.0]),
    "polynomial_square": ("polynomial", [2.0, 0.7, 0.0]),
    "polynomial_linear": ("polynomial", [1.0, 0.7, 0.5]),
}


def sample(n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, y = torch.randn(n, d) / d**0.5, torch.randn(m, d) * (1.4 / d**0.5) + 0.2
    return tuple(t.to(dtype) for t in (x, y, torch.randn(n, d), torch.randn(m, d)))


def expected(oracle: ModuleType, given: tuple[Tensor, ...], *options: object) -> tuple[Tensor, Tensor, Tensor]:
    """H·(vx, vy) in x and in y, and H·(vx, 0) in x."""
    x, y, vx, vy = (t.double() for t in given)
    x.requires_grad_()
    y.requires_grad_()
    value = oracle.value(x, y, *options)
    gx, gy = torch.autograd.grad(value, (x, y), create_graph=True)
    (alone,) = torch.autograd.grad((gx * vx).sum(), x, retain_graph=True)
    hx, hy = torch.autograd.grad((gx * vx).sum() + (gy * vy).sum(), (x, y))
    return hx, hy, alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", KERNELS)
def test_against_the_oracle(isa: str, name: str, dtype: torch.dtype, oracle: ModuleType) -> None:
    kind, parameters = KERNELS[name]
    # The energy kernel has no curvature on a line: there only rounding is left to compare.
    relative, absolute = (1e-10, 1e-13) if dtype == torch.float64 else (5e-5, 2e-6)
    for n, m, d in [(2, 3, 1), (31, 33, 7), (65, 40, 16), (129, 127, 33), (33, 40, 257)]:
        given = sample(n, m, d, dtype)
        p, q = torch.rand(n, dtype=torch.float64) + 0.1, torch.rand(m, dtype=torch.float64) + 0.1
        p, q = ((w / w.sum()).to(dtype) for w in (p, q))
        for estimator, weights in (("unbiased", ()), ("biased", ()), ("biased", (p, q))):
            want = expected(oracle, given, kind, tuple(parameters), estimator, *weights)
            rest = (*weights, torch.ones(3, dtype=torch.float64)) if weights else ()
            hx, hy = ops.hessian_product(*given, kind, parameters, estimator, "ieee", *rest)
            alone, none = ops.hessian_product(*given[:3], None, kind, parameters, estimator, "ieee", *rest)
            assert none.numel() == 0
            for got, h in zip((hx, hy, alone), want, strict=True):
                assert got.dtype == dtype
                error = (got.double() - h).norm()
                assert error <= relative * h.norm() + absolute, (n, m, d, estimator, len(weights), float(error))


@pytest.mark.parametrize(("name", "n"), [("imq_pairs", 150), ("energy", 150), ("polynomial", 150), ("imq_pairs", 400)])
def test_batches_layouts_terms_and_threads(isa: str, name: str, n: int) -> None:
    kind, parameters = KERNELS[name]
    samples = [sample(n, 140, 9, torch.float32) for _ in range(3)]
    whole = [torch.stack(parts) for parts in zip(*samples, strict=True)]
    strided = [t.mT.contiguous().mT for t in whole]
    options = (kind, parameters, "u_statistic" if len(samples[0][0]) == len(samples[0][1]) else "unbiased", "ieee")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            singles = [ops.hessian_product(*s, *options) for s in samples]
            found.append([torch.stack(parts) for parts in zip(*singles, strict=True)])
            found.append(list(ops.hessian_product(*whole, *options)))
            found.append(list(ops.hessian_product(*strided, *options)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    x, y, vx, vy = (t.double() for t in samples[0])
    a = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    for terms in (1, 2, 4, 5):
        rest = (None, None, a, terms)
        got = ops.hessian_product(x, y, vx, vy, *options, *rest)
        with backend.force("reference"):
            want = ops.hessian_product(x, y, vx, vy, *options, *rest)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_the_diagonal_of_a_u_statistic(isa: str, oracle: ModuleType) -> None:
    for name in ("rbf", "laplacian", "rational_quadratic", "polynomial"):
        kind, parameters = KERNELS[name]
        given = sample(130, 130, 5, torch.float64)
        want = expected(oracle, given, kind, tuple(parameters), "u_statistic")
        got = ops.hessian_product(*given, kind, parameters, "u_statistic", "ieee")
        for g, w in zip(got, want, strict=False):
            assert (g - w).norm() <= 1e-10 * w.norm()


def test_a_translation_changes_no_gradient(isa: str) -> None:
    x, y, _, _ = sample(300, 200, 6, torch.float32)
    hx, hy = ops.hessian_product(
        x, y, torch.ones_like(x), torch.ones_like(y), *KERNELS["imq_pairs"], "unbiased", "ieee"
    )
    scale = ops.hessian_product(
        x, y, torch.randn_like(x), torch.randn_like(y), *KERNELS["imq_pairs"], "unbiased", "ieee"
    )
    assert hx.norm() <= 1e-4 * scale[0].norm()
    assert hy.norm() <= 1e-4 * scale[1].norm()


def test_not_a_number_in_a_direction_is_not_lost(isa: str) -> None:
    for kind, parameters in KERNELS.values():
        for where in range(4):
            given = sample(20, 30, 3, torch.float32)
            given[where][4, 1] = float("nan")
            hx, hy = ops.hessian_product(*given, kind, parameters, "unbiased", "ieee")
            assert hx.isnan().any()
            assert hy.isnan().any()
