"""Which kernel an op runs: C++ on the CPU, Triton on the GPU, the torch reference where neither is there."""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import _C, Tensor

from fastgen import check

_PLAIN = (Tensor, torch.nn.Parameter)  # and no subclass that means something else by its operations
forced: str | None = None

CPP = frozenset({"mmd", "langevin", "perceptual", "nearest"})
TRITON = frozenset({"mmd", "langevin", "perceptual", "nearest"})
_BUT = {"mmd": "; reference for float64, degrees over 16, second derivatives of Laplacian and energy"}


@functools.cache
def extension() -> ModuleType | None:
    """`fastgen._C`, or None where it was not built."""
    if importlib.util.find_spec("fastgen._C") is None:
        return None
    module = importlib.import_module("fastgen._C")
    try:
        module.isa()  # reads FASTGEN_ISA at its first call
    except ValueError as error:
        raise check.UserError(f"FASTGEN_ISA: {str(error).removeprefix('isa: ')}") from None
    return module


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(family: str, device: torch.device | str) -> str:
    """'cpp', 'triton' or 'reference' for a device or its type; a reference run for want of a build warns once."""
    device_type = device if isinstance(device, str) else device.type
    if forced is None:
        return _chosen(family, device_type)
    if forced == "cpp" and device_type != "cpu":  # it would follow the address
        raise ValueError(f"{family}: expected tensors on the CPU, where backend.force('cpp') runs, got {device_type}")
    return forced


@functools.cache
def _chosen(family: str, device_type: str) -> str:
    chosen, reason = explain(family, device_type)
    if chosen == "reference" and family in CPP | TRITON:
        warnings.warn(f"fastgen: {family} on {device_type} runs on the plain torch reference: {reason}", stacklevel=4)
    return chosen


def explain(family: str, device_type: str) -> tuple[str, str]:
    """The kernel that `family` runs on such a device, and why."""
    if device_type == "cpu":
        if family not in CPP:
            return "reference", "no C++ kernel for this family yet"
        module = extension()
        if module is None:
            return "reference", "fastgen._C is not built (a C++17 compiler at install time builds it)"
        return "cpp", f"fastgen._C, {module.isa()}"
    if family not in TRITON:
        return "reference", "no Triton kernel for this family yet"
    if not has_triton():
        return "reference", "triton is not installed (pip install 'fastgen[triton]')"
    return "triton", "triton" + _BUT.get(family, "")


@contextmanager
def force(kernel: str) -> Iterator[None]:
    """Run every op on `kernel` inside the block (tests and benchmarks)."""
    global forced
    before, forced = forced, kernel
    try:
        yield
    finally:
        forced = before


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take all of the tensors as they are, and nothing watches what is called."""
    if (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state()
    ):
        return False
    for t in tensors:
        if t is not None and (
            type(t) not in _PLAIN
            or not (t.is_cuda or t.is_cpu)
            or t.is_neg()  # its memory has the other sign: torch's dispatcher says so to kernels
            or t._is_zerotensor()  # it has no memory
            or _C._functorch.is_functorch_wrapped_tensor(t)  # kept from a transform that is over
        ):
            return False
    return True
