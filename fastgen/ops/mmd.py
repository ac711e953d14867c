"""fastgen::mmd_value, mmd_value_grad_x and mmd_value_grad: MMD², and with it the unit gradients of the points.

Three ops of fixed arity: only the side that needs a gradient is paid for. A gradient in y alone is mmd_value_grad_x of
the swapped arguments. Points are [N, D] or [B, N, D]; values and gradients come in float64 for float64 points, else in
float32 (a unit gradient is of order 1/N: float16 would lose it).
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastgen.ops import backend
from fastgen.reference import mmd as reference

_ARGUMENTS = "(Tensor x, Tensor y, str kind, float[] parameters, str estimator, str precision)"
_ESTIMATORS = {"unbiased": 0, "biased": 1, "u_statistic": 2}

torch.library.define("fastgen::mmd_value", f"{_ARGUMENTS} -> Tensor")
torch.library.define("fastgen::mmd_value_grad_x", f"{_ARGUMENTS} -> (Tensor, Tensor)")
torch.library.define("fastgen::mmd_value_grad", f"{_ARGUMENTS} -> (Tensor, Tensor, Tensor)")


def inverse_pairs(constants: Sequence[float]) -> tuple[float, float, float, float] | None:
    """(c, b₁, b₂, b₃) where the seven IMQ constants are c·{s₁, s₂, s₃, 1, 1/s₃, 1/s₂, 1/s₁}, as WAE's are: with
    b = (1 − s)²/s they then need two reciprocals a pair instead of seven (kernels/mmd.py and csrc/mmd.inl say how)."""
    if len(constants) != 7:
        return None
    ordered = sorted(constants)
    middle = ordered[3]
    ratios = [ordered[i] / middle for i in range(3)]
    if any(abs(s * (ordered[6 - i] / middle) - 1) > 1e-15 for i, s in enumerate(ratios)):
        return None
    b1, b2, b3 = ((1 - s) ** 2 / s for s in ratios)
    return middle, b1, b2, b3


def _run(
    x: Tensor, y: Tensor, kind: str, parameters: Sequence[float], estimator: str, precision: str, sides: int
) -> tuple[Tensor, ...]:
    """The value and the gradients of the first `sides` of x and y."""
    chosen = "reference" if kind == "polynomial" else backend.choose("mmd", x.device)
    if chosen == "cpp":
        return _cpp(x, y, kind, parameters, estimator, sides)
    if chosen == "triton":
        from fastgen.kernels import launch

        if launch.mmd_fits(x):
            return launch.mmd(x, y, kind, parameters, inverse_pairs(parameters), estimator, precision, sides)
    if sides == 0:
        return (reference.value(x, y, kind, parameters, estimator),)
    if sides == 1:
        return reference.value_grad_x(x, y, kind, parameters, estimator)
    return reference.value_grad(x, y, kind, parameters, estimator)


def _cpp(
    x: Tensor, y: Tensor, kind: str, parameters: Sequence[float], estimator: str, sides: int
) -> tuple[Tensor, ...]:
    extension = backend.extension()
    assert extension is not None
    dtype = reference.accumulator(x.dtype)
    x, y = x.to(dtype).contiguous(), y.to(dtype).contiguous()
    *batch, n, d = x.shape
    outputs = [torch.empty(batch, dtype=dtype)]
    outputs += [torch.empty_like(points) for points in (x, y)[:sides]]
    pairs = inverse_pairs(parameters) if kind == "imq" else None
    kernel = extension.mmd_f64 if dtype == torch.float64 else extension.mmd_f32
    kernel(
        x.data_ptr(),
        y.data_ptr(),
        [out.data_ptr() for out in outputs],
        batch[0] if batch else 1,
        n,
        y.shape[-2],
        d,
        "imq_pairs" if pairs else kind,
        pairs or parameters,
        _ESTIMATORS[estimator],
        torch.get_num_threads(),
    )
    return tuple(outputs)


def _value(x: Tensor, y: Tensor, kind: str, parameters: Sequence[float], estimator: str, precision: str) -> Tensor:
    return _run(x, y, kind, parameters, estimator, precision, 0)[0]


def _value_grad_x(
    x: Tensor, y: Tensor, kind: str, parameters: Sequence[float], estimator: str, precision: str
) -> tuple[Tensor, ...]:
    return _run(x, y, kind, parameters, estimator, precision, 1)


def _value_grad(
    x: Tensor, y: Tensor, kind: str, parameters: Sequence[float], estimator: str, precision: str
) -> tuple[Tensor, ...]:
    return _run(x, y, kind, parameters, estimator, precision, 2)


def _vmap(*_: object) -> NoReturn:
    # Torch's own fallback would lose the gradient of what is differentiated outside the vmap, without a word.
    raise NotImplementedError("fastgen mmd: vmap is not built; what works: points of shape [B, N, D]")


for _name, _kernel in (("value", _value), ("value_grad_x", _value_grad_x), ("value_grad", _value_grad)):
    for _device in ("CPU", "CUDA"):
        torch.library.impl(f"fastgen::mmd_{_name}", _device)(_kernel)
    torch.library.register_vmap(f"fastgen::mmd_{_name}", _vmap)


def _like(points: Tensor, shape: Sequence[int]) -> Tensor:
    return points.new_empty(shape, dtype=reference.accumulator(points.dtype))


@torch.library.register_fake("fastgen::mmd_value")
def _value_fake(x: Tensor, y: Tensor, kind: str, parameters: object, estimator: str, precision: str) -> Tensor:
    return _like(x, x.shape[:-2])


@torch.library.register_fake("fastgen::mmd_value_grad_x")
def _value_grad_x_fake(
    x: Tensor, y: Tensor, kind: str, parameters: object, estimator: str, precision: str
) -> tuple[Tensor, Tensor]:
    return _like(x, x.shape[:-2]), _like(x, x.shape)


@torch.library.register_fake("fastgen::mmd_value_grad")
def _value_grad_fake(
    x: Tensor, y: Tensor, kind: str, parameters: object, estimator: str, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, x.shape[:-2]), _like(x, x.shape), _like(y, y.shape)


value = torch.ops.fastgen.mmd_value.default
value_grad_x = torch.ops.fastgen.mmd_value_grad_x.default
value_grad = torch.ops.fastgen.mmd_value_grad.default
