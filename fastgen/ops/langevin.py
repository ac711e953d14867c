"""fastgen::langevin_step_ and langevin_noise_: the Langevin update in place, and its noise alone (words, for int32).

A seed or step travels as an integer (the seed's 64 bits as a signed number), or as a 0-d int64 tensor that the kernel
itself reads, so that a CUDA graph can advance it; the integer is then not looked at.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import backend
from fastgen.reference import langevin as reference

torch.library.define(
    "fastgen::langevin_step_",
    "(Tensor(a!) x, Tensor grad, Tensor? chain_id, Tensor? step_sizes, Tensor? noise_scales, Tensor? seed_tensor, "
    "Tensor? step_tensor, Tensor(b!)? lookahead_out, Tensor(c!)? stats, "
    "float step_size, float noise_scale, float precision, "
    "float grad_clip, float low, float high, float lookahead, bool noise_first, SymInt seed, SymInt step) -> ()",
)
torch.library.define(
    "fastgen::langevin_noise_",
    "(Tensor(a!) out, Tensor? chain_id, Tensor? seed_tensor, Tensor? step_tensor, SymInt seed, SymInt step, "
    "int purpose=0) -> ()",
)

_LIBRARY = torch.library.Library("fastgen", "FRAGMENT")


def bump_versions(name: str) -> None:
    """Has autograd see what the op writes, so that a backward that needs the old values raises, as after `add_`."""
    op = getattr(torch.ops.fastgen, name).default
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        # An inference tensor has no version.
        tensors = [args[i] for i in written if args[i] is not None and not args[i].is_inference()]
        torch.autograd.graph.increment_version(tensors)
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _LIBRARY.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


bump_versions("langevin_step_")
bump_versions("langevin_noise_")

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int32: 0}
_UNSIGNED = 2**64 - 1
runs_directly = backend.runs_directly


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def host(tensor: Tensor | None, value: int) -> int:
    return value if tensor is None else int(tensor)


def chains(x: Tensor, chain_id: Tensor | None) -> Tensor:
    return torch.arange(len(x), device=x.device) if chain_id is None else chain_id


def _step(
    x: Tensor,
    grad: Tensor,
    chain_id: Tensor | None,
    step_sizes: Tensor | None,
    noise_scales: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    lookahead_out: Tensor | None,
    stats: Tensor | None,
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
            chains(x, chain_id),
            step_size if step_sizes is None else step_sizes,
            noise_scale if noise_scales is None else noise_scales,
            precision,
            grad_clip,
            low,
            high,
            noise_first,
            host(seed_tensor, seed) & _UNSIGNED,
            host(step_tensor, step),
            lookahead,
            lookahead_out,
            stats,
        )
        return
    state, slope = x.contiguous(), grad.contiguous()
    ahead = None if lookahead_out is None else lookahead_out.contiguous()
    found = None if stats is None else stats.new_zeros(stats.shape, dtype=torch.float64)
    per_chain = [None if t is None else t.contiguous() for t in (chain_id, step_sizes, noise_scales)]
    scalars = (step_size, noise_scale, precision, grad_clip, low, high, lookahead)
    if kernel == "cpp":
        key = (host(seed_tensor, seed), host(step_tensor, step))
        cpp("langevin", cpp_step(state, slope, ahead, found, per_chain, scalars, noise_first, *key))
    else:
        from fastgen.kernels import langevin as kernels

        tensors = (ahead, found, *per_chain, seed_tensor, step_tensor)
        kernels.step_(state, slope, *tensors, *scalars, noise_first, seed, step)
    if stats is not None and found is not None:
        stats.copy_(found)
    if state is not x:
        x.copy_(state)
    if lookahead_out is not None and ahead is not None and ahead is not lookahead_out:
        lookahead_out.copy_(ahead)


torch.library.impl("fastgen::langevin_step_", ("CPU", "CUDA"))(_step)
step_ = torch.ops.fastgen.langevin_step_.default


def direct(x: Tensor, *arguments: Any) -> None:
    """`step_` without torch's dispatcher, where `runs_directly`: of a small state that is a third of the time."""
    written = [t for t in (x, arguments[6], arguments[7]) if t is not None and not t.is_inference()]
    torch.autograd.graph.increment_version(written)
    _step(x, *arguments)


def repeated(x: Tensor, chain_id: Tensor | None, seed: int) -> Callable[[Tensor, int, tuple[float, ...]], None] | None:
    """`direct` of the same x again and again, given grad, step and (η, s, 1/σ², c, low, high): what else the kernel is
    told, it is told once. None where it is not the C++ kernel's, or x not as that takes it."""
    if not (runs_directly(x, chain_id) and x.is_contiguous()) or backend.choose("langevin", x.device) != "cpp":
        return None
    module = backend.extension()
    assert module is not None
    chain_id = None if chain_id is None else chain_id.contiguous()
    told = cpp_step(x, x, None, None, [chain_id, None, None], (0.0,) * 7, False, seed, 0)
    written = () if x.is_inference() else (x,)

    # The default keeps alive what only an address names.
    def again(grad: Tensor, step: int, scalars: tuple[float, ...], chain_id: Tensor | None = chain_id) -> None:
        torch.autograd.graph.increment_version(written)
        word = reference.PURPOSE_NOISE << 28 | step % reference.STEPS
        # x's address may change: sharing it with another process moves what it holds.
        module.langevin_again(told, x.data_ptr(), grad.data_ptr(), *scalars, word, torch.get_num_threads())

    return again


@torch.library.impl("fastgen::langevin_noise_", ("CPU", "CUDA"))
def _noise(
    out: Tensor,
    chain_id: Tensor | None,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    seed: int,
    step: int,
    purpose: int = 0,
) -> None:
    kernel = backend.choose("langevin", out.device)
    if kernel == "reference":
        elements, ids = math.prod(out.shape[1:]), chains(out, chain_id)
        key = (host(seed_tensor, seed) & _UNSIGNED, host(step_tensor, step), purpose)
        if out.dtype == torch.int32:
            made = reference.words(elements, ids, *key).flatten(1)[:, :elements].to(torch.int32)
        else:
            made = reference.normals(elements, ids, *key)
        out.copy_(made.view(out.shape))
        return
    state = out.contiguous()
    chain_id = None if chain_id is None else chain_id.contiguous()
    if kernel == "cpp":
        key = (host(seed_tensor, seed), host(step_tensor, step), purpose)
        step_of = cpp_step(state, None, None, None, [chain_id, None, None], (0.0,) * 7, False, *key)
        cpp("langevin_words" if out.dtype == torch.int32 else "langevin", step_of)
    else:
        from fastgen.kernels import langevin as kernels

        kernels.noise_(state, chain_id, seed_tensor, step_tensor, seed, step, purpose=purpose)
    if state is not out:
        out.copy_(state)


@torch.library.register_fake("fastgen::langevin_step_")
def _step_fake(x: Tensor, grad: Tensor, *_: Any, **__: Any) -> None:
    torch._check(x.shape == grad.shape)


@torch.library.register_fake("fastgen::langevin_noise_")
def _noise_fake(out: Tensor, *_: Any, **__: Any) -> None:
    torch._check(out.ndim >= 1)


def cpp(name: str, *arguments: Any) -> None:
    extension = backend.extension()
    assert extension is not None
    getattr(extension, name)(*arguments)


def cpp_step(
    x: Tensor,
    grad: Tensor | None,
    lookahead_out: Tensor | None,
    stats: Tensor | None,
    per_chain: list[Tensor | None],
    scalars: tuple[float, ...],
    noise_first: bool,
    seed: int,
    step: int,
    purpose: int = reference.PURPOSE_NOISE,
) -> Any:
    """The extension's LangevinStep: pointers to contiguous tensors, which the caller keeps alive."""
    extension = backend.extension()
    assert extension is not None
    pointers = [0 if t is None else t.data_ptr() for t in (x, grad, lookahead_out, stats, *per_chain)]
    count = len(x)
    return extension.LangevinStep(
        *pointers,
        count,
        x.numel() // count if count else 0,
        *scalars,
        noise_first,
        seed & _UNSIGNED,
        purpose << 28 | step % reference.STEPS,
        _TYPES[x.dtype],
        torch.get_num_threads(),
    )
