"""LPIPS's epilogue from given VGG16 features, LPIPS whole, GLANN's loss, a GLO-like step; all with gradients.

`eager` is what users write today: lpips 0.1.4's own lines, whose trunk is frozen and whose heads are not; GLANN's
official ones, whose VGG16 is not frozen and which pass the target through it too, with a graph; for the GLO-like step,
both images through a network whose batch norms are not folded, whose weights are not frozen and whose target is
computed again at every step. That network is EfficientNet-lite0 with its published weights; LPIPS's and GLANN's have
random weights, drawn once and given to everybody. On a GPU float32 convolutions are timed in TF32, torch's default.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from benchmarks.harness import DEVICES, Provider, Run, Work
from benchmarks.perceptual_networks import (
    NETS,
    SCALE,
    SHIFT,
    efficientnet_maps,
    efficientnet_state,
    glann_taps,
    heads,
    lpips_taps,
    operations,
    parameters,
    trunk_state,
)

# A float32 pass puts one or a few of a network's million ReLUs on the other side of 0 than a float64 one, and each
# moves the gradient by up to 1 % of its norm, anywhere: eager's as ours. A wrong factor would move it along itself.
TURNS = 0.05


def network_error(result: Any, expected: Any) -> float:
    """The greatest of the value's relative error, the gradient's along the right one, TURNS times its distance: 1 % too
    much of either is 1e-2."""
    (value, grad), (want, slope) = ([t.double().cpu().flatten() for t in pair] for pair in (result, expected))
    errors = ((value - want).norm() / want.norm(), (grad - slope) @ slope / slope.square().sum())
    worst = torch.stack([*errors, TURNS * (grad - slope).norm() / slope.norm()]).abs().max()
    return float(worst) if worst.isfinite() else float("inf")


CHANNELS = (64, 128, 256, 512, 512)
LAYERS = ("block0", "block2", "block4", "block7")
Result = tuple[Tensor, ...]


def _vgg_features(batch: int, pixels: int, last: bool) -> Callable[[torch.device], dict[str, Any]]:
    """What VGG16 hands to LPIPS for images of `pixels` a side: half the numbers are zeros of a ReLU."""

    def inputs(device: torch.device) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(0)
        layout = torch.channels_last if last else torch.contiguous_format

        def maps() -> list[Tensor]:
            shapes = [(batch, channels, pixels >> k, pixels >> k) for k, channels in enumerate(CHANNELS)]
            return [
                torch.randn(shape, generator=generator, device=device).relu().contiguous(memory_format=layout)
                for shape in shapes
            ]

        f0, f1 = [f.requires_grad_() for f in maps()], maps()
        weights = [torch.rand(c, generator=generator, device=device) for c in CHANNELS]
        return {"f0": f0, "f1": f1, "w": weights}

    return inputs


def _eager_lpips(f0: list[Tensor], f1: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = f0[0].new_zeros(f0[0].shape[0])
    for a, b, weight in zip(f0, f1, weights, strict=True):
        u = a / (torch.sqrt(torch.sum(a**2, dim=1, keepdim=True)) + 1e-10)
        v = b / (torch.sqrt(torch.sum(b**2, dim=1, keepdim=True)) + 1e-10)
        total = total + tf.conv2d((u - v) ** 2, weight[None, :, None, None]).mean([1, 2, 3])
    return total


def _epilogue(distance: Callable[..., Tensor]) -> Callable[[dict[str, Any]], Run]:
    def setup(inputs: dict[str, Any]) -> Run:
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


def _epilogue_fastgen(inputs: dict[str, Any]) -> Run:
    from fastgen import functional as F

    return _epilogue(F.lpips_distance)(inputs)


def _epilogue_compiled(inputs: dict[str, Any]) -> Run:
    return _epilogue(torch.compile(_eager_lpips, dynamic=False))(inputs)


def _epilogue_work(batch: int, pixels: int, last: bool, compiled: bool = True) -> Work:
    layout = "channels_last" if last else "contiguous"
    providers: dict[str, Any] = {"fastgen": _epilogue_fastgen, "eager": _epilogue(_eager_lpips)}
    if compiled:
        providers["torch.compile"] = _epilogue_compiled
    elements = batch * sum(channels * (pixels >> k) ** 2 for k, channels in enumerate(CHANNELS))
    return Work(
        family="perceptual",
        name=f"LPIPS from VGG features, {batch}x{pixels}x{pixels}, {layout}",
        inputs=_vgg_features(batch, pixels, last),
        providers=providers,
        oracle=_epilogue_oracle,
        tolerance=1e-4,
        series=f"LPIPS from VGG features, {layout}",
        size={"N": batch * pixels**2},
        operations=18.0 * elements,  # two norms and quotients, difference, square, weight, sum; half of it again back
        moved=4.0 * 3 * elements,  # both read, one gradient written
    )


def _lpips_images(batch: int, pixels: int) -> Callable[[torch.device], dict[str, Any]]:
    def inputs(device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.rand(batch, 3, pixels, pixels, generator=generator).to(device) * 2 - 1 for _ in "xy")
        return {"x": x.requires_grad_(), "y": y}

    return inputs


def _lpips_eager(
    net: str, dtype: torch.dtype = torch.float32, compiled: str | None = None
) -> Callable[[dict[str, Any]], Run]:
    def setup(inputs: dict[str, Any]) -> Run:
        x, y = (inputs[k].detach().to(dtype).requires_grad_(k == "x") for k in "xy")
        state = {k: v.to(x.device, dtype) for k, v in trunk_state(net).items()}
        weights = [w.to(x.device, dtype).requires_grad_() for w in heads(net)]
        shift, scale = (torch.tensor(v, device=x.device, dtype=dtype)[:, None, None] for v in (SHIFT, SCALE))

        def distance(x: Tensor, y: Tensor) -> Tensor:
            f0, f1 = (lpips_taps(net, state, (image - shift) / scale) for image in (x, y))
            return _eager_lpips(f0, f1, [w.flatten() for w in weights])

        if compiled:
            distance = torch.compile(distance, mode=compiled, dynamic=False)

        def run() -> Result:
            x.grad = None
            value = distance(x, y)
            value.sum().backward()
            assert x.grad is not None
            return value.detach(), x.grad

        return run

    return setup


def _fastgen(
    make: Callable[..., Any], cached: bool, dtype: torch.dtype = torch.float32
) -> Callable[[dict[str, Any]], Run]:
    """Ours: the loss that `make` takes from fastgen.nn, against a target that is `cached` or an image as x is. On CUDA
    recorded at the first call, not as users have it at the fourth, so that what is checked is what is timed."""

    def setup(inputs: dict[str, Any]) -> Run:
        from fastgen import nn

        x, y = inputs["x"], inputs["y"]
        loss = make(nn, **({"cuda_graph": True} if x.is_cuda else {})).to(x.device)
        half = torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)
        with half:
            target = loss.target(y) if cached else y

        def run() -> Result:
            with half:
                value = loss(x, target)
            return value.detach().flatten(), torch.autograd.grad(value.sum(), x)[0]

        return run

    return setup


def _lpips_package(net: str) -> Callable[[dict[str, Any]], Run]:
    def setup(inputs: dict[str, Any]) -> Run:
        import lpips

        x, y = inputs["x"], inputs["y"]
        loss = lpips.LPIPS(pretrained=True, net=net, pnet_rand=True, verbose=False).to(x.device)
        missing = loss.load_state_dict(_package_keys(net, loss), strict=False)
        if missing.unexpected_keys:
            raise RuntimeError(f"lpips has no {missing.unexpected_keys}")

        def run() -> Result:
            x.grad = None
            value = loss(x, y)
            value.sum().backward()
            assert x.grad is not None
            return value.detach().flatten(), x.grad

        return run

    return setup


def _package_keys(net: str, loss: Any) -> dict[str, Tensor]:
    """Our random trunk under lpips's names: net.slice1.0.weight and so on."""
    slices = {key.rsplit(".", 2)[1]: key.rsplit(".", 1)[0] for key in loss.state_dict() if key.startswith("net.slice")}
    return {
        f"{slices[key.split('.')[1]]}.{key.rsplit('.', 1)[1]}": value
        for key, value in trunk_state(net).items()
        if key.split(".")[1] in slices
    }


def _lpips_oracle(net: str) -> Callable[[dict[str, Any]], Result]:
    def oracle(inputs: dict[str, Any]) -> Result:
        result: Result = _lpips_eager(net, torch.float64)(inputs)()
        return result

    return oracle


def _lpips_work(net: str, batch: int, pixels: int, compiled: bool = False) -> Work:
    def ours(nn: Any, **options: Any) -> Any:
        return nn.LPIPS(net=net, trunk_weights=trunk_state(net), **options)

    providers: dict[str, Any] = {
        "fastgen": _fastgen(ours, cached=True),
        "fastgen, target uncached": _fastgen(ours, cached=False),
        "fastgen, bf16": Provider(_fastgen(ours, True, torch.bfloat16), ("cuda",), tolerance=0.1),
        "eager": _lpips_eager(net),
        "torch.compile": Provider(_lpips_eager(net, compiled="default"), DEVICES if compiled else ("cuda",)),
        "torch.compile, CUDA graph": Provider(_lpips_eager(net, compiled="reduce-overhead"), ("cuda",)),
        "torch.compile, bf16": Provider(
            _lpips_eager(net, torch.bfloat16, compiled="default"), ("cuda",), tolerance=0.1
        ),
        "lpips": _lpips_package(net),
    }
    return Work(
        family="perceptual",
        name=f"LPIPS-{net}, {batch}x3x{pixels}x{pixels}, gradient to one image",
        inputs=_lpips_images(batch, pixels),
        providers=providers,
        oracle=_lpips_oracle(net),
        tolerance=1e-3,
        error=network_error,
        series=f"LPIPS-{net}",
        size={"N": batch * pixels**2},
        operations=operations(net, batch, pixels),
        moved=4.0 * (2 * parameters(net) + 3 * batch * 3 * pixels**2),  # the weights each way, both images, a gradient
    )


GLANN_LEVELS = {32: 3, 64: 4}  # how many of the convolutions 2, 7, 12, 21 the official code taps


def _glann_eager(dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Any]], Run]:
    def setup(inputs: dict[str, Any]) -> Run:
        x, y = (inputs[k].detach().to(dtype).requires_grad_(k == "x") for k in "xy")
        levels = GLANN_LEVELS[x.shape[2]]
        state = {k: v.to(x.device, dtype).requires_grad_() for k, v in trunk_state("vgg").items()}

        def run() -> Result:
            for value in (x, *state.values()):
                value.grad = None
            images = [2 * image - 1 for image in (x, y)]
            pairs = zip(*([image, *glann_taps(state, image, levels)] for image in images), strict=True)
            loss = sum(((a - b).abs().flatten(1).mean(1) for a, b in pairs), x.new_zeros(len(x)))
            loss.sum().backward()
            assert x.grad is not None
            return loss.detach(), x.grad

        return run

    return setup


def _glann_work(batch: int, pixels: int) -> Work:
    def ours(nn: Any, **options: Any) -> Any:
        return nn.GLANNLoss(trunk_state("vgg"), **options)

    return Work(
        family="perceptual",
        name=f"GLANN's loss, {batch}x3x{pixels}x{pixels}, gradient to one image",
        inputs=_images(batch, pixels),
        providers={
            "fastgen": _fastgen(ours, cached=True),
            "fastgen, target uncached": _fastgen(ours, cached=False),
            "eager": _glann_eager(),
        },
        oracle=lambda inputs: _glann_eager(torch.float64)(inputs)(),
        tolerance=1e-3,
        error=network_error,
        series="GLANN's loss",
        size={"N": batch * pixels**2},
    )


def _eager_step(state: dict[str, Tensor], x: Tensor, y: Tensor, layers: tuple[str, ...]) -> Tensor:
    last = max(int(layer.removeprefix("block")) for layer in layers)
    maps = [efficientnet_maps(state, (image.expand(-1, 3, -1, -1) - 0.5) / 0.5, last) for image in (x, y)]
    loss = (x - y).abs().mean((1, 2, 3))
    for layer in layers:
        loss = loss + (maps[0][layer] - maps[1][layer]).abs().mean((1, 2, 3))
    return loss


def _images(batch: int, pixels: int, channels: int = 3) -> Callable[[torch.device], dict[str, Any]]:
    def inputs(device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, channels, pixels + 4, pixels + 4)
        x, y = (tf.avg_pool2d(torch.rand(shape, generator=generator), 5, 1) for _ in "xy")
        return {"x": x.to(device).requires_grad_(), "y": y.to(device)}

    return inputs


def _step_eager(inputs: dict[str, Any]) -> Run:
    x, y = inputs["x"], inputs["y"]
    state = {key: value.to(x.device) for key, value in efficientnet_state().items() if value.is_floating_point()}
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
    state = {key: value.double().to(device) for key, value in efficientnet_state().items() if value.is_floating_point()}
    x, y = inputs["x"].detach().double().requires_grad_(), inputs["y"].double()
    loss = _eager_step(state, x, y, LAYERS)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def _step_work(batch: int, pixels: int) -> Work:
    def ours(nn: Any, **options: Any) -> Any:
        return nn.PerceptualLoss("efficientnet-lite0", layers=LAYERS, pixel_weight=1.0, **options)

    return Work(
        family="perceptual",
        name=f"perceptual step, EfficientNet-lite0, {batch}x1x{pixels}x{pixels}",
        inputs=_images(batch, pixels, channels=1),
        providers={
            "fastgen": _fastgen(ours, cached=True),
            "fastgen, target uncached": _fastgen(ours, cached=False),
            "eager": _step_eager,
        },
        oracle=_step_oracle,
        series="perceptual step, EfficientNet-lite0",
        size={"N": batch * pixels**2},
        tolerance=1e-3,
        error=network_error,  # signs of L1 turn too, where two maps nearly meet
    )


def growing(series: str, n: int) -> Work:
    return _lpips_work("vgg", n, 64)


GROWING = {"LPIPS-vgg, images of 3x64x64": 4}


def works(scale: str) -> list[Work]:
    if scale == "demo":
        return [_epilogue_work(2, 128, False, compiled=False), _step_work(64, 28)]
    if scale == "quick":
        return [
            *(_epilogue_work(2, 128, last, compiled=not last) for last in (False, True)),
            *(_lpips_work(net, 2, 64) for net in NETS),
            _glann_work(8, 32),
            _step_work(64, 28),
        ]
    huge = scale == "huge"  # torch.compile takes a minute for VGG16, and another where its memory is measured
    found = [
        *(_epilogue_work(4, size, False, compiled=size == 128) for size in (64, 128, 256)),
        _epilogue_work(4, 128, True, compiled=huge),
        *(_lpips_work(net, 2, 64, compiled=huge) for net in NETS),
        _lpips_work("vgg", 1, 256, compiled=huge),
        _glann_work(4, 64),
        _step_work(64, 28),
    ]
    if huge:
        found += [_epilogue_work(4, size, True) for size in (64, 256)] + [_glann_work(16, 32)]
        found += [_lpips_work(net, 2, size, compiled=True) for net in NETS for size in (128, 256)]
        found += [_lpips_work("alex", 1, 256, compiled=True)]
        found += [_step_work(64, 32), _epilogue_work(16, 256, False), _lpips_work("vgg", 16, 256)]
    return found
