"""Weights of the points of an MMD: what may be one, and what they make of its three sums."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen import check
from fastgen.functional.transforms import wanted
from fastgen.ops import mmd as ops


def check_weight(name: str, weight: Any, points_name: str, points: Tensor, shard: bool = False) -> Tensor:
    """The weights, [N] or [B, N], as they are; those of a `shard` may all be zero."""
    check.tensor(name, weight, ndim=(1, 2))
    if weight.shape not in (points.shape[-2:-1], points.shape[:-1]):
        expected = " or ".join(dict.fromkeys(str(list(s)) for s in (points.shape[-2:-1], points.shape[:-1])))
        raise ValueError(f"{name}: expected shape {expected} to go with {points_name}, got {list(weight.shape)}")
    if weight.device != points.device:
        raise ValueError(f"{name}: expected the device of {points_name}, {points.device}, got {weight.device}")
    if weight.device.type == "cpu" and not torch.compiler.is_compiling():
        # On a GPU, and in a compiled graph, looking would wait for the device or break the graph: NaN tells there.
        if bool((weight < 0).any()):
            raise ValueError(f"{name}: expected no negative weight, got {float(weight.min())}")
        if not shard and bool((weight.sum(-1) == 0).any()):
            raise ValueError(f"{name}: expected weights that do not sum to zero")
    return weight


def differentiable(weight: Tensor | None) -> bool:
    return wanted(weight)[0]


def taken_out(points: Tensor, weight: Tensor | None) -> Tensor:
    """Points of no weight moved onto one that has some: wherever they lie, they do not move the common centre. Where
    the weights have a gradient they stay: what a point would change if it had a weight is of where it lies."""
    if weight is None or differentiable(weight):
        return points
    weight = weight.detach().expand(points.shape[:-1])
    first = weight.argmax(-1, keepdim=True)[..., None]
    # Not take_along_dim, for which a compiled graph is made anew for every number of points.
    kept = points.detach().gather(-2, first.expand(*first.shape[:-1], points.shape[-1]))
    return torch.where(weight[..., None] == 0, kept, points)


def weighted(
    x: Tensor, y: Tensor, x_weight: Tensor | None, y_weight: Tensor | None, estimator: str, group: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """p and q, the weights made to sum to one, [N] or [B, N] and [M] or [B, M], and the coefficients of XX, YY and XY,
    [3] or [B, 3] float64; NaN where there are none. With a group its processes' points together are the samples.
    Differentiable in the weights."""
    p, q = (
        points.new_ones(points.shape[:-1], dtype=torch.float64)
        if weight is None
        else weight.double().expand(points.shape[:-1])
        for points, weight in ((x, x_weight), (y, y_weight))
    )
    p, q = (torch.where(w >= 0, w, float("nan")) for w in (p, q))
    most = _of_all(torch.stack([p.detach().amax(-1), q.detach().amax(-1)]), group, "max")
    if group is not None and not most.is_cuda:  # of its shards: on a GPU looking would wait for the device
        for name, greatest in zip(("x_weight", "y_weight"), most, strict=True):
            if bool((greatest == 0).any()):
                raise ValueError(f"{name}: expected weights that do not sum to zero over the processes")
    p, q = _divided(p, q, most)  # sums cannot overflow then
    p, q = _divided(p, q, _of_all(torch.stack([p.sum(-1), q.sum(-1)]), group))
    # What is left of the weights' product once the pairs i = i are out: nothing, if one point has all the weight.
    left = torch.ones((3, *p.shape[:-1]), dtype=torch.float64, device=x.device)
    if estimator != "biased":
        rest = _others(q, group)
        apart = [(p * _others(p, group)).sum(-1), (q * rest).sum(-1)]
        if estimator == "u_statistic":
            apart.append((p * rest).sum(-1))
        left = torch.cat([_of_all(torch.stack(apart), group), left[len(apart) :]])
    coefficients = torch.where(left > 0, 1 / left, float("nan")).movedim(0, -1).contiguous()
    dtype = ops.accumulator(x.dtype)
    return p.to(dtype), q.to(dtype), coefficients


def in_shares(a: Tensor, sums: Sequence[Tensor], terms: int = ops.ALL) -> tuple[Tensor, Tensor]:
    """The gradients of MMD² in p and q, its coefficients a held still. sums: of the kernel times the others' p or q,
    for each point of x over all of x, of x over y, of y over x and of y over y."""
    xx, xy, yx, yy = sums
    a_xx, a_yy, a_xy = a[..., None].unbind(-2)
    return 2 * (a_xx * xx - a_xy * xy), 2 * (a_yy * yy - a_xy * yx) if terms & 2 else -2 * a_xy * yx


def in_coefficients(p: Tensor, q: Tensor, sums: Sequence[Tensor]) -> Tensor:
    """The gradients of MMD² in its coefficients, [3] or [B, 3]."""
    xx, xy, _, yy = sums
    return torch.stack([(p * xx).sum(-1), (q * yy).sum(-1), -2 * (p * xy).sum(-1)], -1)


def in_weights(
    x_weight: Tensor | None,
    y_weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    a: Tensor,
    estimator: str,
    sums: Sequence[Tensor],
    group: Any,
) -> tuple[Tensor, Tensor]:
    """The gradients of MMD² in the weights that `weighted` made p, q and the coefficients a of; sums as in `in_shares`,
    over all processes' points."""
    gp, gq = in_shares(a, sums)
    p, q = p.double(), q.double()
    if estimator != "biased":  # the coefficients are 1/(1 − Σp²), 1/(1 − Σq²) and of a u-statistic 1/(1 − Σpq)
        xx, yy, xy = (a**2 * _of_all(in_coefficients(p, q, sums), group))[..., None].unbind(-2)
        gp, gq = gp + 2 * xx * p, gq + 2 * yy * q
        if estimator == "u_statistic":
            gp, gq = gp + xy * q, gq + xy * p
    along = _of_all(torch.stack([(p * gp).sum(-1), (q * gq).sum(-1)]), group)
    totals = [
        torch.ones_like(share).sum(-1) if weight is None else weight.double().expand(share.shape).sum(-1)
        for weight, share in ((x_weight, p), (y_weight, q))
    ]
    gp, gq = _divided(gp - along[0, ..., None], gq - along[1, ..., None], _of_all(torch.stack(totals), group))
    return gp, gq


def _divided(p: Tensor, q: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    return p / by[0, ..., None], q / by[1, ..., None]


def _of_all(own: Tensor, group: Any, operation: str = "sum") -> Tensor:
    """The sums, or greatest, of what the group's processes have; in place."""
    if group is not None:
        dist.all_reduce(own, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=group)
    return own


def _others(p: Tensor, group: Any) -> Tensor:
    """1 − p of weights that sum to one, made of the others' sum where one has most: the difference would cancel."""
    small = _of_all(p.masked_fill(p > 0.5, 0).sum(-1, keepdim=True), group)
    return torch.where(p > 0.5, small, 1 - p)
