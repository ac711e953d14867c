"""The perceptual works: their measure of error, and that GLANN's official way is written down right."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture
def works(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("perceptual")


def test_one_percent_too_much_is_an_error(works: ModuleType) -> None:
    value, grad = torch.rand(2).double(), torch.randn(2, 3, 8, 8).double()
    error = works.network_error
    assert error((value, grad), (value, grad)) == 0
    assert error((value * 1.01, grad), (value, grad)) == pytest.approx(0.01)
    assert error((value, grad * 0.99), (value, grad)) == pytest.approx(0.01)
    aside = torch.randn_like(grad)
    aside -= grad * (aside * grad).sum() / grad.square().sum()
    aside *= grad.norm() / aside.norm()
    assert error((value, grad + 0.005 * aside), (value, grad)) < 1e-3  # a ReLU that turned
    assert error((value, grad + 0.1 * aside), (value, grad)) > 1e-3
    grad[0, 0, 0, 0] = torch.nan
    assert error((value, grad), (value, torch.ones_like(grad))) == float("inf")


@pytest.mark.parametrize("pixels", [32, 64])
def test_the_official_way_of_glann(oracle: ModuleType, works: ModuleType, pixels: int) -> None:
    work = works._glann_work(1, pixels)
    inputs = work.inputs(torch.device("cpu"))
    features = oracle.vgg16()
    state = {key.removeprefix("features."): value for key, value in works.trunk_state("vgg").items()}
    features.load_state_dict(state)
    x = inputs["x"].detach().double().requires_grad_()
    want = oracle.glann_loss(features.double(), x, inputs["y"], works.GLANN_LEVELS[pixels])
    value, grad = work.oracle(inputs)
    torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), x)[0], rtol=1e-9, atol=1e-12)
    for name in work.providers:
        assert work.error(work.provider(name).setup(inputs)(), (value, grad)) < work.tolerance, name
