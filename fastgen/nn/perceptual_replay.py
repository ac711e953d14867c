"""Losses of frozen networks as CUDA graphs: value and gradients are recorded once for a kind of call, then replayed."""

import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgen.nn import trunks
from fastgen.nn.cuda_graph import captured, capturing, surroundings

FIRST_CALLS = 3  # of a kind, which "auto" runs as they are: a recording costs what some ten replays save
MOST_PIXELS = 2**18  # of a batch, for "auto": beyond, launches hide behind the work, and a recording's memory counts
MOST_RECORDINGS = 8  # of a loss: each has its inputs' copies, and all of a stream share the memory of the largest

PLAIN = (Tensor, nn.Parameter)
Target = Tensor | tuple[Tensor, ...]  # images, or the maps that were kept of some
Compute = Callable[[Tensor, Target], Tensor]  # of as many samples: [N, ...], a value each, or their mean


class _Kind(NamedTuple):
    """All that a recording has taken for granted, the network apart."""

    options: tuple[Any, ...]
    images: bool  # whether the target is
    wanted: tuple[bool, ...]  # for each input, whether its gradient is
    autocast: torch.dtype | None
    place: Any  # the stream: what lies in a graph's memory is safe between calls of one stream alone
    switches: Hashable
    layouts: tuple[Any, ...]

    def compute(self, compute: Compute, inputs: Sequence[Tensor]) -> Tensor:
        x, *rest = inputs
        device = x.device.type  # autocast's cache must carry nothing into a capture, nor out of it
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            return compute(x, rest[0] if self.images else tuple(rest))

    def chosen(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [t for t, wanted in zip(inputs, self.wanted, strict=True) if wanted]


def _switches(device: torch.device) -> Hashable | None:
    """Those of torch's that a recording obeys; None where something has to see each operation, or a backward pass is
    under way: there a checkpoint runs once more what it ran before, and must find the same."""
    if forward_ad._current_level >= 0 or torch.jit.is_tracing() or torch._C._current_graph_task_id() != -1:
        return None
    return surroundings(device)


def place_of(x: Tensor) -> Any:
    """Where x can be recorded, or None: on the current device, by a stream that is not being captured already."""
    if not x.is_cuda or x.get_device() != torch.cuda.current_device() or torch.cuda.is_current_stream_capturing():
        return None
    return x.get_device(), torch.cuda.current_stream().cuda_stream


_streams: dict[int, tuple[Any, Any]] = {}  # of a device: for what goes before a capture, and for captures


class Recorder:
    """Captures for one stream, one after the other in the same memory: outputs are copied out after each replay."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        device = torch.cuda.current_device()
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(), torch.cuda.Stream()
        self.side, self.stream = _streams[device]

    def __call__(self, run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        """What repeats `run`, and where it leaves its results."""
        current = torch.cuda.current_stream()
        with capturing:
            self.side.wait_stream(current)
            with torch.cuda.stream(self.side):
                run()  # loads kernels, which a capture must not
            current.wait_stream(self.side)
            with captured(self.pool, self.stream) as graph:
                outputs = run()
        return graph.replay, outputs


class _Network:
    """The memory that recordings of `module` read, and whether it is still what the module consists of."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self.module, self.parts = weakref.ref(module), parts[1:]
        contents = (content for m in parts for content in (m._modules, m._parameters, m._buffers))
        self.contents = [content for content in contents if content]
        self.members = list(chain.from_iterable(content.values() for content in self.contents))
        self.tensors = [member for member in self.members if isinstance(member, Tensor)]
        self.plain = all(type(t) in PLAIN for t in self.tensors)
        self.at = [t.data_ptr() for t in self.tensors] if self.plain else []
        self.held = [t.detach() for t in self.tensors]  # or other weights might come to lie there
        self.hooks = [
            hooks
            for m in self.parts
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]

    def same(self, module: nn.Module) -> bool:
        if self.module() is not module:
            return False
        members = list(chain.from_iterable(content.values() for content in self.contents))
        if len(members) != len(self.members) or not all(map(operator.is_, members, self.members)):
            return False
        return not self.plain or [t.data_ptr() for t in self.tensors] == self.at

    def frozen(self) -> bool:
        """Whether only images can want gradients, and calls of its parts do what their `forward` says."""
        if not self.plain or any(self.hooks) or any(t.requires_grad for t in self.tensors):
            return False
        return all(part._compiled_call_impl is None for part in self.parts)


class _Recording:
    """compute(x, target) and the gradients of its sum, as one launch. The results are copies: nothing of a call lies in
    the graph's memory when the next one comes."""

    def __init__(self, kind: _Kind, compute: Compute, inputs: Sequence[Tensor], recorder: Recorder, lock: Any) -> None:
        self.lock = lock

        def run() -> list[Tensor]:
            leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip(self.inputs, kind.wanted, strict=True)]
            with torch.set_grad_enabled(any(kind.wanted)):
                value = kind.compute(compute, leaves)
            if not any(kind.wanted):
                return [value]
            with torch.autocast(value.device.type, enabled=False):
                grads = torch.autograd.grad(value, kind.chosen(leaves), torch.ones_like(value))
            return [value.detach(), *grads]

        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty_like(t, requires_grad=False).copy_(t) for t in inputs]
            self.replay, self.outputs = recorder(run)
            # A gradient comes in its image's own layout, whatever that of the network.
            self.results = [self.outputs[0], *kind.chosen(self.inputs)] if any(kind.wanted) else self.outputs

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with self.lock, torch.no_grad():
            torch._foreach_copy_(self.inputs, list(inputs))
            self.replay()
            return [torch.empty_like(t).copy_(o) for t, o in zip(self.results, self.outputs, strict=True)]


class _Replay(torch.autograd.Function):
    """The gradients come with the value: a sample's are those of its own value, times what comes back for that."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, kind: _Kind, compute: Compute, *inputs: Tensor) -> Tensor:
        value, *grads = recording(inputs)
        ctx.kind, ctx.compute = kind, compute
        ctx.save_for_backward(*grads)
        # For a second order alone: else images may change in place meanwhile, as they may for a network.
        ctx.inputs, ctx.versions = inputs, [t._version for t in inputs]
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kind, inputs, kept = ctx.kind, ctx.inputs, ctx.saved_tensors
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.inputs = ()
        found: Sequence[Tensor]
        if torch.is_grad_enabled():  # asked for a second order, which nothing recorded has
            if [t._version for t in inputs] != ctx.versions:
                raise RuntimeError("create_graph: expected images as they were in the call, got some changed in place")
            found = torch.autograd.grad(kind.compute(ctx.compute, inputs), kind.chosen(inputs), grad, create_graph=True)
        else:
            found = [(grad.reshape(-1, 1, 1, 1) * one).to(one.dtype) for one in kept]
        rest = iter(found)
        return None, None, None, *(next(rest) if wanted else None for wanted in kind.wanted)


class Recorded(nn.Module):
    """A loss with recordings."""

    _kept: "Replays"

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """A network that goes elsewhere takes its recordings' memory with it."""
        super()._apply(fn, recurse)
        self._kept.tidy(self)
        return self


class Replays:
    """The recordings of one loss module. Copies of the module, and what is unpickled, begin without any."""

    def __init__(self, cuda_graph: bool | str) -> None:
        if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
            raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")
        self.cuda_graph = cuda_graph
        self.failed = False
        self.lock = threading.Lock()
        self.forget(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Replays, (self.cuda_graph,)

    def forget(self, module: nn.Module | None) -> None:
        self.network = None if module is None else _Network(module)
        self.calls: dict[_Kind, int] = {}
        self.recordings: dict[_Kind, _Recording] = {}
        self.recorders: dict[Any, Recorder] = {}

    def tidy(self, module: nn.Module) -> None:
        """Gives back the memory of what serves no longer."""
        with self.lock:
            if self.network is not None and not self.network.same(module):
                self.forget(None)

    def __call__(
        self, module: nn.Module, options: tuple[Any, ...], compute: Compute, name: str, x: Tensor, target: Target
    ) -> Tensor:
        """compute(x, target), by a recording where one serves. `options` are what of the module's attributes and of the
        call's arguments `compute` depends on; it reads no other tensors than x, target and the module's own."""
        if torch.compiler.is_compiling() or self.cuda_graph is False or self.failed:
            return compute(x, target)
        if getattr(module, "_is_replica", False):  # nn.DataParallel's, made anew each time, with tensors as parameters
            return compute(x, target)
        if self.cuda_graph is True:
            trunks.check_cuda(name, x)
        place = place_of(x)
        inputs = (x, target) if isinstance(target, Tensor) else (x, *target)
        kind = None if place is None else self._kind(options, place, inputs, isinstance(target, Tensor))
        recording = None if kind is None else self._recording(module, kind, compute, inputs)
        if kind is None or recording is None:
            return compute(x, target)
        if not any(kind.wanted):
            return recording(inputs)[0]
        value: Tensor = _Replay.apply(recording, kind, compute, *inputs)
        return value

    def _kind(self, options: tuple[Any, ...], place: Any, inputs: tuple[Tensor, ...], images: bool) -> _Kind | None:
        """What kind of call this is, or None where it must run as it is."""
        x, device = inputs[0], inputs[0].device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        wanted = tuple(t.requires_grad for t in inputs) if torch.is_grad_enabled() else (False,) * len(inputs)
        if any(type(t) not in PLAIN or t.device != device or t.numel() == 0 for t in inputs):
            return None
        if (switches := _switches(device)) is None:
            return None
        if any(wanted):
            if any(t.is_inference() for t in inputs) or any(wanted[2 if images else 1 :]):
                return None
            if torch.float16 in (autocast, x.dtype):  # without the loss scale, which comes last, they would vanish
                return None
        layouts = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
        return _Kind(options, images, wanted, autocast, place, switches, layouts)

    def _recording(
        self, module: nn.Module, kind: _Kind, compute: Compute, inputs: tuple[Tensor, ...]
    ) -> _Recording | None:
        auto = self.cuda_graph == "auto"
        with self.lock:
            if self.network is None or not self.network.same(module):
                self.forget(module)
            assert self.network is not None
            if not self.network.frozen():
                return None
            if (found := self.recordings.get(kind)) is not None or len(self.recordings) >= MOST_RECORDINGS:
                return found
            if auto:
                n, _, h, w = inputs[0].shape
                if n * h * w > MOST_PIXELS:
                    return None
                if len(self.calls) >= 64:  # shapes that hardly come again
                    self.calls.clear()
                self.calls[kind] = self.calls.get(kind, 0) + 1
                if self.calls[kind] <= FIRST_CALLS:
                    return None
            try:
                if kind.place not in self.recorders:
                    self.recorders[kind.place] = Recorder()
                found = _Recording(kind, compute, inputs, self.recorders[kind.place], self.lock)
            except RuntimeError as error:
                self.forget(None)
                if not auto:
                    raise
                self.failed = True
                what, name = (str(error).splitlines() or [""])[0], type(module).__name__
                warnings.warn(f"{name}: cannot be recorded as a CUDA graph and runs as it is: {what}", stacklevel=5)
                return None
            self.recordings[kind] = found
            return found
