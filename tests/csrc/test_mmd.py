"""The C++ kernel for every instruction set, close to float64 at the sizes where blocks and tiles end."""

from collections.abc import Iterator
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
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    extension = backend.extension()
    assert extension is not None
    before = extension.isa()
    try:
        extension.set_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    extension.set_isa(before)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_oracle(isa: str, dtype: torch.dtype, name: str, oracle: ModuleType) -> None:
    kind, parameters = KERNELS[name]
    assert (ops.inverse_pairs(parameters) is not None) == (name == "imq_pairs")
    relative = 1e-11 if dtype == torch.float64 else 1e-5
    absolute = (1e-13 if dtype == torch.float64 else 5e-7) * len(parameters)
    for n, m, d in [(2, 3, 1), (31, 32, 7), (33, 65, 16), (129, 127, 33), (513, 520, 4), (70, 60, 130), (33, 40, 257)]:
        x = torch.randn(n, d, dtype=dtype) / d**0.5
        y = torch.randn(m, d, dtype=dtype) * 1.5 / d**0.5 + 0.2
        for estimator in ("unbiased", "biased"):
            value, gx, gy = oracle.mmd(x, y, kind, tuple(parameters), estimator)
            got, got_x, got_y = ops.value_grad(x, y, kind, parameters, estimator, "ieee")
            assert abs(float(got) - float(value)) <= absolute, (n, m, d, estimator)
            for g, want in ((got_x, gx), (got_y, gy)):
                assert (g.double() - want).norm() <= relative * want.norm(), (n, m, d, estimator)
            one, one_x = ops.value_grad_x(x, y, kind, parameters, estimator, "ieee")
            assert abs(float(one) - float(value)) <= absolute
            assert (one_x.double() - gx).norm() <= relative * gx.norm()
            assert abs(float(ops.value(x, y, kind, parameters, estimator, "ieee")) - float(value)) <= absolute


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
