"""3×3 convolutions whose kernels do not change: transformed once, by the C++ kernel, float32 and channels_last.

Not an op of torch's: whoever asks for it differentiates it himself, and by another convolution of this kind.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen import check
from fastgen.ops import backend

PANEL = 16  # channels that lie together in memory
LEAST = 8  # tiles of 2×2 pixels: of fewer, reading kernels that are 16/9 of their size takes longer than sums do


def fits(x: Tensor, weight: Tensor, padding: Sequence[int], *others: Tensor | None) -> bool:
    """Whether the kernel takes float32 maps [N, C, H, W] on the CPU and such kernels, at a stride of 1, and is worth
    it; `others` are what else it is to read."""
    out, channels, *size = weight.shape
    n, _, h, w = x.shape
    return (
        size == [3, 3]
        and tuple(padding) == (1, 1)
        and out % PANEL == channels % PANEL == 0
        and n * ((h + 1) // 2) * ((w + 1) // 2) >= LEAST
        and backend.forced in (None, "cpp")
        and backend.extension() is not None
        and backend.runs_directly(x, *others)
    )


def transformed(weight: Tensor) -> Tensor:
    """What `conv3x3` takes of a weight [out, in, 3, 3]: G g Gᵀ, made in float64, as [16, out / 16, in, 16]."""
    g = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    out, channels = weight.shape[:2]
    places = (g @ weight.double() @ g.T).float().permute(2, 3, 0, 1)
    return places.reshape(16, out // PANEL, PANEL, channels).transpose(2, 3).contiguous()


def conv3x3(x: Tensor, kernel: Tensor, bias: Tensor | None, relu: bool = False, mask: Tensor | None = None) -> Tensor:
    """A convolution of x [N, in, H, W], stride 1 and a frame of one zero, by `kernel`, what `transformed` returned.

    relu: of the result. mask: of x's shape; x counts as 0 where it is at most 0 (the way back through a ReLU). Returns
    [N, out, H, W] in channels_last. The same bits for any number of threads. It adds up to four pixels before it
    multiplies: a NaN or an infinity may reach a pixel further than in a convolution, and sums overflow sooner.
    """
    extension = backend.extension()
    assert extension is not None
    if mask is not None and (mask.dtype, mask.shape) != (x.dtype, x.shape):  # as hooks on saved tensors may make it
        raise RuntimeError(f"mask: expected {check.describe(x)}, as the gradient is, got {check.describe(mask)}")
    n, channels, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    mask = None if mask is None else mask.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    out = kernel.shape[1] * PANEL
    y = torch.empty((n, out, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    extension.conv3x3(
        x.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        kernel.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        n,
        h,
        w,
        channels,
        out,
        relu,
        torch.get_num_threads(),
    )
    return y
