"""LPIPS as a drop-in for `lpips.LPIPS`."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from fastgen import check
from fastgen.functional import perceptual as F
from fastgen.functional.transforms import batched
from fastgen.nn import trunks
from fastgen.nn.perceptual import Features, entered_target, images_of, kept
from fastgen.nn.perceptual_replay import Recorded, Replays, Target
from fastgen.nn.trunks_conv import scaled, sequence
from fastgen.reference import perceptual as reference

HEADS = Path(__file__).parent / "lpips_heads"

# torchvision's network, the ends of lpips's slices of `features`, the channels there
_NETS = {
    "alex": ("alexnet", (2, 5, 8, 10, 12), (64, 192, 384, 256, 256)),
    "vgg": ("vgg16", (4, 9, 16, 23, 30), (64, 128, 256, 512, 512)),
    "squeeze": ("squeezenet1_1", (2, 5, 8, 10, 11, 12, 13), (64, 128, 256, 384, 384, 512, 512)),
}


class _First(nn.Sequential):
    """The first slice, which scales the images."""

    def forward(self, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        first, *rest = self
        return sequence(rest, scaled(first, x, gain, offset))


class _Part(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return sequence(self, x)


class _Slices(nn.Module):
    """A torchvision trunk cut after each tapped layer, under lpips's names: slice1.0.weight and so on."""

    def __init__(self, features: nn.Sequential, ends: Sequence[int]) -> None:
        super().__init__()
        start = 0
        for k, end in enumerate(ends, 1):
            part = _Part() if start else _First()
            for index in range(start, end):
                part.add_module(str(index), features[index])
            self.add_module(f"slice{k}", part)
            start = end

    def forward(
        self, x: Tensor, gain: Tensor, offset: Tensor, use: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """The maps of gain·x + offset, or what `use` makes of each as soon as it is there."""
        taps = []
        for k, part in enumerate(self.children()):
            x = part(x) if k else part(x, gain, offset)
            taps.append(x if use is None else use(k, x))
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


def _complete_heads(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Take a state dict's heads under either name (model.0, model.1: without and with dropout) and in either list
    (lin0, lins.0), and refuse some without the others: lpips would leave those random in silence."""
    assert isinstance(module, LPIPS)
    if not module.lpips:
        return
    name = "0" if len(module.lins[0].model) == 1 else "1"  # type: ignore[arg-type]
    given: dict[int, Tensor] = {}
    for k in range(module.L):
        for one in (f"lin{k}", f"lins.{k}"):
            for other in ("0", "1"):
                weight = state.pop(f"{prefix}{one}.model.{other}.weight", None)
                if weight is not None:
                    given[k] = weight
    for k, weight in given.items():
        state[f"{prefix}lin{k}.model.{name}.weight"] = state[f"{prefix}lins.{k}.model.{name}.weight"] = weight
    missing = [f"lin{k}.model.{name}.weight" for k in range(module.L) if k not in given]
    if given and missing:
        raise check.UserError(f"state_dict: expected the heads of {module.L} layers, lacks {', '.join(missing)}")
    if given:
        module._random_heads = False


def _sum(shares: list[Tensor]) -> Tensor:
    value = shares[0]
    for one in shares[1:]:
        value = value + one
    return value


class LPIPS(Recorded):
    """Learned Perceptual Image Patch Similarity: `lpips.LPIPS` with its arguments, shapes, keys and results.

    Args: those of lpips 0.1.4, and after them ours.
        pretrained: True takes the published linear heads, which fastgen ships; False leaves them random, for training
            (eval_mode=False) or for load_state_dict: as long as nothing was loaded, random heads in eval mode raise.
        net: "alex", "vgg" (or "vgg16") or "squeeze".
        version: "0.1", or "0.0" without the input scaling.
        lpips: False averages the layers without heads.
        spatial: True gives a map [N, 1, H, W], each layer enlarged bilinearly.
        pnet_rand: True means a random trunk.
        pnet_tune: True lets the trunk be trained.
        use_dropout: dropout before the heads while they are trained.
        model_path: heads in a file of your own (lpips's .pth, or .safetensors); a full state dict fills the trunk too.
            A file without all heads raises, where lpips would leave the rest random; so does a model_path that
            pretrained=False or lpips=False would leave unread.
        eval_mode: True, the default, freezes heads and trunk and pins them to eval mode, whatever a parent's `.train()`
            says (not so under pnet_tune). False trains the heads, as lpips does by default.
        verbose: prints what is set up, as lpips does; False by default here.
        trunk_weights: None takes torch hub's cache ($TORCH_HOME/hub/checkpoints/alexnet-owt-7be5be79.pth,
            vgg16-397923af.pth, squeezenet1_1-b8a52dc0.pth; nothing is downloaded); else a path or a state dict with
            torchvision's names.
        eps_mode: "lpips", or "torchmetrics" for the numbers of torchmetrics' LPIPS.
        channels_last: runs the trunk in that layout, where its convolutions and our kernels are fastest; a frozen one
            does in any case on GPUs from Ampere on and on the CPU in float32, there by weights made ready once (1.8
            times their size in memory again, 3.6 times where gradients are taken).
        one_batch: two images of one call pass the trunk as one batch, where neither or both need a gradient: fewer
            launches.
        compile: runs the trunk through torch.compile, with a compilation for each kind of input.
        cuda_graph: on CUDA, with frozen networks, "auto" records the value and the images' gradients as one CUDA graph
            when a kind of call (shapes, layouts, dtypes, gradients wanted, autocast, stream) comes for the fourth time
            and has at most 2¹⁸ pixels, and from then on replays it: one launch instead of some hundred, at the price of
            its memory, taken until the networks move. Results are copies. Weights may change in place; replaced ones
            are recorded anew. What cannot be recorded runs as it is: spatial, retPerLayer, one image against many,
            float16 gradients, second orders, hooks; a capture that fails warns. True records at once, at any size,
            raises where a capture fails and takes CUDA images only; False never records. With compile=True, True means
            torch.compile's mode "reduce-overhead", of the trunk alone, and "auto" nothing.

    forward(in0, in1, retPerLayer=False, normalize=False): images [N, 1 or 3, H, W] in [-1, 1], with normalize=True in
    [0, 1], of the module's dtype or a narrower one; CPU images outside warn once (on CUDA the look would wait for the
    device). Sides of at least 31 for "alex",
    16 for "vgg", 17 for "squeeze". One of the two may have N = 1 and is then compared with each of the other. in1 may
    be the cached maps of references, `lpips.target(images)`, and be left out inside `with lpips.target(images):`.

    Returns: [N, 1, 1, 1] or [N, 1, H, W], float32 (float64 for float64 images); with retPerLayer also a list of the
    layers' shares.

    Raises: FileNotFoundError where the trunk's weights should be; UserError (a ValueError) for a file or a state dict
    without all of them; ValueError or TypeError naming the argument.

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
        channels_last: bool = False,
        one_batch: bool = False,
        compile: bool = False,
        cuda_graph: bool | str = "auto",
    ) -> None:
        super().__init__()
        if model_path is not None and not (pretrained and lpips):
            raise ValueError(
                f"model_path: expected None with pretrained={pretrained}, lpips={lpips}, got {model_path!r}"
            )
        if pnet_rand and trunk_weights is not None:
            raise ValueError("trunk_weights: expected None with pnet_rand=True, which makes the trunk random")
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
        self.least = max(trunks.least_sides(features)[: ends[-1]])
        if channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.one_batch, self.cuda_graph = one_batch, cuda_graph
        self.whole, self.whole_graph = compile, compile and cuda_graph is True
        self._kept = Replays(cuda_graph)
        trunks.compile_module(self.net, self.whole, self.whole_graph)
        self.lins = nn.ModuleList()
        if lpips:
            heads = [_Head(channels, use_dropout) for channels in self.chns]
            for k, head in enumerate(heads):
                self.add_module(f"lin{k}", head)
            del self.lins  # lpips registers the list after the heads: the same order of keys
            self.lins = nn.ModuleList(heads)
            if pretrained:
                self._load_heads(model_path or HEADS / f"v{version}_{net}.safetensors")
        self._random_heads = lpips and not pretrained
        self.register_load_state_dict_pre_hook(_complete_heads)
        self.entered: list[Features] = []
        self._range_told = False
        self._pinned = eval_mode and not pnet_tune
        self.requires_grad_(not self._pinned)
        self.net.requires_grad_(pnet_tune)
        super().train(not eval_mode)
        if verbose:
            kind, switch = "LPIPS" if lpips else "baseline", "on" if spatial else "off"
            print(f"Setting up [{kind}] perceptual loss: trunk [{net}], v[{version}], spatial [{switch}]")

    def extra_repr(self) -> str:
        names = ("version", "lpips", "spatial", "pnet_rand", "pnet_tune", "eps_mode", "one_batch", "cuda_graph")
        return ", ".join([f"net={self.pnet_type!r}", *(f"{name}={getattr(self, name)!r}" for name in names)])

    def _load_heads(self, path: str | os.PathLike[str]) -> None:
        state = trunks.read_weights(path)
        for k, head in enumerate(self.lins):
            assert isinstance(head, _Head)
            keys = (f"lin{k}", f"lin{k}.model.1.weight", f"lin{k}.model.0.weight")
            weight = next((state[key] for key in keys if key in state), None)
            if not isinstance(weight, Tensor) or weight.numel() != head.weight.numel():
                raise check.UserError(f"{path}: expected {keys[1]} with {head.weight.numel()} numbers")
            with torch.no_grad():
                head.weight.copy_(weight.reshape(head.weight.shape))
        trunk = {key[4:]: value for key, value in state.items() if isinstance(key, str) and key.startswith("net.")}
        if trunk:
            trunks.load(self.net, trunk, str(path))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        trunks.compile_module(self.net, self.whole, self.whole_graph)  # torch leaves it out of copies

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(mode and not self._pinned)

    def weights(self) -> list[Tensor]:
        """The heads as [C] for each layer, ones without heads: what `F.lpips_distance` takes."""
        if not self.lpips:
            return [self.scaling_layer.scale.new_ones(channels) for channels in self.chns]
        return [head.weight.flatten() for head in self.lins if isinstance(head, _Head)]

    def check_heads(self) -> None:
        """Random heads are for training alone."""
        if self._random_heads and self._pinned:
            raise ValueError(
                "pretrained=False: the heads are random: load_state_dict first, or eval_mode=False to train them"
            )

    def features(self, images: Tensor, normalize: bool = False) -> Features:
        """The trunk's maps of images, before normalisation; differentiable."""
        return Features(tuple(self._run(images, normalize)), tuple(images.shape[2:]))

    def _check_range(self, images: Tensor, normalize: bool) -> None:
        """A warning, once: images in [0, 255] pass for images in [-1, 1] otherwise."""
        if self._range_told or images.is_cuda or torch.compiler.is_compiling() or images.numel() == 0:
            return
        if batched(images):  # nobody can look at them
            return
        low, high = images.detach().aminmax()
        if float(low) < (-0.01 if normalize else -1.01) or float(high) > 1.01:
            self._range_told = True
            expected = "[0, 1] with normalize=True" if normalize else "[-1, 1], or [0, 1] with normalize=True"
            message = f"LPIPS: expected images in {expected}, got values from {float(low):.4g} to {float(high):.4g}"
            warnings.warn(message, stacklevel=4)

    def _run(self, images: Tensor, normalize: bool, use: Callable[[int, Tensor], Tensor] | None = None) -> list[Tensor]:
        images = trunks.fitted("images", images_of("images", images), self.net)
        self._check_range(images, normalize)
        trunks.check_sides("images", images, self.least, f"net={self.pnet_type!r}")
        if self.whole_graph:
            trunks.check_cuda("images", images)
        # 2x − 1, − shift and / scale as one pass, or none
        shift, scale = (t[0].to(images.dtype) for t in (self.scaling_layer.shift, self.scaling_layer.scale))
        if self.version == "0.0":
            shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
        gain, offset = (2 / scale, -(shift + 1) / scale) if normalize else (1 / scale, -shift / scale)
        if not self.whole:
            made: list[Tensor] = self.net(images, gain, offset, use)
            return made
        maps: list[Tensor] = self.net(images, gain, offset)
        if self.whole_graph:  # the next replay writes to the graph's memory
            maps = [f.clone() for f in maps]
        return maps if use is None else [use(k, f) for k, f in enumerate(maps)]

    def target(self, images: Tensor, normalize: bool = False) -> Features:
        """`features`, detached: compare with them as often as you like, `lpips(x, target)`, or `lpips(x)` inside
        `with lpips.target(images):`."""
        return kept(self, lambda: self.features(images, normalize))

    def forward(
        self, in0: Tensor, in1: Tensor | Features | None = None, retPerLayer: bool = False, normalize: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        self.check_heads()
        in0 = trunks.fitted("in0", images_of("in0", in0), self.net)
        if in1 is None:
            in1 = entered_target("in1", self.entered)
        trunks.check_sides("in0", in0, self.least, f"net={self.pnet_type!r}")
        if isinstance(in1, Features):
            if in1.size is not None and in1.size != tuple(in0.shape[2:]):
                raise ValueError(
                    f"in1: expected features of images of size {list(in0.shape[2:])}, got some of {list(in1.size)}"
                )
        else:
            in1 = trunks.fitted("in1", images_of("in1", in1), self.net)
            if in1.shape[2:] != in0.shape[2:]:
                raise ValueError(f"in1: expected images of size {list(in0.shape[2:])}, got {list(in1.shape[2:])}")
        samples0, samples1 = in0.shape[0], len(in1)
        if samples0 != samples1 and 1 not in (samples0, samples1):
            raise ValueError(f"in1: expected {samples0} images or 1, got {samples1}")
        target = in1.maps if isinstance(in1, Features) else in1
        if self.whole or self.spatial or self.training or retPerLayer or samples0 != samples1:
            shares = self._shares(in0, target, normalize)
            return (_sum(shares), shares) if retPerLayer else _sum(shares)
        options = (normalize, self.version, self.eps_mode, self.one_batch)
        return self._kept(self, options, lambda x, y: _sum(self._shares(x, y, normalize)), "in0", in0, target)

    def _shares(self, in0: Tensor, target: Target, normalize: bool) -> list[Tensor]:
        """What each layer adds."""
        samples0, samples1 = len(in0), len(target if isinstance(target, Tensor) else target[0])
        samples = max(samples0, samples1) if 0 not in (samples0, samples1) else 0
        weights = self.weights()
        theirs: Sequence[Tensor] = ()

        def share(k: int, f0: Tensor) -> Tensor:
            if theirs[k].shape[1:] != f0.shape[1:]:
                raise ValueError(
                    f"in1: expected features of images of size {list(in0.shape[2:])} of the same net, "
                    f"got maps of {list(theirs[k].shape[1:])} for {list(f0.shape[1:])}"
                )
            f0, f1 = (f if len(f) == samples else f.expand(samples, -1, -1, -1) for f in (f0, theirs[k]))
            return self._layer(k, f0, f1, weights[k], in0)

        if not isinstance(target, Tensor):
            theirs = target
        elif self.one_batch and not (torch.is_grad_enabled() and in0.requires_grad != target.requires_grad):
            channels = max(in0.shape[1], target.shape[1])
            pair = torch.cat([image.expand(-1, channels, -1, -1) for image in (in0, target)])
            maps = self.features(pair, normalize).maps
            theirs = [f[samples0:] for f in maps]
            return [share(k, f[:samples0]) for k, f in enumerate(maps)]
        else:
            theirs = self.features(target, normalize).maps
        # Each layer is compared as soon as its map is there: its gradient too is then made when the backward comes to
        # it, where it would else be kept from the start.
        return self._run(in0, normalize, share)

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
