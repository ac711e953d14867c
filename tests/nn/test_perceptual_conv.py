"""The trunks' convolutions: packed weights give nn.Conv2d's numbers, and notice what changes them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgen.nn import LPIPS
from fastgen.nn import trunk as nn_trunk
from fastgen.nn.trunks_conv import Conv, scaled, sequence, takes_relu
from fastgen.ops import backend

SHAPES = [
    *((3, 64, 3, 1, 1), (16, 48, 3, 1, 1), (5, 7, 5, 1, 2), (16, 8, 1, 1, 0), (4, 6, 3, 2, 0), (3, 9, 11, 4, 2)),
    (4, 4, 3, 1, 0),
]


def frozen(shape: tuple[int, ...]) -> Conv:
    channels, width, kernel, stride, padding = shape
    return Conv(channels, width, kernel, stride=stride, padding=padding).requires_grad_(False)


def plain(conv: Conv, x: torch.Tensor) -> torch.Tensor:
    """In float64."""
    weight, bias = conv.weight.double(), conv.bias.double()
    return nn.functional.conv2d(x.double(), weight, bias, conv.stride, conv.padding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_values_and_gradients(shape, layout):
    conv = frozen(shape)
    x = torch.randn(2, shape[0], 13, 17).contiguous(memory_format=layout).requires_grad_()
    y, want = conv(x), plain(conv, x)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(want.shape)
    (grad,) = torch.autograd.grad(y, x, upstream)
    (expected,) = torch.autograd.grad(want, x, upstream.double())
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(conv(x), y)
    with torch.no_grad():
        assert torch.equal(conv(x), y)
    other = torch.randn(3, shape[0], 19, 12)  # packed for another size
    torch.testing.assert_close(conv(other).double(), plain(conv, other), rtol=1e-4, atol=1e-5)
    assert conv(x[:0]).shape == (0, *want.shape[1:])
    torch.testing.assert_close(conv.double()(x.double()), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 7, 5, 1, 2), (16, 8, 1, 1, 0), (4, 6, 3, 1, 0), (64, 48, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("sides", [(4, 4), (3, 5), (8, 2), (5, 3)], ids=str)
def test_small_maps_are_a_matrix_product_of_patches(shape, sides):
    conv = frozen(shape)
    kernel, padding = shape[2], shape[4]
    if min(sides) + 2 * padding < kernel:
        sides = (5, 3)
    for batch in (1, 3):  # packed for another size
        x = torch.randn(batch, shape[0], *sides, requires_grad=True)
        y, want = conv(x), plain(conv, x)
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
        assert y.is_contiguous(memory_format=torch.channels_last)
        upstream = torch.randn(want.shape)
        (grad,) = torch.autograd.grad(y.relu_(), x, upstream)  # a network's ReLUs work in place
        (expected,) = torch.autograd.grad(want.relu(), x, upstream.double())
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    assert (False, "product") in conv._packs
    x = torch.randn(1, shape[0], 6, 6)  # and then a map that is not small
    torch.testing.assert_close(conv(x).double(), plain(conv, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sides", [(4, 4), (12, 11)], ids=str)
def test_a_relu_that_is_taken_along(shape, sides):
    """Whatever makes the convolution: values, gradients, many gradients at once, what is not a number."""
    conv = frozen(shape)
    if min(sides) + 2 * shape[4] < shape[2]:
        sides = (11, 11)
    x = torch.randn(3, shape[0], *sides, requires_grad=True)
    y, want = conv(x, relu=True), plain(conv, x).relu()
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(2, *want.shape)
    (grads,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    for one, grad in zip(upstream, grads, strict=True):
        (expected,) = torch.autograd.grad(want, x, one.double(), retain_graph=True)
        (alone,) = torch.autograd.grad(y, x, one, retain_graph=True)
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    assert conv(torch.full_like(x, float("nan")), relu=True).isnan().any()
    conv.requires_grad_()
    torch.testing.assert_close(conv(x, relu=True).double(), want, rtol=1e-4, atol=1e-5)


def test_a_sequence_is_that_of_its_modules():
    """A ReLU behind a convolution is taken along, unless a hook would see that."""
    modules = nn.Sequential(frozen((16, 32, 3, 1, 1)), nn.ReLU(inplace=True), nn.ReLU(), frozen((32, 16, 3, 1, 1)))
    x = torch.randn(2, 16, 9, 8)
    want = plain(modules[3], plain(modules[0], x).relu().float())
    calls: list[str] = []
    real = nn.ReLU.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", lambda self, x: calls.append("relu") or real(self, x))
        torch.testing.assert_close(sequence(modules, x).double(), want, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1
        seen: list[torch.Tensor] = []

        def keep(*given: object) -> None:
            seen.append(given[-1].clone())

        before = torch.nn.modules.module.register_module_forward_hook
        for hook, negative in (
            (lambda: modules[0].register_forward_hook(keep), True),
            (lambda: modules[1].register_forward_hook(keep), False),
            (lambda: before(lambda module, x, y: keep(y) if module is modules[0] else None), True),
        ):
            handle = hook()
            torch.testing.assert_close(sequence(modules, x).double(), want, rtol=1e-4, atol=1e-5)
            handle.remove()
            assert bool((seen[-1] < 0).any()) == negative
        for module in modules[:2]:
            for register in (module.register_full_backward_hook, module.register_full_backward_pre_hook):
                assert takes_relu(modules[0], modules[1])
                handle = register(lambda *_: None)
                assert not takes_relu(modules[0], modules[1])
                handle.remove()
        assert len(calls) == 7
        modules[1].forward = lambda x: x.clamp(0, 1e9)  # of this one alone
        torch.testing.assert_close(sequence(modules, x).double(), want, rtol=1e-4, atol=1e-5)
        modules[1] = type("Other", (nn.ReLU,), {"forward": lambda self, x: x.relu() * 2})()
        want = plain(modules[3], 2 * plain(modules[0], x).relu().float())
        torch.testing.assert_close(sequence(modules, x).double(), want, rtol=1e-4, atol=1e-5)


def test_hooks_on_a_fire_see_what_is_before_its_relus():
    torch.manual_seed(0)
    trunk = nn_trunk("squeezenet1_1", "random")
    fire = trunk.features[3]
    x, seen = torch.rand(2, 3, 40, 40, requires_grad=True), []
    (want,) = trunk(x, ("fire2",))
    for conv in (fire.squeeze, fire.expand1x1, fire.expand3x3):
        conv.register_forward_hook(lambda module, x, y: seen.append(y))
        conv.register_full_backward_hook(lambda module, given, returned: seen.append(returned[0]))
    (got,) = trunk(x, ("fire2",))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert all((y < 0).any() for y in seen)
    got.sum().backward()
    assert len(seen) == 6


def test_a_map_that_is_written_to_is_noticed_on_the_way_back():
    trunk = nn_trunk("vgg16", "random")
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    first, last = trunk(x, ("relu1_2", "relu2_1"))
    first.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last.sum().backward()


def test_what_the_kernel_cannot_take_is_left_to_torch():
    """Turned signs, a default device, a mode that watches, the reference forced, a bias that is none."""
    conv, x = frozen((16, 32, 3, 1, 1)), torch.randn(2, 16, 9, 8)
    want = plain(conv, x)
    torch.testing.assert_close(conv(torch._neg_view(-x)).double(), want, rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        torch.testing.assert_close(conv(x).double(), want, rtol=1e-4, atol=1e-5)
    assert set(conv._packs) == {(False, "convolution"), (False, "transformed")}
    leaf = x.clone().requires_grad_()
    y = conv(leaf, relu=True)
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, leaf, upstream, retain_graph=True)
    y.register_hook(lambda g: torch._neg_view(-g))
    torch.testing.assert_close(torch.autograd.grad(y, leaf, upstream)[0], grad, rtol=1e-4, atol=1e-4)
    del conv._packs
    with backend.force("reference"):
        torch.testing.assert_close(conv(x).double(), want, rtol=1e-4, atol=1e-5)
    assert set(conv._packs) == {(False, "convolution")}
    traced = torch.fx.experimental.proxy_tensor.make_fx(conv)(x)
    torch.testing.assert_close(traced(2 * x).double(), plain(conv, 2 * x), rtol=1e-4, atol=1e-5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t):
        y = conv(leaf, relu=True)
    with pytest.raises(RuntimeError, match="mask: expected float32"):
        y.sum().backward()
    for bias in (torch.randn(1), torch.randn(32, dtype=torch.float64)):
        conv.bias = nn.Parameter(bias, requires_grad=False)
        with pytest.raises(RuntimeError):
            conv(x)


@pytest.mark.parametrize("shape", [(3, 4, 1, 1, 1), (3, 4, 3, 1, 4)], ids=str)
def test_a_padding_as_wide_as_the_kernel_is_not_packed(shape):
    """The way back would have to pad by less than nothing."""
    conv, x = frozen(shape), torch.randn(2, 3, 6, 5, requires_grad=True)
    torch.testing.assert_close(conv(x).double(), plain(conv, x), rtol=1e-4, atol=1e-5)
    got, want = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (conv, lambda x: plain(conv, x)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5, 3, 1, 1), (16, 32, 3, 1, 1), (16, 8, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_twice_differentiable(shape, relu):
    conv = frozen(shape)
    x = torch.randn(1, shape[0], 6, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(conv(x, relu=relu).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    leaf = x.detach().double().requires_grad_()
    made = plain(conv, leaf)
    (grad64,) = torch.autograd.grad((made.relu() if relu else made).square().sum(), leaf, create_graph=True)
    (want,) = torch.autograd.grad(grad64.square().sum(), leaf)
    torch.testing.assert_close(second.double(), want, rtol=1e-4, atol=1e-3)


def anew(conv: Conv) -> None:
    """Other weights where the old ones lay, as far as the allocator does that."""
    shape = conv.weight.shape
    conv.weight = None
    conv.weight = nn.Parameter(torch.randn(shape), requires_grad=False)


@pytest.mark.parametrize(("channels", "width"), [(3, 8), (16, 32)])
def test_weights_that_change_are_packed_again(channels, width):
    conv = frozen((channels, width, 3, 1, 1))
    shape = conv.weight.shape
    x = torch.randn(1, channels, 8, 8, requires_grad=True)
    torch.autograd.grad(conv(x).sum(), x)
    for change in (
        lambda: conv.weight.mul_(2),
        lambda: conv.load_state_dict({"weight": torch.randn(shape), "bias": torch.randn(width)}),
        lambda: setattr(conv, "weight", nn.Parameter(torch.randn(shape), requires_grad=False)),
        lambda: setattr(conv.weight, "data", torch.randn(shape)),
        lambda: conv.weight.data.mul_(2),  # past autograd
        lambda: anew(conv),
    ):
        with torch.no_grad():
            change()
        torch.testing.assert_close(conv(x).double(), plain(conv, x), rtol=1e-4, atol=1e-5)
        got, want = (torch.autograd.grad(f(x).sum(), x)[0] for f in (conv, lambda x: plain(conv, x)))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    y = conv(x)
    with torch.no_grad():
        conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_copies_and_trained_ones():
    conv = frozen((3, 8, 3, 1, 1))
    x = torch.randn(2, 3, 8, 8)
    y = conv(x)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x), y)
        assert list(other.state_dict()) == ["weight", "bias"]
    conv.requires_grad_()
    conv(x).square().sum().backward()
    want = copy.deepcopy(conv).double()
    plain(want, x).square().sum().backward()
    got = conv.weight.grad
    conv.weight.grad = None
    conv.double()(x.double()).square().sum().backward()
    torch.testing.assert_close(got.double(), conv.weight.grad, rtol=1e-4, atol=1e-3)


def test_where_nothing_is_packed():
    """Under autocast, a transform, forward mode, without oneDNN: nn.Conv2d as it is."""
    conv, x = frozen((3, 8, 3, 1, 1)), torch.randn(2, 3, 8, 8)
    want = plain(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    mapped = torch.func.vmap(lambda one: conv(one[None])[0])(x)
    torch.testing.assert_close(mapped.double(), want, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(conv, (x,), (torch.ones_like(x),))
    slope = plain(conv, torch.ones_like(x)) - plain(conv, torch.zeros_like(x))
    torch.testing.assert_close(tangent.double(), slope, rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = conv(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    enabled = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        torch.testing.assert_close(conv(x).double(), want, rtol=1e-4, atol=1e-5)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    assert "_packs" not in vars(conv)
    conv(x)
    assert set(vars(conv)["_packs"]) == {(False, "convolution")}


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_scaling_goes_into_the_first_convolution_where_it_does_not_pad(padding, channels):
    conv = frozen((3, 8, 3, 2, padding)).double()
    x, gain, offset = (
        torch.randn(2, channels, 9, 8).double(),
        torch.rand(3, 1, 1).double(),
        torch.randn(3, 1, 1).double(),
    )
    inputs = []
    conv.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    got = scaled(conv, x, gain, offset)
    torch.testing.assert_close(got, plain(conv, gain * x + offset), rtol=1e-12, atol=1e-12)
    assert len(inputs) == padding  # folded, the images never are scaled


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_the_nets_pack(net):
    lpips = LPIPS(net=net, pnet_rand=True)
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    lpips(x, x.detach().flip(3)).sum().backward()
    convolutions = [m for m in lpips.net.modules() if isinstance(m, nn.Conv2d)]
    packed = [m for m in convolutions if {back for back, _ in vars(m).get("_packs", {})} == {False, True}]
    assert len(convolutions) - len(packed) == {"alex": 1, "vgg": 0, "squeeze": 1}[net]  # a first one of a stride
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in lpips.features(x).maps)


def test_the_way_back_takes_the_weights_of_the_way_there():
    """However soon the module has others: a new parameter, or functional_call's for the time of a call."""
    conv, other = frozen((3, 8, 3, 1, 1)), frozen((3, 8, 3, 1, 1))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    torch.autograd.grad(conv(x).sum(), x)
    y = torch.func.functional_call(conv, {"weight": other.weight, "bias": other.bias}, (x,))
    (want,) = torch.autograd.grad(plain(other, x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], want, rtol=1e-4, atol=1e-4)
    y = conv(x)
    (want,) = torch.autograd.grad(plain(conv, x).sum(), x)
    conv.weight = other.weight
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], want, rtol=1e-4, atol=1e-4)


def test_many_gradients_at_once_and_one_image_alone():
    conv = frozen((3, 8, 3, 1, 1))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = conv(x)
    upstream = torch.randn(3, *y.shape)
    (got,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in upstream]
    torch.testing.assert_close(got, torch.stack(each), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv(x[0]), y[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 2 channels instead"):
        conv(x[:, :2])


def test_a_single_weight_that_changes_is_seen():
    """Of which no sample tells: by its version in place, by its memory where the parameter is another."""
    conv, x = frozen((16, 16, 3, 1, 1)), torch.randn(1, 16, 5, 5)

    def another() -> None:
        weight = conv.weight.detach().clone()
        weight[5, 3, 1, 1] += 1
        conv.weight = nn.Parameter(weight, requires_grad=False)

    with torch.no_grad():
        conv(x)
        for change in (lambda: conv.weight[3, 2, 1, 1].add_(1), another, another):  # the last two of one version
            change()
            torch.testing.assert_close(conv(x).double(), plain(conv, x), rtol=1e-4, atol=1e-5)


def test_on_a_gpu_frozen_weights_lie_in_channels_last(monkeypatch):
    from fastgen.nn import trunks_conv

    assert not trunks_conv._tensor_cores(torch.zeros(1, 1, 1, 1))
    monkeypatch.setattr(trunks_conv, "_tensor_cores", lambda weight: weight.dtype != torch.float64)  # as if one came
    monkeypatch.setattr(Conv, "packs", lambda self, x: False)
    moved, plain_one = LPIPS(pnet_rand=True), LPIPS(pnet_rand=True)
    plain_one.load_state_dict(moved.state_dict())
    x, y = torch.rand(2, 3, 40, 40, requires_grad=True), torch.rand(2, 3, 40, 40)
    expected = plain_one(x, y)
    assert moved.to("cpu") is moved  # whatever moves or casts it
    for f in moved.features(x).maps[:2]:  # the others are of one pixel
        assert f.is_contiguous(memory_format=torch.channels_last)
        assert not f.is_contiguous()
    for key, value in plain_one.state_dict().items():
        assert torch.equal(moved.state_dict()[key], value)
    torch.testing.assert_close(moved(x, y), expected, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(value.sum(), x)[0] for value in (moved(x, y), expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)
    for trained in (Conv(3, 4, 3).to("cpu"), frozen((3, 4, 3, 1, 0)).double()):
        assert trained.weight.is_contiguous()
