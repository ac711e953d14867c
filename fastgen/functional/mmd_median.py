"""The median of all pairs' squared distances, exactly, without holding them: bandwidths chosen from the data."""

import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.transforms import wanted
from fastgen.ops import mmd_median as ops
from fastgen.reference.mmd import accumulator


def median_squared_distance(
    x: Tensor, y: Tensor | None = None, *, rank: int | None = None, diagonal: bool = False
) -> Tensor:
    """The rank-th largest of all squared distances ‖x_i − y_j‖², by default the middle one.

    Args:
        x: [N, D] float64, float32, bfloat16 or float16.
        y: [M, D], of x's dtype and device: all N·M pairs count. None: those of x with itself, in both orders, as in the
            N×N matrix.
        rank: 1 is the largest; None means half the number of pairs that count, rounded down, at least 1. So that
            `torch.topk(d.flatten(), rank).values[-1]` of the distances' matrix d is the result.
        diagonal: whether the N zeros i = j count; only where y is None.

    Returns:
        [], float64 for float64 points, else float32. Exact in this sense: a squared distance is summed in float64 over
        the coordinates in their order, without fused multiply-adds, and rounded once to the result's dtype; of the
        numbers so defined the result is that of the rank, to the bit, on every device. (The expansion
        ‖x‖² + ‖y‖² − 2⟨x, y⟩ rounds otherwise and far worse.)

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; no pair that counts.

    Notes:
        Memory is O((N + M)·D): the answer's bits are found from the top by histograms of distances that are computed
        anew in each pass, two passes over all pairs in float32 and four in float64 on the CPU; up to 2^18 pairs are
        kept instead. Deterministic. NaN where any distance is not finite. No host synchronisation on a GPU.
        Differentiable any number of times, through the pair that has the distance (the first one in row order, where
        several have), with everything else held still: d‖x_i − y_j‖² = 2⟨x_i − y_j, dx_i − dy_j⟩. A distance of a
        point to itself has no gradient; a NaN result has NaN gradients. On the CPU a C++ kernel, on a GPU torch
        operations block by block.

    Source: the median heuristic, Gretton et al., A Kernel Two-Sample Test (JMLR 2012), section 8; differentiated as in
    `mmd_penalty` of github.com/tolstikhin/wae.
    """
    check.tensor("x", x, ndim=(2,))
    check.no_tangent("median_squared_distance", x, y)
    if not isinstance(diagonal, bool):
        raise TypeError(f"diagonal: expected True or False, got {check.describe(diagonal)}")
    if y is None:
        other, n = x, x.shape[0]
        pairs = n * n if diagonal else n * (n - 1)
        if n < 2:
            raise ValueError(f"x: expected at least 2 points, got shape {list(x.shape)}")
    else:
        check.tensor("y", y, ndim=(2,))
        if x.dtype != y.dtype and torch.is_autocast_enabled(x.device.type):
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        check.same("y", y, "x", x)
        if diagonal:
            raise ValueError("diagonal: expected False where y is given: its pairs i = j are pairs as all others")
        if x.shape[1] != y.shape[1]:
            raise ValueError(f"y: expected shape [M, {x.shape[1]}] to go with x, got {list(y.shape)}")
        other, pairs = y, x.shape[0] * y.shape[0]
        for name, points in (("x", x), ("y", y)):
            if points.shape[0] < 1:
                raise ValueError(f"{name}: expected at least 1 point, got shape {list(points.shape)}")
    if x.shape[1] < 1:
        raise ValueError(f"x: expected at least 1 coordinate, got shape {list(x.shape)}")
    if rank is None:
        rank = max(1, pairs // 2)
    elif not isinstance(rank, torch.SymInt):
        rank = check.integer("rank", rank, least=1, most=pairs)
    dtype = accumulator(x.dtype)
    a, b = x.to(dtype), other.to(dtype)
    value, pair = ops.median(a.detach(), b.detach(), rank, y is None)
    if not any(wanted(a, b)):
        return value
    squared = (a.index_select(0, pair[:1]) - b.index_select(0, pair[1:])).square().sum()
    # Worth the exact value, moving with the pair; NaN in both where the value is.
    moves: Tensor = (squared - squared.detach()) * (value * 0 + 1)
    return value + moves
