"""MMD² as its definition reads: float64, direct differences, all pairs at once, gradients by autograd."""

import torch
from torch import Tensor


def kernel_matrix(a: Tensor, b: Tensor, kind: str, parameters: tuple[float, ...]) -> Tensor:
    if kind == "polynomial":
        degree, gamma, coef = parameters
        return (gamma * torch.einsum("id,jd->ij", a, b) + coef) ** int(degree)
    squared = (a[:, None, :] - b[None, :, :]).square().sum(-1)
    if kind == "imq":
        return sum(c / (c + squared) for c in parameters)
    return sum(torch.exp(-squared * g) for g in parameters)


def single(x: Tensor, y: Tensor, kind: str, parameters: tuple[float, ...], estimator: str) -> Tensor:
    n, m = len(x), len(y)
    xx, yy, xy = (kernel_matrix(a, b, kind, parameters) for a, b in ((x, x), (y, y), (x, y)))
    if estimator == "biased":
        return xx.mean() + yy.mean() - 2 * xy.mean()
    within = (xx.sum() - xx.diag().sum()) / (n * (n - 1)) + (yy.sum() - yy.diag().sum()) / (m * (m - 1))
    if estimator == "unbiased":
        return within - 2 * xy.mean()
    return within - 2 * (xy.sum() - xy.diag().sum()) / (n * (n - 1))


def mmd(
    x: Tensor, y: Tensor, kind: str, parameters: tuple[float, ...], estimator: str
) -> tuple[Tensor, Tensor, Tensor]:
    """MMD², its gradient in x and in y, for [N, D] or [B, N, D]."""
    x = x.detach().double().cpu().requires_grad_()
    y = y.detach().double().cpu().requires_grad_()
    if x.ndim == 2:
        value = single(x, y, kind, parameters, estimator)
    else:
        value = torch.stack([single(a, b, kind, parameters, estimator) for a, b in zip(x, y, strict=True)])
    gx, gy = torch.autograd.grad(value.sum(), (x, y))
    return value.detach(), gx, gy


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
