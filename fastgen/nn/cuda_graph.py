"""Recording work as a CUDA graph: what it depends on, and how it begins and ends."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._device import DeviceContext

Graph = Any  # torch.cuda.CUDAGraph
capturing = threading.Lock()  # of which a process may have one at a time


@contextmanager
def captured(pool: Any, stream: Any) -> Iterator[Graph]:
    """Records what the block does on the current device, by `stream` and into `pool`, as the graph that it yields. Who
    calls it holds `capturing`."""
    graph, caching = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
    # Thread-local: by default a data loader's thread that pins memory meanwhile would fail, and so would this.
    capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    # A weight cast before would be read where it no longer is, and so would cuBLAS's memory: each graph has one.
    torch.set_autocast_cache_enabled(False)
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), capture:  # one that fails does not go back to that stream
            yield graph
    except BaseException:
        _end_failed(pool, stream)
        raise
    finally:
        torch.set_autocast_cache_enabled(caching)
        torch._C._cuda_clearCublasWorkspaces()


def _end_failed(pool: Any, stream: Any) -> None:
    """Ends, on the current device, a capture that failed: torch 2.11 does so for one that went well alone. Until then
    its allocator takes one to be under way, frees no memory that several streams have used and empties no cache; and
    the device's generator, which thinks itself captured, draws no number until the next capture ends well."""
    with suppress(RuntimeError):  # newer ones have ended it
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            torch.cuda._sleep(1)  # of an empty graph torch warns


def surroundings(device: torch.device) -> Hashable | None:
    """The switches of torch's that a recording obeys; None where somebody watches or changes what is called."""
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or not all(isinstance(mode, DeviceContext) for mode in modes)
        or torch.is_anomaly_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or nn.modules.module._has_any_global_hook()
    ):
        return None
    kind, cuda = device.type, torch.backends.cuda
    return (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        tuple(mode.device for mode in modes),
        torch.get_default_dtype(),
        _float32(),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        torch.are_deterministic_algorithms_enabled(),
    )


def _float32() -> Hashable:
    """How float32 products are made. The flags of old raise where the new ones are used."""
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        works = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"))
        return tuple(torch._C._get_fp32_precision_getter(*work) for work in works)
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
