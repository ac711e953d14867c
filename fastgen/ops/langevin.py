"""fastgen::langevin_step_ and langevin_noise_: the Langevin update in place, and its noise alone.

A seed or step travels as an integer (the seed's 64 bits as a signed number), or as a 0-d int64 tensor that the kernel
itself reads, so that a CUDA graph can advance it; the integer is then not looked at.
"""

import math

import torch
from torch import Tensor

from fastgen.ops import backend
from fastgen.reference import langevin as reference

torch.library.define(
    "fastgen::langevin_step_",
    "(Tensor(a!) x, Tensor grad, Tensor? chain_id, Tensor? step_sizes, Tensor? noise_scales, Tensor? seed_tensor, "
    "Tensor? step_tensor, Tensor(b!)? lookahead_out, float step_size, float noise_scale, float precision, "
    "float grad_clip, float low, float high, float lookahead, bool noise_first, SymInt seed, SymInt step) -> ()",
)
torch.library.define(
    "fastgen::langevin_noise_",
    "(Tensor(a!) out, Tensor? chain_id, Tensor? seed_tensor, Tensor? step_tensor, SymInt seed, SymInt step) -> ()",
)

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_UNSIGNED = 2**64 - 1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _host(tensor: Tensor | None, value: int) -> int:
    return value if tensor is None else int(tensor)


def _chains(x: Tensor, chain_id: Tensor | None) -> Tensor:
    return torch.arange(len(x), device=x.device) if chain_id is None else chain_id


@torch.library.impl("fastgen::langevin_step_", ("CPU", "CUDA"))
def _step(
    x: Tensor,
    grad: Tensor,
    chain_id: Tensor | None,
    step_sizes: Tensor | None,
    noise_scales: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    lookahead_out: Tensor | None,
    step_size: float,
    noise_scale: float,
    precision: float,
    grad_clip: float,
    low: float,
    high: float,
    lookahead: float,
    noise_first: bool,
    seed: int,
    step: int,
) -> None:
    kernel = backend.choose("langevin", x.device)
    if kernel == "reference":
        reference.step_(
            x,
            grad,
            _chains(x, chain_id),
            step_size if step_sizes is None else step_sizes,
            noise_scale if noise_scales is None else noise_scales,
            precision,
            grad_clip,
            low,
            high,
            noise_first,
            _host(seed_tensor, seed) & _UNSIGNED,
            _host(step_tensor, step),
            lookahead,
            lookahead_out,
        )
        return
    state = x.contiguous()
    ahead = None if lookahead_out is None else lookahead_out.contiguous()
    per_chain = [None if t is None else t.contiguous() for t in (chain_id, step_sizes, noise_scales)]
    scalars = (step_size, noise_scale, precision, grad_clip, low, high, lookahead)
    if kernel == "cpp":
        _cpp(state, grad.contiguous(), ahead, per_chain, scalars, noise_first, seed_tensor, step_tensor, seed, step)
    else:
        from fastgen.kernels import langevin as kernels

        kernels.step_(
            state, grad.contiguous(), ahead, *per_chain, seed_tensor, step_tensor, *scalars, noise_first, seed, step
        )
    if state is not x:
        x.copy_(state)
    if lookahead_out is not None and ahead is not None and ahead is not lookahead_out:
        lookahead_out.copy_(ahead)


@torch.library.impl("fastgen::langevin_noise_", ("CPU", "CUDA"))
def _noise(
    out: Tensor,
    chain_id: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    seed: int,
    step: int,
) -> None:
    kernel = backend.choose("langevin", out.device)
    if kernel == "reference":
        elements = math.prod(out.shape[1:])
        seed = _host(seed_tensor, seed) & _UNSIGNED
        noise = reference.normals(elements, _chains(out, chain_id), seed, _host(step_tensor, step))
        out.copy_(noise.view(out.shape))
        return
    state = out.contiguous()
    chain_id = None if chain_id is None else chain_id.contiguous()
    if kernel == "cpp":
        none = (0.0,) * 7
        _cpp(state, None, None, [chain_id, None, None], none, False, seed_tensor, step_tensor, seed, step)
    else:
        from fastgen.kernels import langevin as kernels

        kernels.noise_(state, chain_id, seed_tensor, step_tensor, seed, step)
    if state is not out:
        out.copy_(state)


@torch.library.register_fake("fastgen::langevin_step_")
def _step_fake(
    x: Tensor,
    grad: Tensor,
    chain_id: Tensor | None,
    step_sizes: Tensor | None,
    noise_scales: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    lookahead_out: Tensor | None,
    step_size: float,
    noise_scale: float,
    precision: float,
    grad_clip: float,
    low: float,
    high: float,
    lookahead: float,
    noise_first: bool,
    seed: int,
    step: int,
) -> None:
    torch._check(x.shape == grad.shape)


@torch.library.register_fake("fastgen::langevin_noise_")
def _noise_fake(
    out: Tensor,
    chain_id: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    seed: int,
    step: int,
) -> None:
    torch._check(out.ndim >= 1)


def _cpp(
    x: Tensor,
    grad: Tensor | None,
    lookahead_out: Tensor | None,
    per_chain: list[Tensor | None],
    scalars: tuple[float, ...],
    noise_first: bool,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    seed: int,
    step: int,
) -> None:
    extension = backend.extension()
    assert extension is not None
    pointers = [0 if t is None else t.data_ptr() for t in (x, grad, lookahead_out, *per_chain)]
    chains = len(x)
    extension.langevin(
        *pointers,
        chains,
        x.numel() // chains if chains else 0,
        *scalars,
        noise_first,
        _host(seed_tensor, seed) & _UNSIGNED,
        reference.PURPOSE_NOISE << 28 | _host(step_tensor, step) % reference.STEPS,
        _TYPES[x.dtype],
        torch.get_num_threads(),
    )
