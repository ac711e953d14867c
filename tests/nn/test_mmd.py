import pytest
import torch

from fastgen import functional as F
from fastgen import nn


def test_the_module_is_the_function() -> None:
    x, y = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4)
    for options in ({}, {"kernel": F.RBF((2.0,)), "estimator": "biased"}, {"kernel": "polynomial"}):
        loss = nn.MMDLoss(**options)
        assert torch.equal(loss(x, y), F.mmd(x, y, **options))
    assert "IMQ" in repr(nn.MMDLoss())
    assert not list(nn.MMDLoss().parameters())


def test_options_are_checked_at_once() -> None:
    with pytest.raises(NotImplementedError, match="cache_y=True"):
        nn.MMDLoss(cache_y=True)
    with pytest.raises(NotImplementedError, match="group"):
        nn.MMDLoss(group="world")
    with pytest.raises(ValueError, match="estimator: expected one of"):
        nn.MMDLoss(estimator="mean")
    with pytest.raises(ValueError, match="kernel: expected one of"):
        nn.MMDLoss("gauss")
