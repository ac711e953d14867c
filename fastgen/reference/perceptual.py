"""What the perceptual ops mean, with their closed-form gradients. Norms and sums of half types are float32."""

import torch
from torch import Tensor

from fastgen.reference.langevin import philox


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are made in, and that values come in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalise(f: Tensor, eps: float, eps_inside: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u = f / (r + eps) with r = |f| over dim 1, or f / r with r = √(eps + |f|²); also 1 / (r + eps) (or 1 / r), and r.

    At a zero vector, where r has no derivative, the first form passes none on. A sum of squares that overflows gives
    NaN: its quotient would be a plausible 0.
    """
    f = f.to(wide(f.dtype))
    square = f.square().sum(1, keepdim=True)
    if eps_inside:
        r = (square + eps).sqrt() + (square - square)
        scale = r.reciprocal()
    else:
        some = square != 0
        r = torch.where(some, square, 1).sqrt() + (square - square)
        scale = torch.where(some, (r + eps).reciprocal(), 0)
    return f * scale, scale, r


def lpips_map(f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
    """Σ_c w_c (u0 − u1)² of f0, f1 [N, C, H, W] -> [N, 1, H, W]."""
    difference = normalise(f0, eps, eps_inside)[0] - normalise(f1, eps, eps_inside)[0]
    return (difference.square() * weight.to(difference.dtype)[:, None, None]).sum(1, keepdim=True)


def lpips_layer(f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
    """Spatial mean of `lpips_map` -> [N]."""
    return lpips_map(f0, f1, weight, eps, eps_inside).mean((1, 2, 3))


def lpips_layer_backward(grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
    """Gradient of Σ grad · lpips_layer with respect to f0: v·s − u0 (u0·v) / r with v = 2 w (u0 − u1) grad / HW and the
    s and r of `normalise`. The distance is symmetric: f1's is this one with the maps exchanged."""
    u0, scale, r = normalise(f0, eps, eps_inside)
    u1 = normalise(f1, eps, eps_inside)[0]
    each = grad.to(u0.dtype) * (2.0 / (f0.shape[2] * f0.shape[3]))
    v = (u0 - u1) * weight.to(u0.dtype)[:, None, None] * each[:, None, None, None]
    return (v * scale - u0 * ((u0 * v).sum(1, keepdim=True) / r)).to(f0.dtype)


def lpips_layer_backward_weight(grad: Tensor, f0: Tensor, f1: Tensor, eps: float, eps_inside: bool) -> Tensor:
    """Gradient of Σ grad · lpips_layer with respect to the weight -> [C]."""
    difference = normalise(f0, eps, eps_inside)[0] - normalise(f1, eps, eps_inside)[0]
    return (difference.square().mean((2, 3)) * grad.to(difference.dtype)[:, None]).sum(0)


def feature_distance(f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    """Mean of |f0 − f1| or (f0 − f1)² over all but the first dimension -> [N]."""
    difference = f0.to(wide(f0.dtype)) - f1.to(wide(f1.dtype))
    return (difference.square() if squared else difference.abs()).flatten(1).mean(1)


def feature_distance_backward(grad: Tensor, f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    """Gradient of Σ grad · feature_distance with respect to f0; f1's is its negative. A tie has sign 0, a NaN none."""
    difference = f0.to(wide(f0.dtype)) - f1.to(wide(f1.dtype))
    slope = 2 * difference if squared else torch.where(difference.isnan(), difference, difference.sign())
    each = grad.to(slope.dtype) * (f0.shape[0] / max(f0.numel(), 1))
    return (slope * each.reshape(-1, *[1] * (f0.ndim - 1))).to(f0.dtype)


RUN = 64  # pixels that share a counter


def projection(
    channels: int, pixels: int, dim: int, seed: int, layer: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Bucket in [0, dim) and sign, ±1, of each coordinate of a layer, [channels, pixels].

    Pixels p = 64 r + j of channel c share the Philox 4x32-10 words w of counter (r, c, layer, 0) and key seed: the sign
    is negative where bit j mod 32 of w[j div 32] is set, the bucket (⌊w[2]·dim / 2³²⌋ + j) mod dim.
    """
    c = torch.arange(channels, device=device)[:, None]
    p = torch.arange(pixels, device=device)[None, :]
    run, j = p // RUN, p % RUN
    runs = torch.arange((pixels + RUN - 1) // RUN, device=device)[None, :]
    zero = torch.zeros_like(runs + c)
    w0, w1, w2, _ = philox(runs + zero, c + zero, zero + layer, zero, seed)
    run = run.expand(channels, -1)
    word = torch.where(j < 32, w0.gather(1, run), w1.gather(1, run))
    bucket = ((w2.gather(1, run) * dim >> 32) + j) % dim
    return bucket, 1 - 2 * (word >> j % 32 & 1)


def lpips_project(f: Tensor, weight: Tensor, dim: int, seed: int, layer: int, eps: float, eps_inside: bool) -> Tensor:
    """√(w_c / HW) u of f [N, C, H, W], added up with signs into the buckets of `projection` -> [N, dim]."""
    u = normalise(f, eps, eps_inside)[0]
    c, pixels = f.shape[1], f.shape[2] * f.shape[3]
    bucket, sign = projection(c, pixels, dim, seed, layer, f.device)
    scale = (weight.to(u.dtype) / pixels).sqrt()[:, None] * sign
    rows = (u.flatten(2) * scale).flatten(1).t()
    out = rows.new_zeros(dim, f.shape[0])
    # index_add would add in any order on CUDA; index_put sorts first
    return out.index_put((bucket.flatten(),), rows, accumulate=True).t().contiguous()


def lpips_project_backward(
    grad: Tensor, f: Tensor, weight: Tensor, bucket: Tensor, sign: Tensor, eps: float, eps_inside: bool
) -> Tensor:
    """Gradient of Σ grad · lpips_project with respect to f, of that one's `projection`: v·s − u (u·v) / r with the u, s
    and r of `normalise` and v the gradient of u: grad's bucket times sign and scale."""
    u, scale, r = normalise(f, eps, eps_inside)
    root = (weight.to(u.dtype) / (f.shape[2] * f.shape[3])).sqrt()[:, None] * sign
    v = (grad.to(u.dtype).index_select(1, bucket.flatten()) * root.flatten()).view(u.shape)
    return (v * scale - u * ((u * v).sum(1, keepdim=True) / r)).to(f.dtype)
