"""LPIPS as a Euclidean embedding, whole or compact."""

import torch
from torch import Tensor, nn

from fastgen import check
from fastgen.functional import perceptual as F
from fastgen.nn.perceptual_lpips import LPIPS
from fastgen.reference import perceptual as reference


class PerceptualEmbedding(nn.Module):
    """Images as points whose squared L2 distance is their LPIPS: E(x)_(l,c,p) = √(w_lc / H_l W_l) · u_lcp.

    N·M distances then cost N + M passes of the network, and any nearest-neighbour search finds perceptual neighbours.

    Args:
        lpips: an `LPIPS` without `spatial`, whose heads are not negative (the published ones are not).
        dim: None (default) for the embedding itself. A number, at least 64, for a random projection of it to so many
            dimensions, made as the embedding is and without a matrix (`F.lpips_projection`): squared distances are
            right in the mean, with a relative standard deviation of at most √(2 / dim) over seeds. Rank candidates by
            it, then `search.perceptual_nearest(..., sketch=)` ranks those exactly.
        seed: of the projection, default 0; embeddings of different seeds do not go together.

    forward(x, normalize=False): images [N, 1 or 3, H, W] in [-1, 1], with normalize=True in [0, 1].

    Returns: [N, E] float32 (float64 for float64 images), E = dim or Σ_l C_l H_l W_l: 31,872 for "alex" at 64x64 pixels.

    Raises: ValueError for a negative head or a spatial LPIPS; TypeError for another module.

    Notes: Differentiable, with gradient 0 at pixels whose channels are all 0. ‖E(x) − E(y)‖² equals lpips(x, y) to 1e-5
        relative in float32.

    Source: Zhang et al. 2018, eq. 1, read as a norm; the projection is a CountSketch (Charikar et al. 2002).
    """

    def __init__(self, lpips: LPIPS, *, dim: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.dim = None if dim is None else check.integer("dim", dim, least=64, most=2**31 - 1)
        self.seed = check.integer("seed", seed, least=0, most=2**64 - 1)
        if not isinstance(lpips, LPIPS):
            raise TypeError(f"lpips: expected a fastgen.nn.LPIPS, got {type(lpips).__name__}")
        if lpips.spatial:
            raise ValueError("lpips: expected spatial=False, got a spatial LPIPS")
        lpips.check_heads()
        if any(bool((weight < 0).any()) for weight in lpips.weights()):
            raise ValueError("lpips: expected heads >= 0, whose roots scale the channels; got a negative weight")
        self.lpips = lpips

    def extra_repr(self) -> str:
        return f"dim={self.dim}, seed={self.seed}"

    def forward(self, x: Tensor, normalize: bool = False) -> Tensor:
        if self.dim is not None:
            maps, weights = self.lpips.features(x, normalize).maps, [w.detach() for w in self.lpips.weights()]
            return F.lpips_projection(maps, weights, dim=self.dim, seed=self.seed, eps_mode=self.lpips.eps_mode)
        parts = []
        for f, weight in zip(self.lpips.features(x, normalize).maps, self.lpips.weights(), strict=True):
            u = reference.normalise(f, *F.epsilon(self.lpips.eps_mode))[0]
            scale = (weight.to(u.dtype) / (f.shape[2] * f.shape[3])).sqrt()
            parts.append((u * scale[:, None, None]).flatten(1))
        return torch.cat(parts, 1)
