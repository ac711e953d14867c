"""What the maximum mean discrepancy means, in blocks of rows so that no N×M matrix is ever held.

    MMD² = a_xx Σ k(x_i, x_j) + a_yy Σ k(y_i, y_j) − 2 a_xy Σ k(x_i, y_j)

`kind` and `parameters` name the kernel: "imq" Σ c/(c + d²) over the constants c, "rbf" Σ exp(−g·d²) over the rates g,
"polynomial" (γ⟨x, y⟩ + c)^p with parameters (p, γ, c). Points are [N, D] or [B, N, D], already checked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 21  # elements of one block of kernel values: 8 MiB in float32


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are made and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weights(n: int, m: int, estimator: str) -> tuple[float, float, float]:
    """a_xx, a_yy and a_xy."""
    if estimator == "biased":
        return 1 / n**2, 1 / m**2, 1 / (n * m)
    a_xy = 1 / (n * (n - 1)) if estimator == "u_statistic" else 1 / (n * m)
    return 1 / (n * (n - 1)), 1 / (m * (m - 1)), a_xy


def value(x: Tensor, y: Tensor, kind: str, parameters: Sequence[float], estimator: str) -> Tensor:
    """MMD², shape [] or [B]."""
    return _mmd(x, y, kind, parameters, estimator, False, False)[0]


def value_grad_x(x: Tensor, y: Tensor, kind: str, parameters: Sequence[float], estimator: str) -> tuple[Tensor, Tensor]:
    """MMD² and its gradient in x."""
    result, gx, _ = _mmd(x, y, kind, parameters, estimator, True, False)
    return result, gx


def value_grad(
    x: Tensor, y: Tensor, kind: str, parameters: Sequence[float], estimator: str
) -> tuple[Tensor, Tensor, Tensor]:
    """MMD² and its gradients in x and in y."""
    return _mmd(x, y, kind, parameters, estimator, True, True)


def _mmd(
    x: Tensor, y: Tensor, kind: str, parameters: Sequence[float], estimator: str, for_x: bool, for_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a_xx, a_yy, a_xy = weights(x.shape[-2], y.shape[-2], estimator)
    masked = estimator != "biased"
    out = accumulator(x.dtype)
    work = out
    if x.is_cuda and torch.get_float32_matmul_precision() != "highest":
        work = torch.float64  # the user's TF32 is for layers: here it would be larger than the result
    with torch.autocast(x.device.type, enabled=False):
        shape_x, shape_y = x.shape, y.shape
        x = x.to(work).reshape(-1, *shape_x[-2:])
        y = y.to(work).reshape(-1, *shape_y[-2:])
        if kind != "polynomial":
            # One centre for both keeps the expanded distances exact where it matters, and makes inf NaN everywhere.
            centre = torch.cat([x, y], dim=-2).mean(-2, keepdim=True)
            x, y = x - centre, y - centre
        xx, gx, _ = _sweep(x, x, kind, parameters, True, masked, for_x, False)
        yy, gy, _ = _sweep(y, y, kind, parameters, True, masked, for_y, False)
        xy, gx_cross, gy_cross = _sweep(x, y, kind, parameters, estimator == "u_statistic", masked, for_x, for_y)
        result = (a_xx * xx + a_yy * yy - 2 * a_xy * xy).to(out).reshape(shape_x[:-2])
        gx = (2 * a_xx * gx - 2 * a_xy * gx_cross).to(out).reshape(shape_x).contiguous() if for_x else gx
        gy = (2 * a_yy * gy - 2 * a_xy * gy_cross).to(out).reshape(shape_y).contiguous() if for_y else gy
    return result, gx, gy


def _sweep(
    a: Tensor,
    b: Tensor,
    kind: str,
    parameters: Sequence[float],
    on_diagonal: bool,
    masked: bool,
    for_a: bool,
    for_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_ij k(a_i, b_j) in float64, Σ_j ∂k/∂a_i and Σ_i ∂k/∂b_j; where `on_diagonal`, the pairs i = j are special."""
    total = a.new_zeros(a.shape[0], dtype=torch.float64)
    ga = torch.zeros_like(a) if for_a else a.new_zeros(0)
    gb = torch.zeros_like(b) if for_b else a.new_zeros(0)
    expanded = kind != "polynomial"
    norm_b = (b * b).sum(-1)[:, None, :]
    rows = max(1, BLOCK // max(1, b.shape[0] * b.shape[1]))
    for start in range(0, a.shape[1], rows):
        part = a[:, start : start + rows]
        if expanded:
            q = torch.baddbmm((part * part).sum(-1, keepdim=True) + norm_b, part, b.mT, alpha=-2).clamp_(min=0)
            if on_diagonal:
                q.diagonal(start, 1, 2).mul_(0)  # a point is at no distance from itself, unless it is NaN
        else:
            q = part @ b.mT
        k, slope = _kernel(q, kind, parameters, for_a or for_b)
        if on_diagonal and masked:
            for matrix in (k, slope):
                matrix.diagonal(start, 1, 2).zero_()
        total += k.sum((1, 2), dtype=torch.float64)
        if for_a:
            ga[:, start : start + rows] = slope @ b
            if expanded:
                ga[:, start : start + rows] -= part * slope.sum(2, keepdim=True)
        if for_b:
            gb += slope.mT @ part
            if expanded:
                gb -= b * slope.sum(1)[:, :, None]
    return total, ga * -2 if expanded else ga, gb * -2 if expanded else gb


def _kernel(q: Tensor, kind: str, parameters: Sequence[float], slope: bool) -> tuple[Tensor, Tensor]:
    """k and dk/dq for a block of squared distances, or of inner products."""
    if kind == "polynomial":
        degree, gamma, coef = parameters
        inner = gamma * q + coef
        power = inner ** (int(degree) - 1)
        return power * inner, degree * gamma * power
    k = torch.zeros_like(q)
    dk = torch.zeros_like(q)
    for p in parameters:
        if kind == "imq":
            term = p / (p + q)
            k += term
            if slope:
                dk -= term * term / p
        else:
            term = torch.exp(q * -p)
            k += term
            if slope:
                dk -= p * term
    return k, dk
