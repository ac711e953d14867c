"""The naive meaning of the perceptual family: loops and plain autograd in float64, and lpips 0.1.4 as it is written."""

import math

import torch
import torch.nn.functional as tf
from torch import Tensor, nn


def unit(v: Tensor, eps_mode: str) -> Tensor:
    if eps_mode == "torchmetrics":
        return v / (1e-8 + (v * v).sum()).sqrt()
    if not bool((v != 0).any()):
        return v.detach() * 0  # the convention at a zero vector: no gradient
    return v / ((v * v).sum().sqrt() + 1e-10)


def lpips_layer(f0: Tensor, f1: Tensor, weight: Tensor, eps_mode: str) -> Tensor:
    f0, f1, weight = f0.double(), f1.double(), weight.double()
    n, _, h, w = f0.shape
    values = []
    for i in range(n):
        pixels = [
            (weight * (unit(f0[i, :, y, x], eps_mode) - unit(f1[i, :, y, x], eps_mode)) ** 2).sum()
            for y in range(h)
            for x in range(w)
        ]
        values.append(torch.stack(pixels).sum() / (h * w))
    return torch.stack(values) if values else f0.sum((1, 2, 3)) + f1.sum((1, 2, 3)) + 0 * weight.sum()


def lpips_layer_gradients(
    f0: Tensor, f1: Tensor, weight: Tensor, upstream: Tensor, eps_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [t.detach().double().clone().requires_grad_() for t in (f0, f1, weight)]
    (lpips_layer(*leaves, eps_mode) * upstream.double()).sum().backward()
    return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)


def feature_distance(maps0: list[Tensor], maps1: list[Tensor], distance: str, layer_weight: list[float]) -> Tensor:
    total = torch.zeros(maps0[0].shape[0], dtype=torch.float64)
    for f0, f1, scale in zip(maps0, maps1, layer_weight, strict=True):
        for i in range(f0.shape[0]):
            d = (f0[i].double() - f1[i].double()).flatten()
            total[i] += scale * (d.abs() if distance == "l1" else d * d).sum() / d.numel()
    return total


def philox(counter: list[int], seed: int) -> list[int]:
    """Philox 4x32-10 in Python's integers."""
    c, key = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ key[0], b % 2**32, a >> 32 ^ c[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


def projection(f: Tensor, weight: Tensor, dim: int, seed: int, layer: int, eps_mode: str) -> Tensor:
    """LPIPS's embedding of one layer, coordinate by coordinate into its bucket."""
    n, channels, h, w = f.shape
    out = torch.zeros(n, dim, dtype=torch.float64)
    for i in range(n):
        for p in range(h * w):
            u = unit(f[i, :, p // w, p % w].double(), eps_mode)
            for c in range(channels):
                words = philox([p // 64, c, layer, 0], seed)
                sign = -1 if words[p % 64 // 32] >> (p % 32) & 1 else 1
                bucket = ((words[2] * dim >> 32) + p % 64) % dim
                out[i, bucket] += sign * float(weight[c] / (h * w)) ** 0.5 * float(u[c])
    return out


def projection_gradient(
    f: Tensor, weight: Tensor, upstream: Tensor, dim: int, seed: int, layer: int, eps_mode: str
) -> Tensor:
    """Of Σ upstream · projection with respect to f, each pixel's by autograd; 0 where the root of a zero vector has
    none."""
    n, channels, h, w = f.shape
    leaf = f.detach().double().requires_grad_()
    total = leaf.sum() * 0
    for i in range(n):
        for p in range(h * w):
            pull = []
            for c in range(channels):
                words = philox([p // 64, c, layer, 0], seed)
                sign = -1 if words[p % 64 // 32] >> (p % 32) & 1 else 1
                bucket = ((words[2] * dim >> 32) + p % 64) % dim
                pull.append(sign * float(weight[c] / (h * w)) ** 0.5 * float(upstream[i, bucket]))
            total = total + unit(leaf[i, :, p // w, p % w], eps_mode) @ torch.tensor(pull, dtype=torch.float64)
    return torch.autograd.grad(total, leaf)[0].nan_to_num()


def gram(f: Tensor) -> Tensor:
    f = f.double()
    n, c, h, w = f.shape
    found = torch.zeros(n, c, c, dtype=torch.float64)
    for i in range(n):
        for a in range(c):
            for b in range(c):
                found[i, a, b] = (f[i, a] * f[i, b]).sum() / (c * h * w)
    return found


def glann_loss(features: nn.Sequential, x: Tensor, y: Tensor, levels: int, several_scales: bool = False) -> Tensor:
    """GLANN's official distance as it is written: 2I − 1, gray as three, 28 padded, taps that later ReLUs overwrite."""
    ids = [2, 7, 12, 21, 30]
    modules = [nn.ReLU(inplace=True) if isinstance(module, nn.ReLU) else module for module in features]

    def taps(z: Tensor, levels: int) -> list[Tensor]:
        z, output = z.clone(), []
        for i in range(ids[:levels][-1] + 1):
            z = modules[i](z)
            if i in ids[:levels]:
                output.append(z)
        return output

    def distance(a: Tensor, b: Tensor, levels: int) -> Tensor:
        loss = (a - b).abs().flatten(1).mean(1)
        for f, g in zip(taps(a, levels), taps(b, levels), strict=True):
            loss = loss + (f - g).abs().flatten(1).mean(1)
        return loss

    images = [image.double().expand(-1, 3, -1, -1) for image in (x, y)]
    if x.shape[2] == 28:
        images = [tf.pad(image, (2, 2, 2, 2)) for image in images]
    images = [2 * image - 1 for image in images]
    loss = distance(*images, levels)
    if several_scales:
        loss = loss + distance(*(tf.avg_pool2d(image, 4) for image in images), 4)
    return loss


def laplacian_pyramid_loss(x: Tensor, y: Tensor, levels: int, kernel: Tensor | None = None) -> float:
    """minimal_glo's LapLoss: both pyramids, a kernel of summed squared bumps, one scalar."""
    bumps = [
        [math.exp((i - 2) ** 2 / -8.0) ** 2 + math.exp((j - 2) ** 2 / -8.0) ** 2 for i in range(5)] for j in range(5)
    ]
    kernel = torch.tensor(bumps, dtype=torch.float64) if kernel is None else kernel.double()
    kernel = (kernel / kernel.sum()).repeat(x.shape[1], 1, 1)[:, None]

    def pyramid(image: Tensor) -> list[Tensor]:
        found, current = [], image.double()
        for _ in range(levels):
            low = tf.conv2d(tf.pad(current, [len(kernel[0, 0]) // 2] * 4, mode="replicate"), kernel, groups=x.shape[1])
            found.append(current - low)
            current = tf.avg_pool2d(low, 2)
        return [*found, current]

    return sum(float((a - b).abs().mean()) for a, b in zip(pyramid(x), pyramid(y), strict=True))


def vgg16(classes: bool = False) -> nn.Sequential:
    """torchvision's features, written out module by module (configuration D)."""
    layers: list[nn.Module] = []
    channels = 3
    for v in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if isinstance(v, str):
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            layers += [nn.Conv2d(channels, v, kernel_size=3, padding=1), nn.ReLU()]
            channels = v
    return nn.Sequential(*layers)


def alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )


class Fire(nn.Module):
    def __init__(self, inplanes: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inplanes, squeeze, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = tf.relu(self.squeeze(x))
        return torch.cat([tf.relu(self.expand1x1(x)), tf.relu(self.expand3x3(x))], 1)


def squeezenet1_1() -> nn.Sequential:
    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=3, stride=2),
        nn.ReLU(),
        pool(),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        pool(),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        pool(),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )


NETS = {
    "alex": (alexnet, [range(2), range(2, 5), range(5, 8), range(8, 10), range(10, 12)]),
    "vgg": (vgg16, [range(4), range(4, 9), range(9, 16), range(16, 23), range(23, 30)]),
    "squeeze": (
        squeezenet1_1,
        [range(2), range(2, 5), range(5, 8), range(8, 10), range(10, 11), range(11, 12), range(12, 13)],
    ),
}


class EagerLPIPS(nn.Module):
    """lpips.LPIPS.forward of lpips 0.1.4, trunk and heads given by hand."""

    def __init__(self, net: str, heads: list[Tensor], version: str = "0.1", lpips: bool = True) -> None:
        super().__init__()
        features, self.slices = NETS[net][0](), NETS[net][1]
        self.features, self.heads, self.version, self.lpips = features, heads, version, lpips

    def taps(self, x: Tensor) -> list[Tensor]:
        found = []
        for part in self.slices:
            for index in part:
                x = self.features[index](x)
            found.append(x)
        return found

    def forward(
        self, in0: Tensor, in1: Tensor, spatial: bool = False, normalize: bool = False, eps_mode: str = "lpips"
    ):
        if normalize:
            in0, in1 = 2 * in0 - 1, 2 * in1 - 1
        shape = in0.shape[2:]
        if self.version == "0.1":
            shift = in0.new_tensor([-0.030, -0.088, -0.188])[None, :, None, None]
            scale = in0.new_tensor([0.458, 0.448, 0.450])[None, :, None, None]
            in0, in1 = (in0 - shift) / scale, (in1 - shift) / scale

        def normal(f: Tensor) -> Tensor:
            if eps_mode == "torchmetrics":
                return f / torch.sqrt(1e-8 + torch.sum(f**2, dim=1, keepdim=True))
            return f / (torch.sqrt(torch.sum(f**2, dim=1, keepdim=True)) + 1e-10)

        shares = []
        for f0, f1, head in zip(self.taps(in0), self.taps(in1), self.heads, strict=True):
            difference = (normal(f0) - normal(f1)) ** 2
            each = (
                tf.conv2d(difference, head.to(f0.dtype)[None, :, None, None]) if self.lpips else difference.sum(1, True)
            )
            if spatial:
                each = nn.Upsample(size=shape, mode="bilinear", align_corners=False)(each)
            else:
                each = each.mean([2, 3], keepdim=True)
            shares.append(each)
        return sum(shares), shares


def efficientnet_lite0(state: dict[str, Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Stem and blocks of the published checkpoint, batch norms and padding as such; and logits."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"].to(x.dtype)
        k = weight.shape[-1]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((math.ceil(size / stride) - 1) * stride + k - size, 0)
            pads += [total // 2, total - total // 2]
        groups = 1 if weight.shape[1] == x.shape[1] else x.shape[1]
        return tf.conv2d(tf.pad(x, pads), weight, None, stride, groups=groups)

    def norm(name: str, x: Tensor) -> Tensor:
        parts = [state[f"{name}.{p}"].to(x.dtype) for p in ("running_mean", "running_var", "weight", "bias")]
        return tf.batch_norm(x, *parts, training=False, eps=1e-3)

    x = norm("_bn0", conv("_conv_stem", x, 2)).clamp(0, 6)
    maps, i = [x], 0
    for repeats, stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for r in range(repeats):
            name, y = f"_blocks.{i}", x
            if i:
                y = norm(f"{name}._bn0", conv(f"{name}._expand_conv", y)).clamp(0, 6)
            y = norm(f"{name}._bn1", conv(f"{name}._depthwise_conv", y, stride if r == 0 else 1)).clamp(0, 6)
            y = norm(f"{name}._bn2", conv(f"{name}._project_conv", y))
            x = x + y if r else y
            maps.append(x)
            i += 1
    head = norm("_bn1", conv("_conv_head", x)).clamp(0, 6).mean((2, 3))
    return maps, head @ state["_fc.weight"].to(x.dtype).t() + state["_fc.bias"].to(x.dtype)
