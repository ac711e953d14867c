"""Distances between feature maps: LPIPS's normalised and weighted one, plain L1 and L2, GLO's Laplacian pyramid."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as tf
from torch import Tensor

from fastgen import check
from fastgen.functional.transforms import Function, apply, twice, wanted
from fastgen.ops import perceptual as ops
from fastgen.reference import perceptual as reference

EPS_MODES = ("lpips", "torchmetrics")
DISTANCES = ("l1", "l2")


def epsilon(eps_mode: str) -> tuple[float, bool]:
    """(eps, whether it stands under the root). Literals: out of a table, torch.compile would make them inputs."""
    return (1e-10, False) if eps_mode == "lpips" else (1e-8, True)


class _LpipsLayer(Function):
    vmap = staticmethod(ops.no_vmap["lpips_layer"])

    @staticmethod
    def forward(ctx: Any, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
        ctx.eps = (eps, eps_inside)
        value: Tensor
        if any(ctx.needs_input_grad[:2]):
            value, kept = ops.lpips_layer_kept(f0, f1, weight, eps, eps_inside)
        else:
            value, kept = ops.lpips_layer(f0, f1, weight, eps, eps_inside), None
        ctx.save_for_backward(f0, f1, weight, kept)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        f0, f1, weight, kept = ctx.saved_tensors
        eps = ctx.eps
        need0, need1, need_weight = ctx.needs_input_grad[:3]
        grad0 = grad1 = grad_weight = None

        def one(grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
            found: Tensor = ops.lpips_layer_backward(grad, f0, f1, weight, *eps, kept)
            return found

        def both(grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = ops.lpips_layer_backward_both(grad, f0, f1, weight, *eps, kept)
            return found

        def one_meaning(grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, _: Tensor) -> Tensor:
            return reference.lpips_layer_backward(grad, f0, f1, weight, *eps)

        def both_meaning(grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            return one_meaning(grad, f0, f1, weight, _), one_meaning(grad, f1, f0, weight, _)

        if need0 and need1:
            grad0, grad1 = twice(both, both_meaning, grad, f0, f1, weight, kept)
        elif need0:
            grad0 = twice(one, one_meaning, grad, f0, f1, weight, kept)
        elif need1:
            grad1 = twice(one, one_meaning, grad, f1, f0, weight, kept.flip(1))
        if need_weight:
            grad_weight = twice(
                lambda g, a, b: ops.lpips_layer_backward_weight(g, a, b, *eps),
                lambda g, a, b: reference.lpips_layer_backward_weight(g, a, b, *eps),
                grad,
                f0,
                f1,
            ).to(weight.dtype)
        return grad0, grad1, grad_weight, None, None


class _LpipsProject(Function):
    vmap = staticmethod(ops.no_vmap["lpips_project"])

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, weight: Tensor, dim: int, seed: int, layer: int, eps: float, inside: bool
    ) -> Tensor:
        ctx.save_for_backward(f, weight)
        ctx.options = (dim, seed, layer, eps, inside)
        value: Tensor = ops.lpips_project(f, weight, dim, seed, layer, eps, inside)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        f, weight = ctx.saved_tensors
        dim, seed, layer, eps, inside = ctx.options
        if ctx.needs_input_grad[1]:  # within transforms in torch.compile this is not known before
            _constant_weight(layer)

        def meaning(grad: Tensor, f: Tensor, weight: Tensor) -> Tensor:
            bucket, sign = ops.lpips_project_buckets(f.detach(), dim, seed, layer)
            return reference.lpips_project_backward(grad, f, weight, bucket, sign, eps, inside)

        def kernel(grad: Tensor, f: Tensor, weight: Tensor) -> Tensor:
            found: Tensor = ops.lpips_project_backward(grad, f, weight, seed, layer, eps, inside)
            return found

        return twice(kernel, meaning, grad, f, weight), None, None, None, None, None, None


def _constant_weight(layer: int) -> NoReturn:
    check.not_built(f"weights[{layer}].requires_grad", True, "weights that require no gradient")


class _FeatureDistance(Function):
    vmap = staticmethod(ops.no_vmap["feature_distance"])

    @staticmethod
    def forward(ctx: Any, f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
        ctx.save_for_backward(f0, f1)
        ctx.squared = squared
        value: Tensor = ops.feature_distance(f0, f1, squared)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        f0, f1 = ctx.saved_tensors
        squared = ctx.squared
        need0, need1 = ctx.needs_input_grad[:2]
        of = (grad, f0, f1) if need0 else (grad, f1, f0)
        found = twice(
            lambda g, a, b: ops.feature_distance_backward(g, a, b, squared),
            lambda g, a, b: reference.feature_distance_backward(g, a, b, squared),
            *of,
        )
        if need0:
            return found, -found if need1 else None, None
        return None, found, None


def _pairs(features0: Any, features1: Any, ndim: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The maps of both sides, level by level: of one shape and device, of the wider of their dtypes."""
    sides = []
    for name, features in (("features0", features0), ("features1", features1)):
        if isinstance(features, Tensor) or not isinstance(features, Sequence) or len(features) == 0:
            raise TypeError(f"{name}: expected a list of feature maps, got {check.describe(features)}")
        sides.append([check.tensor(f"{name}[{i}]", f, ndim=ndim) for i, f in enumerate(features)])
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"features1: expected {len(sides[0])} maps as in features0, got {len(sides[1])}")
    pairs: list[tuple[Tensor, Tensor]] = []
    for i, (f0, f1) in enumerate(zip(*sides, strict=True)):
        if f1.shape != f0.shape:
            raise ValueError(f"features1[{i}]: expected shape {list(f0.shape)} of features0, got {list(f1.shape)}")
        if 0 in f0.shape[1:]:
            raise ValueError(f"features0[{i}]: expected at least one element a sample, got shape {list(f0.shape)}")
        if i and f0.shape[0] != pairs[0][0].shape[0]:
            raise ValueError(f"features0[{i}]: expected {pairs[0][0].shape[0]} samples, got {f0.shape[0]}")
        if f1.dtype != f0.dtype:
            dtype = torch.promote_types(f0.dtype, f1.dtype)
            f0, f1 = f0.to(dtype), f1.to(dtype)
        check.same(f"features1[{i}]", f1, f"features0[{i}]", f0)
        pairs.append((f0, f1))
    return pairs


def _layer_weights(weights: Any, maps: list[Tensor]) -> list[Tensor]:
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence) or len(weights) != len(maps):
        given = f"{len(weights)} of them" if isinstance(weights, Sequence) else check.describe(weights)
        raise ValueError(f"weights: expected a list of {len(maps)} tensors, one a layer, got {given}")
    for i, (weight, f) in enumerate(zip(weights, maps, strict=True)):
        check.tensor(f"weights[{i}]", weight, ndim=(1,))
        if weight.shape[0] != f.shape[1]:
            raise ValueError(f"weights[{i}]: expected [{f.shape[1]}], a number a channel, got {list(weight.shape)}")
        if weight.device != f.device:
            raise ValueError(f"weights[{i}]: expected the device of features0, {f.device}, got {weight.device}")
    return list(weights)


def lpips_distance(
    features0: Sequence[Tensor], features1: Sequence[Tensor], weights: Sequence[Tensor], *, eps_mode: str = "lpips"
) -> Tensor:
    r"""Σ_l mean_p Σ_c w_lc (u0 − u1)², where u = f / (|f| + 1e-10) normalises each pixel's channels.

    Args:
        features0, features1: lists of maps [N, C_l, H_l, W_l], float64, float32, bfloat16 or float16, each in its own
            layout (channels_last is fine); the same shapes on both sides. Differing dtypes are promoted.
        weights: a [C_l] for each layer, float; LPIPS's heads are not negative, which is not required here.
        eps_mode: "lpips": u = f / (√Σf² + 1e-10), as `lpips`; "torchmetrics": u = f / √(1e-8 + Σf²).

    Returns: [N], float32 (float64 for float64 features): LPIPS, exactly 0 for identical maps.

    Raises: TypeError or ValueError naming the argument.

    Notes: Differentiable in either side and in the weights, and twice. With "lpips" a zero vector gets the gradient 0,
        where autograd through √ gives NaN. Norms and sums are float32 for half types, under autocast too. NaN, inf and
        a sum of squares that overflows give NaN. Deterministic.

    Source: Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features, eq. 1; lpips 0.1.4; torchmetrics 1.9.
    """
    check.choice("eps_mode", eps_mode, EPS_MODES)
    pairs = _pairs(features0, features1, (4,))
    heads = _layer_weights(weights, [f0 for f0, _ in pairs])
    check.no_tangent("lpips_distance", *features0, *features1, *heads)
    total: Tensor | None = None
    for (f0, f1), weight in zip(pairs, heads, strict=True):
        value = apply(_LpipsLayer, f0, f1, weight, *epsilon(eps_mode))
        total = value if total is None else total + value
    assert total is not None
    return total


def lpips_projection(
    features: Sequence[Tensor], weights: Sequence[Tensor], *, dim: int, seed: int = 0, eps_mode: str = "lpips"
) -> Tensor:
    r"""A random projection S of LPIPS's embedding E, E‖S(x) − S(y)‖² = ‖E(x) − E(y)‖² = LPIPS(x, y); E is never stored.

    Each coordinate √(w_lc / H_l W_l) u_lcp of E is added with a random sign to one of `dim` numbers: a CountSketch
    whose buckets follow each other over runs of 64 pixels from a random start. Signs and starts come from Philox
    counters.

    Args:
        features: a list of maps [N, C_l, H_l, W_l], float64, float32, bfloat16 or float16.
        weights: a [C_l] for each layer, not negative; they are not differentiated.
        dim: numbers an image, at least 64.
        seed: 0 (default) to 2⁶⁴ − 1; points are comparable for the same seed and dim alone.
        eps_mode: as for `lpips_distance`.

    Returns: [N, dim], float32 (float64 for float64 features).

    Raises: TypeError or ValueError naming the argument; NotImplementedError for weights that require a gradient.

    Notes: For one pair, ‖S(x) − S(y)‖² has the mean LPIPS(x, y) over seeds and a relative standard deviation of at most
        √(2 / dim): 4.4 % for 1024. It is off by more than ε with a probability of at most 2 / (dim ε²) (Chebyshev).
        Differentiable in features, and twice. Deterministic; on the CPU, where a channels_last map is copied first, any
        layout gives the same bits, on CUDA the same but for rounding.

    Source: Charikar, Chen & Farach-Colton 2002 (CountSketch); Weinberger et al. 2009, whose variance bound holds for
        any buckets that no two coordinates share with a probability above 1 / dim: those of one run share none.
    """
    check.choice("eps_mode", eps_mode, EPS_MODES)
    dim = check.integer("dim", dim, least=64, most=2**31 - 1)
    seed = check.integer("seed", seed, least=0, most=2**64 - 1)
    maps = [pair[0] for pair in _pairs(features, features, (4,))]
    check.no_tangent("lpips_projection", *maps)
    total: Tensor | None = None
    for i, (f, weight) in enumerate(zip(maps, _layer_weights(weights, maps), strict=True)):
        signed = seed - 2**64 if seed >= 2**63 else seed
        if wanted(weight, unknown=False)[0]:
            _constant_weight(i)
        value = apply(_LpipsProject, f, weight, dim, signed, i, *epsilon(eps_mode))
        total = value if total is None else total + value
    assert total is not None
    return total


def feature_distance(
    features0: Sequence[Tensor],
    features1: Sequence[Tensor],
    *,
    distance: str = "l1",
    layer_weight: Sequence[float] | None = None,
) -> Tensor:
    """Σ_l w_l mean |f0 − f1| (or (f0 − f1)²), the mean over all but the first dimension.

    Args:
        features0, features1: lists of maps [N, ...] of two to five dimensions, floats; images count as a map. Differing
            dtypes are promoted.
        distance: "l1" or "l2" (squared).
        layer_weight: a number for each layer, default 1.

    Returns: [N], float32 (float64 for float64 features).

    Raises: TypeError or ValueError naming the argument.

    Notes: Differentiable in either side, and twice (the second derivative of l1 is 0); l1's gradient is 0 at a tie and
        NaN at NaN. Sums are float32 for half types. Deterministic.

    Source: GLANN (Hoshen, Li & Malik 2019), eq. 2, whose code uses L1 and weights of 1.
    """
    check.choice("distance", distance, DISTANCES)
    pairs = _pairs(features0, features1, (2, 3, 4, 5))
    check.no_tangent("feature_distance", *features0, *features1)
    scales = [1.0] * len(pairs) if layer_weight is None else layer_numbers(layer_weight, len(pairs))
    total: Tensor | None = None
    for (f0, f1), scale in zip(pairs, scales, strict=True):
        value = apply(_FeatureDistance, f0, f1, distance == "l2")
        value = value if scale == 1.0 else value * scale
        total = value if total is None else total + value
    assert total is not None
    return total


def layer_numbers(layer_weight: Any, layers: int) -> list[float]:
    if isinstance(layer_weight, (str, Tensor)) or not isinstance(layer_weight, Sequence):
        raise TypeError(f"layer_weight: expected a list of numbers, got {check.describe(layer_weight)}")
    if len(layer_weight) != layers:
        raise ValueError(f"layer_weight: expected {layers} numbers, one a layer, got {len(layer_weight)}")
    return [check.number(f"layer_weight[{i}]", weight) for i, weight in enumerate(layer_weight)]


class _Gram(Function):
    """α f fᵀ of f [N, C, P]. Its gradient is one product, where autograd would take two for the two factors."""

    vmap = staticmethod(check.no_vmap("gram_matrix", "features [N, C, H, W]"))

    @staticmethod
    def forward(ctx: Any, f: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(f)
        ctx.alpha = alpha
        return torch.baddbmm(f.new_zeros(()), f, f.mT, beta=0, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (f,) = ctx.saved_tensors
        return torch.baddbmm(f.new_zeros(()), grad + grad.mT, f, beta=0, alpha=ctx.alpha), None


def gram_matrix(features: Tensor) -> Tensor:
    """f fᵀ / (C H W), how the channels of a feature map go together.

    Args:
        features: [N, C, H, W], float64, float32, bfloat16 or float16, of any layout.

    Returns: [N, C, C], float32 (float64 for float64).

    Raises: TypeError or ValueError naming the argument.

    Notes: Differentiable, any number of times. Products are summed in float32 for half types and under autocast,
        already divided: sums of squares of a float16 map do not fit float16. Deterministic wherever matrix products
        are.

    Source: Johnson et al. 2016, eq. 3.
    """
    check.tensor("features", features, ndim=(4,))
    if 0 in features.shape[1:]:
        raise ValueError(f"features: expected at least one element a sample, got shape {list(features.shape)}")
    check.no_tangent("gram_matrix", features)
    with torch.autocast(features.device.type, enabled=False):
        f = features.to(reference.wide(features.dtype)).flatten(2)
        gram: Tensor = apply(_Gram, f, 1.0 / (f.shape[1] * f.shape[2]))
    return gram


LAPLACIAN_KERNELS = ("minimal_glo", "burt_adelson")


def _laplacian_kernel(kernel: Any, like: Tensor) -> Tensor:
    """[k, k] of the dtype and device of `like`."""
    if isinstance(kernel, Tensor):
        check.tensor("kernel", kernel, ndim=(2,))
        if kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
            raise ValueError(f"kernel: expected [k, k] of an odd k, got {list(kernel.shape)}")
        return kernel.to(like)
    if check.choice("kernel", kernel, LAPLACIAN_KERNELS) == "burt_adelson":
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=like.dtype, device=like.device) / 16
        return row[:, None] * row
    bump = torch.exp(torch.arange(-2, 3, device=like.device, dtype=like.dtype).square() / -4)
    both = bump[:, None] + bump
    return both / both.sum()


def _replicated(images: Tensor, border: int) -> Tensor:
    """Edges repeated outwards. Of torch's own, inductor knows the layout of the gradient wrongly."""
    if not torch.compiler.is_compiling():
        return tf.pad(images, [border] * 4, mode="replicate")
    images = torch.cat([*[images[:, :, :1]] * border, images, *[images[:, :, -1:]] * border], 2)
    return torch.cat([*[images[..., :1]] * border, images, *[images[..., -1:]] * border], 3)


def laplacian_pyramid_loss(x: Tensor, y: Tensor, *, levels: int = 3, kernel: str | Tensor = "minimal_glo") -> Tensor:
    """Σ_j mean |L_j(x) − L_j(y)| over the levels of a Laplacian pyramid and its low-pass rest.

    A level is L_j = I_j − k∗I_j and I_{j+1} the 2x2 average of k∗I_j. The pyramid is linear, so one of x − y serves.

    Args:
        x, y: images [N, C, H, W], floats of one dtype and device; each side at least 2^levels.
        levels: high-pass levels, beside which the rest counts too; default 3, as minimal_glo trains with.
        kernel: "minimal_glo" (default), its own 5x5: proportional to g(i) + g(j) with g(i) = exp(−(i − 2)² / 4), a sum
            where a Gaussian has the product; "burt_adelson", the product of (1, 4, 6, 4, 1) / 16; or a tensor [k, k], k
            odd, used as it is and not differentiated.

    Returns: [N]; its mean is minimal_glo's LapLoss(max_levels=levels).

    Raises: TypeError or ValueError naming the argument.

    Notes: Differentiable in both; at a tie the gradient is 0, second derivatives are 0. A mean a level instead of the
        paper's sum with weight 2^2j is the same but for the factor 1 / (C·H·W). Edges are replicated.

    Source: Bojanowski et al. 2018, GLO, section 3.2 (Lap1); github.com/tneumann/minimal_glo, glo.py; Burt & Adelson
    1983.
    """
    check.tensor("x", x, ndim=(4,))
    check.tensor("y", y, ndim=(4,))
    check.same("y", y, "x", x)
    if y.shape != x.shape:
        raise ValueError(f"y: expected the shape of x, {list(x.shape)}, got {list(y.shape)}")
    levels = check.integer("levels", levels, least=1, most=62)  # 2**levels is in the message below
    if min(x.shape[2:]) < 2**levels or x.shape[1] == 0:
        raise ValueError(f"x: expected sides of at least 2**levels = {2**levels}, got shape {list(x.shape)}")
    channels, dtype = x.shape[1], reference.wide(x.dtype)
    current = x.to(dtype) - y.to(dtype)
    blur = _laplacian_kernel(kernel, current.detach())
    border = blur.shape[0] // 2
    blur = blur.detach().expand(channels, 1, -1, -1)
    total = current.new_zeros(current.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(levels):
            low = tf.conv2d(_replicated(current, border), blur, groups=channels)
            total = total + (current - low).abs().mean((1, 2, 3))
            current = tf.avg_pool2d(low, 2)
    return total + current.abs().mean((1, 2, 3))
