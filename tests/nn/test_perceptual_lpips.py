"""LPIPS against lpips 0.1.4 written out eagerly, in float64; and LPIPS as an embedding."""

import pytest
import torch
from torch import nn

from fastgen import check
from fastgen.functional import lpips_distance
from fastgen.nn import LPIPS, Features, PerceptualEmbedding, trunks
from fastgen.nn.perceptual_lpips import _NETS, HEADS

NETS = ["alex", "vgg", "squeeze"]


def both(oracle, net, **options):
    """Ours and the oracle's with one random trunk, He-scaled, and the published heads."""
    name = _NETS[net][0]
    features = trunks.TORCHVISION[name][0]()
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    ours = LPIPS(net=net, trunk_weights=state, **options)
    version = options.get("version", "0.1")
    heads = trunks.read_weights(HEADS / f"v{version}_{net}.safetensors")
    theirs = oracle.EagerLPIPS(net, [heads[f"lin{k}"] for k in range(ours.L)], version, options.get("lpips", True))
    theirs.features.load_state_dict(features.state_dict())
    return ours, theirs.double()


@pytest.mark.parametrize(
    ("net", "options"),
    [
        ("alex", {}),
        ("vgg", {}),
        ("squeeze", {}),
        ("alex", {"version": "0.0"}),
        ("squeeze", {"lpips": False}),
        ("alex", {"use_dropout": False}),
        ("alex", {"eps_mode": "torchmetrics"}),
    ],
)
def test_same_results(oracle, net, options):
    ours, theirs = both(oracle, net, **options)
    x, y = torch.rand(2, 3, 48, 40) * 2 - 1, torch.rand(2, 3, 48, 40) * 2 - 1
    eps_mode = options.get("eps_mode", "lpips")
    want, want_shares = theirs(x.double(), y.double(), eps_mode=eps_mode)
    got, shares = ours(x, y, retPerLayer=True)
    assert got.shape == want.shape == (2, 1, 1, 1)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)
    assert len(shares) == len(want_shares)
    for a, b in zip(shares, want_shares, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-7)
    assert torch.equal(ours(x, y), got)
    normal = ours((x + 1) / 2, (y + 1) / 2, normalize=True)
    torch.testing.assert_close(normal, got, rtol=1e-4, atol=0)
    assert torch.equal(ours(x, x.clone()), torch.zeros(2, 1, 1, 1))
    # a cached side, one reference against many
    assert torch.equal(ours(x, ours.target(y)), got)
    one = torch.cat([ours(x[i : i + 1], y[:1]) for i in range(2)])
    torch.testing.assert_close(ours(x, y[:1]), one, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours(y[:1], x), one, rtol=1e-5, atol=0)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_gradients(oracle, net):
    ours, theirs = both(oracle, net)
    x, y = torch.rand(2, 3, 40, 40) * 2 - 1, torch.rand(2, 3, 40, 40) * 2 - 1
    a = [t.double().requires_grad_() for t in (x, y)]
    b = [t.clone().requires_grad_() for t in (x, y)]
    want = torch.autograd.grad(theirs(*a)[0].sum(), a)
    got = torch.autograd.grad(ours(*b).sum(), b)
    for g, expected in zip(got, want, strict=True):
        assert float((g.double() - expected).norm() / expected.norm()) < 1e-4
    (alone,) = torch.autograd.grad(ours(b[0], y).sum(), b[0])
    torch.testing.assert_close(alone, got[0], rtol=1e-5, atol=1e-8)


def test_spatial(oracle):
    ours, theirs = both(oracle, "alex", spatial=True)
    x, y = torch.rand(2, 3, 67, 50) * 2 - 1, torch.rand(2, 3, 67, 50) * 2 - 1
    want, want_shares = theirs(x.double(), y.double(), spatial=True)
    got, shares = ours(x, y, retPerLayer=True)
    assert got.shape == (2, 1, 67, 50)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(shares[4].double(), want_shares[4], rtol=1e-3, atol=1e-6)
    assert torch.equal(ours(x, x), torch.zeros_like(got))
    x = torch.zeros(1, 3, 40, 40, requires_grad=True)
    for parameter in ours.net.parameters():
        parameter.data.zero_()
    ours(x, torch.ones(1, 3, 40, 40)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("spatial", [False, True])
def test_targets_of_another_size_and_of_inference_mode(spatial):
    lpips, x = LPIPS(pnet_rand=True, spatial=spatial), torch.rand(1, 3, 40, 40, requires_grad=True)
    with pytest.raises(ValueError, match=r"in1: expected features of images of size \[40, 40\]"):
        lpips(x, lpips.target(torch.rand(1, 3, 64, 64)))
    with pytest.raises(ValueError, match=r"in1: expected features of images of size \[40, 40\], got some of \[40, 41"):
        lpips(x, lpips.target(torch.rand(1, 3, 40, 41)))  # whose maps are of the same size
    with pytest.raises(ValueError, match=r"in1: expected features of images of size \[40, 40\] of the same net"):
        lpips(x, Features(lpips.target(torch.rand(1, 3, 64, 64)).maps))
    with torch.inference_mode():
        target = lpips.target(torch.rand(1, 3, 40, 40))
    assert torch.autograd.grad(lpips(x, target).sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("net", NETS)
def test_state_dict_keys(net):
    keys = list(LPIPS(net=net, pnet_rand=True).state_dict())
    slices = {
        "alex": ["1.0", "2.3", "3.6", "4.8", "5.10"],
        "vgg": ["1.0", "1.2", "2.5", "2.7", "3.10", "3.12", "3.14", "4.17", "4.19", "4.21", "5.24", "5.26", "5.28"],
        "squeeze": ["1.0"]
        + [
            f"{s}.{part}"
            for s in ("2.3", "2.4", "3.6", "3.7", "4.9", "5.10", "6.11", "7.12")
            for part in ("squeeze", "expand1x1", "expand3x3")
        ],
    }[net]
    layers = 7 if net == "squeeze" else 5
    want = ["scaling_layer.shift", "scaling_layer.scale"]
    want += [f"net.slice{s}.{part}" for s in slices for part in ("weight", "bias")]
    want += [f"lin{k}.model.1.weight" for k in range(layers)] + [f"lins.{k}.model.1.weight" for k in range(layers)]
    if net == "squeeze":  # lpips adds lin5 and lin6 before it makes the list
        assert set(keys) == set(want)
    else:
        assert keys == want


def test_heads_are_the_published_ones():
    # sums and zeros of lpips 0.1.4's weights/v0.1
    zeros = {"alex": 150, "vgg": 0, "squeeze": 119}
    for net in NETS:
        heads = trunks.read_weights(HEADS / f"v0.1_{net}.safetensors")
        assert sum(int((w == 0).sum()) for w in heads.values()) == zeros[net]
        assert all(bool((w >= 0).all()) for w in heads.values())
        assert [len(heads[f"lin{k}"]) for k in range(len(heads))] == list(_NETS[net][2])
    licence = (HEADS / "LICENSE").read_text()
    assert "Richard Zhang" in licence


def test_head_files(tmp_path):
    plain = LPIPS(pnet_rand=True)
    full = plain.state_dict()
    heads = {key: value * 2 for key, value in full.items() if key.startswith("lin") and "lins" not in key}
    torch.save(heads, tmp_path / "heads.pth")
    torch.save(full, tmp_path / "full.pth")
    torch.save({**heads, 0: 1, "lin0.model.1.weight": 3}, tmp_path / "number.pth")
    with pytest.raises(check.UserError, match=r"number\.pth: expected lin0\.model\.1\.weight with 64 numbers"):
        LPIPS(pnet_rand=True, model_path=tmp_path / "number.pth")
    torch.save({**heads, 0: 1}, tmp_path / "odd.pth")
    LPIPS(pnet_rand=True, model_path=tmp_path / "odd.pth")
    for dropout in (True, False):  # lpips leaves the heads random without dropout
        loaded = LPIPS(pnet_rand=True, use_dropout=dropout, model_path=tmp_path / "heads.pth")
        for a, b in zip(loaded.weights(), plain.weights(), strict=True):
            assert torch.equal(a, 2 * b)
    whole = LPIPS(pnet_rand=True, model_path=tmp_path / "full.pth")
    assert all(torch.equal(value, full[key]) for key, value in whole.state_dict().items())
    del heads["lin3.model.1.weight"]
    torch.save(heads, tmp_path / "less.pth")
    with pytest.raises(check.UserError, match=r"less\.pth: expected lin3\.model\.1\.weight with 256"):
        LPIPS(pnet_rand=True, model_path=tmp_path / "less.pth")


def test_missing_trunk_and_random(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"put torchvision's alexnet-owt-7be5be79\.pth there"):
        LPIPS()
    torch.manual_seed(1)
    first = LPIPS(pretrained=False, pnet_rand=True)
    second = LPIPS(pretrained=False, pnet_rand=True)
    x = torch.rand(1, 3, 40, 40)
    with pytest.raises(ValueError, match="pretrained=False: the heads are random: load_state_dict first"):
        first(x, x)
    training = LPIPS(pretrained=False, pnet_rand=True, eval_mode=False)
    assert training(x, x.flip(3)).requires_grad
    assert not torch.equal(first.weights()[0], second.weights()[0])
    assert not torch.equal(first.net.slice1[0].weight, second.net.slice1[0].weight)


def test_pinned_unless_tuned():
    pinned = nn.ModuleList([LPIPS(pnet_rand=True)]).train()
    assert not any(m.training for m in pinned[0].modules())
    assert not any(p.requires_grad for p in pinned.parameters())
    heads = LPIPS(pnet_rand=True, eval_mode=False)
    assert heads.training
    assert {name.split(".")[0] for name, p in heads.named_parameters() if p.requires_grad} == {
        f"lin{k}" for k in range(5)
    }
    tuned = LPIPS(pnet_rand=True, pnet_tune=True)
    assert not tuned.training
    assert tuned.train().training
    assert all(p.requires_grad for p in tuned.parameters())


def test_heads_train(oracle):
    ours, theirs = both(oracle, "alex", eval_mode=False, use_dropout=False)
    theirs.heads = [head.double().requires_grad_() for head in theirs.heads]
    x, y = torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 40)
    ours(x, y).sum().backward()
    theirs(x.double(), y.double())[0].sum().backward()
    for k in range(5):
        got = ours.lins[k].weight.grad.flatten().double()
        torch.testing.assert_close(got, theirs.heads[k].grad, rtol=1e-3, atol=1e-7)
    dropping = LPIPS(pnet_rand=True, eval_mode=False)
    values = torch.stack([dropping(x, y).flatten() for _ in range(24)])
    assert values.std(0).min() > 0
    dropping.eval()
    torch.testing.assert_close(values.mean(0), dropping(x, y).flatten(), rtol=0.2, atol=0)


def test_gray_autocast_half_inputs():
    ours = LPIPS(pnet_rand=True)
    gray, other = torch.rand(2, 1, 40, 40), torch.rand(2, 1, 40, 40)
    assert torch.equal(ours(gray, other), ours(gray.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)))
    old = LPIPS(pnet_rand=True, version="0.0")
    assert torch.equal(old(gray, other), old(gray.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)))
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(gray, other)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ours(gray, other), rtol=0.1, atol=1e-5)
    half = ours.to(torch.bfloat16)
    assert half(gray.bfloat16(), other.bfloat16()).isfinite().all()


@pytest.mark.parametrize("version", ["0.1", "0.0"])
def test_narrower_images_are_widened_and_wider_ones_refused(version):
    """As lpips's scaling layer does; wider ones are torch's own RuntimeError there."""
    ours = LPIPS(pnet_rand=True, version=version)
    x, y = torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 40)
    for narrow in (torch.float16, torch.bfloat16):
        a, b = x.to(narrow).requires_grad_(), y.to(narrow)
        value = ours(a, b)
        assert value.dtype == torch.float32
        assert torch.equal(value, ours(a.float(), b.float()))
        assert torch.equal(ours(a, y), ours(a.float(), y))
        with ours.target(b):
            assert torch.equal(ours(a), value)
        (grad,) = torch.autograd.grad(value.sum(), a)
        leaf = a.detach().float().requires_grad_()
        (want,) = torch.autograd.grad(ours(leaf, b.float()).sum(), leaf)
        assert torch.equal(grad, want.to(narrow))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ours(a, b), value, rtol=0.1, atol=1e-5)
    for case, (a, b) in {"in0": (x.double(), y), "in1": (x, y.double())}.items():
        for call in (ours, torch.autocast("cpu", torch.bfloat16)(ours)):
            with pytest.raises(TypeError, match=f"{case}: expected images of the network's float32.*got float64"):
                call(a, b)
    with pytest.raises(TypeError, match=r"images: .*float64"):
        ours.target(x.double())
    with pytest.raises(TypeError, match=r"in0: expected images of the network's bfloat16.*got float16"):
        ours.bfloat16()(x.half(), y.bfloat16())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LPIPS(net="resnet", pnet_rand=True), ValueError, "net: .*'resnet'"),
        (lambda: LPIPS(version="0.2", pnet_rand=True), ValueError, "version"),
        (lambda: LPIPS(pnet_rand=True, eps_mode="x"), ValueError, "eps_mode"),
        (lambda: LPIPS(pnet_rand=True)(torch.rand(2, 3, 40, 40), torch.rand(3, 3, 40, 40)), ValueError, "in1: .*2.*3"),
        (lambda: LPIPS(pnet_rand=True)(torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 48)), ValueError, "in1: .*size"),
        (lambda: LPIPS(pnet_rand=True)(torch.rand(2, 4, 40, 40), torch.rand(2, 4, 40, 40)), ValueError, "in0"),
        (lambda: PerceptualEmbedding(nn.Identity()), TypeError, "lpips: expected a fastgen.nn.LPIPS"),
        (lambda: PerceptualEmbedding(LPIPS(pnet_rand=True, spatial=True)), ValueError, "spatial"),
        (lambda: PerceptualEmbedding(LPIPS(pretrained=False, pnet_rand=True)), ValueError, "the heads are random"),
        (
            lambda: PerceptualEmbedding(LPIPS(pretrained=False, pnet_rand=True, eval_mode=False)),
            ValueError,
            "negative",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("net", "options"),
    [("alex", {}), ("squeeze", {}), ("alex", {"eps_mode": "torchmetrics"}), ("squeeze", {"lpips": False})],
    ids=str,
)
def test_embedding(oracle, net, options):
    ours, _ = both(oracle, net, **options)
    embed = PerceptualEmbedding(ours)
    x, y = torch.rand(3, 3, 40, 40) * 2 - 1, torch.rand(3, 3, 40, 40) * 2 - 1
    a, b = embed(x), embed(y)
    distances = (a[:, None].double() - b.double()).square().sum(2)
    for i in range(3):
        want = ours(x[i : i + 1], y).flatten().double()
        torch.testing.assert_close(distances[i], want, rtol=1e-5, atol=0)
    assert a.shape[1] == sum(f[0].numel() for f in ours.features(x).maps)


def test_embedding_gradient():
    ours = LPIPS(pnet_rand=True)
    embed = PerceptualEmbedding(ours)
    x, y = torch.rand(2, 3, 40, 40, requires_grad=True), torch.rand(2, 3, 40, 40)
    (a,) = torch.autograd.grad((embed(x) - embed(y)).square().sum(), x)
    (b,) = torch.autograd.grad(ours(x, y).sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    for parameter in ours.net.parameters():
        parameter.data.zero_()
    (a,) = torch.autograd.grad(embed(x).sum(), x)
    assert torch.equal(a, torch.zeros_like(a))


def test_features_and_weights_are_the_function():
    ours = LPIPS(pnet_rand=True)
    x, y = torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 40)
    value = lpips_distance(ours.features(x, normalize=True).maps, ours.target(y, normalize=True).maps, ours.weights())
    torch.testing.assert_close(ours(x, y, normalize=True).flatten(), value, rtol=1e-6, atol=0)


def test_compile():
    torch._dynamo.reset()
    ours = LPIPS(pnet_rand=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, y = torch.rand(2, 3, 40, 40, requires_grad=True), torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(compiled(x, y), ours(x, y))
    (a,) = torch.autograd.grad(compiled(x, y).sum(), x)
    (b,) = torch.autograd.grad(ours(x, y).sum(), x)
    torch.testing.assert_close(a, b)
