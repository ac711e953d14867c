"""Maximum mean discrepancy: value and gradients in one pass, in memory that grows with N + M and not with N·M."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.mmd_group import check_group, grouped
from fastgen.functional.mmd_kernels import (
    IMQ,
    RBF,
    Energy,
    Kernel,
    Laplacian,
    Polynomial,
    RationalQuadratic,
    resolve,
)
from fastgen.functional.mmd_plain import ESTIMATORS, PRECISIONS, prepared
from fastgen.functional.mmd_weights import (
    check_weight,
    differentiable,
    in_coefficients,
    in_shares,
    taken_out,
    weighted,
)
from fastgen.functional.transforms import Function, apply, batched, wanted
from fastgen.ops import mmd as ops

__all__ = [
    "IMQ",
    "RBF",
    "Energy",
    "Kernel",
    "Laplacian",
    "Polynomial",
    "RationalQuadratic",
    "mmd",
    "resolve",
]

# kind, parameters, estimator, precision, x_weight, y_weight, coefficients, terms: what the ops take after the points
Options = tuple[Any, ...]


class _Function(Function):
    vmap = staticmethod(ops.no_vmap)


class _MMD(_Function):
    """The gradient is made with the value, since the upstream gradient is one number for each MMD."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, options: Options, call: ops.Call | None) -> Tensor:
        for_x, for_y, _, _ = ctx.needs_input_grad
        call = call or ops.call
        ctx.options = options
        value: Tensor
        gx = gy = None
        if not for_y:
            value, gx = call(1, x, y, options)
        elif for_x:
            value, gx, gy = call(2, x, y, options)
        else:
            value, gy = call(1, y, x, _swapped(options))
        ctx.save_for_backward(x, y, gx, gy)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, gx, gy = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *apply(_Gradient, upstream, x, y, gx, gy, ctx.options), None, None
        return *_scaled(upstream, x.dtype, gx, gy), None, None


# Function.apply is this and what functorch wants before it, two microseconds.
_apply_directly: Any = super(torch.autograd.Function, _MMD).apply


class _Gradient(_Function):
    """upstream·∂MMD²/∂x and upstream·∂MMD²/∂y as a function of upstream, x and y; its own gradient is the product of
    MMD²'s Hessian with what comes from above."""

    @staticmethod
    def forward(
        ctx: Any, upstream: Tensor, x: Tensor, y: Tensor, gx: Tensor | None, gy: Tensor | None, options: Options
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(upstream, x, y, gx, gy)
        ctx.options = options
        return _scaled(upstream, x.dtype, gx, gy)

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vy: Tensor | None) -> tuple[Tensor | None, ...]:
        return *apply(_Product, vx, vy, *ctx.saved_tensors, ctx.options), None, None, None


class _Product(_Function):
    """The gradient of _Gradient: joined to all of its inputs, so that a third derivative raises where it is taken."""

    @staticmethod
    def forward(
        ctx: Any,
        vx: Tensor | None,
        vy: Tensor | None,
        upstream: Tensor,
        x: Tensor,
        y: Tensor,
        gx: Tensor | None,
        gy: Tensor | None,
        options: Options,
    ) -> tuple[Tensor | None, ...]:
        pairs = [(v, g) for v, g in ((vx, gx), (vy, gy)) if v is not None and g is not None]
        along = torch.stack([(v * g).sum((-2, -1)) for v, g in pairs]).sum(0)
        if gx is None:
            assert vy is not None
            hy, hx = ops.hessian_product(y, x, vy, None, *_swapped(options))
        else:
            assert vx is not None
            hx, hy = ops.hessian_product(x, y, vx, None if gy is None else vy, *options)
        products = _scaled(upstream, x.dtype, None if gx is None else hx, None if gy is None else hy)
        return along.to(upstream.dtype), *products

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            "fastgen mmd: third-order gradients are not built; what works: first and second order"
        )


class _WeightedMMD(_Function):
    """MMD² as a function of the points, the weights p and q that sum to one, and the coefficients of its three sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, p: Tensor, q: Tensor, coefficients: Tensor, options: Options, terms: int
    ) -> Tensor:
        for_x, for_y = ctx.needs_input_grad[:2]
        given = (*options, p, q, coefficients, terms)
        gx = gy = None
        if for_x and for_y:
            value, gx, gy = ops.call(2, x, y, given)
        elif for_y:
            value, gy = ops.call(1, y, x, _swapped(given))
        else:
            value, *rest = ops.call(int(for_x), x, y, given)
            gx = rest[0] if rest else None
        ctx.save_for_backward(x, y, p, q, coefficients, gx, gy)
        ctx.options, ctx.terms = options, terms
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        given = (upstream, *ctx.saved_tensors, ctx.options, ctx.terms)
        found = apply(_WeightedGradient, *given) if torch.is_grad_enabled() else _weighted_gradients(*given)
        return *found, None, None


def _weighted_gradients(
    upstream: Tensor,
    x: Tensor,
    y: Tensor,
    p: Tensor,
    q: Tensor,
    a: Tensor,
    gx: Tensor | None,
    gy: Tensor | None,
    options: Options,
    terms: int,
) -> tuple[Tensor | None, ...]:
    """upstream times the gradients of MMD² in x, y, p, q and a."""
    sums = ops.row_sums(x, y, *options[:3], p, q)
    scale = upstream.double()[..., None]
    gp, gq = (g * scale for g in in_shares(a, sums, terms))
    return *_scaled(upstream, x.dtype, gx, gy), gp.to(p.dtype), gq.to(q.dtype), in_coefficients(p, q, sums) * scale


class _WeightedGradient(_Function):
    """`_weighted_gradients`; their own gradient is the Hessian's product, of weights and coefficients too."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        *tensors, ctx.options, ctx.terms = given
        ctx.save_for_backward(*tensors)
        return _weighted_gradients(*given)

    @staticmethod
    def backward(ctx: Any, *v: Tensor | None) -> tuple[Tensor | None, ...]:
        products = apply(_WeightedProduct, *v, *ctx.saved_tensors, ctx.options, ctx.terms)
        return *products, None, None, None, None


class _WeightedProduct(_Function):
    """As `_Product`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        vx, vy, vp, vq, va, upstream, x, y, p, q, a, gx, gy, options, terms = given
        sums = ops.row_sums(x, y, *options[:3], p, q)
        change: Sequence[Tensor] = ops.row_sums(x, y, *options[:3], vp, vq)
        if vx is not None or vy is not None:
            moved = ops.row_sums(x, y, *options[:3], p, q, ops.ALL, vx, vy)
            change = [s + t for s, t in zip(change, moved, strict=True)]
        hp, hq = (s + t for s, t in zip(in_shares(a, change, terms), in_shares(va, sums, terms), strict=True))
        ha = in_coefficients(p, q, change) + in_coefficients(vp, vq, sums)
        gp, gq = in_shares(a, sums, terms)
        along = (vp * gp).sum(-1) + (vq * gq).sum(-1) + (va * in_coefficients(p, q, sums)).sum(-1)
        for v, g in ((vx, gx), (vy, gy)):
            if v is not None and g is not None:
                along = along + (v * g).sum((-2, -1))
        hx, hy = _moved_gradients((x, y, p, q, a), (vx, vy, vp, vq, va), options, terms)
        scale = upstream.double()[..., None]
        of_shares = (hp * scale).to(p.dtype), (hq * scale).to(q.dtype)
        return along.to(upstream.dtype), *_scaled(upstream, x.dtype, hx, hy), *of_shares, ha * scale

    backward = _Product.backward


def _moved_gradients(
    at: Sequence[Tensor], v: Sequence[Any], options: Options, terms: int
) -> tuple[Tensor | None, Tensor | None]:
    """How MMD²'s gradients in x and y change along v, which is of x, y, p, q and a; x or y without is a constant."""
    x, y, p, q, a = at
    vx, vy, vp, vq, va = v
    kind, parameters, estimator, precision = options
    if vx is None and vy is None:
        return None, None
    if vx is None:
        swapped, moved = (y, x, q, p, a[..., [1, 0, 2]]), (vy, vx, vq, vp, va[..., [1, 0, 2]])
        hy, hx = _moved_gradients(swapped, moved, options, _swapped((*options, None, None, None, terms))[-1])
        return hx, hy
    hx, hy = ops.hessian_product(x, y, vx, vy, *options, p, q, a, terms)

    def pulled(
        points: Tensor, own: Tensor, v_own: Tensor, other: Tensor, weight: Tensor, v_weight: Tensor, which: int
    ) -> Tensor | float:
        """How the gradient in points of coefficient Σ ownᵢ weightⱼ k(pointsᵢ, otherⱼ) changes, but for the points."""
        if not terms & (1, 2, 4)[which]:
            return 0.0
        off = "u_statistic" if estimator == "u_statistic" or (estimator == "unbiased" and which < 2) else "biased"
        sign, plain = (-2 if which == 2 else 2), a.new_tensor([0.0, 0.0, -0.5])
        a_own, va_own = (sign * c[..., which, None] * own for c in (a, va))
        found: Tensor | float = 0.0
        for scale, w in ((sign * a[..., which, None] * v_own + va_own, weight), (a_own, v_weight)):
            given = (kind, parameters, off, precision, torch.ones_like(own), w, plain, 4)
            found = found + scale[..., None] * ops.value_grad_x(points, other, *given)[1]
        return found

    hx = hx + pulled(x, p, vp, x, p, vp, 0) + pulled(x, p, vp, y, q, vq, 2)
    if vy is None:
        return hx, None
    return hx, hy + pulled(y, q, vq, y, q, vq, 1) + pulled(y, q, vq, x, p, vp, 2)


def _scaled(
    upstream: Tensor, dtype: torch.dtype, gx: Tensor | None, gy: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    scale = upstream[..., None, None] if upstream.ndim else upstream
    if gx is not None:
        gx = gx * scale
        gx = gx if gx.dtype is dtype else gx.to(dtype)  # a call that does nothing is a microsecond
    if gy is not None:
        gy = gy * scale
        gy = gy if gy.dtype is dtype else gy.to(dtype)
    return gx, gy


def _swapped(options: Options) -> Options:
    """The options of the same MMD² with its samples in the other order."""
    kind, parameters, estimator, precision, *rest = options
    if not rest:
        return options
    x_weight, y_weight, coefficients, terms = rest
    if coefficients is not None:
        coefficients = coefficients[..., [1, 0, 2]]
    terms = terms & 4 | (terms & 1) << 1 | (terms & 2) >> 1
    return kind, parameters, estimator, precision, y_weight, x_weight, coefficients, terms


def evaluate(x: Tensor, y: Tensor, options: Options, call: ops.Call = ops.call) -> Tensor:
    """MMD² of checked arguments, with a gradient where one is asked for."""
    result: Tensor
    if call is ops.call:
        result = apply(_MMD, x, y, options, None) if any(wanted(x, y)) else call(0, x, y, options)[0]
    elif torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        result = _apply_directly(x, y, options, call)
    else:
        (result,) = call(0, x, y, options)
    return result


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel | str = "imq",
    estimator: str = "unbiased",
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
    precision: str = "bf16x3",
    group: Any = None,
) -> Tensor:
    """Squared maximum mean discrepancy of two samples, a_xx Σ k(xᵢ, xⱼ) + a_yy Σ k(yᵢ, yⱼ) − 2 a_xy Σ k(xᵢ, yⱼ).

    Args:
        x: [N, D] or [B, N, D] float64, float32, bfloat16 or float16.
        y: [M, D] or [B, M, D], of x's dtype and device; N ≠ M is fine. (Under autocast the dtypes may differ and are
            promoted.)
        kernel: `IMQ(...)`, `RBF(...)`, `Laplacian(...)`, `RationalQuadratic(...)`, `Energy()`, `Polynomial(...)`, or
            "imq", "rbf", "laplacian", "rational_quadratic", "energy", "polynomial" for their defaults. Several scales
            are summed, not averaged.
        estimator: "unbiased": i ≠ j in the XX and YY sums, a_xx = 1/(N(N−1)), a_yy = 1/(M(M−1)), a_xy = 1/(NM);
            "biased": all pairs, 1/N², 1/M², 1/(NM); "u_statistic": i ≠ j in the XY sum too, N = M,
            all three 1/(N(N−1)).
        x_weight, y_weight: [N] or [B, N] and [M] or [B, M], any of the dtypes, none negative; None means equal
            weights. They are divided by their sums to p and q, and a pair's term is multiplied by pᵢpⱼ, qᵢqⱼ or pᵢqⱼ.
            "biased": a_xx = a_yy = a_xy = 1; "unbiased": a_xx = 1/(1 − Σp²), a_yy = 1/(1 − Σq²), a_xy = 1, the mean
            over pairs i ≠ j drawn with these weights; "u_statistic": a_xy = 1/(1 − Σpq) too. Equal weights give the
            unweighted value; a weight of zero takes the point out; all the weight on one point leaves "unbiased"
            without a pair, NaN. They may require gradients (at the reference's speed), which see the
            division by the sum: along the weights themselves nothing changes. Points of weight zero then do move the
            common centre.
        precision: how the GPU makes its inner products, in Triton's terms: "ieee", "bf16x6", "tf32x3", "bf16x3",
            "tf32". The CPU, and float64, always work in full precision.
        group: a torch.distributed process group whose processes' x, and y, together are the two samples (shards of any
            sizes but zero; an average of the shards' MMD² is another estimator). Every process gets the one value, to
            rounding that of a single process, and the gradient of it in its own shard: DistributedDataParallel, which
            averages gradients, asks for a loss multiplied by the number of processes. Collective: all processes call
            it. A shard at a time is broadcast, so that memory stays O(N·D) of two shards. "u_statistic" pairs x and y
            by their place in the shards. Differentiable once; weights ask for gradients on every process or on none.
            Shard sizes are exchanged on the host.

    Returns:
        MMD², [] or [B], float64 for float64 points, else float32. It may be negative unless the estimator is biased.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; fewer than two points
            where i ≠ j asks for two; weights that are negative or sum to zero (on a GPU and in a compiled graph, where
            nothing waits for the data: NaN).
        NotImplementedError: second derivatives with `group`, third ones, forward-mode differentiation, torch.vmap.

    Notes:
        Memory is O((N + M)·D). The same input gives the same bits on one device, for any number of threads. Distances
        are expanded about the common centre of both samples; sums over pairs end in float64. In float32 a squared
        distance is off by about 2⁻²³·R², R being the largest distance from that centre (the Laplacian and energy
        kernels excepted): for clusters far apart relative to the bandwidth take float64. Points that are not
        finite give NaN, and so do those beyond 1e17 (of float64: 1e149) from the centre, plainly or in units of the
        kernel's scale: their squares overflow. Differentiable twice, a third derivative raises; only
        the side that asks is paid for. The second derivative is an analytic Hessian-vector product, in one pass
        on the CPU and in O((N + M)·D) memory everywhere. On a GPU float64 points, degrees beyond 16 and second
        derivatives of the Laplacian and energy kernels run on blocked matrix products, in full precision; these two
        and polynomials take "bf16x6" products where "bf16x3" or "tf32" is asked for, and of these two pairs closer than
        an eighth of their distance from the centre get their distance from differences. Gradients that do not fit on
        chip (D > 128 or 64, there or elsewhere) go through 64 MiB of memory, second derivatives through twice that;
        more than 1024 batch items take 64 KiB each.

    Source: Gretton et al., A Kernel Two-Sample Test (JMLR 2012), equations 3 and 5 and lemma 6.
    """
    return compute(x, y, kernel, estimator, x_weight, y_weight, precision, group)


def compute(
    x: Tensor,
    y: Tensor,
    kernel: Kernel | str,
    estimator: str,
    x_weight: Tensor | None,
    y_weight: Tensor | None,
    precision: str,
    group: Any = None,
    y_term: Tensor | None = None,
) -> Tensor:
    """`mmd`; where `y_term` is given, `own_term` of y, the sum over y's own pairs is not made again."""
    if x_weight is None and y_weight is None and group is None and y_term is None:
        short = prepared(x, y, kernel, estimator, precision)
        if short is not None:
            return evaluate(x, y, *short)
    given = (x, y, kernel, estimator, x_weight, y_weight, precision)
    if group is not None:
        check_group(group)
        try:
            checked: Any = _checked(*given, shards=True)
        except Exception as problem:
            checked = problem
        return grouped(checked, x_weight, y_weight, group)
    x, y, options = _checked(*given)
    terms = ops.ALL if y_term is None else ops.ALL & ~2
    if differentiable(x_weight) or differentiable(y_weight):
        of_weights: Tensor = apply(_WeightedMMD, x, y, *weighted(x, y, x_weight, y_weight, estimator), options, terms)
        return of_weights if y_term is None else of_weights + y_term
    if x_weight is not None or y_weight is not None:
        options = (*options, *weighted(x, y, x_weight, y_weight, estimator), terms)
    elif y_term is not None:
        options = (*options, None, None, None, terms)
    value = evaluate(x, y, options)
    return value if y_term is None else value + y_term


def _checked(
    x: Tensor,
    y: Tensor,
    kernel: Kernel | str,
    estimator: str,
    x_weight: Tensor | None,
    y_weight: Tensor | None,
    precision: str,
    shards: bool = False,
) -> tuple[Tensor, Tensor, Options]:
    """The points, those of no weight taken out, and the options; `shards` may be small, and of different sizes."""
    check.tensor("x", x, ndim=(2, 3))
    check.tensor("y", y, ndim=(2, 3))
    check.no_tangent("mmd", x, y, x_weight, y_weight)
    if batched(x, y, x_weight, y_weight):  # a look at the weights would say it in other words
        ops.no_vmap()
    if x.dtype != y.dtype and torch.is_autocast_enabled(x.device.type):
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    check.same("y", y, "x", x)
    chosen = resolve(kernel)
    check.choice("estimator", estimator, ESTIMATORS)
    check.choice("precision", precision, PRECISIONS)
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        expected = [*x.shape[:-2], "M", x.shape[-1]]
        raise ValueError(f"y: expected shape [{', '.join(map(str, expected))}] to go with x, got {list(y.shape)}")
    if not shards:
        _check_count("x", x, estimator)
        _check_count("y", y, estimator)
        if estimator == "u_statistic" and x.shape[-2] != y.shape[-2]:
            raise ValueError(f"y: expected as many points as x for {estimator=}, {x.shape[-2]}, got {y.shape[-2]}")
    if x.shape[-1] < 1:
        raise ValueError(f"x: expected at least 1 coordinate, got shape {list(x.shape)}")
    for name, weight, points_name, points in (("x_weight", x_weight, "x", x), ("y_weight", y_weight, "y", y)):
        if weight is not None:
            check_weight(name, weight, points_name, points, shards)
    kind, parameters = chosen._op(x.shape[-1])
    return taken_out(x, x_weight), taken_out(y, y_weight), (kind, parameters, estimator, precision)


def own_term(
    y: Tensor, *, kernel: Kernel | str, estimator: str, weight: Tensor | None = None, precision: str = "bf16x3"
) -> Tensor:
    """What y's own pairs add to `mmd`, a constant."""
    check.tensor("y", y, ndim=(2, 3))
    check.no_tangent("mmd", y, weight)
    _check_count("y", y, estimator)
    kind, parameters = resolve(kernel)._op(y.shape[-1])
    options: Options = (kind, parameters, estimator, precision)
    if weight is None:
        return ops.call(0, y, y, (*options, None, None, None, 1))[0]
    check_weight("y_weight", weight, "y", y)
    y = taken_out(y, weight)
    q, _, coefficients = weighted(y, y, weight, weight, estimator)
    return ops.call(0, y, y, (*options, q, q, coefficients, 1))[0]


def _check_count(name: str, points: Tensor, estimator: str) -> None:
    least = 1 if estimator == "biased" else 2
    if points.shape[-2] < least:
        raise ValueError(f"{name}: expected at least {least} points for {estimator=}, got shape {list(points.shape)}")
