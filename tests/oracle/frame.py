"""The naive float64 meaning of the FRAME models' updates: loops, explicit gradients, autograd for the JKO term."""

import math

import torch
from torch import Tensor


def pixel_answers(x: Tensor) -> list[list[float]]:
    """The layer "pixels" of one grey image [1, H, W]: for each filter its responses, absent neighbours as zeros."""
    height, width = x.shape[1:]
    rows = [[float(x[0, i, j]) for j in range(width)] for i in range(height)]
    flat = [v for row in rows for v in row]
    answers = [[sign * v - c for v in flat] for c in (0, 1, 2) for sign in (1, -1)]
    right, down, both = [], [], []
    for i in range(height):
        for j in range(width):
            r, d = j + 1 < width, i + 1 < height
            right.append(rows[i][j + 1] - rows[i][j] if r else 0.0)
            down.append(rows[i + 1][j] - rows[i][j] if d else 0.0)
            both.append(rows[i + 1][j + 1] - rows[i + 1][j] - rows[i][j + 1] + rows[i][j] if r and d else 0.0)
    return [*answers, right, down, both]


def filter_means(x: Tensor) -> Tensor:
    """(mean rectified, mean absolute) response of each filter over the images x [N, 1, H, W]: [2, K]."""
    every = [pixel_answers(image) for image in x.double()]
    count = len(every[0])
    pooled = [[v for image in every for v in image[k]] for k in range(count)]
    rectified = [sum(max(v, 0.0) for v in values) / len(values) for values in pooled]
    absolute = [sum(abs(v) for v in values) / len(values) for values in pooled]
    return torch.tensor([rectified, absolute], dtype=torch.float64)


def penalised_gap_gradient(
    score, negatives: Tensor, data: Tensor, *, beta: float, sigma: float, penalty: str
) -> list[Tensor]:
    """∇_θ of E f(negatives) − E f(data) + (β/2) E‖∇_x U‖² (or ‖∇_x f‖²), by double backward; θ descends along it."""
    parameters = list(score.parameters())
    x = negatives.detach().clone().requires_grad_()
    (pull,) = torch.autograd.grad(score(x).sum(), x, create_graph=True)
    drift = pull - x / sigma**2 if penalty == "energy" else pull
    # In the penalty the samples are where they are: only the parameters inside ∇f move.
    norm = drift.flatten(1).square().sum(1).mean()
    loss = score(negatives).mean() - score(data).mean() + 0.5 * beta * norm
    return list(torch.autograd.grad(loss, parameters))


def langevin(x: Tensor, pull, noise: list[Tensor], *, step_size: float, sigma: float) -> Tensor:
    """x ← x − η(pull(x) + x/σ²) + √(2η) ε, element by element, the ε recorded."""
    x = x.double().clone()
    for epsilon in noise:
        gradient = pull(x)
        flat, g, e = x.flatten(), gradient.flatten(), epsilon.double().flatten()
        for i in range(len(flat)):
            flat[i] = flat[i] - step_size * (g[i] + flat[i] / sigma**2) + math.sqrt(2 * step_size) * e[i]
        x = flat.view_as(x)
    return x
