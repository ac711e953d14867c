"""Ops `fastgen::lpips_layer` and `fastgen::feature_distance` with their gradients, all first order.

Both maps of a call have one shape, dtype and device. Values are float32 (float64 for float64); a gradient has the dtype
and the strides of its map. Private: `fastgen.functional.perceptual` checks and differentiates.
"""

import torch
from torch import Tensor

from fastgen.reference import perceptual as reference

_SCHEMAS = {
    "lpips_layer": "(Tensor f0, Tensor f1, Tensor weight, float eps, bool eps_inside) -> Tensor",
    "lpips_layer_backward": "(Tensor grad, Tensor f0, Tensor f1, Tensor weight, float eps, bool eps_inside) -> Tensor",
    "lpips_layer_backward_both": (
        "(Tensor grad, Tensor f0, Tensor f1, Tensor weight, float eps, bool eps_inside) -> (Tensor, Tensor)"
    ),
    "lpips_layer_backward_weight": "(Tensor grad, Tensor f0, Tensor f1, float eps, bool eps_inside) -> Tensor",
    "feature_distance": "(Tensor f0, Tensor f1, bool squared) -> Tensor",
    "feature_distance_backward": "(Tensor grad, Tensor f0, Tensor f1, bool squared) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastgen::{_name}", _schema)


def _like(f: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides that the fake promises."""
    out = torch.empty_like(f)
    return value if value.stride() == out.stride() and value.dtype == out.dtype else out.copy_(value)


def _lpips_layer(f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return reference.lpips_layer(f0, f1, weight, eps, eps_inside)


def _lpips_layer_backward(grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return _like(f0, reference.lpips_layer_backward(grad, f0, f1, weight, eps, eps_inside))


def _lpips_layer_backward_both(
    grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool
) -> tuple[Tensor, Tensor]:
    return (
        _lpips_layer_backward(grad, f0, f1, weight, eps, eps_inside),
        _lpips_layer_backward(grad, f1, f0, weight, eps, eps_inside),
    )


def _lpips_layer_backward_weight(grad: Tensor, f0: Tensor, f1: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return reference.lpips_layer_backward_weight(grad, f0, f1, eps, eps_inside)


def _feature_distance(f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    return reference.feature_distance(f0, f1, squared)


def _feature_distance_backward(grad: Tensor, f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    return _like(f0, reference.feature_distance_backward(grad, f0, f1, squared))


for _name in _SCHEMAS:
    torch.library.impl(f"fastgen::{_name}", "CPU")(globals()[f"_{_name}"])
    torch.library.impl(f"fastgen::{_name}", "CUDA")(globals()[f"_{_name}"])


def _values(f0: Tensor) -> Tensor:
    return f0.new_empty(f0.shape[0], dtype=reference.wide(f0.dtype))


@torch.library.register_fake("fastgen::lpips_layer")
def _(f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return _values(f0)


@torch.library.register_fake("fastgen::lpips_layer_backward")
def _(grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return torch.empty_like(f0)


@torch.library.register_fake("fastgen::lpips_layer_backward_both")
def _(grad: Tensor, f0: Tensor, f1: Tensor, weight: Tensor, eps: float, eps_inside: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(f0), torch.empty_like(f1)


@torch.library.register_fake("fastgen::lpips_layer_backward_weight")
def _(grad: Tensor, f0: Tensor, f1: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return f0.new_empty(f0.shape[1], dtype=reference.wide(f0.dtype))


@torch.library.register_fake("fastgen::feature_distance")
def _(f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    return _values(f0)


@torch.library.register_fake("fastgen::feature_distance_backward")
def _(grad: Tensor, f0: Tensor, f1: Tensor, squared: bool) -> Tensor:
    return torch.empty_like(f0)


lpips_layer = torch.ops.fastgen.lpips_layer
lpips_layer_backward = torch.ops.fastgen.lpips_layer_backward
lpips_layer_backward_both = torch.ops.fastgen.lpips_layer_backward_both
lpips_layer_backward_weight = torch.ops.fastgen.lpips_layer_backward_weight
feature_distance = torch.ops.fastgen.feature_distance
feature_distance_backward = torch.ops.fastgen.feature_distance_backward
