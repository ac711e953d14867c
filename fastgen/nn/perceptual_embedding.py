"""LPIPS as a Euclidean embedding, whole or compact."""

import torch
from torch import Tensor, nn

from fastgen.functional import perceptual as F
from fastgen.nn.perceptual_lpips import LPIPS
from fastgen.reference import perceptual as reference


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
        lpips.check_heads()
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
