"""Maximum mean discrepancy: value and gradients in one pass, in memory that grows with N + M and not with N·M."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen import check
from fastgen.ops import mmd as ops

ESTIMATORS = ("unbiased", "biased", "u_statistic")
PRECISIONS = ("ieee", "bf16x6", "tf32x3", "bf16x3", "tf32")
_KERNEL_NAMES = ("imq", "rbf", "polynomial", "laplacian", "energy", "rational_quadratic")


def _positive(name: str, values: Any) -> None:
    if isinstance(values, (str, Tensor)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a tuple of numbers, got {check.describe(values)}")
    if not values:
        raise ValueError(f"{name}: expected at least one number, got none")
    for v in values:
        check.number(name, v, above=0)


@dataclass(frozen=True)
class IMQ:
    """Inverse multiquadrics k(x, y) = Σ_s s·base / (s·base + ‖x − y‖²), summed over `scales` and not averaged.

    Args:
        scales: positive; WAE's seven by default, which have a faster kernel of their own (as has every list of seven
            that is closed under s → 1/s).
        base: positive, in units of squared distance; None means 2·D, the mean squared distance of two points of a
            standard normal.

    Source: Tolstikhin et al., Wasserstein Auto-Encoders (2018), section 4, and its code's seven scales.
    """

    scales: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    base: float | None = None

    def __post_init__(self) -> None:
        _positive("scales", self.scales)
        if self.base is not None:
            check.number("base", self.base, above=0)

    def _op(self, d: int) -> tuple[str, list[float]]:
        base = 2.0 * d if self.base is None else float(self.base)
        return "imq", [s * base for s in self.scales]


@dataclass(frozen=True)
class RBF:
    """Gaussian kernels k(x, y) = Σ_b exp(−‖x − y‖² / 2b²), summed over `bandwidths`.

    Args:
        bandwidths: positive, in units of distance; None means √D·(1/4, 1/2, 1, 2, 4), a factor-two ladder about the
            typical distance √(2D) of two points of a standard normal.

    Source: Gretton et al., A Kernel Two-Sample Test (2012); sums over a ladder after Li et al., Generative Moment
    Matching Networks (2015), section 3.
    """

    bandwidths: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.bandwidths is not None:
            _positive("bandwidths", self.bandwidths)

    def _op(self, d: int) -> tuple[str, list[float]]:
        if self.bandwidths is None:
            return "rbf", [0.5 / (d * b * b) for b in (0.25, 0.5, 1.0, 2.0, 4.0)]
        return "rbf", [0.5 / (b * b) for b in self.bandwidths]


@dataclass(frozen=True)
class Polynomial:
    """k(x, y) = (gamma·⟨x, y⟩ + coef)^degree, the kernel of KID. Runs on blocked matrix products, on every device.

    Args:
        degree: at least 1.
        gamma: positive; None means 1/D.
        coef: at least 0.

    Source: Bińkowski et al., Demystifying MMD GANs (2018), section 4.
    """

    degree: int = 3
    gamma: float | None = None
    coef: float = 1.0

    def __post_init__(self) -> None:
        check.integer("degree", self.degree, least=1)
        if self.gamma is not None:
            check.number("gamma", self.gamma, above=0)
        check.number("coef", self.coef, least=0)

    def _op(self, d: int) -> tuple[str, list[float]]:
        return "polynomial", [float(self.degree), 1.0 / d if self.gamma is None else float(self.gamma), self.coef]


Kernel = IMQ | RBF | Polynomial
_DEFAULTS: dict[str, Kernel] = {"imq": IMQ(), "rbf": RBF(), "polynomial": Polynomial()}


class _MMD(torch.autograd.Function):
    """The gradient is made with the value, since the upstream gradient is one number for each MMD."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, kind: str, parameters: list[float], estimator: str, precision: str
    ) -> Tensor:
        for_x, for_y = ctx.needs_input_grad[:2]
        ctx.sides = for_x, for_y
        ctx.dtype = x.dtype
        if for_x and for_y:
            value, gx, gy = ops.value_grad(x, y, kind, parameters, estimator, precision)
            ctx.save_for_backward(gx, gy)
        else:
            a, b = (x, y) if for_x else (y, x)
            value, gradient = ops.value_grad_x(a, b, kind, parameters, estimator, precision)
            ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "fastgen mmd: second-order gradients are not built yet (backward was called with create_graph=True); "
                "what works: first-order gradients in x and y"
            )
        scale = upstream[..., None, None] if upstream.ndim else upstream
        gradients = [(g * scale).to(ctx.dtype) for g in ctx.saved_tensors]
        if all(ctx.sides):
            return gradients[0], gradients[1], None, None, None, None
        return (
            gradients[0] if ctx.sides[0] else None,
            gradients[0] if ctx.sides[1] else None,
            None,
            None,
            None,
            None,
        )


def resolve(kernel: Any) -> Kernel:
    """A kernel object, from itself or its name."""
    if isinstance(kernel, (IMQ, RBF, Polynomial)):
        return kernel
    if not isinstance(kernel, str):
        raise TypeError(f"kernel: expected IMQ, RBF, Polynomial or a name, got {check.describe(kernel)}")
    if kernel not in _DEFAULTS:
        check.choice("kernel", kernel, _KERNEL_NAMES)
        check.not_built("kernel", kernel, "'imq', 'rbf', 'polynomial'")
    return _DEFAULTS[kernel]


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
        kernel: `IMQ(...)`, `RBF(...)`, `Polynomial(...)` or "imq", "rbf", "polynomial" for their defaults. Several
            scales are summed, not averaged.
        estimator: "unbiased": i ≠ j in the XX and YY sums, a_xx = 1/(N(N−1)), a_yy = 1/(M(M−1)), a_xy = 1/(NM);
            "biased": all pairs, 1/N², 1/M², 1/(NM); "u_statistic": i ≠ j in the XY sum too, N = M,
            all three 1/(N(N−1)).
        x_weight, y_weight: not built yet.
        precision: how the GPU makes its inner products, in Triton's terms: "ieee", "bf16x6", "tf32x3", "bf16x3",
            "tf32". The CPU, and float64, always work in full precision.
        group: not built yet (an average over shards is another estimator).

    Returns:
        MMD², [] or [B], float64 for float64 points, else float32. It may be negative unless the estimator is biased.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; fewer than two points
            where i ≠ j asks for two.
        NotImplementedError: an option that is not built yet; backward with create_graph=True.

    Notes:
        Memory is O((N + M)·D). The same input gives the same bits on one device, for any number of threads. Distances
        are expanded about the common centre of both samples; sums over pairs end in float64. Points that are not
        finite, or whose squares overflow, give NaN. Differentiable once in x and y; only the side that asks is paid
        for. On a GPU, D > 128, float64 points and the polynomial kernel run on blocked matrix products instead (never
        in TF32).

    Source: Gretton et al., A Kernel Two-Sample Test (JMLR 2012), equations 3 and 5 and lemma 6.
    """
    check.tensor("x", x, ndim=(2, 3))
    check.tensor("y", y, ndim=(2, 3))
    if x.dtype != y.dtype and torch.is_autocast_enabled(x.device.type):
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    check.same("y", y, "x", x)
    chosen = resolve(kernel)
    check.choice("estimator", estimator, ESTIMATORS)
    check.choice("precision", precision, PRECISIONS)
    if x_weight is not None:
        check.not_built("x_weight", type(x_weight).__name__, "None")
    if y_weight is not None:
        check.not_built("y_weight", type(y_weight).__name__, "None")
    if group is not None:
        check.not_built("group", group, "None")
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        expected = [*x.shape[:-2], "M", x.shape[-1]]
        raise ValueError(f"y: expected shape [{', '.join(map(str, expected))}] to go with x, got {list(y.shape)}")
    least = 1 if estimator == "biased" else 2
    for name, points in (("x", x), ("y", y)):
        if points.shape[-2] < least:
            raise ValueError(
                f"{name}: expected at least {least} points for {estimator=}, got shape {list(points.shape)}"
            )
    if x.shape[-1] < 1:
        raise ValueError(f"x: expected at least 1 coordinate, got shape {list(x.shape)}")
    if estimator == "u_statistic" and x.shape[-2] != y.shape[-2]:
        raise ValueError(f"y: expected as many points as x for {estimator=}, {x.shape[-2]}, got {y.shape[-2]}")
    kind, parameters = chosen._op(x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        result: Tensor = _MMD.apply(x, y, kind, parameters, estimator, precision)
        return result
    return ops.value(x, y, kind, parameters, estimator, precision)
