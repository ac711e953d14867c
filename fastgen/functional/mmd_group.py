"""MMD² of samples that are spread over the processes of a torch.distributed group: one number, not an average."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen import check
from fastgen.functional.mmd_weights import differentiable, in_weights, weighted
from fastgen.ops import mmd as ops


def check_group(group: Any) -> None:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed process group or None, got {check.describe(group)}")


def grouped(
    checked: tuple[Tensor, Tensor, tuple[Any, ...]] | Exception,
    x_weight: Tensor | None,
    y_weight: Tensor | None,
    group: Any,
) -> Tensor:
    """The value of all shards together, the same on every process, with this process's part of the gradient.

    checked: this process's points, kernel, parameters, estimator and precision, or what is wrong with its arguments:
    all processes hear of it, and none waits for one that has left."""
    learnt = [differentiable(w) for w in (x_weight, y_weight)]
    use_of_weights = int(x_weight is not None or y_weight is not None) + learnt[0] + 2 * learnt[1]
    if isinstance(checked, Exception):
        _exchange([0] * 8, group)
        raise checked
    x, y, options = checked
    counts = _counts(x, y, options, use_of_weights, group)
    x, y = _emptied(x, x_weight, y), _emptied(y, y_weight, x)
    result: Tensor = _Grouped.apply(x, y, x_weight, y_weight, (*options, group, counts))
    return result


def _emptied(points: Tensor, weight: Tensor | None, others: Tensor) -> Tensor:
    """A shard without any weight counts for nothing: it is moved onto a point of the other sample, as `taken_out` does
    with points of a shard that has some."""
    if weight is None or differentiable(weight):
        return points
    return torch.where((weight != 0).any(-1)[..., None, None], points, others[..., :1, :].detach())


class _Grouped(torch.autograd.Function):
    """Each process meets its own points with everybody's, a shard at a time; each shard is sent once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, x_weight: Tensor | None, y_weight: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        given = (x, y, x_weight, y_weight)
        arguments: list[Any] = [t if t is None else t.detach() for t in given]
        arguments += (ctx.needs_input_grad, *options)
        value, gradients = _forward(*arguments)
        ctx.save_for_backward(*gradients)
        ctx.like = [t if t is None else (t.dtype, t.ndim) for t in given]
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "fastgen mmd: second-order gradients with group= are not built; what works: first order, or group=None"
            )
        found: list[Tensor | None] = []
        for gradient, like in zip(ctx.saved_tensors, ctx.like, strict=True):
            if gradient is not None:
                gradient = gradient * upstream.reshape(*upstream.shape, *[1] * (gradient.ndim - upstream.ndim))
                dtype, ndim = like
                gradient = (gradient if gradient.ndim == ndim else gradient.sum(0)).to(dtype)  # weights of all batches
            found.append(gradient)
        return *found, None


def _exchange(own: list[int], group: Any) -> list[list[int]]:
    mine = torch.tensor(own, dtype=torch.int64, device=_device(group))
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    found: list[list[int]] = torch.stack(rows).tolist()
    return found


def _device(group: Any) -> str:
    """Of tensors that it takes: of one that was begun without a backend torch.distributed tells no backend's name."""
    return "cpu" if torch.device("cpu") in group._device_types else "cuda"


def _counts(x: Tensor, y: Tensor, options: tuple[Any, ...], weighted: int, group: Any) -> list[tuple[int, int]]:
    """(N, M) of every process; what does not fit together raises on all of them."""
    batch = x.shape[0] if x.ndim == 3 else -1
    chosen = zlib.crc32(repr(options).encode())
    own = [1, x.shape[-2], y.shape[-2], x.shape[-1], batch, check.FLOATS.index(x.dtype), weighted, chosen]
    rows = _exchange(own, group)
    if wrong := [rank for rank, row in enumerate(rows) if not row[0]]:
        raise ValueError(f"group: expected good arguments on every process, got errors on {wrong}")
    names = "coordinates", "batches", "dtypes", "use of weights", "kernel, estimator and precision"
    for column, name in enumerate(names, 3):
        found = [row[column] for row in rows]
        if len(set(found)) > 1:
            raise ValueError(f"group: expected the same {name} on every process, got {found}")
    counts = [(row[1], row[2]) for row in rows]
    estimator = options[2]
    least = 1 if estimator == "biased" else 2
    for name, shards in zip(("x", "y"), zip(*counts, strict=True), strict=True):
        if min(shards) < 1 or sum(shards) < least:
            raise ValueError(f"{name}: expected points on every process, {least} in all for {estimator=}, got {counts}")
    if estimator == "u_statistic" and any(n != m for n, m in counts):
        raise ValueError(f"y: expected as many points as x on every process for {estimator=}, got {counts}")
    return counts


def _forward(
    x: Tensor,
    y: Tensor,
    x_weight: Tensor | None,
    y_weight: Tensor | None,
    needed: Sequence[bool],
    kind: str,
    parameters: Sequence[float],
    estimator: str,
    precision: str,
    group: Any,
    counts: list[tuple[int, int]],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The value and the gradients of x, y and their weights."""
    for_x, for_y, *for_weights = needed[:4]
    x, y = x.contiguous(), y.contiguous()
    p: Tensor | None = None
    q: Tensor | None = None
    if x_weight is None and y_weight is None:
        n, m = (sum(shards) for shards in zip(*counts, strict=True))
        a = torch.tensor(ops.coefficients(n, m, estimator), dtype=torch.float64, device=x.device)
    else:
        p, q, a = weighted(x, y, x_weight, y_weight, estimator, group)
    own = (x, y, kind, parameters, estimator, precision, p, q, a)
    value = torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device)
    gx = gy = None
    if for_x and for_y:
        part, gx, gy = ops.value_grad(*own)
    elif for_x:
        part, gx = ops.value_grad_x(*own)
    elif for_y:
        swapped = (y, x, kind, parameters, estimator, precision, q, p, a[..., [1, 0, 2]].contiguous())
        part, gy = ops.value_grad_x(*swapped)
    else:
        part = ops.value(*own)
    value += part
    sums: list[Tensor] = []  # of each own point over everybody's: xx, xy, yx, yy
    if any(for_weights):
        sums = list(ops.row_sums(x, y, kind, parameters, estimator, p, q))
    # A pair of points of two processes is met by both: half of its value for each, all of its gradient for its owner.
    # The ops subtract 2·a_xy times the sum: these factors make it a_xx, a_yy or −2·a_xy times half of both orders.
    zero = torch.zeros_like(a[..., 0])
    xx, yy, xy = (torch.stack([zero, zero, c], -1) for c in (-a[..., 0] / 2, -a[..., 1] / 2, a[..., 2] / 2))
    rank = dist.get_rank(group)
    for other, (n_there, m_there) in enumerate(counts):
        there: list[Tensor | None] = []
        for mine, size in ((x, n_there), (y, m_there), (p, n_there), (q, m_there)):
            if mine is None:
                there.append(None)
                continue
            shape = list(mine.shape)
            shape[-1 if mine.ndim < x.ndim else -2] = size
            shard = mine if other == rank else mine.new_empty(shape)
            dist.broadcast(shard, group=group, group_src=other)
            there.append(shard)
        if other == rank:
            continue
        x_there, y_there, p_there, q_there = there
        for points, weight, wanted, remotes in (
            (x, p, for_x, ((x_there, p_there, xx), (y_there, q_there, xy))),
            (y, q, for_y, ((y_there, q_there, yy), (x_there, p_there, xy))),
        ):
            for remote, remote_weight, coefficients in remotes:
                options = (kind, parameters, "biased", precision, weight, remote_weight, coefficients, 4)
                assert remote is not None
                if wanted:
                    part, gradient = ops.value_grad_x(points, remote, *options)
                    target = gx if points is x else gy
                    assert target is not None
                    target += 2 * gradient
                else:
                    part = ops.value(points, remote, *options)
                value += part
        own_and_remote = (
            (x, p, x_there, p_there),
            (x, p, y_there, q_there),
            (y, q, x_there, p_there),
            (y, q, y_there, q_there),
        )
        for total, (points, weight, remote, remote_weight) in zip(sums, own_and_remote, strict=False):
            total += ops.row_sums(points, remote, kind, parameters, "biased", weight, remote_weight, 4)[1]
    parts = [torch.empty_like(value) for _ in counts]
    dist.all_gather(parts, value, group=group)
    value = torch.stack(parts).sum(0).to(ops.accumulator(x.dtype))
    if not sums:
        return value, (gx, gy, None, None)
    assert p is not None
    assert q is not None
    of_weights = in_weights(x_weight, y_weight, p, q, a, estimator, sums, group)
    return value, (gx, gy, *(g if asked else None for g, asked in zip(of_weights, for_weights, strict=True)))
