"""Nearest neighbours by numpy in float64, one query at a time."""

import numpy as np
import torch
from torch import Tensor


def nearest(query: Tensor, database: Tensor, k: int = 1, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    points = database.detach().double().numpy()
    distances, indices = [], []
    for row, one in enumerate(query.detach().double().numpy()):
        ids = np.arange(len(points))
        if mask is not None:
            ids = ids[(mask if mask.ndim == 1 else mask[row]).numpy()]
        distance = np.square(points[ids] - one).sum(1).astype(np.float32)
        best = np.lexsort((ids, distance))[:k]
        distances.append(distance[best])
        indices.append(ids[best])
    return torch.from_numpy(np.stack(distances)), torch.from_numpy(np.stack(indices))


def distance(query: Tensor, database: Tensor, index: Tensor) -> Tensor:
    """The chosen distances in float64, as autograd differentiates them."""
    return (query.double().unsqueeze(1) - database.double()[index]).square().sum(-1)
