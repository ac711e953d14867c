"""Checks of what users hand in: each names the argument, what was expected and what came."""

import math
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class UserError(ValueError):
    """Something the user can mend: the command line prints it as it is and exits with status 2."""


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: Any) -> str:
    """`float32 [4, 8] on cpu` for a tensor, else its type and value."""
    if isinstance(value, Tensor):
        return f"{short(value.dtype)} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def tensor(
    name: str, value: Any, *, dtypes: tuple[torch.dtype, ...] = FLOATS, ndim: tuple[int, ...] | None = None
) -> Tensor:
    """`value` itself, a dense tensor of one of `dtypes` with one of the `ndim` numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(short, dtypes))}, got {short(value.dtype)}")
    if ndim is not None and value.ndim not in ndim:
        raise ValueError(f"{name}: expected {' or '.join(map(str, ndim))} dimensions, got shape {list(value.shape)}")
    return value


def rows(name: str, value: np.ndarray) -> np.ndarray:
    """`value` itself, an array of rows that torch takes."""
    if value.dtype not in (np.float32, np.float64, np.float16) or value.ndim != 2:
        raise TypeError(
            f"{name}: expected a [N, D] array of float32, float64 or float16, got {value.dtype} {list(value.shape)}"
        )
    return value


def finite_rows(value: Tensor) -> Tensor:
    """[N] bool: where all numbers of a row are finite. Nothing else times zero is zero; `isfinite` takes ten passes."""
    flat = value.detach().reshape(len(value), math.prod(value.shape[1:]))
    return flat.mul(0).sum(1) == 0


def finite(name: str, points: Tensor, first: int = 0) -> None:
    """Every number of `points`, whose first row is the `first` of what is called `name`, is finite."""
    bad = (~finite_rows(points)).nonzero()
    if len(bad):
        row = first + int(bad[0, 0])
        raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {row}") from None


def same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` has the dtype and device of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {short(other.dtype)}, got {short(value.dtype)}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """A finite float within the bounds, finite in `dtype` too, of numpy's numbers too; `above` is exclusive."""
    if type(value) is not float and type(value) is not int:
        duration = isinstance(value, np.timedelta64)  # to numpy an integer
        if duration or isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(f"{name}: expected a number, got {describe(value)}")
        value = operator.index(value) if isinstance(value, (int, np.integer)) else float(value)
    if dtype is not None and torch.finfo(dtype).max < abs(value) < float("inf"):
        got = f"{value!r}" if isinstance(value, float) else f"an integer of {value.bit_length()} bits"
        raise ValueError(f"{name}: expected a number finite in {short(dtype)}, got {got}")
    bounds = (
        [f"> {above}"] * (above is not None)
        + [f">= {least}"] * (least is not None)
        + [f"<= {most}"] * (most is not None)
    )
    try:
        wide = float(value)
    except OverflowError:  # an integer beyond every float
        wide = float("inf")
    inside = (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    if wide - wide != 0 or not inside:
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}".rstrip() + f", got {value!r}")
    return wide


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """An int within the bounds, of all that Python takes for an index (numpy's integers too) but a bool or a tensor."""
    if type(value) is not int:
        value = _index(name, value)
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = [f">= {least}"] * (least is not None) + [f"<= {most}"] * (most is not None)
        raise ValueError(f"{name}: expected an integer {' and '.join(bounds)}, got {value}")
    return value


def _index(name: str, value: Any) -> int:
    try:
        if not isinstance(value, (bool, Tensor)):  # a tensor on a GPU would be waited for
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected an integer, got {describe(value)}")


def no_tangent(what: str, *values: Any) -> None:
    """Forward-mode AD passes through an op without a rule for it as if its inputs were constants: refused instead."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for value in values:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"fastgen {what}: forward-mode AD is not built; what works: reverse mode, as torch.autograd.grad"
            )


def no_vmap(what: str, works: str) -> Callable[..., NoReturn]:
    """The rule under torch.vmap of what has none. Torch's own fallback for ops would lose the gradient of what is
    differentiated outside the vmap, without a word."""

    def refuse(*_: object) -> NoReturn:
        raise NotImplementedError(f"fastgen {what}: vmap is not built; what works: {works}")

    return refuse


def not_built(name: str, value: Any, works: str) -> NoReturn:
    """An option of the public surface whose kernel is not there yet: never quietly another computation."""
    raise NotImplementedError(f"{name}={value!r} is not built yet; what works: {works}")
