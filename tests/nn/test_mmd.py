import copy
import pickle

import pytest
import torch

from fastgen import functional as F
from fastgen import nn
from fastgen.nn import mmd as module
from fastgen.ops import mmd as ops


def test_the_module_is_the_function() -> None:
    x, y = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4)
    for options in ({}, {"kernel": F.RBF((2.0,)), "estimator": "biased"}, {"kernel": "polynomial"}):
        loss = nn.MMDLoss(**options)
        assert torch.equal(loss(x, y), F.mmd(x, y, **options))
    assert "IMQ" in repr(nn.MMDLoss())
    assert not list(nn.MMDLoss().parameters())


def test_weights_are_passed_on() -> None:
    x, y, p, q = torch.randn(9, 4), torch.randn(7, 4), torch.rand(9), torch.rand(7)
    assert torch.equal(nn.MMDLoss()(x, y, x_weight=p, y_weight=q), F.mmd(x, y, x_weight=p, y_weight=q))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The y of every time that a sum over y's own pairs is made for the cache."""
    made = []
    real = module.own_term
    monkeypatch.setattr(module, "own_term", lambda y, **options: made.append(y) or real(y, **options))
    return made


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u_statistic"])
@pytest.mark.parametrize("kernel", ["imq", "energy", "polynomial"])
def test_the_own_term_of_y_is_kept_while_y_is_the_same(kernel: str, estimator: str, calls: list) -> None:
    loss = nn.MMDLoss(kernel, estimator=estimator, cache_y=True)
    y = torch.randn(12, 4, dtype=torch.float64)
    weight = torch.rand(12, dtype=torch.float64)

    def check(made: int, y: torch.Tensor, y_weight: torch.Tensor | None = None) -> None:
        x = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
        got = loss(x, y, y_weight=y_weight)
        want = F.mmd(x, y, kernel=kernel, estimator=estimator, y_weight=y_weight)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        gradients = [torch.autograd.grad(v, x)[0] for v in (got, want)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)
        assert len(calls) == made

    check(1, y)
    check(1, y)
    y.mul_(1.5)
    check(2, y)
    check(2, y)
    check(3, y.clone())
    check(4, y)
    check(5, y, weight)
    check(5, y, weight)
    weight[3] = 4.0
    check(6, y, weight)
    check(7, y)
    check(7, y)
    check(7, y.clone().requires_grad_())
    assert pickle.loads(pickle.dumps(loss))._kept is None
    loss = copy.deepcopy(loss)
    check(8, y)


def test_a_captured_call_makes_the_term_itself(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replayed with whatever y then holds; and its own is no number yet, so that nobody else may take it."""
    loss, x, y = nn.MMDLoss(cache_y=True), torch.randn(9, 4), torch.randn(7, 4)
    loss(x, y)
    with monkeypatch.context() as capture:
        capture.setattr(module, "_captured", lambda t: True)
        loss(x, y)
        kept = loss._kept
        loss(x, y.clone())
        assert len(calls) == 3
        assert loss._kept is kept
    loss(x, y)
    assert len(calls) == 3


def test_a_kept_term_skips_the_pairs_of_y(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = ops.value
    monkeypatch.setattr(ops, "value", lambda *a: seen.append(a[9:]) or real(*a))
    loss = nn.MMDLoss(cache_y=True)
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    loss(x, y)
    loss(x, y)
    assert seen == [(1,), (5,), (5,)]


def test_options_are_checked_at_once() -> None:
    with pytest.raises(TypeError, match=r"group: expected a torch\.distributed process group"):
        nn.MMDLoss(group="world")
    with pytest.raises(ValueError, match="estimator: expected one of"):
        nn.MMDLoss(estimator="mean")
    with pytest.raises(ValueError, match="kernel: expected one of"):
        nn.MMDLoss("gauss")
    with pytest.raises(TypeError, match=r"y: expected a torch\.Tensor"):
        nn.MMDLoss(cache_y=True)(torch.zeros(3, 2), 3)
    with pytest.raises(ValueError, match="y: expected at least 2 points"):
        nn.MMDLoss(cache_y=True)(torch.zeros(3, 2), torch.zeros(1, 2))


def test_a_kept_term_is_of_its_options() -> None:
    x, y = torch.randn(8, 3), torch.randn(9, 3)
    loss = nn.MMDLoss(cache_y=True)
    loss(x, y)
    loss.kernel = F.RBF((0.5,))
    assert torch.allclose(loss(x, y), F.mmd(x, y, kernel=F.RBF((0.5,))), atol=1e-6)
    loss.estimator = "biased"
    assert torch.allclose(loss(x, y), F.mmd(x, y, kernel=F.RBF((0.5,)), estimator="biased"), atol=1e-6)


def test_a_kept_term_is_of_its_numbers() -> None:
    """Of a y that got other numbers, another place or dtype without a change that torch counts."""
    x, holder = torch.randn(8, 3), torch.nn.Linear(3, 9, bias=False).requires_grad_(False)
    y, loss = holder.weight, nn.MMDLoss(cache_y=True)

    def check(points: torch.Tensor = x) -> None:
        torch.testing.assert_close(loss(points, y), F.mmd(points, y), rtol=1e-4, atol=1e-6)

    check()
    version = y._version
    y.data = torch.randn(9, 3) + 5
    check()
    y.data = y.data[:4]
    check()
    y.data = y.data.T.contiguous().T
    check()
    holder.double()
    check(x.double())
    assert y._version == version
