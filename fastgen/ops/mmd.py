"""fastgen::mmd_value, mmd_value_grad_x and mmd_value_grad: MMD², and with it the unit gradients of the points;
fastgen::mmd_hessian_product, how those gradients change along given directions; and fastgen::mmd_row_sums, what
gradients in weights are made of.

Three ops of fixed arity: only the side that needs a gradient is paid for. A gradient in y alone is mmd_value_grad_x of
the swapped arguments. Points are [N, D] or [B, N, D]; values and gradients come in float64 for float64 points, else in
float32 (a unit gradient is of order 1/N: float16 would lose it).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import check
from fastgen.ops import backend
from fastgen.reference import mmd as reference

_OPTIONS = (
    "str kind, float[] parameters, str estimator, str precision, "
    "Tensor? x_weight=None, Tensor? y_weight=None, Tensor? coefficients=None, int terms=7"
)
ALL = reference.ALL
accumulator = reference.accumulator
coefficients = reference.weights
_ESTIMATORS = {"unbiased": 0, "biased": 1, "u_statistic": 2}
LEAST_RATIO = 1 / 64  # of pairs' scales: of much smaller ones the float32 of their common denominator loses digits
_OWN = (torch.float32, torch.float64)  # dtypes of the C++ kernels
Call = Callable[[int, Tensor, Tensor, Sequence[Any]], tuple[Tensor, ...]]  # `call` and what `direct` finds

torch.library.define("fastgen::mmd_value", f"(Tensor x, Tensor y, {_OPTIONS}) -> Tensor")
torch.library.define("fastgen::mmd_value_grad_x", f"(Tensor x, Tensor y, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define("fastgen::mmd_value_grad", f"(Tensor x, Tensor y, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "fastgen::mmd_hessian_product", f"(Tensor x, Tensor y, Tensor vx, Tensor? vy, {_OPTIONS}) -> (Tensor, Tensor)"
)
torch.library.define(
    "fastgen::mmd_row_sums",
    "(Tensor x, Tensor y, str kind, float[] parameters, str estimator, Tensor x_weight, Tensor y_weight, "
    "int terms=7, Tensor? vx=None, Tensor? vy=None) -> (Tensor, Tensor, Tensor, Tensor)",
)


@functools.lru_cache(maxsize=256)
def _arguments(kind: str, parameters: tuple[float, ...], estimator: str) -> tuple[str, tuple[float, ...], int]:
    """The extension's own kind, parameters and estimator of a value and its gradients."""
    pairs = _pairs(kind, parameters)
    return ("imq_pairs", pairs, _ESTIMATORS[estimator]) if pairs else (kind, parameters, _ESTIMATORS[estimator])


@functools.lru_cache(maxsize=256)
def _pairs(kind: str, parameters: tuple[float, ...]) -> tuple[float, float, float, float] | None:
    return inverse_pairs(parameters) if kind == "imq" else None


def inverse_pairs(constants: Sequence[float]) -> tuple[float, float, float, float] | None:
    """(c, b₁, b₂, b₃) where the seven IMQ constants are c·{s₁, s₂, s₃, 1, 1/s₃, 1/s₂, 1/s₁}, as WAE's are: with
    b = (1 − s)²/s they then need two reciprocals a pair instead of seven (mmd.py of the Triton kernels, mmd_kernels.inl
    of the C++ ones)."""
    if len(constants) != 7:
        return None
    ordered = sorted(constants)
    middle = ordered[3]
    ratios = [ordered[i] / middle for i in range(3)]
    if ratios[0] < LEAST_RATIO or any(abs(s * (ordered[6 - i] / middle) - 1) > 1e-15 for i, s in enumerate(ratios)):
        return None
    b1, b2, b3 = ((1 - s) ** 2 / s for s in ratios)
    return middle, b1, b2, b3


def _run(x: Tensor, y: Tensor, sides: int, precision: str, options: reference.Options) -> tuple[Tensor, ...]:
    """The value and the gradients of the first `sides` of x and y."""
    chosen = backend.choose("mmd", x.device)
    if chosen == "cpp":
        return _cpp(x, y, sides, options)
    if chosen == "triton":
        from fastgen.kernels import mmd_launch

        if mmd_launch.fits(x.dtype, options.kind, options.parameters):
            pairs = _pairs(options.kind, tuple(options.parameters))
            return mmd_launch.mmd(x, y, sides, precision, pairs, *options)
    if sides == 0:
        return (reference.value(x, y, options),)
    if sides == 1:
        return reference.value_grad_x(x, y, options)
    return reference.value_grad(x, y, options)


def _cpp(
    x: Tensor, y: Tensor, sides: int, options: reference.Options, vx: Tensor | None = None, vy: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The value and the gradients of the first `sides` of x and y; or, along (vx, vy), how those gradients change."""
    extension = backend.extension()
    assert extension is not None
    kind, parameters, estimator, x_weight, y_weight, coefficients, terms = options
    # Between close points the two parts of a rooted kernel's second derivative cancel, to nothing in one dimension.
    dtype = torch.float64 if vx is not None and kind in reference.ROOTED else reference.accumulator(x.dtype)
    x, y = _dense(x, dtype), _dense(y, dtype)
    *batch, n, d = x.shape
    m = y.shape[-2]
    outputs = [torch.empty_like(points) for points in (x, y)[:sides]]
    gradients = [out.data_ptr() for out in outputs] + [0] * (2 - sides)
    extra: tuple[int, ...] = (0, 0, 0, 0, 0)
    kept: list[Tensor | None] = []  # what the addresses point to
    if vx is None:
        outputs.insert(0, x.new_empty(batch))
    if vx is not None or x_weight is not None or y_weight is not None or coefficients is not None:
        if x_weight is not None or y_weight is not None:
            x_weight, y_weight = (
                points.new_ones(()) if w is None else w for points, w in ((x, x_weight), (y, y_weight))
            )
        kept = [None if v is None else _dense(v, dtype) for v in (vx, vy)]
        for given, shape, wide in (
            (x_weight, [*batch, n], dtype),
            (y_weight, [*batch, m], dtype),
            (coefficients, [*batch, 3], torch.float64),
        ):
            kept.append(None if given is None else _dense(given.expand(shape), wide))
        extra = tuple(0 if t is None else t.data_ptr() for t in kept)
    code = _ESTIMATORS[estimator]
    if vx is None:
        kind, parameters, code = _arguments(kind, tuple(parameters), estimator)
    (extension.mmd_f64 if dtype == torch.float64 else extension.mmd_f32)(
        x.data_ptr(),
        y.data_ptr(),
        *extra,
        0 if vx is not None else outputs[0].data_ptr(),
        *gradients,
        batch[0] if batch else 1,
        n,
        m,
        d,
        kind,
        parameters,
        code,
        terms,
        torch.get_num_threads(),
    )
    return tuple(outputs)


def _dense(points: Tensor, dtype: torch.dtype) -> Tensor:
    return (points if points.dtype is dtype else points.to(dtype)).contiguous()


def _value(x: Tensor, y: Tensor, kind: str, parameters: Any, estimator: str, precision: str, *rest: Any) -> Tensor:
    return _run(x, y, 0, precision, reference.Options(kind, parameters, estimator, *rest))[0]


def _value_grad_x(
    x: Tensor, y: Tensor, kind: str, parameters: Any, estimator: str, precision: str, *rest: Any
) -> tuple[Tensor, ...]:
    return _run(x, y, 1, precision, reference.Options(kind, parameters, estimator, *rest))


def _value_grad(
    x: Tensor, y: Tensor, kind: str, parameters: Any, estimator: str, precision: str, *rest: Any
) -> tuple[Tensor, ...]:
    return _run(x, y, 2, precision, reference.Options(kind, parameters, estimator, *rest))


def _hessian_product(
    x: Tensor, y: Tensor, vx: Tensor, vy: Tensor | None, kind: str, parameters: Any, estimator: str, *rest: Any
) -> tuple[Tensor, Tensor]:
    precision, *others = rest
    options = reference.Options(kind, parameters, estimator, *others)
    chosen = backend.choose("mmd", x.device)
    if chosen == "cpp":
        out = reference.accumulator(x.dtype)
        found = [h.to(out) for h in _cpp(x, y, 1 if vy is None else 2, options, vx, vy)]
        return found[0], found[1] if len(found) > 1 else x.new_empty(0, dtype=out)
    if chosen == "triton":
        from fastgen.kernels import mmd_launch

        if mmd_launch.fits(x.dtype, kind, parameters, second=True):
            return mmd_launch.hessian_product(x, y, vx, vy, precision, *options)
    # Else as blocked matrix products, in full precision: there `precision` is of no account.
    return reference.hessian_product(x, y, vx, vy, options)


def _row_sums(
    x: Tensor,
    y: Tensor,
    kind: str,
    parameters: Any,
    estimator: str,
    x_weight: Tensor,
    y_weight: Tensor,
    terms: int = ALL,
    vx: Tensor | None = None,
    vy: Tensor | None = None,
) -> tuple[Tensor, ...]:
    # Blocked matrix products everywhere: weights are learnt less often than points.
    options = reference.Options(kind, parameters, estimator, x_weight, y_weight, None, terms)
    return reference.row_sums(x, y, options, vx, vy)


no_vmap = check.no_vmap("mmd", "points of shape [B, N, D]")


for _name, _kernel in (
    ("value", _value),
    ("value_grad_x", _value_grad_x),
    ("value_grad", _value_grad),
    ("hessian_product", _hessian_product),
    ("row_sums", _row_sums),
):
    for _device in ("CPU", "CUDA"):
        torch.library.impl(f"fastgen::mmd_{_name}", _device)(_kernel)
    torch.library.register_vmap(f"fastgen::mmd_{_name}", no_vmap)


def _like(points: Tensor, shape: Sequence[int]) -> Tensor:
    return points.new_empty(shape, dtype=reference.accumulator(points.dtype))


@torch.library.register_fake("fastgen::mmd_value")
def _value_fake(x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    return _like(x, x.shape[:-2])


@torch.library.register_fake("fastgen::mmd_value_grad_x")
def _value_grad_x_fake(x: Tensor, y: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _like(x, x.shape[:-2]), _like(x, x.shape)


@torch.library.register_fake("fastgen::mmd_value_grad")
def _value_grad_fake(x: Tensor, y: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, x.shape[:-2]), _like(x, x.shape), _like(y, y.shape)


@torch.library.register_fake("fastgen::mmd_hessian_product")
def _hessian_product_fake(
    x: Tensor, y: Tensor, vx: Tensor, vy: Tensor | None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return _like(x, x.shape), _like(y, [0] if vy is None else y.shape)


@torch.library.register_fake("fastgen::mmd_row_sums")
def _row_sums_fake(x: Tensor, y: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return tuple(p.new_empty(p.shape[:-1], dtype=torch.float64) for p in (x, x, y, y))


value = torch.ops.fastgen.mmd_value.default
value_grad_x = torch.ops.fastgen.mmd_value_grad_x.default
value_grad = torch.ops.fastgen.mmd_value_grad.default
hessian_product = torch.ops.fastgen.mmd_hessian_product.default
row_sums = torch.ops.fastgen.mmd_row_sums.default


def call(sides: int, x: Tensor, y: Tensor, options: Sequence[Any]) -> tuple[Tensor, ...]:
    """The value, and the gradients of the first `sides` of x and y."""
    found = (value, value_grad_x, value_grad)[sides](x, y, *options)
    return (found,) if sides == 0 else found


def _direct_cpp(dtype: torch.dtype, kind: str, parameters: tuple[float, ...], estimator: str) -> Call:
    extension: Any = backend.extension()
    run = extension.mmd_f32 if dtype is torch.float32 else extension.mmd_f64
    kind, parameters, code = _arguments(kind, parameters, estimator)

    def call(sides: int, x: Tensor, y: Tensor, _: Sequence[Any]) -> tuple[Tensor, ...]:
        *batch, n, d = x.shape
        found = x.new_empty(batch)
        gx = torch.empty_like(x) if sides else None
        gy = torch.empty_like(y) if sides == 2 else None
        run(
            x.data_ptr(),
            y.data_ptr(),
            0,
            0,
            0,
            0,
            0,
            found.data_ptr(),
            0 if gx is None else gx.data_ptr(),
            0 if gy is None else gy.data_ptr(),
            batch[0] if batch else 1,
            n,
            y.shape[-2],
            d,
            kind,
            parameters,
            code,
            reference.ALL,
            torch.get_num_threads(),
        )
        if gx is None:
            return (found,)
        return (found, gx) if gy is None else (found, gx, gy)

    return call


def _direct_triton(sides: int, x: Tensor, y: Tensor, options: Sequence[Any]) -> tuple[Tensor, ...]:
    from fastgen.kernels import mmd_launch

    kind, parameters, estimator, precision = options
    return mmd_launch.mmd(x, y, sides, precision, _pairs(kind, parameters), kind, parameters, estimator)


@functools.lru_cache(maxsize=256)
def direct(options: tuple[Any, ...], dtype: torch.dtype, device: str, forced: str | None) -> Call | None:
    """`call` without torch's dispatcher, for unweighted points of one dtype that lie in memory as they are on a type of
    device, with what is `backend.forced` there. None where no kernel of ours takes such points."""
    kind, parameters, estimator, _ = options
    chosen = backend.choose("mmd", device)
    if chosen == "cpp":
        return _direct_cpp(dtype, kind, parameters, estimator) if dtype in _OWN else None
    if chosen == "triton":
        from fastgen.kernels import mmd_launch

        return _direct_triton if mmd_launch.fits(dtype, kind, parameters) else None
    return None
