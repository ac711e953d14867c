"""What the maximum mean discrepancy means, in blocks of rows so that no N×M matrix is ever held.

    MMD² = a_xx Σ pᵢpⱼ k(xᵢ, xⱼ) + a_yy Σ qᵢqⱼ k(yᵢ, yⱼ) − 2 a_xy Σ pᵢqⱼ k(xᵢ, yⱼ)

`kind` and `parameters` name the kernel: "imq" Σ c/(c + d²) over the constants c, "rbf" Σ exp(−g·d²) and "laplacian"
Σ exp(−g·d) over the rates g, "energy" −d, "rational_quadratic" Σ (1 + d²/2αℓ²)^−α with parameters (ℓ, α, α, …),
"polynomial" (γ⟨x, y⟩ + c)^p with parameters (p, γ, c). Points are [N, D] or [B, N, D], weights p and q [N] and [M] or
[B, N] and [B, M], or None for ones; the coefficients a are [3] or [B, 3] float64, or None for those of unweighted
points. `terms` says which of the three sums are made: XX + YY + XY. All are already checked.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 21  # elements of one block of kernel values: 8 MiB in float32
XX, YY, XY = 1, 2, 4
ALL = XX | YY | XY
ROOTED = ("laplacian", "energy")  # kernels of d and not of d²: an expanded d² near zero would have no digit right
LARGEST = {torch.float32: 1.25e34, torch.float64: 1.25e299}  # square of a point that is still one, as in the kernels


class Options(NamedTuple):
    """Everything but the points, in the order of the ops' arguments."""

    kind: str
    parameters: Sequence[float]
    estimator: str
    x_weight: Tensor | None = None
    y_weight: Tensor | None = None
    coefficients: Tensor | None = None
    terms: int = ALL


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are made and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_reach(points: Tensor) -> Tensor:
    """The points, those so far out that distances overflow as NaN: an infinite d² would pass for one that is known."""
    return points.masked_fill(~((points * points).sum(-1, keepdim=True) < LARGEST[points.dtype]), float("nan"))


def weights(n: int, m: int, estimator: str) -> tuple[float, float, float]:
    """a_xx, a_yy and a_xy of unweighted points."""
    if estimator == "biased":
        return 1 / n**2, 1 / m**2, 1 / (n * m)
    a_xy = 1 / (n * (n - 1)) if estimator == "u_statistic" else 1 / (n * m)
    return 1 / (n * (n - 1)), 1 / (m * (m - 1)), a_xy


def value(x: Tensor, y: Tensor, options: Options) -> Tensor:
    """MMD², shape [] or [B]."""
    return _mmd(x, y, options, False, False)[0]


def value_grad_x(x: Tensor, y: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """MMD² and its gradient in x."""
    result, gx, _ = _mmd(x, y, options, True, False)
    return result, gx


def value_grad(x: Tensor, y: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """MMD² and its gradients in x and in y."""
    return _mmd(x, y, options, True, True)


class _Problem:
    """Both samples as [B, N, D] in the precision that sums are made in, centred where only differences count."""

    def __init__(self, x: Tensor, y: Tensor, options: Options, *, wide: bool = False) -> None:
        self.out = accumulator(x.dtype)
        work = self.out
        if wide or (x.is_cuda and torch.get_float32_matmul_precision() != "highest"):
            work = torch.float64  # the user's TF32 is for layers: here it would be larger than the result
        n, m = x.shape[-2], y.shape[-2]
        # Of one layout: a matrix product's last bits depend on it.
        self.x, self.y = (p.to(work).reshape(-1, *p.shape[-2:]).contiguous() for p in (x, y))
        items = len(self.x)
        if options.kind != "polynomial":
            # One centre for both keeps the expanded distances exact where it matters, and makes inf NaN everywhere.
            centre = torch.cat([self.x, self.y], dim=-2).mean(-2, keepdim=True)
            self.x, self.y = self.x - centre, self.y - centre
        self.x, self.y = in_reach(self.x), in_reach(self.y)
        self.p, self.q = (
            None if w is None else w.to(work).reshape(-1, w.shape[-1]).expand(items, -1)
            for w in (options.x_weight, options.y_weight)
        )
        if options.coefficients is None:
            self.a = x.new_tensor(weights(n, m, options.estimator), dtype=torch.float64).expand(items, 3)
        else:
            self.a = options.coefficients.reshape(-1, 3).expand(items, 3)
        self.masked = options.estimator != "biased"
        # The pairs of a sweep, on its diagonal i = j, are special.
        self.diagonal = {XX: True, YY: True, XY: options.estimator == "u_statistic"}

    def pulls(self) -> tuple[Tensor, Tensor, Tensor]:
        """The coefficients as factors of gradients, [B, 1, 1] each."""
        xx, yy, xy = self.a.to(self.x.dtype)[:, :, None, None].unbind(1)
        return 2 * xx, 2 * yy, -2 * xy


def _mmd(x: Tensor, y: Tensor, options: Options, for_x: bool, for_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        problem = _Problem(x, y, options)
        a, b = problem.x, problem.y
        total = a.new_zeros(len(a), dtype=torch.float64)
        gx, gy = torch.zeros_like(a), torch.zeros_like(b)
        pull = problem.pulls()
        if options.terms & XX:
            k, g, _ = _sweep(a, a, problem.p, problem.p, problem, options, XX, for_x, False)
            total += problem.a[:, 0] * k
            gx += pull[0] * g
        if options.terms & YY:
            k, g, _ = _sweep(b, b, problem.q, problem.q, problem, options, YY, for_y, False)
            total += problem.a[:, 1] * k
            gy += pull[1] * g
        if options.terms & XY:
            k, ga, gb = _sweep(a, b, problem.p, problem.q, problem, options, XY, for_x, for_y)
            total -= 2 * problem.a[:, 2] * k
            gx += pull[2] * ga
            gy += pull[2] * gb
    empty = x.new_empty(0, dtype=problem.out)
    return (
        total.to(problem.out).reshape(x.shape[:-2]),
        gx.to(problem.out).reshape(x.shape).contiguous() if for_x else empty,
        gy.to(problem.out).reshape(y.shape).contiguous() if for_y else empty,
    )


def hessian_product(x: Tensor, y: Tensor, vx: Tensor, vy: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """The Hessian of MMD² times (vx, vy), in x and in y; without vy, y is a constant and the second result is empty.

    With f(q) a kernel of q = ‖a − b‖² and s = ⟨a − b, va − vb⟩, the gradient 2 f′·(a − b) changes along v by
    2 f′·(va − vb) + 4 f″ s·(a − b); with f of t = ⟨a, b⟩ it is f′·b, and changes by f′·vb + f″ (⟨va, b⟩ + ⟨a, vb⟩)·b.
    """
    with torch.autocast(x.device.type, enabled=False):
        # Between close points the two parts of a rooted kernel's second derivative cancel, to nothing in one dimension.
        problem = _Problem(x, y, options, wide=options.kind in ROOTED)
        a, b = problem.x, problem.y
        va = vx.to(a.dtype).reshape(a.shape).contiguous()
        vb = torch.zeros_like(b) if vy is None else vy.to(a.dtype).reshape(b.shape).contiguous()
        hx, hy = torch.zeros_like(a), torch.zeros_like(b)
        pull = problem.pulls()
        if options.terms & XX:
            hx += pull[0] * _second_sweep(a, a, va, va, problem.p, problem.p, problem, options, XX, False)[0]
        if options.terms & YY and vy is not None:
            hy += pull[1] * _second_sweep(b, b, vb, vb, problem.q, problem.q, problem, options, YY, False)[0]
        if options.terms & XY:
            for_y = vy is not None
            ha, hb = _second_sweep(a, b, va, vb, problem.p, problem.q, problem, options, XY, for_y)
            hx += pull[2] * ha
            hy += pull[2] * hb
    empty = x.new_empty(0, dtype=problem.out)
    return (
        hx.to(problem.out).reshape(x.shape).contiguous(),
        empty if vy is None else hy.to(problem.out).reshape(y.shape).contiguous(),
    )


def row_sums(
    x: Tensor, y: Tensor, options: Options, vx: Tensor | None = None, vy: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σⱼ pⱼ k(xᵢ, xⱼ), Σⱼ qⱼ k(xᵢ, yⱼ), Σᵢ pᵢ k(xᵢ, yⱼ) and Σᵢ qᵢ k(yᵢ, yⱼ) over the pairs that the estimator and
    `terms` count, in float64; both weights are given. With vx or vy: how these change along them."""
    with torch.autocast(x.device.type, enabled=False):
        order = int(vx is not None or vy is not None)
        problem = _Problem(x, y, options, wide=order > 0 and options.kind in ROOTED)
        a, b, p, q = problem.x, problem.y, problem.p, problem.q
        assert p is not None
        assert q is not None
        va, vb = (torch.zeros_like(z) if v is None else v.to(z.dtype).reshape(z.shape) for z, v in ((a, vx), (b, vy)))
        found = [w.new_zeros(w.shape, dtype=torch.float64) for w in (p, p, q, q)]

        def matrices(s: Tensor, t: Tensor, vs: Tensor, vt: Tensor, which: int) -> Iterator[tuple[slice, Tensor]]:
            if options.terms & which:
                for rows, values in _blocks(s, t, None, None, problem, options, which, order):
                    k = values[order]
                    yield rows, k * _along(s[:, rows], t, vs[:, rows], vt, options.kind) if order else k

        for out, points, v, weight, which in ((found[0], a, va, p, XX), (found[3], b, vb, q, YY)):
            for rows, k in matrices(points, points, v, v, which):
                out[:, rows] = (k * weight[:, None, :]).sum(2, dtype=torch.float64)
        for rows, k in matrices(a, b, va, vb, XY):
            found[1][:, rows] = (k * q[:, None, :]).sum(2, dtype=torch.float64)
            found[2] += (k * p[:, rows, None]).sum(1, dtype=torch.float64)
    xx, xy, yx, yy = (
        out.reshape(shape) for out, shape in zip(found, (*[x.shape[:-1]] * 2, *[y.shape[:-1]] * 2), strict=True)
    )
    return xx, xy, yx, yy


def _along(a: Tensor, b: Tensor, va: Tensor, vb: Tensor, kind: str) -> Tensor:
    """How the q of `_kernel`, a squared distance or an inner product, of every pair changes along (va, vb)."""
    crossed = va @ b.mT + a @ vb.mT
    if kind == "polynomial":
        return crossed
    return 2 * ((a * va).sum(-1, keepdim=True) + (b * vb).sum(-1)[:, None, :] - crossed)


def _blocks(
    a: Tensor,
    b: Tensor,
    wa: Tensor | None,
    wb: Tensor | None,
    problem: _Problem,
    options: Options,
    which: int,
    order: int,
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Slabs of rows of a against all of b: the slice, and k and its first `order` derivatives, weighted and masked."""
    expanded = options.kind != "polynomial"
    norm_b = (b * b).sum(-1)[:, None, :]
    rows = max(1, BLOCK // max(1, b.shape[0] * b.shape[1]))
    for start in range(0, a.shape[1], rows):
        part = a[:, start : start + rows]
        if options.kind in ROOTED:
            q = torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").square_()
        elif expanded:
            q = torch.baddbmm((part * part).sum(-1, keepdim=True) + norm_b, part, b.mT, alpha=-2).clamp_(min=0)
        else:
            q = part @ b.mT
        if expanded and which != XY:
            q.diagonal(start, 1, 2).mul_(0)  # a point is at no distance from itself, unless it is NaN
        found = _kernel(q, options.kind, options.parameters, order)
        for matrix in found:
            if problem.masked and problem.diagonal[which]:
                matrix.diagonal(start, 1, 2).zero_()
            if wa is not None:
                matrix *= wa[:, start : start + rows, None]
            if wb is not None:
                matrix *= wb[:, None, :]
        yield slice(start, start + rows), found


def _sweep(
    a: Tensor,
    b: Tensor,
    wa: Tensor | None,
    wb: Tensor | None,
    problem: _Problem,
    options: Options,
    which: int,
    for_a: bool,
    for_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_ij k(a_i, b_j) in float64, Σ_j ∂k/∂a_i and Σ_i ∂k/∂b_j."""
    total = a.new_zeros(a.shape[0], dtype=torch.float64)
    ga, gb = torch.zeros_like(a), torch.zeros_like(b)
    expanded = options.kind != "polynomial"
    for rows, (k, *slopes) in _blocks(a, b, wa, wb, problem, options, which, 1 if for_a or for_b else 0):
        total += k.sum((1, 2), dtype=torch.float64)
        if for_a:
            ga[:, rows] = _pull(slopes[0], a[:, rows], b, expanded)
        if for_b:
            gb += _pull(slopes[0].mT, b, a[:, rows], expanded)
    return total, ga, gb


def _pull(slope: Tensor, a: Tensor, b: Tensor, expanded: bool) -> Tensor:
    """Σ_j of the slopes times what a pair's own derivative is: 2 (a_i − b_j) for a squared distance, else b_j."""
    return 2 * (a * slope.sum(2, keepdim=True) - slope @ b) if expanded else slope @ b


def _second_sweep(
    a: Tensor,
    b: Tensor,
    va: Tensor,
    vb: Tensor,
    wa: Tensor | None,
    wb: Tensor | None,
    problem: _Problem,
    options: Options,
    which: int,
    for_b: bool,
) -> tuple[Tensor, Tensor]:
    """How Σ_j ∂k/∂a_i, and where asked Σ_i ∂k/∂b_j, change along (va, vb)."""
    ha, hb = torch.zeros_like(a), torch.zeros_like(b)
    expanded = options.kind != "polynomial"
    for rows, (_, first, second) in _blocks(a, b, wa, wb, problem, options, which, 2):
        part, v = a[:, rows], va[:, rows]
        bent = second * _along(part, b, v, vb, options.kind)
        ha[:, rows] = _pull(first, v, vb, expanded) + _pull(bent, part, b, expanded)
        if for_b:
            hb += _pull(first.mT, vb, v, expanded) + _pull(bent.mT, b, part, expanded)
    return ha, hb


def _kernel(q: Tensor, kind: str, parameters: Sequence[float], order: int) -> tuple[Tensor, ...]:
    """k and its first `order` derivatives in q, for a block of squared distances, or of inner products."""
    if kind == "polynomial":
        degree, gamma, coef = int(parameters[0]), parameters[1], parameters[2]
        inner = gamma * q + coef
        power = inner ** (degree - 1)
        found = [power * inner, degree * gamma * power]
        if order == 2:
            found.append(degree * (degree - 1) * gamma**2 * inner ** max(degree - 2, 0))
        return tuple(found[: order + 1])
    if kind in ROOTED:
        # At d = 0, where there is no derivative, the zero subgradient; 0/0 must not reach the sums.
        d = q.sqrt()
        inverse = torch.where(q == 0, 0.0, 1 / d)
        if kind == "energy":
            return (-d, -0.5 * inverse, 0.25 * inverse**3)[: order + 1]
    sums = [torch.zeros_like(q) for _ in range(order + 1)]
    for p in parameters[1:] if kind == "rational_quadratic" else parameters:
        if kind == "imq":
            k = p / (p + q)
            factors: tuple[Tensor | float, Tensor | float] = (k / -p, 2 * (k / p) ** 2)
        elif kind == "rbf":
            k = torch.exp(q * -p)
            factors = (-p, p * p)
        elif kind == "laplacian":
            k = torch.exp(d * -p)
            factors = (-0.5 * p * inverse, 0.25 * p * (1 + p * d) * inverse**3)
        else:
            c = 2 * p * parameters[0] ** 2
            t = q / c
            k = torch.exp(torch.log1p(t) * -p)
            factors = (-p / (c + q), p * (p + 1) / (c + q) ** 2)
        sums[0] += k
        for derivative, factor in zip(sums[1:], factors, strict=False):
            derivative += k * factor
    return tuple(sums)
