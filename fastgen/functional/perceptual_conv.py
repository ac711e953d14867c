"""A convolution of stride 1 with weights that do not change and are made ready once, on the CPU in float32.

Kernels of 3×3 go to our own convolution, others to oneDNN, small maps as a matrix product of their patches.
"""

from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from fastgen.ops import perceptual_conv as ops

mkldnn = torch.ops.mkldnn
FEW = 16  # pixels of a map up to which a matrix product of its patches is faster than oneDNN's convolution
Ready = dict[tuple[bool, str], tuple[Any, ...]]  # (the way back, by what) -> what the weights were, and them made ready


class _Frozen(torch.autograd.Function):
    """The way back to the input is such a convolution too, with the kernel turned round."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int], ready: Ready, relu: bool
    ) -> Tensor:
        ctx.padding = [k - 1 - p for k, p in zip(weight.shape[2:], padding, strict=True)]
        ctx.ready = ready
        y = _convolution(x, weight, bias, list(padding), ready, False, relu)
        ctx.save_for_backward(weight, y if relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, y = ctx.saved_tensors  # which raises where they were changed in between
        # Asked for a second order, or for many gradients at once (is_grads_batched).
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            grad = grad if y is None else torch.ops.aten.threshold_backward(grad, y.detach(), 0)
            found = tf.conv2d(grad, _turned(weight), padding=ctx.padding)
        else:
            found = _convolution(grad, weight, None, ctx.padding, ctx.ready, True, mask=y)
        return found, None, None, None, None, None


def frozen_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int], ready: Ready, relu: bool = False
) -> Tensor:
    """conv2d(x, weight, bias, padding=padding), or with `relu` what a ReLU makes of it, in channels_last.

    x [N, C, H, W], weight and bias: float32 on the CPU; weight and bias get no gradient. ready: the caller's, empty at
    first: the weights as they were made ready, used again as long as they are the same. Differentiable in x, and twice.
    """
    y: Tensor = _Frozen.apply(x, weight, bias, padding, ready, relu)
    return y


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    ready: Ready,
    back: bool,
    relu: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`mask`: the result of the ReLU that the way back passes."""
    weight = weight.detach()
    if ops.fits(x, weight.transpose(0, 1) if back else weight, padding, bias, mask):
        way = "transformed"
    else:
        way = "product" if x.shape[2] * x.shape[3] <= FEW else "convolution"
    if (back, way) not in ready or not _same(weight, *ready[back, way][:3]):
        made = _made_ready(_turned(weight).contiguous() if back else weight, way, padding, x)
        ready[back, way] = (weight, weight._version, _sample(weight).clone(), made)
    kernel = ready[back, way][3]
    if way == "transformed":
        return ops.conv3x3(x, kernel, bias, relu, mask)
    if mask is not None:
        x = torch.ops.aten.threshold_backward(x, mask, 0)
    x = x.contiguous(memory_format=torch.channels_last)
    y: Tensor
    if way == "product":
        y = mkldnn._linear_pointwise(_patches(x, weight.shape[2:], padding), kernel, bias, "none", [], "")
        y = y.permute(0, 3, 1, 2).clone()  # in place of which a ReLU may write, as it may not of a view
    else:
        y = mkldnn._convolution_pointwise(x, kernel, bias, padding, [1, 1], [1, 1], 1, "none", [], "")
    return y.relu_() if relu else y  # oneDNN's own makes 0 of NaN


def _turned(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1)


def _made_ready(weight: Tensor, way: str, padding: list[int], x: Tensor) -> Tensor:
    if way == "transformed":
        return ops.transformed(weight)
    made: Tensor
    if way == "product":
        made = mkldnn._reorder_linear_weight(weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous())
    else:
        made = mkldnn._reorder_convolution_weight(weight, padding, [1, 1], [1, 1], 1, list(x.shape))
    return made


def _patches(x: Tensor, kernel: torch.Size, padding: list[int]) -> Tensor:
    """Of a channels_last map, what the kernel sees at each pixel: [N, H, W, kernel · kernel · C]."""
    x = tf.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    n, h, w, c = x.shape
    size, (row, column) = (h - kernel[0] + 1, w - kernel[1] + 1), (w * c, c)
    return x.as_strided((n, *size, *kernel, c), (h * row, row, column, row, column, 1)).reshape(n, *size, -1)


def _sample(weight: Tensor) -> Tensor:
    count = min(64, weight.numel())
    return weight.as_strided((count,), (weight.numel() // count,))


def _same(weight: Tensor, known: Tensor, version: int, sample: Tensor) -> bool:
    """Whether nothing was written since: not in place, not to another memory, not past autograd (`weight.data`), of
    which a sample tells unless single numbers were changed."""
    if weight.data_ptr() != known.data_ptr() or weight._version != version:
        return False
    return torch.equal(_sample(weight), sample)
