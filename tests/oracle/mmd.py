"""MMD² as its definition reads: float64, direct differences, all pairs at once, gradients by autograd."""

import torch
from torch import Tensor


def kernel_matrix(a: Tensor, b: Tensor, kind: str, parameters: tuple[float, ...]) -> Tensor:
    if kind == "polynomial":
        degree, gamma, coef = parameters
        return (gamma * torch.einsum("id,jd->ij", a, b) + coef) ** int(degree)
    squared = (a[:, None, :] - b[None, :, :]).square().sum(-1)
    if kind in ("laplacian", "energy"):
        apart = squared > 0
        d = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)  # its gradient at zero is zero
        return -d if kind == "energy" else sum(torch.exp(-d * g) for g in parameters)
    if kind == "rational_quadratic":
        return sum((1 + squared / (2 * p * parameters[0] ** 2)) ** -p for p in parameters[1:])
    if kind == "imq":
        return sum(c / (c + squared) for c in parameters)
    return sum(torch.exp(-squared * g) for g in parameters)


def single(
    x: Tensor, y: Tensor, kind: str, parameters: tuple[float, ...], estimator: str, p: Tensor, q: Tensor
) -> Tensor:
    p, q = p / p.sum(), q / q.sum()

    def mean(a: Tensor, b: Tensor, wa: Tensor, wb: Tensor, off: bool) -> Tensor:
        w = wa[:, None] * wb
        if off:
            w = w - w.diag().diag()
        return (w * kernel_matrix(a, b, kind, parameters)).sum() / w.sum()

    off = estimator != "biased"
    return mean(x, x, p, p, off) + mean(y, y, q, q, off) - 2 * mean(x, y, p, q, estimator == "u_statistic")


def value(
    x: Tensor,
    y: Tensor,
    kind: str,
    parameters: tuple[float, ...],
    estimator: str,
    p: Tensor | None = None,
    q: Tensor | None = None,
) -> Tensor:
    """MMD² for [N, D] or [B, N, D], differentiable; the weights need not sum to one."""
    p = (torch.ones(x.shape[:-1]) if p is None else p).double().expand(x.shape[:-1])
    q = (torch.ones(y.shape[:-1]) if q is None else q).double().expand(y.shape[:-1])
    if x.ndim == 2:
        return single(x, y, kind, parameters, estimator, p, q)
    items = zip(x, y, p, q, strict=True)
    return torch.stack([single(a, b, kind, parameters, estimator, wa, wb) for a, b, wa, wb in items])


def mmd(
    x: Tensor,
    y: Tensor,
    kind: str,
    parameters: tuple[float, ...],
    estimator: str,
    p: Tensor | None = None,
    q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """MMD², its gradient in x and in y."""
    x = x.detach().double().cpu().requires_grad_()
    y = y.detach().double().cpu().requires_grad_()
    found = value(x, y, kind, parameters, estimator, p, q)
    gx, gy = torch.autograd.grad(found.sum(), (x, y))
    return found.detach(), gx, gy


def wae_penalty(qz: Tensor, pz: Tensor, base: float) -> Tensor:
    """mmd_penalty of tolstikhin/wae (wae.py), the IMQ branch, line by line; `base` is its Cbase."""
    n = qz.shape[0]
    norms_pz = pz.square().sum(1, keepdim=True)
    distances_pz = norms_pz + norms_pz.T - 2.0 * (pz @ pz.T)
    norms_qz = qz.square().sum(1, keepdim=True)
    distances_qz = norms_qz + norms_qz.T - 2.0 * (qz @ qz.T)
    distances = norms_qz + norms_pz.T - 2.0 * (qz @ pz.T)
    stat = torch.zeros((), dtype=qz.dtype)
    for scale in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        c = base * scale
        res1 = c / (c + distances_qz) + c / (c + distances_pz)
        res1 = (res1 * (1.0 - torch.eye(n, dtype=qz.dtype))).sum() / (n * n - n)
        res2 = (c / (c + distances)).sum() * 2.0 / (n * n)
        stat = stat + res1 - res2
    return stat
