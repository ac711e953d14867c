"""The usual idioms of functional training: functional_call, and gradients in the parameters by torch.func."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp

from fastgen import functional as F
from fastgen.nn import LPIPS, MMDLoss, PerceptualLoss, trunks

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def steps(model: nn.Module, loss, batches, functional: bool) -> list[Tensor]:
    """Three of gradient descent."""
    values, parameters = [], dict(model.named_parameters())
    for batch in batches:
        if functional:
            frozen = {name: p.detach() for name, p in parameters.items()}
            gradients, value = grad_and_value(lambda p, b: loss(functional_call(model, p, (b,)), b))(frozen, batch)
        else:
            value = loss(functional_call(model, parameters, (batch,)), batch)
            found = torch.autograd.grad(value, list(parameters.values()))
            gradients = dict(zip(parameters, found, strict=True))
        parameters = {k: (p - 0.05 * gradients[k]).detach().requires_grad_() for k, p in parameters.items()}
        values.append(value.detach())
    return [*values, *parameters.values()]


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
def test_training_by_mmd(dtype: torch.dtype, weighted: bool) -> None:
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    prior, importance = torch.randn(12, 3, dtype=dtype), torch.rand(9, dtype=dtype)
    batches = [torch.randn(9, 6, dtype=dtype) for _ in range(3)]
    for module in (MMDLoss(), MMDLoss(F.RBF((1.0, 2.0)), cache_y=True)):

        def loss(codes: Tensor, _: Tensor, module=module) -> Tensor:
            return module(codes, prior, x_weight=importance if weighted else None)

        got, want = (steps(encoder, loss, batches, functional) for functional in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert not torch.equal(got[0], got[2])


def test_a_cached_term_belongs_to_no_transform() -> None:
    """Neither is a sample, made inside, taken for a constant, nor a sum of one that is over for a number of now."""
    x, y = torch.randn(7, 2), torch.randn(5, 2)
    loss, plain = MMDLoss(cache_y=True), MMDLoss()
    for _ in range(2):
        assert torch.equal(grad(loss)(x, y), grad(plain)(x, y))
        torch.testing.assert_close(loss(x, y), plain(x, y), rtol=1e-5, atol=1e-6)
        got, want = (
            grad(lambda b, module=module: grad(lambda a: module(a, 2 * b))(x).square().sum())(y)
            for module in (loss, plain)
        )
        assert torch.equal(got, want)
    for a in (x, y):
        got, want = (
            grad(lambda b, module=module: grad(lambda s: (s * module(2 * b, 3 * b.flip(0)[:5])).sum())(torch.ones(())))(
                a
            )
            for module in (loss, plain)
        )
        assert torch.equal(got, want)


def trunk(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3)).to(dtype)


@DTYPES
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_perceptual_loss_and_its_parameters(dtype: torch.dtype, distance: str, oracles) -> None:
    oracle, network = oracles("perceptual"), trunk(dtype)
    options = {"pixel_weight": 0.5, "style_weight": 2.0, "style_layers": ["2"]}
    loss = PerceptualLoss(network, layers=["0", "2"], distance=distance, reduction="mean", **options)
    x, y = torch.rand(2, 3, 8, 7, dtype=dtype), torch.rand(2, 3, 8, 7, dtype=dtype)
    leaf, parameters = x.clone().requires_grad_(), dict(loss.named_parameters())
    want = torch.autograd.grad(loss(leaf, y), [*parameters.values(), leaf])
    frozen = {name: p.detach() for name, p in parameters.items()}
    gradients, gx = grad(lambda p, a: functional_call(loss, p, (a, y)), argnums=(0, 1))(frozen, x)
    assert all(torch.equal(a, b) for a, b in zip((*gradients.values(), gx), want, strict=True))

    wide = trunk(torch.float64)
    wide.load_state_dict(network.state_dict())
    leaf = x.double().clone().requires_grad_()
    ours, theirs = ([images, wide[0](images), wide(images)] for images in (leaf, y.double()))
    style = [[oracle.gram(maps[2])] for maps in (ours, theirs)]
    naive = oracle.feature_distance(ours, theirs, distance, [0.5, 1.0, 1.0])
    naive = naive + oracle.feature_distance(*style, "l2", [2.0 * 25])
    exact = torch.autograd.grad(naive.mean(), [*wide.parameters(), leaf])
    for a, b in zip((*gradients.values(), gx), exact, strict=True):
        tight = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(a.double(), b, **tight)


@pytest.mark.parametrize("target", ["images", "cached"])
def test_lpips(target: str, oracles) -> None:
    """By image, by its heads' weights, and twice."""
    features = trunks.TORCHVISION["alexnet"][0]()
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    lpips = LPIPS(net="alex", trunk_weights={f"features.{k}": v for k, v in features.state_dict().items()})
    lpips = lpips.double()
    x, y = (torch.rand(2, 3, 40, 35, dtype=torch.float64) * 2 - 1 for _ in range(2))
    other = lpips.target(y) if target == "cached" else y
    heads = {name: p.detach() for name, p in lpips.named_parameters() if name.startswith("lin")}
    assert len(heads) == 5

    def loss(p: dict[str, Tensor], a: Tensor) -> Tensor:
        return functional_call(lpips, p, (a, other)).sum()

    leaf = x.clone().requires_grad_()
    leaves = {name: p.clone().requires_grad_() for name, p in heads.items()}
    want = torch.autograd.grad(loss(leaves, leaf), [*leaves.values(), leaf])
    gradients, gx = grad(loss, argnums=(0, 1))(heads, x)
    assert all(torch.equal(a, b) for a, b in zip((*gradients.values(), gx), want, strict=True))
    assert torch.equal(grad(lambda a: lpips(a, other).sum())(x), torch.autograd.grad(lpips(leaf, other).sum(), leaf)[0])
    value, pull = vjp(lambda a: lpips(a, other), x)
    assert torch.equal(pull(torch.ones_like(value))[0], gx)

    naive = oracles("perceptual").EagerLPIPS("alex", [head.flatten() for head in heads.values()], "0.1", True).double()
    naive.features.load_state_dict(features.state_dict())
    (exact,) = torch.autograd.grad(naive(leaf, y, eps_mode="lpips")[0].sum(), leaf)
    torch.testing.assert_close(gx, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))  # float32 mean and std

    second = grad(lambda a: grad(lambda b: lpips(b, other).sum())(a).square().sum())(x)
    (first,) = torch.autograd.grad(lpips(leaf, other).sum(), leaf, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), leaf)[0], rtol=1e-9, atol=1e-15)
    with pytest.raises(NotImplementedError, match="fastgen lpips_distance: vmap is not built"):
        torch.vmap(lpips, in_dims=(0, None))(x[None], y)
