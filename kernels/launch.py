"""The launch table: block sizes, warps and stages for each kernel, dtype and size, as plain data. No autotuner runs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from fastgen.kernels import tuned
from fastgen.kernels.aot import Spec
from torch import Tensor

MMD_ROWS = 128  # BLOCK_M of every configuration: each set is padded to whole tiles of it
MMD_LARGEST_D = 128
MMD_LARGEST_BATCH = 65535  # of CUDA's second grid axis


def mmd_fits(x: Tensor) -> bool:
    """Whether the kernels take such points: else the reference's blocked products run."""
    return x.dtype != torch.float64 and x.shape[-1] <= MMD_LARGEST_D and x.shape[:-2].numel() <= MMD_LARGEST_BATCH


def mmd_blocks(kernel: str, dp: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages of `_mmd_grad_kernel` ("grad") or `_mmd_value_kernel` ("value")."""
    if (found := tuned.find(f"mmd_{kernel}", f"D={dp}")) is not None:
        return {"BLOCK_M": MMD_ROWS, **found}
    columns = 32 if kernel == "grad" or dp > 64 else 64
    return {"BLOCK_M": MMD_ROWS, "BLOCK_N": columns, "num_warps": 8, "num_stages": 2}


def mmd_parameters(
    kind: str, parameters: Sequence[float], pairs: tuple[float, float, float, float] | None
) -> tuple[str, float, tuple[float, ...], float]:
    """Kernel, base, parameters in units of u = d²/base, and what the kernel's slope still has to be multiplied by."""
    if kind == "imq" and pairs is not None:
        return "imq_pairs", pairs[0], pairs[1:], 1.0
    if kind == "rational_quadratic":
        lengthscale, *alphas = parameters
        return kind, 2 * lengthscale**2, (*alphas, *(1 / a for a in alphas)), 1.0
    middle = sorted(parameters)[len(parameters) // 2]
    if kind == "imq":
        return "imq", middle, tuple(middle / c for c in parameters), 1.0
    return "rbf", math.log(2) / middle, tuple(g / middle for g in parameters), math.log(2)


def mmd(
    x: Tensor,
    y: Tensor,
    kind: str,
    parameters: Sequence[float],
    pairs: tuple[float, float, float, float] | None,
    estimator: str,
    precision: str,
    sides: int,
) -> tuple[Tensor, ...]:
    """MMD² and the unit gradients of the first `sides` of x and y, in float32; [N, D] or [B, N, D] with D ≤ 128."""
    from fastgen.kernels import mmd as kernels

    *batch, n, d = x.shape
    m = y.shape[-2]
    items = batch[0] if batch else 1
    x, y = x.contiguous(), y.contiguous()
    name, base, scaled, slope = mmd_parameters(kind, parameters, pairs)
    dp = max(16, 1 << (d - 1).bit_length())
    padded_n = (n + MMD_ROWS - 1) // MMD_ROWS * MMD_ROWS
    padded = padded_n + (m + MMD_ROWS - 1) // MMD_ROWS * MMD_ROWS
    tiles = padded // MMD_ROWS
    gradients = [torch.empty(p.shape, dtype=torch.float32, device=p.device) for p in (x, y)[:sides]]
    z = x.new_empty(items, padded, dp, dtype=torch.float32)
    norm = x.new_empty(items, padded, dtype=torch.float32)
    kernels._mmd_pack_kernel[(tiles, items)](
        x, y, z, norm, n, m, d, padded_n, padded, base**-0.5, BLOCK=MMD_ROWS, DP=dp, num_warps=4
    )
    # One partial sum for each tile: the gradient kernel's tiles come first, the value kernel takes the rest.
    tiles_grad = (0, padded_n // MMD_ROWS, tiles)[sides]
    partial = x.new_empty(items, tiles, dtype=torch.float64)
    options = {
        "KIND": kernels.KINDS[name],
        "ESTIMATOR": kernels.ESTIMATORS[estimator],
        "DP": dp,
        "PRECISION": precision,
        "PTX": x.is_cuda and torch.version.hip is None,
    }
    if tiles_grad:
        a_xy = 1 / (n * (n - 1)) if estimator == "u_statistic" else 1 / (n * m)
        kernels._mmd_grad_kernel[(tiles_grad, items)](
            z,
            norm,
            gradients[0],
            gradients[-1],
            partial,
            n,
            m,
            d,
            padded_n,
            padded,
            tiles,
            4 * a_xy * slope * base**-0.5,
            scaled,
            BOTH=sides == 2,
            **options,
            **mmd_blocks("grad", dp),
        )
    if tiles_grad < tiles:
        kernels._mmd_value_kernel[(tiles - tiles_grad, items)](
            z, norm, partial, n, m, padded_n, padded, tiles_grad, tiles, scaled, **options, **mmd_blocks("value", dp)
        )
    total = partial.sum(-1)
    if estimator == "biased":  # the pairs i = i, left out above: their distance is exactly zero
        total += (len(parameters) - (kind == "rational_quadratic")) * (1 / n + 1 / m)
    return total.to(torch.float32).reshape(batch), *gradients


def mmd_specs() -> list[Spec]:
    """What the tests compile ahead of time; first WAE's kernel at D = 64 in the default precision."""
    from fastgen.kernels import mmd as kernels

    counts = dict.fromkeys(("n", "m", "d", "padded_n", "padded", "partials", "first_tile"), "i32")
    pointers = {"z_ptr": "*fp32", "norm_ptr": "*fp32", "gx_ptr": "*fp32", "gy_ptr": "*fp32", "partial_ptr": "*fp64"}
    specs = []
    shapes = [("imq_pairs", 3, 64), ("imq_pairs", 3, 128), ("imq_pairs", 3, 16), ("rbf", 5, 64), ("imq", 3, 64)]
    shapes.append(("rational_quadratic", 10, 64))
    for name, count, dp in shapes:
        for precision in (
            ("bf16x3", "tf32x3", "tf32", "ieee", "bf16x6") if (name, dp) == ("imq_pairs", 64) else ("bf16x3",)
        ):
            for kind, kernel in (("grad", kernels._mmd_grad_kernel), ("value", kernels._mmd_value_kernel)):
                blocks = mmd_blocks(kind, dp)
                types: dict[str, Any] = {
                    **counts,
                    **pointers,
                    "gradient_scale": "fp32",
                    "parameters": ("fp32",) * count,
                }
                constexprs = {
                    "KIND": kernels.KINDS[name],
                    "ESTIMATOR": 0,
                    "BOTH": False,
                    "BLOCK_M": blocks["BLOCK_M"],
                    "BLOCK_N": blocks["BLOCK_N"],
                    "DP": dp,
                    "PRECISION": precision,
                }
                names = kernel.arg_names
                specs.append(
                    Spec(
                        f"{kind} {name} D={dp} {precision}",
                        kernel,
                        {a: types.get(a, "constexpr") for a in names},
                        {a: v for a, v in constexprs.items() if a in names},
                        num_warps=blocks["num_warps"],
                        num_stages=blocks["num_stages"],
                    )
                )
    for dtype in ("fp32", "bf16"):
        types = {**counts, "x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "z_ptr": "*fp32", "norm_ptr": "*fp32"}
        types |= {"scale": "fp32", "BLOCK": "constexpr", "DP": "constexpr"}
        specs.append(
            Spec(
                f"pack {dtype}",
                kernels._mmd_pack_kernel,
                {a: types[a] for a in kernels._mmd_pack_kernel.arg_names},
                {"BLOCK": MMD_ROWS, "DP": 64},
            )
        )
    return specs


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
    return {"BLOCK_P": min(256, max(1, LPIPS_TILE // block_c)), "BLOCK_C": block_c, "num_warps": 4}


def lpips_layer(
    f0: Tensor, f1: Tensor, weight: Tensor, eps: float, inside: bool, last: bool, grad: Tensor | None, sides: int
) -> tuple[Tensor, ...]:
    """The value [N] in float32, or (with grad [N]) the gradients of the first `sides` maps; both dense, of one layout:
    `last` says channels_last."""
    from fastgen.kernels import perceptual as kernels

    n, channels, pixels = f0.shape[0], f0.shape[1], f0.shape[2] * f0.shape[3]
    blocks = lpips_blocks(channels)
    programs = -(-pixels // blocks["BLOCK_P"])
    weight = weight.to(torch.float32).contiguous()
    flags = {"INSIDE": inside, "LAST": last, **blocks, **kernels.OPTIONS}
    if grad is None:
        partial = torch.empty(n, programs, dtype=torch.float32, device=f0.device)
        if n:
            with torch.cuda.device_of(f0):
                kernels._lpips_value_kernel[(n * programs,)](f0, f1, weight, partial, pixels, channels, eps, **flags)
        return ((partial.sum(1, dtype=torch.float64) / pixels).to(torch.float32),)
    grad = grad.to(torch.float32).contiguous()
    out = [torch.empty_like(f) for f in (f0, f1)[:sides]]
    if n:
        with torch.cuda.device_of(f0):
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

    n, channels, pixels = f.shape[0], f.shape[1], f.shape[2] * f.shape[3]
    blocks, tiles = lpips_blocks(channels), project_blocks(dim)
    scale = torch.empty(n, pixels, dtype=torch.float32, device=f.device)
    root = (weight.to(torch.float64) / pixels).sqrt().to(torch.float32)
    runs = channels * -(-pixels // 64)
    share = -(-runs // (PROJECT_SPLITS * tiles["RUNS"])) * tiles["RUNS"]
    splits = -(-runs // share)
    partial = torch.empty(n, splits, dim, dtype=torch.float32, device=f.device)
    if n:
        with torch.cuda.device_of(f):
            kernels._lpips_scale_kernel[(n * -(-pixels // blocks["BLOCK_P"]),)](
                f, scale, pixels, channels, eps, INSIDE=inside, LAST=last, **blocks, **kernels.OPTIONS
            )
            words = ((seed + 2**31) % 2**32 - 2**31, (seed >> 32))  # of 32 bits with a sign, as seed is one of 64
            kernels._project_kernel[(n * splits, -(-dim // tiles["BLOCK_D"]))](
                *(f, scale, root, partial, pixels, channels, dim, layer, *words, splits, share),
                LAST=last,
                **tiles,
                **kernels.OPTIONS,
            )
    return partial.sum(1, dtype=torch.float64).to(torch.float32)


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
    return out if grad is not None else (out.sum(1, dtype=torch.float64) / max(size, 1)).to(torch.float32)


def langevin_accept(elements: int) -> tuple[int, bool, int]:
    """(groups of four elements in a program, whether a chain fits it, warps)."""
    of_chain = -(-elements // 4)
    groups = max(32, min(512, 1 << (of_chain - 1).bit_length()))
    return groups, of_chain <= groups, max(1, groups // 128)
