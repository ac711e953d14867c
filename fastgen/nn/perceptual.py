"""Perceptual losses with cached targets, LPIPS as a drop-in for `lpips.LPIPS`, and LPIPS as a Euclidean embedding."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from fastgen import check
from fastgen.functional import perceptual as F
from fastgen.nn import trunks
from fastgen.reference import perceptual as reference

HEADS = Path(__file__).parent / "lpips_heads"


@dataclass(frozen=True)
class Features:
    """What a loss keeps of target images: compare with it again and again without the network.

    `features[rows]` (an index tensor, a slice or a mask) picks samples; `features.to(...)` moves or narrows the maps,
    to bfloat16 say; `Features.cat` joins batches.
    """

    maps: tuple[Tensor, ...]

    def __getitem__(self, rows: Any) -> "Features":
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        return Features(tuple(f[rows] for f in self.maps))

    def __len__(self) -> int:
        return self.maps[0].shape[0]

    def to(self, *args: Any, **kwargs: Any) -> "Features":
        return Features(tuple(f.to(*args, **kwargs) for f in self.maps))

    @staticmethod
    def cat(parts: Sequence["Features"]) -> "Features":
        return Features(tuple(torch.cat(maps) for maps in zip(*(part.maps for part in parts), strict=True)))


def _images(name: str, value: Any) -> Tensor:
    check.tensor(name, value, ndim=(4,))
    if value.shape[1] not in (1, 3) or 0 in value.shape[2:]:
        raise ValueError(f"{name}: expected images [N, 1 or 3, H, W], got shape {list(value.shape)}")
    checked: Tensor = value
    return checked


class PerceptualLoss(nn.Module):
    """pixel_weight · mean |x − y| + Σ_l w_l mean |f_l(x) − f_l(y)| over the feature maps f_l of a frozen network.

    Args:
        trunk: "efficientnet-lite0", "vgg16", "alexnet" or "squeezenet1_1" (with their weights: `fastgen.nn.trunk`), a
            module from `fastgen.nn.trunk(...)`, or any other module: then `layers` names submodules whose outputs are
            taken. Another module gets the images as they are, and is run to its end; it is neither frozen nor changed.
        layers: names of the maps to compare, each once; `trunk.layers` lists those of our own.
        layer_weight: a number for each layer, default 1.
        distance: "l1" or "l2" (squared), of maps and of pixels.
        pixel_weight: what the images' own distance counts, default 0.
        style_weight: Gram matrices are not built yet: 0.
        pad_to: pads smaller images with 0 (black) on all sides to this height and width before the network, as GLANN
            pads 28 to 32. None, the default, gives the network what comes: any size for EfficientNet-lite0, for the
            others one that their poolings leave something of.
        reduction: "none" for [N], "mean" for a scalar.

    forward(x, target): x and target are images [N, 1 or 3, H, W] in [0, 1], which our trunks normalise by their own
    mean and std; one channel counts as three equal ones. target may be `loss.target(y)`, or rows of it, and then y
    never passes through the network again: the same number, to the bit for the same batch.

    Returns: [N] float32 (float64 for float64 images), or its mean.

    Raises: ValueError or TypeError naming the argument; FileNotFoundError where the weights should be.

    Notes: Gradients reach x, and target images that require them. Maps under autocast are compared in float32.
        Deterministic wherever the convolutions are.

    Source: Johnson et al. 2016; Hoshen, Li & Malik 2019, GLANN, eq. 2. GLANN's own loss is trunk("vgg16", mean=3*[0.5],
        std=3*[0.5]), pixel_weight=1, pad_to=32, layers=("relu1_2", "relu2_2", "conv3_2") at 28 or 32 pixels.
    """

    def __init__(
        self,
        trunk: str | nn.Module,
        *,
        layers: Sequence[str],
        layer_weight: Sequence[float] | None = None,
        distance: str = "l1",
        pixel_weight: float = 0.0,
        style_weight: float = 0.0,
        pad_to: int | None = None,
        reduction: str = "none",
    ) -> None:
        super().__init__()
        if style_weight != 0:
            check.not_built("style_weight", style_weight, "style_weight=0")
        if isinstance(trunk, str):
            trunk = trunks.trunk(trunk)
        elif not isinstance(trunk, nn.Module):
            raise TypeError(f"trunk: expected a name or a module, got {type(trunk).__name__}")
        if isinstance(layers, str):
            raise TypeError(f"layers: expected a sequence of names, got the string {layers!r}")
        if isinstance(trunk, trunks.Trunk):
            self.layers = trunk.check_layers(layers)
        else:
            self.layers = tuple(layers)
            names = dict(trunk.named_modules())
            unknown = [layer for layer in self.layers if layer not in names]
            if unknown or not self.layers:
                raise ValueError(f"layers: expected names of submodules of trunk, got {unknown or list(layers)}")
        self.trunk = trunk
        self.layer_weight = [1.0] * len(self.layers)
        if layer_weight is not None:
            self.layer_weight = F.layer_numbers(layer_weight, len(self.layers))
        self.distance = check.choice("distance", distance, F.DISTANCES)
        self.pixel_weight = check.number("pixel_weight", pixel_weight, least=0)
        self.pad_to = None if pad_to is None else check.integer("pad_to", pad_to, least=1)
        self.reduction = check.choice("reduction", reduction, ("none", "mean"))

    def features(self, images: Tensor) -> Features:
        """The maps that are compared, differentiable: the images themselves first where pixels count."""
        own = (images,) if self.pixel_weight else ()
        if self.pad_to is not None:
            missing = [max(self.pad_to - size, 0) for size in (images.shape[3], images.shape[2])]
            if any(missing):
                images = tf.pad(images, [part for m in missing for part in (m // 2, m - m // 2)])
        if isinstance(self.trunk, trunks.Trunk):
            return Features((*own, *self.trunk(images, self.layers)))
        return Features((*own, *_hooked(self.trunk, self.layers, images)))

    @torch.no_grad()
    def target(self, y: Tensor, *, chunk: int | None = None) -> Features:
        """The maps of target images, detached, for `loss(x, features)`; `chunk` images pass the network at a time."""
        _images("y", y)
        if chunk is None:
            return self.features(y)
        check.integer("chunk", chunk, least=1)
        return Features.cat([self.features(part) for part in y.split(chunk)])

    def forward(self, x: Tensor, target: Tensor | Features) -> Tensor:
        _images("x", x)
        if not isinstance(target, Features):
            _images("target", target)
            if target.shape != x.shape:
                raise ValueError(f"target: expected the shape of x, {list(x.shape)}, got {list(target.shape)}")
            target = self.features(target) if target.requires_grad else self.target(target)
        elif len(target) != x.shape[0]:
            raise ValueError(f"target: expected features of {x.shape[0]} images, got {len(target)}")
        weights = [self.pixel_weight, *self.layer_weight] if self.pixel_weight else self.layer_weight
        loss = F.feature_distance(self.features(x).maps, target.maps, distance=self.distance, layer_weight=weights)
        return loss.mean() if self.reduction == "mean" else loss


def _hooked(network: nn.Module, layers: Sequence[str], images: Tensor) -> list[Tensor]:
    """Outputs of the named submodules, copied: the next module may be a ReLU that works in place."""
    taps: dict[str, Tensor] = {}

    def keep(layer: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(f"layers: {layer!r} returns {type(output).__name__}, not a tensor")
            taps[layer] = output.clone()

        return hook

    handles = [network.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer for layer in layers if layer not in taps]
    if missing:
        raise ValueError(f"layers: {missing} took no part in the forward pass of trunk")
    return [taps[layer] for layer in layers]


# torchvision's network, the ends of lpips's slices of `features`, the channels there
_NETS = {
    "alex": ("alexnet", (2, 5, 8, 10, 12), (64, 192, 384, 256, 256)),
    "vgg": ("vgg16", (4, 9, 16, 23, 30), (64, 128, 256, 512, 512)),
    "squeeze": ("squeezenet1_1", (2, 5, 8, 10, 11, 12, 13), (64, 128, 256, 384, 384, 512, 512)),
}


class _Slices(nn.Module):
    """A torchvision trunk cut after each tapped layer, under lpips's names: slice1.0.weight and so on."""

    def __init__(self, features: nn.Sequential, ends: Sequence[int]) -> None:
        super().__init__()
        start = 0
        for k, end in enumerate(ends, 1):
            part = nn.Sequential()
            for index in range(start, end):
                part.add_module(str(index), features[index])
            self.add_module(f"slice{k}", part)
            start = end

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for part in self.children():
            x = part(x)
            taps.append(x)
        return taps


class _ScalingLayer(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift.to(x.dtype)) / self.scale.to(x.dtype)


class _Head(nn.Module):
    """lpips's NetLinLayer: the name of its weight, model.1 or model.0, says whether there is a dropout."""

    def __init__(self, channels: int, use_dropout: bool) -> None:
        super().__init__()
        dropout = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*dropout, nn.Conv2d(channels, 1, 1, bias=False))

    @property
    def weight(self) -> Tensor:
        weight = self.model[-1].weight
        assert isinstance(weight, Tensor)
        return weight


class LPIPS(nn.Module):
    """Learned Perceptual Image Patch Similarity: `lpips.LPIPS` with its arguments, shapes, keys and results.

    Args: those of lpips 0.1.4, and after them two of ours.
        pretrained: True takes the published linear heads, which fastgen ships; False leaves them random.
        net: "alex", "vgg" (or "vgg16") or "squeeze".
        version: "0.1", or "0.0" without the input scaling.
        lpips: False averages the layers without heads.
        spatial: True gives a map [N, 1, H, W], each layer enlarged bilinearly.
        pnet_rand: True means a random trunk.
        pnet_tune: True lets the trunk be trained.
        use_dropout: dropout before the heads while they are trained.
        model_path: heads in a file of your own (lpips's .pth, or .safetensors); a full state dict fills the trunk too.
            A file without all heads raises, where lpips would leave the rest random.
        eval_mode: True, the default, freezes heads and trunk and pins them to eval mode, whatever a parent's `.train()`
            says (not so under pnet_tune). False trains the heads, as lpips does by default.
        verbose: prints what is set up, as lpips does; False by default here.
        trunk_weights: None takes torch hub's cache ($TORCH_HOME/hub/checkpoints/alexnet-owt-7be5be79.pth,
            vgg16-397923af.pth, squeezenet1_1-b8a52dc0.pth; nothing is downloaded); else a path or a state dict with
            torchvision's names.
        eps_mode: "lpips", or "torchmetrics" for the numbers of torchmetrics' LPIPS.

    forward(in0, in1, retPerLayer=False, normalize=False): images [N, 1 or 3, H, W] in [-1, 1], with normalize=True in
    [0, 1]. One of the two may have N = 1 and is then compared with each of the other. in1 may be the cached maps of
    references, `lpips.target(images)`.

    Returns: [N, 1, 1, 1] or [N, 1, H, W], float32 (float64 for float64 images); with retPerLayer also a list of the
    layers' shares.

    Raises: FileNotFoundError where the trunk's weights should be; UserError (a ValueError) for a file without them;
    ValueError or TypeError naming the argument.

    Notes: Gradients reach either image, and twice; at pixels whose channels are all 0 they are 0 and not NaN. Norms and
        sums are float32 for half types and under autocast. Exactly 0 for identical images. Deterministic wherever the
        convolutions are.

    Source: Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric; lpips 0.1.4.
    """

    def __init__(
        self,
        pretrained: bool = True,
        net: str = "alex",
        version: str = "0.1",
        lpips: bool = True,
        spatial: bool = False,
        pnet_rand: bool = False,
        pnet_tune: bool = False,
        use_dropout: bool = True,
        model_path: str | os.PathLike[str] | None = None,
        eval_mode: bool = True,
        verbose: bool = False,
        *,
        trunk_weights: trunks.Weights = None,
        eps_mode: str = "lpips",
    ) -> None:
        super().__init__()
        net = "vgg" if net == "vgg16" else check.choice("net", net, tuple(_NETS))
        check.choice("version", version, ("0.1", "0.0"))
        self.eps_mode = check.choice("eps_mode", eps_mode, F.EPS_MODES)
        self.pnet_type, self.version, self.lpips, self.spatial = net, version, lpips, spatial
        self.pnet_tune, self.pnet_rand = pnet_tune, pnet_rand
        name, ends, self.chns = _NETS[net]
        self.L = len(ends)

        self.scaling_layer = _ScalingLayer()
        features = trunks.TORCHVISION[name][0]()
        if not pnet_rand:
            state, source = trunks.state_for(name, trunk_weights)
            trunks.load(nn.ModuleDict({"features": features}), state, source)
        self.net = _Slices(features, ends)
        self.lins = nn.ModuleList()
        if lpips:
            heads = [_Head(channels, use_dropout) for channels in self.chns]
            for k, head in enumerate(heads):
                self.add_module(f"lin{k}", head)
            del self.lins  # lpips registers the list after the heads: the same order of keys
            self.lins = nn.ModuleList(heads)
            if pretrained:
                self._load_heads(model_path or HEADS / f"v{version}_{net}.safetensors")
        self._pinned = eval_mode and not pnet_tune
        self.requires_grad_(not self._pinned)
        self.net.requires_grad_(pnet_tune)
        super().train(not eval_mode)
        if verbose:
            kind, switch = "LPIPS" if lpips else "baseline", "on" if spatial else "off"
            print(f"Setting up [{kind}] perceptual loss: trunk [{net}], v[{version}], spatial [{switch}]")

    def _load_heads(self, path: str | os.PathLike[str]) -> None:
        state = trunks.read_weights(path)
        for k, head in enumerate(self.lins):
            assert isinstance(head, _Head)
            keys = (f"lin{k}", f"lin{k}.model.1.weight", f"lin{k}.model.0.weight")
            weight = next((state[key] for key in keys if key in state), None)
            if weight is None or weight.numel() != head.weight.numel():
                raise check.UserError(f"{path}: expected {keys[1]} with {head.weight.numel()} numbers")
            with torch.no_grad():
                head.weight.copy_(weight.reshape(head.weight.shape))
        trunk = {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
        if trunk:
            trunks.load(self.net, trunk, str(path))

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(mode and not self._pinned)

    def weights(self) -> list[Tensor]:
        """The heads as [C] for each layer, ones without heads: what `F.lpips_distance` takes."""
        if not self.lpips:
            return [self.scaling_layer.scale.new_ones(channels) for channels in self.chns]
        return [head.weight.flatten() for head in self.lins if isinstance(head, _Head)]

    def features(self, images: Tensor, normalize: bool = False) -> Features:
        """The trunk's maps of images, before normalisation; differentiable."""
        _images("images", images)
        if normalize:
            images = 2 * images - 1
        if self.version == "0.1":
            images = self.scaling_layer(images)
        return Features(tuple(self.net(images.expand(-1, 3, -1, -1))))

    @torch.no_grad()
    def target(self, images: Tensor, normalize: bool = False) -> Features:
        """`features`, detached: compare with them as often as you like, `lpips(x, target)`."""
        return self.features(images, normalize)

    def forward(
        self, in0: Tensor, in1: Tensor | Features, retPerLayer: bool = False, normalize: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        _images("in0", in0)
        if not isinstance(in1, Features):
            _images("in1", in1)
            if in1.shape[2:] != in0.shape[2:]:
                raise ValueError(f"in1: expected images of size {list(in0.shape[2:])}, got {list(in1.shape[2:])}")
        samples0, samples1 = in0.shape[0], len(in1)
        if samples0 != samples1 and 1 not in (samples0, samples1):
            raise ValueError(f"in1: expected {samples0} images or 1, got {samples1}")
        maps0 = self.features(in0, normalize).maps
        maps1 = in1.maps if isinstance(in1, Features) else self.features(in1, normalize).maps
        if samples0 != samples1:
            samples = max(samples0, samples1) if 0 not in (samples0, samples1) else 0
            maps0 = tuple(f.expand(samples, -1, -1, -1) for f in maps0)
            maps1 = tuple(f.expand(samples, -1, -1, -1) for f in maps1)
        shares = [
            self._layer(k, f0, f1, weight, in0)
            for k, (f0, f1, weight) in enumerate(zip(maps0, maps1, self.weights(), strict=True))
        ]
        value = shares[0]
        for share in shares[1:]:
            value = value + share
        return (value, shares) if retPerLayer else value

    def _layer(self, k: int, f0: Tensor, f1: Tensor, weight: Tensor, image: Tensor) -> Tensor:
        dropout = self.training and self.lpips and len(self.lins[k].model) > 1  # type: ignore[arg-type]
        if not self.spatial and not dropout:
            return F.lpips_distance([f0], [f1], [weight], eps_mode=self.eps_mode)[:, None, None, None]
        eps, inside = F.epsilon(self.eps_mode)
        if dropout:
            u0, u1 = (reference.normalise(f, eps, inside)[0] for f in (f0, f1))
            each = tf.dropout((u0 - u1).square()) * weight[:, None, None]
            each = each.sum(1, keepdim=True)
        else:
            each = reference.lpips_map(f0, f1, weight, eps, inside)
        if not self.spatial:
            return each.mean((2, 3), keepdim=True)
        return tf.interpolate(each, size=image.shape[2:], mode="bilinear", align_corners=False)


class PerceptualEmbedding(nn.Module):
    """Images as points whose squared L2 distance is their LPIPS: E(x)_(l,c,p) = √(w_lc / H_l W_l) · u_lcp.

    N·M distances then cost N + M passes of the network, and any nearest-neighbour search finds perceptual neighbours.

    Args:
        lpips: an `LPIPS` without `spatial`, whose heads are not negative (the published ones are not).

    forward(x, normalize=False): images [N, 1 or 3, H, W] in [-1, 1], with normalize=True in [0, 1].

    Returns: [N, E] float32 (float64 for float64 images), E = Σ_l C_l H_l W_l: 31,872 for "alex" at 64x64 pixels.

    Raises: ValueError for a negative head or a spatial LPIPS; TypeError for another module.

    Notes: Differentiable, with gradient 0 at pixels whose channels are all 0. ‖E(x) − E(y)‖² equals lpips(x, y) to 1e-5
        relative in float32.

    Source: Zhang et al. 2018, eq. 1, read as a norm.
    """

    def __init__(self, lpips: LPIPS) -> None:
        super().__init__()
        if not isinstance(lpips, LPIPS):
            raise TypeError(f"lpips: expected a fastgen.nn.LPIPS, got {type(lpips).__name__}")
        if lpips.spatial:
            raise ValueError("lpips: expected spatial=False, got a spatial LPIPS")
        if any(bool((weight < 0).any()) for weight in lpips.weights()):
            raise ValueError("lpips: expected heads >= 0, whose roots scale the channels; got a negative weight")
        self.lpips = lpips

    def forward(self, x: Tensor, normalize: bool = False) -> Tensor:
        parts = []
        for f, weight in zip(self.lpips.features(x, normalize).maps, self.lpips.weights(), strict=True):
            u = reference.normalise(f, *F.epsilon(self.lpips.eps_mode))[0]
            scale = (weight.to(u.dtype) / (f.shape[2] * f.shape[3])).sqrt()
            parts.append((u * scale[:, None, None]).flatten(1))
        return torch.cat(parts, 1)
