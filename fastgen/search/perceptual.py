"""Nearest neighbours under a perceptual distance, by the embedding whose squared L2 distance it is."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.nearest import Nearest, nearest
from fastgen.search.streaming import merged

Embedding = Callable[[Tensor], Tensor]


@torch.no_grad()
def perceptual_nearest(
    images: Tensor,
    generated: Tensor | Iterable[Tensor],
    embed: Embedding,
    *,
    k: int = 1,
    chunk: int = 256,
    sketch: Embedding | None = None,
    candidates: int = 64,
) -> Nearest:
    """For each image the k generated ones at the least perceptual distance, by N + M passes of the network, not 2 N M.

    Args:
        images: [N, C, H, W], the queries; their embeddings are kept, [N, E].
        generated: [M, C, H, W], or chunks of it from any iterable: of a stream, only k distances and ids a query are
            kept.
        embed: `nn.PerceptualEmbedding(lpips)`, or anything else that turns [n, C, H, W] into points [n, E] whose
            squared L2 distance is meant.
        k: neighbours for each image, 1 (default) to M.
        chunk: images that pass the network at a time, default 256.
        sketch: a smaller embedding to choose candidates by, `nn.PerceptualEmbedding(lpips, dim=1024)`, whose [M, dim]
            is kept, for generated images too many to be compared whole. None (default) compares all.
        candidates: with a sketch, how many of the nearest by it are embedded whole and ranked exactly, default 64; at
            least k.

    Returns: Nearest(distance [N, k] float32, index [N, k] int64), ascending by (distance, index).

    Raises: TypeError or ValueError naming the argument; ValueError for points that are not finite.

    Notes: Without a sketch the answer is exact: distances are summed in float64 over the embedding (`F.nearest`), ties
        go to the lowest index, and any chunk gives the same wherever the network gives the same for any batch
        (convolutions round their last bit by batch size). With a sketch the distances are exact too, and each is the
        nearest of its candidates: the true one is missed where the sketch puts `candidates` others before it. Passes
        are then N + M for the sketch, N and each chunk of queries' candidates for the rest. Not differentiable.

    Source: Zhang et al. 2018, eq. 1, as a norm; Hoshen, Li & Malik 2019 call the same search by pairs infeasible.
    """
    check.tensor("images", images, ndim=(4,))
    k = check.integer("k", k, least=1)
    chunk = check.integer("chunk", chunk, least=1)
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    if sketch is not None:
        if not isinstance(generated, Tensor):
            raise TypeError(f"generated: expected a tensor with a sketch, got {type(generated).__name__}")
        candidates = check.integer("candidates", candidates, least=k)
        return _by_sketch(images, check.tensor("generated", generated, ndim=(4,)), embed, k, chunk, sketch, candidates)
    query = _embedded("embed", embed, images, chunk)
    best: Nearest | None = None
    first = 0
    for part in generated.split(chunk) if isinstance(generated, Tensor) else generated:
        check.tensor("generated", part, ndim=(4,))
        if len(part) == 0:
            continue
        points = _embedded("embed", embed, part, chunk)
        if points.shape[1] != query.shape[1]:
            raise ValueError(
                f"generated: expected images of {list(images.shape[1:])} as in images, got {list(part.shape[1:])}"
            )
        found = nearest(query, points, min(k, len(points)))
        found = Nearest(found.distance, found.index + first)
        best = found if best is None else merged(best, found, k)
        first += len(part)
    if first < k:
        raise ValueError(f"k: expected at most the {first} generated images, got {k}")
    assert best is not None
    return best


def _embedded(name: str, embed: Embedding, images: Tensor, chunk: int) -> Tensor:
    parts = []
    for part in images.split(chunk):
        points = check.tensor(f"{name}(images)", embed(part))
        if points.shape[:1] != part.shape[:1]:
            raise ValueError(f"{name}: expected {len(part)} points of {len(part)} images, got {list(points.shape)}")
        parts.append(points)
    return torch.cat(parts)


def _by_sketch(
    images: Tensor, generated: Tensor, embed: Embedding, k: int, chunk: int, sketch: Embedding, candidates: int
) -> Nearest:
    if k > len(generated):
        raise ValueError(f"k: expected at most the {len(generated)} generated images, got {k}")
    query, points = (_embedded("sketch", sketch, part, chunk) for part in (images, generated))
    near = nearest(query, points, min(candidates, len(generated)))
    parts: list[Nearest] = []
    for rows in torch.arange(len(images), device=images.device).split(max(1, chunk // candidates)):
        ids, place = near.index[rows].unique(return_inverse=True)  # ascending: the lowest index stays the lowest
        mask = torch.zeros(len(rows), len(ids), dtype=torch.bool, device=images.device)
        mask.scatter_(1, place, True)
        query, points = (_embedded("embed", embed, part, chunk) for part in (images[rows], generated[ids]))
        found = nearest(query, points, k, mask=mask)
        parts.append(Nearest(found.distance, ids[found.index]))
    return Nearest(torch.cat([p.distance for p in parts]), torch.cat([p.index for p in parts]))
