"""Nearest neighbours by numpy in float64, one query at a time."""

import numpy as np
import torch
from torch import Tensor


def nearest(
    query: Tensor, database: Tensor, k: int = 1, mask: Tensor | None = None, exclude_radius: float | None = None
) -> tuple[Tensor, Tensor]:
    points = database.detach().double().numpy()
    if exclude_radius is not None:
        mask = left(query, database, mask, exclude_radius)
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


def left(query: Tensor, database: Tensor, mask: Tensor | None, exclude_radius: float) -> Tensor:
    """The mask without the rows that some query has nearer than the radius, query by query."""
    mask = torch.ones(len(query), len(database), dtype=torch.bool) if mask is None else mask.expand(len(query), -1)
    points, rejected = database.detach().double().numpy(), np.zeros(len(database), dtype=bool)
    for row, one in enumerate(query.detach().double().numpy()):
        ids = np.flatnonzero(mask[row].numpy())
        near = np.square(points[ids] - one).sum(1).astype(np.float32).astype(np.float64) < exclude_radius**2
        rejected[ids[near]] = True
    return mask & ~torch.from_numpy(rejected)


def distance(query: Tensor, database: Tensor, index: Tensor) -> Tensor:
    """The chosen distances in float64, as autograd differentiates them."""
    return (query.double().unsqueeze(1) - database.double()[index]).square().sum(-1)
