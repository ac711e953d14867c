"""The launch table: block sizes, warps and stages for each kernel, dtype and size, as plain data. No autotuner runs."""

import torch
from fastgen.kernels import tuned
from torch import Tensor


def langevin(elements: int, whole: bool = False) -> tuple[int, bool]:
    """(groups of four elements in a program, whether a program stays within one chain), four warps each.

    Long chains are cut into blocks of which at most an eighth may lie beyond the chain's end; else programs run over
    the chains' groups one after the other, at the price of a division for each group. `whole`: within one chain always,
    for sums over it."""
    found = tuned.find("langevin", "groups")
    for groups in found["largest_first"] if found is not None else (512, 256, 128):
        padded = -(-elements // (4 * groups)) * 4 * groups
        if padded * 8 <= elements * 9:
            return groups, True
    if whole:
        return max(32, min(256, 1 << (-(-elements // 4) - 1).bit_length())), True
    return 256, False


LPIPS_TILE = 4096  # elements of each map that a program keeps in registers
LPIPS_LARGEST_C = 2048
FEATURE_BLOCK = 4096
PROJECT_TILE = 4096  # buckets times runs of pixels that a program looks at together
PROJECT_SPLITS = 64  # programs among which a sample's runs are divided, at most
MOST_ELEMENTS = 2**31 - 2**16  # of a sample: offsets within one are 32 bits


def lpips_fits(f: Tensor) -> bool:
    """Whether the kernels take such maps: else the reference runs."""
    return f.dtype != torch.float64 and f.shape[1] <= LPIPS_LARGEST_C and f[:1].numel() < MOST_ELEMENTS


def feature_fits(f: Tensor) -> bool:
    return f.dtype != torch.float64 and f[:1].numel() < MOST_ELEMENTS


def lpips_blocks(channels: int) -> dict[str, int]:
    """BLOCK_P, BLOCK_C and num_warps of `_lpips_value_kernel` and `_lpips_grad_kernel`.

    512 channels leave 8 pixels: whole sectors of 32 bytes where channels lie in planes of float32."""
    block_c = max(16, 1 << (channels - 1).bit_length())
    if (found := tuned.find("lpips", f"C={block_c}")) is not None:
        return {"BLOCK_C": block_c, **found}
    return {"BLOCK_P": min(256, max(1, LPIPS_TILE // block_c)), "BLOCK_C": block_c, "num_warps": 4}


def lpips_layer(
    f0: Tensor, f1: Tensor, weight: Tensor, eps: float, inside: bool, last: bool, grad: Tensor | None, sides: int
) -> tuple[Tensor, ...]:
    """The value [N] in float32, or (with grad [N]) the gradients of the first `sides` maps; both dense, of one layout:
    `last` says channels_last."""
    from fastgen.kernels import perceptual as kernels

    n, channels, pixels = f0.shape[0], f0.shape[1], f0.shape[2] * f0.shape[3]
    weight = weight.to(torch.float32).contiguous()
    with torch.cuda.device_of(f0):  # whose table it is too
        blocks = lpips_blocks(channels)
        programs = -(-pixels // blocks["BLOCK_P"])
        flags = {"INSIDE": inside, "LAST": last, **blocks, **kernels.OPTIONS}
        if grad is None:
            partial = torch.empty(n, programs, dtype=torch.float32, device=f0.device)
            if n:
                kernels._lpips_value_kernel[(n * programs,)](f0, f1, weight, partial, pixels, channels, eps, **flags)
            return (partial.sum(1, dtype=torch.float64).to(torch.float32),)
        grad = grad.to(torch.float32).contiguous()
        out = [torch.empty_like(f) for f in (f0, f1)[:sides]]
        if n:
            kernels._lpips_grad_kernel[(n * programs,)](
                f0, f1, weight, grad, out[0], out[1] if sides == 2 else None, pixels, channels, eps, **flags
            )
    return tuple(out)


def project_blocks(dim: int) -> dict[str, int]:
    """RUNS and BLOCK_D of `_project_kernel`: a warp's threads share a run's random words."""
    block_d = min(1024, 1 << (dim - 1).bit_length())
    return {"RUNS": PROJECT_TILE // block_d, "BLOCK_D": block_d}


def lpips_project(
    f: Tensor, weight: Tensor, dim: int, seed: int, layer: int, eps: float, inside: bool, last: bool
) -> Tensor:
    """[N, dim] in float32; f dense, `last` says channels_last. Two launches: each pixel's scale, then the buckets."""
    from fastgen.kernels import perceptual as kernels
    from fastgen.kernels.langevin import _signed

    n, channels, pixels = f.shape[0], f.shape[1], f.shape[2] * f.shape[3]
    tiles = project_blocks(dim)
    scale = torch.empty(n, pixels, dtype=torch.float32, device=f.device)
    root = (weight.to(torch.float64) / pixels).sqrt().to(torch.float32)
    runs = channels * -(-pixels // 64)
    share = -(-runs // (PROJECT_SPLITS * tiles["RUNS"])) * tiles["RUNS"]
    splits = -(-runs // share)
    partial = torch.empty(n, splits, dim, dtype=torch.float32, device=f.device)
    if n:
        with torch.cuda.device_of(f):
            blocks = lpips_blocks(channels)
            kernels._lpips_scale_kernel[(n * -(-pixels // blocks["BLOCK_P"]),)](
                f, scale, pixels, channels, eps, INSIDE=inside, LAST=last, **blocks, **kernels.OPTIONS
            )
            words = _signed(seed), _signed(seed >> 32)
            kernels._project_kernel[(n * splits, -(-dim // tiles["BLOCK_D"]))](
                *(f, scale, root, partial, pixels, channels, dim, layer, *words, splits, share),
                LAST=last,
                **tiles,
                **kernels.OPTIONS,
            )
    return partial.sum(1, dtype=torch.float64).to(torch.float32)


def unproject_blocks(channels: int) -> dict[str, int]:
    """As `lpips_blocks`, within one run of 64 pixels: a program then needs a channel's random words once."""
    blocks = lpips_blocks(channels)
    return {**blocks, "BLOCK_P": min(64, blocks["BLOCK_P"])}


def lpips_project_backward(
    grad: Tensor, f: Tensor, weight: Tensor, seed: int, layer: int, eps: float, inside: bool, last: bool
) -> Tensor:
    """The gradient of f, dense, of what has the gradient grad [N, dim]."""
    from fastgen.kernels import perceptual as kernels
    from fastgen.kernels.langevin import _signed

    n, channels, pixels, dim = f.shape[0], f.shape[1], f.shape[2] * f.shape[3], grad.shape[1]
    root = (weight.to(torch.float64) / pixels).sqrt().to(torch.float32)
    grad, out = grad.to(torch.float32).contiguous(), torch.empty_like(f)
    words = _signed(seed), _signed(seed >> 32)
    if n:
        with torch.cuda.device_of(f):
            blocks = unproject_blocks(channels)
            kernels._unproject_kernel[(n * -(-pixels // blocks["BLOCK_P"]),)](
                *(f, grad, root, out, pixels, channels, dim, layer, *words, eps),
                INSIDE=inside,
                LAST=last,
                **blocks,
                **kernels.OPTIONS,
            )
    return out


def feature_distance(f0: Tensor, f1: Tensor, squared: bool, grad: Tensor | None) -> Tensor:
    """The value [N] in float32, or the gradient of f0; both maps dense, their elements in one order."""
    from fastgen.kernels import perceptual as kernels

    n = f0.shape[0]
    size = f0.numel() // max(n, 1)
    programs = -(-size // FEATURE_BLOCK)
    if grad is not None:
        grad = grad.to(torch.float32).contiguous()
        out = torch.empty_like(f0)
    else:
        out = torch.empty(n, programs, dtype=torch.float32, device=f0.device)
    if n:
        with torch.cuda.device_of(f0):
            kernels._feature_kernel[(n * programs,)](
                f0, f1, grad, out, size, SQUARED=squared, BLOCK=FEATURE_BLOCK, **kernels.OPTIONS
            )
    return out if grad is not None else out.sum(1, dtype=torch.float64).to(torch.float32)


def langevin_accept(elements: int) -> tuple[int, bool, int]:
    """(groups of four elements in a program, whether a chain fits it, warps)."""
    of_chain = -(-elements // 4)
    groups = max(32, min(512, 1 << (of_chain - 1).bit_length()))
    return groups, of_chain <= groups, max(1, groups // 128)
