"""Ops `fastgen::lpips_layer`, `lpips_project` and `feature_distance` with their gradients, all first order.

Both maps of a call have one shape, dtype and device. Values are float32 (float64 for float64); a gradient has the dtype
and the strides of its map. Private: `fastgen.functional.perceptual` checks and differentiates.
"""

import torch
from torch import Tensor

from fastgen import check
from fastgen.ops import backend
from fastgen.reference import perceptual as reference

_SCHEMAS = {
    "lpips_layer": "(Tensor f0, Tensor f1, Tensor weight, float eps, bool eps_inside) -> Tensor",
    "lpips_layer_kept": "(Tensor f0, Tensor f1, Tensor weight, float eps, bool eps_inside) -> (Tensor, Tensor)",
    "lpips_layer_backward": (
        "(Tensor grad, Tensor f0, Tensor f1, Tensor weight, float eps, bool eps_inside, Tensor? kept=None) -> Tensor"
    ),
    "lpips_layer_backward_both": (
        "(Tensor grad, Tensor f0, Tensor f1, Tensor weight, float eps, bool eps_inside, Tensor? kept=None)"
        " -> (Tensor, Tensor)"
    ),
    "lpips_layer_backward_weight": "(Tensor grad, Tensor f0, Tensor f1, float eps, bool eps_inside) -> Tensor",
    "lpips_project": (
        "(Tensor f, Tensor weight, SymInt dim, SymInt seed, int layer, float eps, bool eps_inside) -> Tensor"
    ),
    "lpips_project_backward": (
        "(Tensor grad, Tensor f, Tensor weight, SymInt seed, int layer, float eps, bool eps_inside) -> Tensor"
    ),
    "feature_distance": "(Tensor f0, Tensor f1, bool squared) -> Tensor",
    "feature_distance_backward": "(Tensor grad, Tensor f0, Tensor f1, bool squared) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastgen::{_name}", _schema)
_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/type.h


def _like(f: Tensor, value: Tensor) -> Tensor:
    """`value` with the dtype of `f` and the strides that the fake promises."""
    if value.dtype == f.dtype and value.stride() == f.stride():
        return value
    return torch.empty_like(f).copy_(value)


def _dense(f0: Tensor, f1: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both maps in one layout, f0's if that will do; whether it is channels_last."""
    last = f0.ndim == 4 and not f0.is_contiguous() and f0.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return f0.contiguous(memory_format=layout), f1.contiguous(memory_format=layout), last


def _lpips_cpp(
    f0: Tensor,
    f1: Tensor,
    weight: Tensor,
    eps: float,
    eps_inside: bool,
    grad: Tensor | None,
    sides: int,
    keep: bool,
    kept: Tensor | None,
) -> tuple[Tensor, ...]:
    """The value (and, asked to `keep`, what the gradient needs of each pixel), or, with `grad`, the gradients of the
    first `sides` of f0 and f1, from what was `kept`."""
    extension = backend.extension()
    assert extension is not None
    g0, g1, last = _dense(f0, f1)
    n, c, h, w = g0.shape
    wide = reference.wide(g0.dtype)
    weight = weight.to(wide).contiguous()
    maps = (g0.data_ptr(), g1.data_ptr(), weight.data_ptr())
    sizes = (n, c, h * w, eps, eps_inside, last, _TYPES[g0.dtype], torch.get_num_threads())
    keeps = keep or (grad is not None and (kept is None or kept.numel() == 0))  # empty of another kernel's forward
    if keeps:
        kept = g0.new_empty(2, 2, n, h, w, dtype=wide)
    kept_at = 0 if kept is None else kept.data_ptr()
    value = g0.new_empty(n, dtype=wide)
    if grad is None or keeps:
        extension.lpips_layer(*maps, 0, value.data_ptr(), kept_at, 0, 0, *sizes)
    if grad is None:
        return (value,) if kept is None else (value, kept)
    grad = grad.to(wide).contiguous()
    out = [torch.empty_like(g) for g in (g0, g1)[:sides]]
    pointers = (out[0].data_ptr(), out[1].data_ptr() if sides == 2 else 0)
    extension.lpips_layer(*maps, grad.data_ptr(), 0, kept_at, *pointers, *sizes)
    return tuple(_like(f, g) for f, g in zip((f0, f1), out, strict=False))


def _lpips_fused(
    f0: Tensor,
    f1: Tensor,
    weight: Tensor,
    eps: float,
    eps_inside: bool,
    grad: Tensor | None = None,
    sides: int = 0,
    keep: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, ...] | None:
    """What `_lpips_cpp` returns, from the kernel for these maps; None where that is the reference."""
    kernel = backend.choose("perceptual", f0.device)
    if kernel == "cpp":
        return _lpips_cpp(f0, f1, weight, eps, eps_inside, grad, sides, keep, kept)
    if kernel == "triton":
        from fastgen.kernels import launch

        if launch.lpips_fits(f0):
            g0, g1, last = _dense(f0, f1)
            out = launch.lpips_layer(g0, g1, weight, eps, eps_inside, last, grad, sides)
            return out if grad is None else tuple(_like(f, g) for f, g in zip((f0, f1), out, strict=False))
    return None


def _lpips_layer(f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
    fused = _lpips_fused(f0, f1, weight, eps, eps_inside)
    return reference.lpips_layer(f0, f1, weight, eps, eps_inside) if fused is None else fused[0]


def _keeps(f0: Tensor) -> Tensor:
    """[scale or along, side, N, H, W]: of the C++ kernel alone. A GPU has the norms again sooner than from memory."""
    n, _, h, w = f0.shape
    kept = backend.choose("perceptual", f0.device) == "cpp"
    return f0.new_empty(2, 2, n, h, w if kept else 0, dtype=reference.wide(f0.dtype))


def _lpips_layer_kept(f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> tuple[Tensor, Tensor]:
    fused = _lpips_fused(f0, f1, weight, eps, eps_inside, keep=True)
    if fused is None:
        return reference.lpips_layer(f0, f1, weight, eps, eps_inside), _keeps(f0)
    return (fused[0], _keeps(f0)) if len(fused) == 1 else (fused[0], fused[1])


def _lpips_layer_backward(
    grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool, kept: Tensor | None = None
) -> Tensor:
    fused = _lpips_fused(f0, f1, weight, eps, eps_inside, grad, 1, kept=kept)
    if fused is None:
        return _like(f0, reference.lpips_layer_backward(grad, f0, f1, weight, eps, eps_inside))
    return fused[0]


def _lpips_layer_backward_both(
    grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    fused = _lpips_fused(f0, f1, weight, eps, eps_inside, grad, 2, kept=kept)
    if fused is not None:
        return fused[0], fused[1]
    return (
        _lpips_layer_backward(grad, f0, f1, weight, eps, eps_inside),
        _lpips_layer_backward(grad, f1, f0, weight, eps, eps_inside),
    )


def _lpips_layer_backward_weight(grad: Tensor, f0: Tensor, f1: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return reference.lpips_layer_backward_weight(grad, f0, f1, eps, eps_inside)


def _project_fused(
    f: Tensor, weight: Tensor, dim: int, seed: int, layer: int, eps: float, eps_inside: bool, grad: Tensor | None
) -> Tensor | None:
    """The projection, or (with `grad`) the gradient of f; None where that is the reference's."""
    kernel = backend.choose("perceptual", f.device)
    if kernel == "triton":
        from fastgen.kernels import launch

        if launch.lpips_fits(f):
            last = not f.is_contiguous() and f.is_contiguous(memory_format=torch.channels_last)
            g = f if last else f.contiguous()
            if grad is None:
                return launch.lpips_project(g, weight, dim, seed, layer, eps, eps_inside, last)
            return _like(f, launch.lpips_project_backward(grad, g, weight, seed, layer, eps, eps_inside, last))
    if kernel != "cpp":
        return None
    extension = backend.extension()
    assert extension is not None
    n, c, h, w = f.shape
    g, wide = f.contiguous(), reference.wide(f.dtype)
    weight = weight.to(wide).contiguous()
    grad = None if grad is None else grad.to(wide).contiguous()
    out = g.new_empty(n, dim, dtype=wide) if grad is None else torch.empty_like(g)
    pointers = (g.data_ptr(), weight.data_ptr(), 0 if grad is None else grad.data_ptr(), out.data_ptr())
    sizes = (n, c, h * w, dim, layer, seed % 2**64)
    extension.lpips_project(*pointers, *sizes, eps, eps_inside, _TYPES[g.dtype], torch.get_num_threads())
    return out if grad is None else _like(f, out)


def _lpips_project(f: Tensor, weight: Tensor, dim: int, seed: int, layer: int, eps: float, eps_inside: bool) -> Tensor:
    fused = _project_fused(f, weight, dim, seed, layer, eps, eps_inside, None)
    return reference.lpips_project(f, weight, dim, seed, layer, eps, eps_inside) if fused is None else fused


def _lpips_project_backward(
    grad: Tensor, f: Tensor, weight: Tensor, seed: int, layer: int, eps: float, eps_inside: bool
) -> Tensor:
    fused = _project_fused(f, weight, grad.shape[1], seed, layer, eps, eps_inside, grad)
    if fused is not None:
        return fused
    buckets = reference.projection(f.shape[1], f.shape[2] * f.shape[3], grad.shape[1], seed, layer, f.device)
    return _like(f, reference.lpips_project_backward(grad, f, weight, *buckets, eps, eps_inside))


def _feature_cpp(f0: Tensor, f1: Tensor, squared: bool, grad: Tensor | None) -> Tensor:
    """The value, or (with `grad`) the gradient of f0."""
    extension = backend.extension()
    assert extension is not None
    g0, g1, _ = _dense(f0, f1)
    n, wide = g0.shape[0], reference.wide(g0.dtype)
    if grad is None:
        out = g0.new_empty(n, dtype=wide)
        pointers = (0, out.data_ptr(), 0)
    else:
        grad = grad.to(wide).contiguous()
        out = torch.empty_like(g0)
        pointers = (grad.data_ptr(), 0, out.data_ptr())
    sizes = (n, g0.numel() // max(n, 1), squared, _TYPES[g0.dtype], torch.get_num_threads())
    extension.feature_distance(g0.data_ptr(), g1.data_ptr(), *pointers, *sizes)
    return out if grad is None else _like(f0, out)


def _feature_fused(f0: Tensor, f1: Tensor, squared: bool, grad: Tensor | None) -> Tensor | None:
    kernel = backend.choose("perceptual", f0.device)
    if kernel == "cpp":
        return _feature_cpp(f0, f1, squared, grad)
    if kernel == "triton":
        from fastgen.kernels import launch

        if launch.feature_fits(f0):
            g0, g1, _ = _dense(f0, f1)
            out = launch.feature_distance(g0, g1, squared, grad)
            return out if grad is None else _like(f0, out)
    return None


def _feature_distance(f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    fused = _feature_fused(f0, f1, squared, None)
    return reference.feature_distance(f0, f1, squared) if fused is None else fused


def _feature_distance_backward(grad: Tensor, f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    fused = _feature_fused(f0, f1, squared, grad)
    return _like(f0, reference.feature_distance_backward(grad, f0, f1, squared)) if fused is None else fused


no_vmap = {
    op: check.no_vmap(function, "one batch of maps")
    for op, function in (
        ("lpips_layer", "lpips_distance"),
        ("lpips_project", "lpips_projection"),
        ("feature_distance", "feature_distance"),
    )
}
for _name in _SCHEMAS:
    torch.library.impl(f"fastgen::{_name}", "CPU")(globals()[f"_{_name}"])
    torch.library.impl(f"fastgen::{_name}", "CUDA")(globals()[f"_{_name}"])
    torch.library.register_vmap(f"fastgen::{_name}", no_vmap[_name.removesuffix("_kept").partition("_backward")[0]])


def _values(f0: Tensor) -> Tensor:
    return f0.new_empty(f0.shape[0], dtype=reference.wide(f0.dtype))


@torch.library.register_fake("fastgen::lpips_layer")
def _(f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return _values(f0)


@torch.library.register_fake("fastgen::lpips_layer_kept")
def _(f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> tuple[Tensor, Tensor]:
    return _values(f0), _keeps(f0)


@torch.library.register_fake("fastgen::lpips_layer_backward")
def _(
    grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool, kept: Tensor | None = None
) -> Tensor:
    return torch.empty_like(f0)


@torch.library.register_fake("fastgen::lpips_layer_backward_both")
def _(
    grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(f0), torch.empty_like(f1)


@torch.library.register_fake("fastgen::lpips_layer_backward_weight")
def _(grad: Tensor, f0: Tensor, f1: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return f0.new_empty(f0.shape[1], dtype=reference.wide(f0.dtype))


@torch.library.register_fake("fastgen::lpips_project")
def _(f: Tensor, weight: Tensor, dim: int, seed: int, layer: int, eps: float, eps_inside: bool) -> Tensor:
    return f.new_empty(f.shape[0], dim, dtype=reference.wide(f.dtype))


@torch.library.register_fake("fastgen::lpips_project_backward")
def _(grad: Tensor, f: Tensor, weight: Tensor, seed: int, layer: int, eps: float, eps_inside: bool) -> Tensor:
    return torch.empty_like(f)


@torch.library.register_fake("fastgen::feature_distance")
def _(f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    return _values(f0)


@torch.library.register_fake("fastgen::feature_distance_backward")
def _(grad: Tensor, f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    return torch.empty_like(f0)


@torch.library.custom_op("fastgen::lpips_project_buckets", mutates_args=())
def _lpips_project_buckets(f: Tensor, dim: int, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    """Opaque: inductor does not keep to the wrapping int64 products of Philox."""
    return reference.projection(f.shape[1], f.shape[2] * f.shape[3], dim, seed, layer, f.device)


@_lpips_project_buckets.register_fake
def _lpips_project_buckets_fake(f: Tensor, dim: int, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    bucket = f.new_empty(f.shape[1], f.shape[2] * f.shape[3], dtype=torch.int64)
    return bucket, torch.empty_like(bucket)


lpips_layer = torch.ops.fastgen.lpips_layer
lpips_layer_kept = torch.ops.fastgen.lpips_layer_kept
lpips_layer_backward = torch.ops.fastgen.lpips_layer_backward
lpips_layer_backward_both = torch.ops.fastgen.lpips_layer_backward_both
lpips_layer_backward_weight = torch.ops.fastgen.lpips_layer_backward_weight
lpips_project = torch.ops.fastgen.lpips_project
lpips_project_backward = torch.ops.fastgen.lpips_project_backward
feature_distance = torch.ops.fastgen.feature_distance
feature_distance_backward = torch.ops.fastgen.feature_distance_backward
lpips_project_buckets = torch.ops.fastgen.lpips_project_buckets.default
