"""The convolutions of our trunks: frozen ones pack their weights once, a first one takes the images' scaling along."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from fastgen.ops import perceptual_conv as ops


class _Packed(torch.autograd.Function):
    """A convolution of stride 1 with constant weights, and a ReLU. The way back to the input is such a convolution too,
    with the kernel turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: "Conv", relu: bool) -> Tensor:
        ctx.conv = conv
        y = conv.packed(x, conv.weight, back=False, relu=relu)
        ctx.save_for_backward(conv.weight, y if relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, y = ctx.saved_tensors  # which raises where they were changed in between
        # Asked for a second order, or for many gradients at once (is_grads_batched).
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            grad = grad if y is None else grad * (y.detach() > 0)
            return tf.conv2d(grad, _turned(weight), padding=ctx.conv.padding_back), None, None
        # The module may have been given another weight since.
        return ctx.conv.packed(grad, weight, back=True, mask=y), None, None


def _turned(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1)


mkldnn = torch.ops.mkldnn
FEW = 16  # pixels of a map up to which a matrix product of its patches is faster than a convolution


def _patches(x: Tensor, kernel: tuple[int, ...], padding: list[int]) -> Tensor:
    """Of a channels_last map, what the kernel sees at each pixel: [N, H, W, kernel · kernel · C]."""
    x = tf.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    n, h, w, c = x.shape
    size, (row, column) = (h - kernel[0] + 1, w - kernel[1] + 1), (w * c, c)
    return x.as_strided((n, *size, *kernel, c), (h * row, row, column, row, column, 1)).reshape(n, *size, -1)


def _pack(weight: Tensor, way: str, padding: list[int], x: Tensor) -> Tensor:
    if way == "transformed":
        return ops.transformed(weight)
    packed: Tensor
    if way == "product":
        packed = mkldnn._reorder_linear_weight(weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous())
    else:
        packed = mkldnn._reorder_convolution_weight(weight, padding, [1, 1], [1, 1], 1, list(x.shape))
    return packed


def _sample(weight: Tensor) -> Tensor:
    count = min(64, weight.numel())
    return weight.as_strided((count,), (weight.numel() // count,))


def _same(weight: Tensor, known: Tensor, version: int, sample: Tensor) -> bool:
    """Whether nothing was written since: not in place, not to another memory, not past autograd (`weight.data`), of
    which a sample tells unless single numbers were changed."""
    if weight.data_ptr() != known.data_ptr() or weight._version != version:
        return False
    return torch.equal(_sample(weight), sample)


def _tensor_cores(weight: Tensor) -> bool:
    """Whether convolutions with such weights run on them, in float32 too (as TF32, unless it is switched off)."""
    if not weight.is_cuda or weight.dtype == torch.float64 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 0)


class Conv(nn.Conv2d):
    """A convolution that, frozen, runs float32 on the CPU in channels_last, by weights made ready once.

    `nn.Conv2d` reorders its weights in every call, forward and back: a quarter of VGG16's time at 64x64 pixels. Kernels
    of 3x3 go to our own convolution, which needs 4/9 of the products (off by 4e-7 of the result's norm for 512
    channels; sums by 2e-7); transformed, they take 16/9 of their memory again, and as much after a first backward
    pass. Others are packed for oneDNN. What is not frozen, float32, on the CPU is
    left to `nn.Conv2d`. Change weights under torch.no_grad(), as it should be: of what is written past autograd, to
    `weight.data` or its memory, 64 numbers tell, not each.

    forward(x, relu=False): a ReLU that follows is taken along, both ways.

    On a GPU frozen weights are kept in channels_last.
    """

    padding: tuple[int, int]

    @property
    def padding_back(self) -> list[int]:
        return [k - 1 - p for k, p in zip(self.kernel_size, self.padding, strict=True)]

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Frozen weights that come to a GPU with tensor cores lie in channels_last there, and maps follow them: cuDNN
        would else reorder maps and weights for each convolution, forward and back."""
        super()._apply(fn, recurse)
        if not self.weight.requires_grad and _tensor_cores(self.weight):
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
        return self

    def packs(self, x: Tensor) -> bool:
        """Whether packed weights serve: frozen, and no autocast, compiler or transform of torch.func that must see."""
        weight, bias = self.weight, self.bias
        assert bias is not None
        return bool(
            not torch.compiler.is_compiling()
            and type(x) is Tensor
            and x.device.type == weight.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and x.ndim == 4
            and x.shape[1] == self.in_channels
            and not (weight.requires_grad or bias.requires_grad or weight.is_inference())
            and (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last))
            and x.numel() > 0
            and all(p < k for p, k in zip(self.padding, self.kernel_size, strict=True))  # else the way back has none
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.enabled
            and torch.backends.mkldnn.is_available()
            and not torch._C._are_functorch_transforms_active()
            and torch.autograd.forward_ad._current_level < 0
        )

    def packed(self, x: Tensor, weight: Tensor, back: bool, relu: bool = False, mask: Tensor | None = None) -> Tensor:
        weight = weight.detach()
        padding = self.padding_back if back else list(self.padding)
        turned = weight.transpose(0, 1) if back else weight
        if ops.fits(x, turned, tuple(padding)):
            way = "transformed"
        else:
            way = "product" if x.shape[2] * x.shape[3] <= FEW else "convolution"
        packs: dict[tuple[bool, str], tuple[Any, ...]] = self.__dict__.setdefault("_packs", {})
        if (back, way) not in packs or not _same(weight, *packs[back, way][:3]):
            pack = _pack(_turned(weight).contiguous() if back else weight, way, padding, x)
            packs[back, way] = (weight, weight._version, _sample(weight).clone(), pack)
        pack = packs[back, way][3]
        bias = None if back else self.bias
        if way == "transformed":
            return ops.conv3x3(x, pack, bias, relu, mask)
        if mask is not None:
            x = torch.ops.aten.threshold_backward(x, mask, 0)
        x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor
        if way == "product":
            y = mkldnn._linear_pointwise(_patches(x, self.kernel_size, padding), pack, bias, "none", [], "")
            y = y.permute(0, 3, 1, 2).clone()  # in place of which a ReLU may write, as it may not of a view
        else:
            y = mkldnn._convolution_pointwise(x, pack, bias, padding, [1, 1], [1, 1], 1, "none", [], "")
        return y.relu_() if relu else y  # oneDNN's own makes 0 of NaN

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_packs"}  # they cannot be copied

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        y: Tensor
        if self.stride == (1, 1) and self.packs(x):
            y = _Packed.apply(x, self, relu)
            return y
        if self.packs(x):  # a network's first: few weights
            x = x.contiguous(memory_format=torch.channels_last)
        y = super().forward(x)
        return y.relu_() if relu else y


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def takes_relu(module: nn.Module, relu: nn.Module | None = None) -> bool:
    """Whether nobody sees what is between a convolution and the ReLU that follows it, which it then takes along."""
    hooks = torch.nn.modules.module._has_any_global_hook()
    for one in (module, relu):
        hooks = hooks or (one is not None and any(map(vars(one).get, _HOOKS)))
    return isinstance(module, Conv) and not hooks and not torch.compiler.is_compiling()


def sequence(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """One after the other."""
    modules = list(modules)
    for k, module in enumerate(modules):
        if type(module) is nn.ReLU and k and takes_relu(modules[k - 1], module):
            continue
        after = modules[k + 1] if k + 1 < len(modules) else None
        x = module(x, relu=True) if type(after) is nn.ReLU and takes_relu(module, after) else module(x)
    return x


def scaled(first: nn.Module, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """`first` of gain·x + offset, numbers for each of its channels [C, 1, 1]; x may have one channel in their place.

    Folded into weights and bias where `first` does not pad (SqueezeNet). The zeros of a padding lie round gain·x +
    offset: x would need a frame of −offset / gain, a copy like the one that is to be saved.
    """
    assert isinstance(first, Conv)
    if any(first.padding):
        y: Tensor = first(torch.addcmul(offset, x, gain))
        return y
    assert first.bias is not None
    weight = first.weight * gain.to(first.weight.dtype)
    bias = first.bias + (first.weight * offset.to(first.weight.dtype)).sum((1, 2, 3))
    x = x.expand(-1, weight.shape[1], -1, -1)
    if first.packs(x) or first.weight.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    return tf.conv2d(x, weight, bias, first.stride)
