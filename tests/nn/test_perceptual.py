"""PerceptualLoss: the number, cached targets, other people's networks, what it refuses."""

import pickle

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import nn

from fastgen.nn import Features, GLANNLoss, PerceptualLoss, trunk

LAYERS = ("block0", "block2", "block4")


@pytest.fixture
def lite0():
    return trunk("efficientnet-lite0", "random")


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 19)])
def test_value(oracle, lite0, distance, channels, size):
    loss = PerceptualLoss(lite0, layers=LAYERS, layer_weight=[1, 0.5, 2], distance=distance, pixel_weight=0.75)
    x, y = torch.rand(3, channels, size, size), torch.rand(3, channels, size, size)
    maps = [[image, *lite0(image, LAYERS)] for image in (x, y)]
    want = oracle.feature_distance(*maps, distance, [0.75, 1.0, 0.5, 2.0])
    got = loss(x, y)
    assert got.shape == (3,)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    mean = PerceptualLoss(
        lite0, layers=LAYERS, layer_weight=[1, 0.5, 2], distance=distance, pixel_weight=0.75, reduction="mean"
    )
    assert mean(x, y) == got.mean()
    assert torch.equal(loss(x, x.clone()), torch.zeros(3))


def test_cached_target_is_the_same_number(lite0):
    loss = PerceptualLoss(lite0, layers=LAYERS, pixel_weight=1.0)
    x, y = torch.rand(6, 1, 28, 28, requires_grad=True), torch.rand(6, 1, 28, 28)
    features = loss.target(y)
    assert len(features) == 6
    assert not any(f.requires_grad for f in features.maps)
    assert torch.equal(loss(x, features), loss(x, y))
    grads = [torch.autograd.grad(loss(x, t).sum(), x)[0] for t in (features, y)]
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0
    rows = torch.tensor([4, 1, 1])
    torch.testing.assert_close(loss(x[rows], features[rows]), loss(x, y)[rows])
    torch.testing.assert_close(loss(x[5:], features[-1]), loss(x, y)[5:])
    chunked = loss.target(y, chunk=4)
    for a, b in zip(chunked.maps, features.maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    joined = Features.cat([features[:2], features[2:]])
    assert all(torch.equal(a, b) for a, b in zip(joined.maps, features.maps, strict=True))
    narrow = features.to(torch.bfloat16)
    torch.testing.assert_close(loss(x, narrow), loss(x, y), rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "vgg16"])
def test_narrower_images_are_widened_and_wider_ones_refused(name):
    network = trunk(name, "random")
    loss = PerceptualLoss(network, layers=network.layers[:2], pixel_weight=1.0)
    x, y = torch.rand(2, 3, 20, 20), torch.rand(2, 3, 20, 20)
    for narrow in (torch.float16, torch.bfloat16):
        a, b = x.to(narrow), y.to(narrow)
        torch.testing.assert_close(loss(a, b), loss(a.float(), b.float()), rtol=1e-5, atol=0)
        torch.testing.assert_close(loss(a, loss.target(b)), loss(a, b), rtol=1e-6, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(a, b), loss(x, y), rtol=0.1, atol=1e-3)
    with pytest.raises(TypeError, match=r"x: expected images of the network's float32.*got float64"):
        loss(x.double(), y)
    with pytest.raises(TypeError, match=r"target: expected images of the network's float32.*got float64"):
        loss(x, y.double())


def test_gradients_reach_either_side(lite0):
    loss = PerceptualLoss(lite0.double(), layers=("stem", "block1"), pixel_weight=1.0, distance="l2")
    x, y = torch.rand(1, 1, 5, 6).double().requires_grad_(), torch.rand(1, 1, 5, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, y), fast_mode=True)
    assert not any(p.requires_grad for p in loss.parameters())
    assert not any(m.training for m in loss.train().trunk.modules())


def test_pad_to(lite0):
    x, y = torch.rand(2, 1, 28, 28), torch.rand(2, 1, 28, 28)
    padded = PerceptualLoss(lite0, layers=LAYERS, pad_to=32)
    plain = PerceptualLoss(lite0, layers=LAYERS)
    frame = nn.ZeroPad2d(2)
    torch.testing.assert_close(padded(x, y), plain(frame(x), frame(y)), rtol=0, atol=0)
    assert torch.equal(padded(frame(x), frame(y)), padded(x, y))
    target = padded.target(y)
    assert torch.equal(padded(x, target), padded(x, y))
    with pytest.raises(
        ValueError, match=r"target: expected features of images of \[32, 32\] pixels, got some of \[28, 28"
    ):
        padded(frame(x), target)
    with pytest.raises(ValueError, match=r"target: expected features of images of \[27, 28\] pixels"):
        plain(x[:, :, 1:], plain.target(y))  # whose maps are of the same size
    with pytest.raises(ValueError, match="parts: expected features of images of one size"):
        Features.cat([target, padded.target(frame(y))])
    stored = pickle.loads(pickle.dumps(target[:1]))
    assert stored.size == (28, 28, 32, 32)
    assert torch.equal(padded(x[:1], stored), padded(x[:1], target[:1]))


def test_targets_of_another_padding_are_refused(lite0):
    """Whose deepest maps are of one shape."""
    x, y = torch.rand(2, 1, 28, 28), torch.rand(2, 1, 28, 28)
    padded, plain = (PerceptualLoss(lite0, layers=["block10"], pad_to=size) for size in (32, None))
    assert padded.target(y).maps[0].shape == plain.target(y).maps[0].shape
    with pytest.raises(ValueError, match=r"\[28, 28\] pixels padded to \[32, 32\], got some of \[28, 28\] pixels$"):
        padded(x, plain.target(y))
    with pytest.raises(ValueError, match=r"\[28, 28\] pixels, got some of \[28, 28\] pixels padded to \[32, 32\]"):
        plain(x, padded.target(y))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 5, 3)
        self.unused = nn.Identity()

    def forward(self, x):
        return self.second(self.act(self.first(x)))


def test_any_module_by_hooks(oracle):
    net = Net()
    x, y = torch.rand(2, 3, 9, 9), torch.rand(2, 3, 9, 9)
    loss = PerceptualLoss(net, layers=["first", "second"])
    with torch.no_grad():
        # `first` as it left the convolution, though the ReLU after it works in place
        maps = [[net.first(image), net.second(net.first(image).relu())] for image in (x, y)]
    torch.testing.assert_close(loss(x, y).double(), oracle.feature_distance(*maps, "l1", [1.0, 1.0]), rtol=1e-6, atol=0)
    assert torch.equal(loss(x, loss.target(y)), loss(x, y))
    assert not net.first._forward_hooks
    with pytest.raises(ValueError, match=r"layers: \['unused'\] took no part"):
        PerceptualLoss(net, layers=["unused"])(x, y)


def test_a_trainable_trunk_gets_gradients_of_both_sides():
    x, y = torch.rand(2, 3, 9, 9), torch.rand(2, 3, 9, 9)
    net = Net()
    loss = PerceptualLoss(net, layers=["first", "second"], distance="l2")
    got = torch.autograd.grad(loss(x, y).sum(), list(net.parameters()))
    both = [(loss.features(image).maps) for image in (x, y)]
    want = sum((a - b).square().mean((1, 2, 3)).sum() for a, b in zip(*both, strict=True))
    for a, b in zip(got, torch.autograd.grad(want, list(net.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    net.requires_grad_(False)
    assert not loss(x, y).requires_grad


def test_compile(lite0):
    torch._dynamo.reset()
    loss = PerceptualLoss(lite0, layers=LAYERS, pixel_weight=1.0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (4, 3, 5):
        x, y = torch.rand(n, 1, 28, 28, requires_grad=True), torch.rand(n, 1, 28, 28)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        got = compiled(x, y)
        torch.testing.assert_close(got, loss(x, y))
        (a,) = torch.autograd.grad(got.sum(), x)
        (b,) = torch.autograd.grad(loss(x, y).sum(), x)
        torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"style_weight": -1.0}, ValueError, "style_weight"),
        ({"style_layers": ["block1"]}, ValueError, "style_layers: expected style_weight > 0"),
        ({"style_weight": 1.0, "style_layers": ["x"]}, ValueError, "style_layers: expected some of stem"),
        ({"style_weight": 1.0, "style_layers": "stem"}, TypeError, "style_layers: expected a sequence"),
        ({"layers": ["block99"]}, ValueError, "layers: expected some of stem, block0"),
        ({"layers": "block0"}, TypeError, "layers: expected a sequence"),
        ({"layers": []}, ValueError, "layers"),
        ({"layers": ["block0", "block0"]}, ValueError, "each name once"),
        ({"trunk": nn.Sequential(nn.Identity()), "layers": ["0", "0"]}, ValueError, "layers: each name once"),
        ({"layer_weight": [1.0]}, ValueError, "layer_weight: expected 3 numbers"),
        ({"distance": "cosine"}, ValueError, "distance"),
        ({"pixel_weight": -1.0}, ValueError, "pixel_weight"),
        ({"reduction": "sum"}, ValueError, "reduction"),
        ({"pad_to": 0}, ValueError, "pad_to"),
        ({"trunk": 3}, TypeError, "trunk: expected a name or a module"),
        ({"trunk": "vgg19"}, ValueError, "name: .*'vgg16'.*'vgg19'"),
        ({"trunk": nn.Identity(), "layers": ["a"]}, ValueError, "layers: expected names of submodules"),
    ],
)
def test_constructor_errors(lite0, options, error, message):
    arguments = {"trunk": lite0, "layers": LAYERS, **options}
    with pytest.raises(error, match=message):
        PerceptualLoss(arguments.pop("trunk"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(2, 1, 8, 8), torch.rand(3, 1, 8, 8)), r"target: expected the shape of x"),
        ((torch.rand(2, 2, 8, 8), torch.rand(2, 2, 8, 8)), r"x: expected images \[N, 1 or 3, H, W\]"),
        ((torch.rand(2, 64), torch.rand(2, 64)), "x: expected 4 dimensions"),
    ],
)
def test_forward_errors(lite0, arguments, message):
    loss = PerceptualLoss(lite0, layers=LAYERS)
    with pytest.raises(ValueError, match=message):
        loss(*arguments)
    with pytest.raises(ValueError, match="target: expected features of 2 images, got 3"):
        loss(torch.rand(2, 1, 8, 8), loss.target(torch.rand(3, 1, 8, 8)))


@pytest.mark.parametrize("layers", [("block0", "block2"), ()], ids=["content and style", "style"])
def test_style(oracle, lite0, layers):
    style = ("stem", "block2")
    loss = PerceptualLoss(lite0, layers=layers, style_weight=3.0, style_layers=style, pixel_weight=0.5, distance="l2")
    x, y = torch.rand(2, 3, 12, 12, requires_grad=True), torch.rand(2, 3, 12, 12)
    content = [[image, *(lite0(image, layers) if layers else [])] for image in (x.detach(), y)]
    want = oracle.feature_distance(*content, "l2", [0.5] + [1.0] * len(layers))
    for a, b in zip(lite0(x.detach(), style), lite0(y, style), strict=True):
        want = want + 3.0 * (oracle.gram(a) - oracle.gram(b)).square().sum((1, 2))
    torch.testing.assert_close(loss(x, y).double(), want, rtol=1e-5, atol=0)
    target = loss.target(y)
    assert torch.equal(loss(x, target), loss(x, y))
    assert [f.ndim for f in target.maps] == [4] * (1 + len(layers)) + [3, 3]
    (grad,) = torch.autograd.grad(loss(x, target).sum(), x)
    leaf = x.detach().clone().requires_grad_()
    maps = lite0(leaf, ("stem", "block0", "block2"))
    total = 0.5 * (leaf - y).square().flatten(1).mean(1)
    pairs = zip(maps, lite0(y, ("stem", "block0", "block2")), strict=True)
    named = dict(zip(("stem", "block0", "block2"), pairs, strict=True))
    for layer in layers:
        total = total + (named[layer][0] - named[layer][1]).square().flatten(1).mean(1)
    for layer in style:
        grams = [f.flatten(2) @ f.flatten(2).mT / f[0].numel() for f in named[layer]]
        total = total + 3 * (grams[0] - grams[1]).square().sum((1, 2))
    (want,) = torch.autograd.grad(total.sum(), leaf)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-7)
    assert loss(x[:0], y[:0]).shape == (0,)
    default = PerceptualLoss(lite0, layers=style, style_weight=1.0)
    assert default.style_layers == style


def test_rows_of_a_target(lite0):
    target = PerceptualLoss(lite0, layers=LAYERS).target(torch.rand(3, 1, 9, 9))
    rows = list(target)
    assert [len(row) for row in rows] == [1, 1, 1]
    assert torch.equal(target[np.int64(-1)].maps[0], rows[2].maps[0])
    for row in (3, -4, np.int32(3)):
        with pytest.raises(IndexError, match="features: expected a row of 3"):
            target[row]


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_target_made_in_inference_mode_trains(lite0, chunk):
    loss = PerceptualLoss(lite0, layers=LAYERS, pixel_weight=1.0, style_weight=1.0)
    x = torch.rand(2, 1, 9, 9, requires_grad=True)
    with torch.inference_mode():
        y = torch.rand(2, 1, 9, 9)
        target = loss.target(y, chunk=chunk)
    assert not any(f.requires_grad for f in target.maps)
    (grad,) = torch.autograd.grad(loss(x, target).sum(), x)
    assert grad.abs().sum() > 0


def test_inside_a_target(lite0):
    loss = PerceptualLoss(lite0, layers=LAYERS)
    x, y = torch.rand(2, 1, 9, 9), torch.rand(2, 1, 9, 9)
    with loss.target(y):
        assert torch.equal(loss(x), loss(x, y))
    with pytest.raises(ValueError, match="target: expected images, or features"):
        loss(x)


def random_vgg():
    from fastgen.nn import trunks

    features = trunks.vgg16_features()
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    return features, {f"features.{key}": value for key, value in features.state_dict().items()}


@pytest.mark.parametrize(
    ("side", "channels", "levels"), [(16, 3, 2), (28, 1, 3), (32, 3, 3), (64, 1, 4), (72, 3, 5)], ids=str
)
def test_glann_is_the_official_loss(oracle, side, channels, levels):
    features, state = random_vgg()
    loss = GLANNLoss(state)
    assert not any(p.requires_grad for p in loss.parameters())
    x, y = torch.rand(2, channels, side, side), torch.rand(2, channels, side, side)
    a = x.double().requires_grad_()
    want = oracle.glann_loss(features.double(), a, y, levels, side > 64)
    (slope,) = torch.autograd.grad(want.sum(), a)
    x.requires_grad_()
    got = loss(x, y)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert float((grad.double() - slope).norm() / slope.norm()) < 0.02  # signs of L1 turn where maps all but meet
    passes = []
    target = loss.target(y)
    loss.trunk.features[0].register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(loss(x, target), got)
    assert len(passes) == (2 if side > 64 else 1)
    with target:
        assert torch.equal(loss(x), got)
    assert GLANNLoss(state, reduction="mean")(x, y) == got.mean()
    assert torch.equal(loss(x, x.detach().clone()), torch.zeros(2))


def test_glann_taps_to_the_bit():
    """Modules 2, 7, 12 and 21 of torchvision's features: the last before its ReLU, the others behind it."""
    features, state = random_vgg()
    features.requires_grad_(False)
    loss, x = GLANNLoss(state), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        z, want = 2 * x - 1, []
        for i, module in enumerate(features[:22]):
            z = module(z)
            if i in (2, 7, 12, 21):
                want.append(z)
    got = loss.features(x).maps[1:]
    assert len(got) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[3].min() < 0 <= got[2].min()


def test_glann_errors():
    loss = GLANNLoss("random")
    for shape in ((1, 3, 24, 24), (1, 3, 64, 65)):
        with pytest.raises(ValueError, match="x: expected sides of 16, 28, 32, 64 or more"):
            loss(torch.rand(shape), torch.rand(shape))
    target = loss.target(torch.rand(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"target: expected features of images of \[28, 28\] pixels"):
        loss(torch.rand(1, 1, 28, 28), target)
    with pytest.raises(ValueError, match=r"target: expected features of images of \[28, 28\] pixels"):
        loss(torch.rand(1, 1, 28, 28), loss.target(torch.rand(1, 1, 32, 32)))
    with pytest.raises(ValueError, match="target: expected features of 2 images, got 1"):
        loss(torch.rand(2, 1, 16, 16), target)
    with pytest.raises(ValueError, match="reduction"):
        GLANNLoss("random", reduction="sum")
