"""Adam on the rows that a batch touches, with the projection of those rows in the same step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastgen import check


class RowAdam(torch.optim.Optimizer):
    """torch.optim.SparseAdam, then each touched row goes back to the sphere or into the ball of radius 1.

    For the rows that the gradient holds:  m ← m + (1 − β₁)(g − m),  v ← v + (1 − β₂)(g² − v),
    z ← P(z − η·√(1 − β₂ᵗ)/(1 − β₁ᵗ)·m / (√v + ε)),  P(z) = z/‖z‖ ("sphere"), z/max(‖z‖, 1) ("ball") or z (None).
    t counts steps, not a row's own. No other row of z, m or v is read or written: a step costs O(batch · D) for any
    number of rows.

    Args:
        params: [N, D] parameters with sparse gradients, as `nn.Embedding(sparse=True)` gives; repeated rows are summed.
        lr: η. betas, eps: as SparseAdam.
        project: "sphere", "ball" or None. A row at 0 stays there.

    Raises: RuntimeError for a dense gradient; ValueError or TypeError naming the argument.

    Notes: Deterministic. The state (m, v, t) is in `state_dict` under SparseAdam's names.

    Source: torch.optim.SparseAdam; the projections: Bojanowski et al., GLO, ICML 2018 (ball), GLANN (sphere).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        project: str | None = "sphere",
    ) -> None:
        lr = check.number("lr", lr, least=0)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas!r}")
        betas = check.number("betas", betas[0], least=0), check.number("betas", betas[1], least=0)
        if max(betas) >= 1:
            raise ValueError(f"betas: expected numbers below 1, got {betas}")
        eps = check.number("eps", eps, above=0)
        if project is not None:
            check.choice("project", project, ("sphere", "ball"))
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "project": project})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for z in group["params"]:
                if z.grad is None:
                    continue
                if not z.grad.is_sparse:
                    raise RuntimeError("RowAdam: expected a sparse gradient, as nn.Embedding(sparse=True) gives")
                self._step(z, z.grad.coalesce(), group)
        return loss

    def _step(self, z: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[z]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(z)
            state["exp_avg_sq"] = torch.zeros_like(z)
        state["step"] += 1
        rows, g = grad.indices()[0], grad.values()
        (beta1, beta2), t = group["betas"], state["step"]
        m, v = state["exp_avg"][rows], state["exp_avg_sq"][rows]
        m = m + (g - m) * (1 - beta1)
        v = v + (g * g - v) * (1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = m, v
        size = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        z[rows] = project(z[rows] - size * (m / (v.sqrt() + group["eps"])), group["project"])


def project(z: Tensor, onto: str | None) -> Tensor:
    """Rows [N, D] on the unit sphere, in the unit ball, or as they are."""
    if onto is None:
        return z
    norm = z.norm(dim=1, keepdim=True)
    return z / norm.clamp_min(1e-12 if onto == "sphere" else 1.0)
