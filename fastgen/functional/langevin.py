"""The Langevin step in place, and its noise. `fastgen.reference.langevin` specifies noise stream v1 to the bit."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import check
from fastgen.ops import langevin as _ops
from fastgen.reference.langevin import STEPS

_ELEMENTS = 2**34


def langevin_step_(
    x: Tensor,
    grad: Tensor,
    *,
    step_size: float | Tensor,
    noise_scale: float | Tensor | None = None,
    prior_scale: float | None = None,
    grad_clip: float | None = None,
    clamp: tuple[float | None, float | None] | None = None,
    noise_first: bool = False,
    seed: int | Tensor,
    step: int | Tensor = 0,
    chain_id: Tensor | None = None,
    lookahead: tuple[float, Tensor] | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """One Langevin step, in place: x ← clamp(x − η·(clip(∇U) + x/σ²) + s·ε), the noise ε made in the kernel.

    Args:
        x: [C, ...] float64, float32, bfloat16 or float16, C chains; overwritten. Any strides; what is not contiguous is
            copied to and fro.
        grad: ∇U(x), of x's shape, dtype and device.
        step_size: η > 0, a number, or a tensor of one number, [], or of one for each chain, [C]: float32 (float64 where
            x is), on x's device, so that a CUDA graph can change it.
        noise_scale: s >= 0, likewise; None is √(2η), the Langevin diffusion at temperature 1. FRAME's δ is
            step_size=δ²/2, noise_scale=δ. At 0 no noise is made.
        prior_scale: σ > 0 of a Gaussian reference N(0, σ²I), added as x·(1/σ²); None has no such term.
        grad_clip: c > 0, holds each element of grad (not of x/σ²) within [−c, c]; None does not.
        clamp: (low, high), either may be None; holds each element of the result within.
        noise_first: for loops that add noise, then take the gradient there, then step. x is the noisy state that grad
            was taken at; the call ends that step and adds the noise of the next:
            x ← clamp(clamp(x − η·(clip(∇U) + x/σ²)) + s·ε), which differs from the default by the inner clamp alone.
            The loop starts with `x.add_(s * langevin_noise(x, seed=seed, step=0))` and passes step=k + 1 in round k.
        seed: 0 <= seed < 2⁶⁴, or a 0-d int64 tensor on x's device, whose 64 bits are the seed.
        step: 0 <= step < 2²⁸, which step's noise; or a 0-d int64 tensor on x's device (taken modulo 2²⁸), which a CUDA
            graph can advance.
        chain_id: [C] int64, the global number of each chain, whose 64 bits count (−1 is chain 2⁶⁴ − 1); None is 0, 1,
            ..., C − 1.
        lookahead: (β, out) also writes x − β·(clip(∇U) + x/σ²) of the x before the step into `out`, like x: the
            negatives of a derived wFRAME gradient. x, out and stats each have memory of their own.
        stats: [C, 3] float32 or float64, overwritten in the same pass with, for each chain, ‖∇U‖₂ of the grad as given
            (its squares are summed in float64), the number of elements that clamp moved, and of those whose new value
            was NaN or infinite, before the clamp or as stored.

    Returns:
        x itself.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range. RuntimeError: x or grad
        requires grad while grad mode is on.

    Notes:
        Deterministic: the noise of an element is a function of (seed, step, chain id, index within the chain) alone,
        so neither the order of chains, nor their split over devices or processes, nor the number of threads changes
        it; the index counts in row-major order whatever the strides. Each product and sum is rounded once, to float32
        (half types are widened, and rounded at the end; float64 state computes in float64 with the same normals,
        widened), so that CPU and GPU give the same bits. NaN in x or grad stays NaN. Tensors of scalars are not
        checked for range: that would wait for the device. Not differentiable.

    Source:
        Welling and Teh, ICML 2011; the term x/σ²: Xie et al., "A theory of generative ConvNet", ICML 2016, eq. 6;
        noise first: Du and Mordatch, NeurIPS 2019.
    """
    _state("x", x)
    check.tensor("grad", grad, dtypes=(x.dtype,))
    _like("grad", grad, "x", x)
    if torch.is_grad_enabled() and (x.requires_grad or grad.requires_grad):
        name = "x" if x.requires_grad else "grad"
        raise RuntimeError(f"{name}: langevin_step_ is not differentiable; detach it, or call under torch.no_grad()")
    if stats is not None:
        _statistics(stats, x)
    step_sizes, noise_scales, scalars, interval = _scales(x, clamp, step_size, noise_scale, prior_scale, grad_clip)
    beta, out = 0.0, None
    if lookahead is not None:
        beta, out = _lookahead(lookahead, x)
    _apart(x, grad, out, stats)
    key = _key(x, seed, step, chain_id)
    tensors = (x, grad, key[0], step_sizes, noise_scales, key[1], key[2], out, stats)
    run = _ops.direct if _ops.runs_directly(*tensors) else _ops.step_
    run(*tensors, *scalars, *interval, beta, bool(noise_first), key[3], key[4])
    return x


class Steps:
    """`langevin_step_` of the same x, seed and chains again and again, for a caller who has checked the numbers of the
    steps and takes no gradient of x: of a small state most of a step is checks, and what does not change from step to
    step, the kernel included, is looked at once."""

    def __init__(
        self,
        x: Tensor,
        *,
        prior_scale: float | None,
        grad_clip: float | None,
        clamp: tuple[float | None, float | None] | None,
        seed: int | Tensor,
        chain_id: Tensor | None,
    ) -> None:
        _state("x", x)
        self._x, self._clamp, self._more = x, clamp, (prior_scale, grad_clip)
        self._seed, self._chain_id = seed, chain_id
        self._again = None
        if not isinstance(seed, Tensor):
            ids, _, _, number, _ = _key(x, seed, 0, chain_id)
            self._again = _ops.repeated(x, ids, number)

    def __call__(
        self, grad: Tensor, step_size: float | Tensor, noise_scale: float | Tensor | None, step: int | Tensor
    ) -> None:
        x = self._x
        if (
            self._again is not None
            and not (isinstance(step_size, Tensor) or isinstance(noise_scale, Tensor) or isinstance(step, Tensor))
            and type(grad) is Tensor
            and grad.layout is torch.strided
            and grad.dtype is x.dtype
            and grad.shape == x.shape
            and grad.is_cpu
            and not grad.requires_grad
            and grad.is_contiguous()
            and _ops.runs_directly(grad)
        ):
            _apart(x, grad, None, None)
            _, _, scalars, interval = _scales(x, self._clamp, step_size, noise_scale, *self._more)
            return self._again(grad, step, (*scalars, *interval))
        prior_scale, grad_clip = self._more
        langevin_step_(
            x, grad, step_size=step_size, noise_scale=noise_scale, prior_scale=prior_scale, grad_clip=grad_clip,
            clamp=self._clamp, seed=self._seed, step=step, chain_id=self._chain_id,
        )  # fmt: skip
        return None


def langevin_noise(
    like: Tensor | Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    chain_id: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The standard normals that `langevin_step_` adds: noise stream v1, the same bits on every device.

    Also a reproducible source of latent codes: code i of a data set is `langevin_noise((1, d), seed=s,
    chain_id=torch.tensor([i]))`, whatever batch it stands in.

    Args:
        like: the shape [C, ...], or a tensor that gives shape, dtype and device.
        seed, step, chain_id: as in `langevin_step_`, tensors on the result's device.
        dtype: float32 by default (else that of `like`). The normals are made in float32, then rounded or widened.
        device: the default device, or that of `like`.

    Returns:
        [C, ...], contiguous; |normal| <= 6.5555415.

    Raises:
        TypeError, ValueError: as `langevin_step_`.

    Notes:
        Deterministic, not differentiable.

    Source:
        `fastgen.reference.langevin`; Philox: Salmon et al., SC 2011.
    """
    if isinstance(like, Tensor):
        shape: Sequence[int] = like.shape
        dtype, device = like.dtype if dtype is None else dtype, like.device if device is None else device
    else:
        if not isinstance(like, Sequence) or isinstance(like, str):
            raise TypeError(f"like: expected a tensor or a shape, got {check.describe(like)}")
        shape = [check.integer(f"like[{i}]", size, least=0) for i, size in enumerate(like)]
        dtype = torch.float32 if dtype is None else dtype
    if dtype not in check.FLOATS:
        raise TypeError(f"dtype: expected {' or '.join(map(check.short, check.FLOATS))}, got {dtype}")
    out = torch.empty(shape, dtype=dtype, device=device)
    _state("like", out)
    key = _key(out, seed, step, chain_id)
    torch.ops.fastgen.langevin_noise_(out, *key)
    return out


def _state(name: str, x: Any) -> None:
    check.tensor(name, x)
    if x.ndim == 0:
        raise ValueError(f"{name}: expected [C, ...] with chains in dimension 0, got a 0-d tensor")
    if x.numel() > _ELEMENTS and math.prod(x.shape[1:]) > _ELEMENTS:
        raise ValueError(f"{name}: expected at most 2**34 elements a chain, got shape {list(x.shape)}")
    _written(name, x)


def _written(name: str, value: Tensor) -> None:
    if not torch.compiler.is_compiling() and value.is_neg():  # the imaginary part of a conjugate
        raise ValueError(
            f"{name}: expected a tensor to write to, got a view with its signs turned; resolve_neg() copies"
        )


def _like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    check.same(name, value, other_name, other)
    if value.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {list(other.shape)}, got {list(value.shape)}")


def _apart(x: Tensor, grad: Tensor, out: Tensor | None, stats: Tensor | None) -> None:
    """What is written shares no memory with anything else, but that grad may be x itself."""
    if torch.compiler.is_compiling():  # there are no addresses
        return
    spans = {}
    try:
        if out is None and stats is None and x.is_contiguous() and grad.is_contiguous():
            between = abs(x.data_ptr() - grad.data_ptr())
            if between == 0 or between >= x.nbytes:
                return
        given = {"x": x, "grad": grad, "lookahead[1]": out, "stats": stats}
        for name, value in given.items():
            if value is not None and value.numel() and (start := value.data_ptr()):
                last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
                spans[name] = value, start, start + (last + 1) * value.element_size()
    except RuntimeError:  # a tensor without memory, of a tracer
        return
    for written in ("stats", "lookahead[1]", "x"):
        for name in spans:
            if written not in spans or name == written:
                continue
            one, start, end = spans[written]
            other, other_start, other_end = spans[name]
            if start >= other_end or other_start >= end:
                continue
            like = one.dtype == other.dtype and one.stride() == other.stride() and one.shape == other.shape
            if {written, name} == {"x", "grad"} and like and start == other_start:
                continue
            offset = (other_start - start) // one.element_size()
            if not like or _meet(sorted(zip(one.stride(), one.shape, strict=True), reverse=True), offset):
                raise ValueError(f"{written}: expected memory of its own, got some of {name}'s")


def _meet(dimensions: list[tuple[int, int]], offset: int) -> bool:
    """Whether two tensors of these (stride, size), largest first, share an element: they may be columns of one."""
    if not dimensions:
        return offset == 0
    (stride, size), *rest = dimensions
    if stride == 0 or size == 1:
        return _meet(rest, offset)
    return any(abs(k) < size and _meet(rest, offset - k * stride) for k in (offset // stride, offset // stride + 1))


def _interval(clamp: Any) -> tuple[float, float]:
    if clamp is None:
        return -math.inf, math.inf
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise TypeError(f"clamp: expected None or (low, high), got {check.describe(clamp)}")
    low = -math.inf if clamp[0] is None else check.number("clamp[0]", clamp[0], dtype=torch.float64)
    high = math.inf if clamp[1] is None else check.number("clamp[1]", clamp[1], dtype=torch.float64)
    if low > high:
        raise ValueError(f"clamp: expected low <= high, got {clamp!r}")
    return low + 0.0, high + 0.0  # of two zeros the positive one: to `_scales_of_numbers` they are the same


def _vector(name: str, value: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    check.tensor(name, value, dtypes=(dtype,), ndim=(1,))
    if value.shape[0] != x.shape[0]:
        raise ValueError(f"{name}: expected one for each chain, [{x.shape[0]}], got {list(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}")
    return value.detach()


def _per_chain(
    name: str, value: float | Tensor, x: Tensor | None, dtype: torch.dtype, **bounds: float
) -> tuple[float, Tensor | None]:
    if isinstance(value, Tensor):
        assert x is not None
        return 0.0, _vector(name, value.expand(len(x)) if value.ndim == 0 else value, x, dtype)
    return check.number(name, value, dtype=dtype, **bounds), None


_Scales = tuple[Tensor | None, Tensor | None, tuple[float, float, float, float], tuple[float, float]]
_NUMBERS = frozenset({float, int, type(None)})


def _scales(x: Tensor, clamp: Any, *given: Any) -> _Scales:
    """(η and s for each chain, or None; η, s, 1/σ², c; low, high): step_size, noise_scale, prior_scale and grad_clip as
    the ops want them, and clamp."""
    compute = _ops.compute_dtype(x.dtype)
    ends = (None, None) if clamp is None else clamp
    if type(ends) is tuple and not torch.compiler.is_compiling() and _NUMBERS.issuperset(map(type, (*given, *ends))):
        return _scales_of_numbers(compute, *given, *ends)
    return _checked_scales(x, compute, clamp, *given)


@functools.lru_cache(maxsize=256, typed=True)
def _scales_of_numbers(
    compute: torch.dtype, step_size: Any, noise_scale: Any, prior_scale: Any, grad_clip: Any, *clamp: Any
) -> _Scales:
    """A chain has the same ones at every step."""
    return _checked_scales(None, compute, clamp, step_size, noise_scale, prior_scale, grad_clip)


def _checked_scales(
    x: Tensor | None,
    compute: torch.dtype,
    clamp: Any,
    step_size: Any,
    noise_scale: Any,
    prior_scale: Any,
    grad_clip: Any,
) -> _Scales:
    interval = _interval(clamp)
    clip = math.inf if grad_clip is None else check.number("grad_clip", grad_clip, above=0.0, dtype=torch.float64)
    h, step_sizes = _per_chain("step_size", step_size, x, compute, above=0.0)
    precision = 0.0
    if prior_scale is not None:
        prior_scale = check.number("prior_scale", prior_scale, above=0.0, dtype=torch.float64)
        square = prior_scale * prior_scale
        precision = 1.0 / square if square else math.inf
        if not max(1.0, h) * precision <= torch.finfo(compute).max:
            raise ValueError(
                f"prior_scale: expected 1/σ² and step_size/σ² finite in {check.short(compute)}, got {prior_scale!r}"
            )
    if noise_scale is None:
        s, noise_scales = math.sqrt(2.0 * h), None
        if step_sizes is not None:  # by way of float64: torch's float32 root may not be the nearest, nor that of a GPU
            noise_scales = (2.0 * step_sizes.double()).sqrt().to(compute)
    else:
        s, noise_scales = _per_chain("noise_scale", noise_scale, x, compute, least=0.0)
    return step_sizes, noise_scales, (h, s, precision, clip), interval


def _statistics(stats: Any, x: Tensor) -> None:
    check.tensor("stats", stats, dtypes=(torch.float32, torch.float64), ndim=(2,))
    if stats.shape[0] != x.shape[0] or stats.shape[1] != 3:
        raise ValueError(f"stats: expected shape [{x.shape[0]}, 3], got {list(stats.shape)}")
    if stats.device != x.device:
        raise ValueError(f"stats: expected the device of x, {x.device}, got {stats.device}")
    if torch.is_grad_enabled() and stats.requires_grad:
        raise RuntimeError("stats: langevin_step_ is not differentiable; detach it")
    _written("stats", stats)


def _lookahead(lookahead: Any, x: Tensor) -> tuple[float, Tensor]:
    if not isinstance(lookahead, (tuple, list)) or len(lookahead) != 2:
        raise TypeError(f"lookahead: expected (beta, out), got {check.describe(lookahead)}")
    beta = check.number("lookahead[0]", lookahead[0], dtype=_ops.compute_dtype(x.dtype))
    out = check.tensor("lookahead[1]", lookahead[1], dtypes=(x.dtype,))
    _like("lookahead[1]", out, "x", x)
    if out is x or (not torch.compiler.is_compiling() and out.numel() and out.data_ptr() == x.data_ptr()):
        raise ValueError("lookahead[1]: expected memory of its own, got x's")
    if torch.is_grad_enabled() and out.requires_grad:
        raise RuntimeError("lookahead[1]: langevin_step_ is not differentiable; detach it")
    _written("lookahead[1]", out)
    return beta, out


def _key(
    x: Tensor, seed: Any, step: Any, chain_id: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int]:
    """(chain_id, seed tensor, step tensor, seed, step): the arguments as the op wants them."""
    if chain_id is not None:
        chain_id = _vector("chain_id", chain_id, x, torch.int64)
    numbers: list[int] = []
    tensors: list[Tensor | None] = []
    for name, value, most in (("seed", seed, 2**64 - 1), ("step", step, STEPS - 1)):
        if isinstance(value, Tensor):
            check.tensor(name, value, dtypes=(torch.int64,), ndim=(0,))
            if value.device != x.device:
                raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}")
            tensors.append(value)
            numbers.append(0)
        else:
            number = check.integer(name, value, least=0, most=most)
            tensors.append(None)
            numbers.append(number - 2**64 if number >= 2**63 else number)
    return chain_id, tensors[0], tensors[1], numbers[0], numbers[1]
