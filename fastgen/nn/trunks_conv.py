"""The convolutions of our trunks: frozen ones pack their weights once, a first one takes the images' scaling along."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from fastgen.functional.perceptual_conv import Ready, frozen_convolution


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
    pass. Others are packed for oneDNN. What is not frozen float32 on the CPU is left to `nn.Conv2d`. Change weights
    under torch.no_grad(), as it should be: of what is written past autograd, to `weight.data` or its memory, 64 numbers
    tell, not each.

    forward(x, relu=False): a ReLU that follows is taken along, both ways.

    On a GPU frozen weights are kept in channels_last.
    """

    padding: tuple[int, int]

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Frozen weights that come to a GPU with tensor cores lie in channels_last there, and maps follow them: cuDNN
        would else reorder maps and weights for each convolution, forward and back."""
        super()._apply(fn, recurse)
        if not self.weight.requires_grad and _tensor_cores(self.weight):
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
        return self

    def packs(self, x: Tensor) -> bool:
        """Whether packed weights serve: frozen, and no autocast, compiler, trace, mode or transform of torch.func that
        must see."""
        weight, bias = self.weight, self.bias
        assert bias is not None
        return bool(
            not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state())
            and type(x) is Tensor
            and x.device.type == weight.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and x.ndim == 4
            and x.shape[1] == self.in_channels
            and all(type(t) in (Tensor, nn.Parameter) for t in (weight, bias))
            and weight.shape == (self.out_channels, self.in_channels, *self.kernel_size)  # one group
            and bias.shape == (self.out_channels,)
            and (bias.dtype, bias.device.type) == (torch.float32, "cpu")
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

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_packs"}  # they cannot be copied

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        if not self.packs(x):
            y = super().forward(x)
        elif self.stride != (1, 1):  # a network's first: few weights
            y = super().forward(x.contiguous(memory_format=torch.channels_last))
        else:
            assert self.bias is not None
            ready: Ready = self.__dict__.setdefault("_packs", {})
            return frozen_convolution(x, self.weight, self.bias, self.padding, ready, relu)
        return y.relu_() if relu else y


_SEES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "forward")


def takes_relu(module: nn.Module, relu: nn.Module | None = None) -> bool:
    """Whether nobody sees what is between a convolution and the ReLU that follows it, which it then takes along."""
    if torch.compiler.is_compiling() or type(module) is not Conv or torch.nn.modules.module._has_any_global_hook():
        return False
    return not any(map(vars(module).get, _SEES)) and (relu is None or not any(map(vars(relu).get, _SEES)))


def sequence(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """One after the other."""
    modules = list(modules)
    taken = False
    for module, after in zip(modules, [*modules[1:], None], strict=True):
        if taken:
            taken = False
            continue
        taken = type(after) is nn.ReLU and takes_relu(module, after)
        x = module(x, relu=True) if taken else module(x)
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
