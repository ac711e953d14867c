"""LPIPS in the place of lpips.LPIPS: state dicts with their shapes, heads of every name, bad input, ways to run it."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from fastgen import check
from fastgen.functional import perceptual as functional
from fastgen.nn import LPIPS, Features, trunk, trunks
from fastgen.nn.perceptual_lpips import HEADS

# What lpips 0.1.4 saves: the convolutions of each slice as (index, output, input, kernel), the heads' channels.
CONVOLUTIONS = {
    "alex": [
        ("1.0", 64, 3, 11),
        ("2.3", 192, 64, 5),
        ("3.6", 384, 192, 3),
        ("4.8", 256, 384, 3),
        ("5.10", 256, 256, 3),
    ],
    "vgg": [
        *(("1.0", 64, 3, 3), ("1.2", 64, 64, 3), ("2.5", 128, 64, 3), ("2.7", 128, 128, 3), ("3.10", 256, 128, 3)),
        *(("3.12", 256, 256, 3), ("3.14", 256, 256, 3), ("4.17", 512, 256, 3), ("4.19", 512, 512, 3)),
        *(("4.21", 512, 512, 3), ("5.24", 512, 512, 3), ("5.26", 512, 512, 3), ("5.28", 512, 512, 3)),
    ],
    "squeeze": [
        ("1.0", 64, 3, 3),
        *(
            (f"{at}.{part}", width, channels, kernel)
            for at, into, squeeze, expand in (
                *(("2.3", 64, 16, 64), ("2.4", 128, 16, 64), ("3.6", 128, 32, 128), ("3.7", 256, 32, 128)),
                *(("4.9", 256, 48, 192), ("5.10", 384, 48, 192), ("6.11", 384, 64, 256), ("7.12", 512, 64, 256)),
            )
            for part, width, channels, kernel in (
                ("squeeze", squeeze, into, 1),
                ("expand1x1", expand, squeeze, 1),
                ("expand3x3", expand, squeeze, 3),
            )
        ),
    ],
}
CHANNELS = {
    "alex": (64, 192, 384, 256, 256),
    "vgg": (64, 128, 256, 512, 512),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}


def saved_by_lpips(net: str, dropout: bool = True) -> dict[str, torch.Tensor]:
    """A state dict with the keys and shapes of lpips.LPIPS(net=net).state_dict(), of random numbers."""
    state = {"scaling_layer.shift": torch.randn(1, 3, 1, 1), "scaling_layer.scale": torch.rand(1, 3, 1, 1) + 0.3}
    for at, width, channels, kernel in CONVOLUTIONS[net]:
        state[f"net.slice{at}.weight"] = torch.randn(width, channels, kernel, kernel) / (channels**0.5 * kernel)
        state[f"net.slice{at}.bias"] = torch.randn(width)
    for k, channels in enumerate(CHANNELS[net]):
        weight = torch.rand(1, channels, 1, 1)
        state[f"lin{k}.model.{int(dropout)}.weight"] = state[f"lins.{k}.model.{int(dropout)}.weight"] = weight
    return state


@pytest.mark.parametrize("net", list(CHANNELS))
def test_a_saved_state_loads_strictly(net):
    state = saved_by_lpips(net)
    ours = LPIPS(pretrained=False, net=net, pnet_rand=True)
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == {k: tuple(v.shape) for k, v in state.items()}
    ours.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    x = torch.rand(1, 3, 40, 40)
    assert ours(x, x.flip(3)).isfinite().all()  # the heads are no longer random


def test_heads_under_every_name():
    state = saved_by_lpips("alex")
    want = [state[f"lin{k}.model.1.weight"].flatten() for k in range(5)]
    renamed = {key.replace("model.1", "model.0"): value for key, value in state.items()}
    once = {key: value for key, value in state.items() if not key.startswith("lins.")}  # taming keeps one list
    twice = {key: value for key, value in state.items() if not key.startswith("lin") or key.startswith("lins.")}
    for given in (state, renamed, once, twice):
        for dropout in (True, False):
            ours = LPIPS(pretrained=False, pnet_rand=True, use_dropout=dropout)
            ours.load_state_dict(given)
            assert all(torch.equal(a, b) for a, b in zip(ours.weights(), want, strict=True))
            nested = nn.ModuleDict({"loss": LPIPS(pretrained=False, pnet_rand=True, use_dropout=dropout)})
            nested.load_state_dict({f"loss.{key}": value for key, value in given.items()})
            assert torch.equal(nested["loss"].weights()[3], want[3])
    assert len(once) == len(state) - 5
    assert list(given) == list(twice)  # the caller's own dict is left alone


def test_missing_heads_are_refused():
    state = saved_by_lpips("alex")
    some = {key: value for key, value in state.items() if "3.model" not in key}
    for strict in (True, False):
        with pytest.raises(check.UserError, match=r"heads of 5 layers, lacks lin3\.model\.1\.weight$"):
            LPIPS(pretrained=False, pnet_rand=True).load_state_dict(some, strict=strict)
    none = {key: value for key, value in state.items() if not key.startswith("lin")}
    ours = LPIPS(pretrained=False, pnet_rand=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*lin0\.model\.1\.weight"):
        ours.load_state_dict(none)
    ours.load_state_dict(none, strict=False)  # a trunk alone is no mistake, but heads are still missing
    with pytest.raises(ValueError, match="the heads are random"):
        ours(torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 40))
    LPIPS(pnet_rand=True).load_state_dict(none, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        LPIPS(pnet_rand=True, net="vgg").load_state_dict(saved_by_lpips("alex"), strict=False)


def test_files_of_another_net(tmp_path):
    with pytest.raises(check.UserError, match=r"v0\.1_vgg\.safetensors: expected lin1\.model\.1\.weight with 192"):
        LPIPS(pnet_rand=True, model_path=HEADS / "v0.1_vgg.safetensors")
    state = {f"features.{key}": value for key, value in trunks.alexnet_features().state_dict().items()}
    with pytest.raises(check.UserError, match="the state dict: lacks "):
        LPIPS(net="vgg", trunk_weights=state)


@pytest.mark.parametrize(("net", "least"), [("alex", 31), ("vgg", 16), ("squeeze", 17)])
def test_images_too_small(net, least):
    ours = LPIPS(net=net, pnet_rand=True)
    assert ours(torch.rand(1, 3, least, least + 5), torch.rand(1, 3, least, least + 5)).isfinite().all()
    small = torch.rand(1, 3, least + 5, least - 1)
    with pytest.raises(
        ValueError, match=rf"in0: expected sides of at least {least} for net='{net}', got \[{least + 5}"
    ):
        ours(small, small)
    with pytest.raises(ValueError, match=f"images: expected sides of at least {least}"):
        ours.target(small)


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "squeezenet1_1"])
def test_least_sides_are_the_least(name):
    network = trunk(name, "random")
    for layer, least in network.least.items():
        if layer.startswith("pool") or layer == network.layers[0]:
            assert network(torch.rand(1, 1, least, least), [layer])[0].numel() > 0
            if least > 1:
                with pytest.raises(RuntimeError):
                    network.run(torch.rand(1, 3, least - 1, least - 1), (layer,))
                with pytest.raises(
                    ValueError, match=rf"x: expected sides of at least {least} for layers \['{layer}'\]"
                ):
                    network(torch.rand(1, 1, least - 1, least), [layer])


def test_a_warning_once_for_images_out_of_range():
    good, bytes_ = torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 40) * 255
    for normalize, bad, expected in (
        (False, bytes_, r"\[-1, 1\]"),
        (True, good * 2 - 1, r"\[0, 1\] with normalize=True"),
    ):
        ours = LPIPS(pnet_rand=True)
        with pytest.warns(UserWarning, match=f"LPIPS: expected images in {expected}.*got values from"):
            ours(good, bad, normalize=normalize)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours(good, bad, normalize=normalize)  # once
            LPIPS(pnet_rand=True)(good, good * 2 - 1)
            LPIPS(pnet_rand=True)(good, good, normalize=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": False, "model_path": "a"}, "model_path: expected None with pretrained=False"),
        ({"lpips": False, "model_path": "a"}, "model_path: expected None with pretrained=True, lpips=False"),
        ({"trunk_weights": {}}, "trunk_weights: expected None with pnet_rand=True"),
    ],
)
def test_arguments_that_would_not_be_read(options, message):
    with pytest.raises(ValueError, match=message):
        LPIPS(pnet_rand=True, **options)


def test_inside_a_target():
    ours = LPIPS(pnet_rand=True)
    x, y = torch.rand(2, 3, 40, 40, requires_grad=True), torch.rand(2, 3, 40, 40)
    want = ours(x, y)
    with ours.target(y) as target:
        assert torch.equal(ours(x), want)
        value, shares = ours(x, retPerLayer=True)
        assert torch.equal(value, want)
        assert len(shares) == 5
        with ours.target(y[:1]):
            torch.testing.assert_close(ours(x)[:1], want[:1])
        assert torch.equal(ours(x), want)
        with target[1:]:
            torch.testing.assert_close(ours(x[1:]), want[1:])
    with pytest.raises(ValueError, match="in1: expected images, or features"):
        ours(x)
    stored = pickle.loads(pickle.dumps(target))  # a file holds maps, not the network
    assert torch.equal(ours(x, stored), want)
    with pytest.raises(ValueError, match="target: expected features straight from"), stored:
        pass
    with pytest.raises(ZeroDivisionError), target:
        raise ZeroDivisionError
    assert ours.entered == []
    assert torch.equal(ours(x, Features(target.maps)), want)


def test_backward_again_and_exact_zero():
    ours = LPIPS(pnet_rand=True)
    x, y = torch.rand(2, 3, 40, 40, requires_grad=True), torch.rand(2, 3, 40, 40, requires_grad=True)
    value = ours(x, y)
    value.sum().backward(retain_graph=True)
    first = x.grad.clone(), y.grad.clone()
    value.sum().backward()
    for grad, once in zip((x.grad, y.grad), first, strict=True):
        assert torch.equal(grad, once * 2)
        assert once.abs().sum() > 0
    (second,) = torch.autograd.grad(ours(x, x.detach().clone()).sum(), x)
    assert torch.equal(second, torch.zeros_like(second))


@pytest.mark.parametrize("net", ["alex", "squeeze"])
@pytest.mark.parametrize("options", [{"channels_last": True}, {"one_batch": True}], ids=str)
def test_ways_to_run(net, options):
    plain = LPIPS(net=net, pnet_rand=True)
    other = LPIPS(net=net, pnet_rand=True, **options)
    other.load_state_dict(plain.state_dict())
    assert list(other.state_dict()) == list(plain.state_dict())
    x, y = torch.rand(3, 3, 40, 44, requires_grad=True), torch.rand(3, 1, 40, 44)
    for normalize in (False, True):
        a, b = plain(x, y, normalize=normalize), other(x, y, normalize=normalize)
        torch.testing.assert_close(b, a, rtol=1e-4, atol=0)
        grads = [torch.autograd.grad(v.sum(), x)[0] for v in (a, b)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(other(x, y), plain(x, y), rtol=1e-4, atol=0)
        torch.testing.assert_close(other(x, y[:1]), plain(x, y[:1]), rtol=1e-4, atol=0)
        assert torch.equal(other(x, x.clone()), torch.zeros(3, 1, 1, 1))
        assert torch.equal(other(x, other.target(x)), torch.zeros(3, 1, 1, 1))
    if "channels_last" in options:
        assert all(f.is_contiguous(memory_format=torch.channels_last) for f in other.features(x).maps)
    torch.testing.assert_close(copy.deepcopy(other)(x, y), plain(x, y), rtol=1e-4, atol=0)


def test_one_batch_is_one_pass():
    ours = LPIPS(pnet_rand=True, one_batch=True)
    batches = []
    ours.net.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    x, y = torch.rand(3, 3, 40, 40), torch.rand(1, 3, 40, 40)
    ours(x, y)
    ours(x.requires_grad_(), y.requires_grad_())
    assert batches == [4, 4]
    ours(x, y.detach())  # the target's half of a backward pass would be wasted
    assert batches == [4, 4, 1, 3]


def test_gradients_of_layers_are_made_when_they_are_used(monkeypatch):
    """One by one between the trunk's own backward passes: together they would be a fifth of a step's memory."""
    ours, order = LPIPS(pnet_rand=True), []
    made = functional.ops.lpips_layer_backward
    recorded = lambda *arguments: (order.append("layer"), made(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(functional.ops, "lpips_layer_backward", recorded)

    def watch(k, f):
        if f.requires_grad:
            f.register_hook(lambda grad: order.append(k))

    for k, part in enumerate(ours.net.children()):
        part.register_forward_hook(lambda module, arguments, f, k=k: watch(k, f))
    x, y = torch.rand(1, 3, 40, 40, requires_grad=True), torch.rand(1, 3, 40, 40)
    for in1 in (y, ours.target(y)):
        order.clear()
        ours(x, in1).sum().backward()
        assert order == ["layer", 4, "layer", 3, "layer", 2, "layer", 1, "layer", 0]


def test_cuda_graphs_need_cuda():
    x = torch.rand(1, 3, 40, 40)
    with pytest.raises(ValueError, match=r"in0: expected images on a CUDA device for cuda_graph=True, got float32"):
        LPIPS(pnet_rand=True, cuda_graph=True)(x, x)
    with pytest.raises(ValueError, match="x: expected images on a CUDA device for cuda_graph=True"):
        trunk("alexnet", "random", cuda_graph=True)(x, ["conv1"])


def test_compiled(monkeypatch):
    whole = nn.Module.compile  # the compiler behind it is torch's affair
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None, **rest: whole(self, backend="aot_eager", **rest))
    torch._dynamo.reset()
    plain, other = LPIPS(pnet_rand=True), LPIPS(pnet_rand=True, compile=True)
    other.load_state_dict(plain.state_dict())
    assert list(other.state_dict()) == list(plain.state_dict())
    x, y = torch.rand(2, 3, 31, 31, requires_grad=True), torch.rand(2, 3, 31, 31)
    a, b = plain(x, y), other(x, y)
    torch.testing.assert_close(b, a, rtol=1e-4, atol=0)
    grads = [torch.autograd.grad(v.sum(), x)[0] for v in (a, b)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-7)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert twin.net._compiled_call_impl is not None
        torch.testing.assert_close(twin(x, y), a, rtol=1e-4, atol=0)
    assert copy.deepcopy(plain).net._compiled_call_impl is None


def test_trunk_options(monkeypatch):
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None, **rest: whole(self, backend="aot_eager", **rest))
    torch._dynamo.reset()
    plain = trunk("squeezenet1_1", "random")
    x, layers = torch.rand(2, 1, 32, 32), ["fire3", "relu1"]
    for options in ({"channels_last": True}, {"compile": True}):
        other = copy.deepcopy(trunk("squeezenet1_1", plain.state_dict(), **options))
        assert (other._compiled_call_impl is not None) == ("compile" in options)
        for a, b in zip(other(x, layers), plain(x, layers), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            if "channels_last" in options:
                assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_cuda_graph(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # each rounding may turn a ReLU
    plain = LPIPS(pnet_rand=True).cuda()
    graph = LPIPS(pnet_rand=True, cuda_graph=True, channels_last=True).cuda()
    graph.load_state_dict(plain.state_dict())
    for _ in range(4):  # warm up, record, replay
        x, y = torch.rand(2, 3, 64, 64, device="cuda", requires_grad=True), torch.rand(2, 3, 64, 64, device="cuda")
        values = [f(x, y) for f in (plain, graph)]
        torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=1e-6)
        grads = [torch.autograd.grad(v.sum(), x)[0] for v in values]
        assert (grads[1] - grads[0]).norm() <= 1e-2 * grads[0].norm()
        kept = graph.target(y)
        with torch.no_grad():
            assert torch.equal(graph(y, kept), torch.zeros(2, 1, 1, 1, device="cuda"))
