"""Our autograd.Functions under the transforms of torch.func, and what is differentiated twice there as elsewhere.

Torch refuses a Function whose `forward` fills its own context. One with `setup_context` it takes, but binds the
arguments of every call to its signature, which takes longer than some of our kernels: so a single one stands for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def wanted(*values: Any) -> tuple[bool, ...]:
    """Which of them are tensors whose gradient is asked for."""
    compiling = torch.compiler.is_compiling()
    if compiling or not torch._C._are_functorch_transforms_active():
        if not torch.is_grad_enabled():
            return (False,) * len(values)
        return tuple([isinstance(v, Tensor) and v.requires_grad for v in (_renewed(values) if compiling else values)])
    # Each transform has flags and a grad mode of its own, of which a tensor shows those of the innermost.
    return tuple([any(t.requires_grad for t in _layers(v)) for v in values])


def batched(*values: Any) -> bool:
    """Whether a torch.vmap that is under way goes over one of them."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(torch._C._functorch.is_batchedtensor(t) for v in values for t in _layers(v))


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), within transforms of torch.func too."""
    if torch.compiler.is_compiling():
        return function.apply(*_renewed(args))
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    *returned, note = _Transformed.apply(*args, function, wanted(*args))
    return tuple(returned[: note.outputs]) if note.several else returned[0]


def twice(kernel: Callable[..., Any], meaning: Callable[..., Any], *tensors: Tensor) -> Any:
    """kernel(*tensors), a gradient; where it may be differentiated, as meaning(*tensors), the same in plain torch."""
    if not torch.is_grad_enabled() or batched(*tensors):  # the op says that it has no vmap
        return kernel(*tensors)
    # torch.func asks for a graph always, and seldom goes back through it; autograd's create_graph means to.
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return apply(_Twice, *tensors, kernel, meaning)
    return meaning(*tensors)


def _renewed(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dynamo takes the argument of a function under torch.func.grad for a constant, but not what an op makes of it."""
    return tuple([v.view_as(v) if isinstance(v, Tensor) and not v.requires_grad else v for v in values])


def _layers(value: Any) -> Iterator[Tensor]:
    """A tensor, and all that transforms have wrapped in it."""
    while isinstance(value, Tensor):
        yield value
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
        value = torch._C._functorch.get_unwrapped(value) if wrapped else None


class _Context:
    """Takes down what a `forward` tells its context."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@dataclass(frozen=True)
class _Note:
    several: bool  # whether `forward` returned a tuple
    outputs: int
    saved: list[int | None]  # where the saved tensors are among the inputs and all that is returned
    attributes: dict[str, Any]


class _Transformed(torch.autograd.Function):
    """The Function that comes after its own arguments, followed by which of them want a gradient. What it saves beside
    inputs and outputs is returned after them, as constants, for every transform to have it at its own level."""

    @staticmethod
    def forward(*given: Any) -> tuple[Any, ...]:
        *inputs, function, needed = given
        # One tensor may be two inputs, with a flag of its own for each: objects of their own tell them apart.
        inputs = [v.detach() if isinstance(v, Tensor) else v for v in inputs]
        context: Any = _Context(needed)
        returned = function.forward(context, *inputs)
        several = isinstance(returned, tuple)
        known = [*inputs, function, needed, *(returned if several else (returned,))]
        outputs = len(known) - len(given)
        places = {id(v): i for i, v in enumerate(known) if isinstance(v, Tensor)}
        saved: list[int | None] = []
        for t in context.saved_tensors:
            if t is not None and id(t) not in places:
                places[id(t)] = len(known)
                known.append(t)
            saved.append(None if t is None else places[id(t)])
        attributes = {k: v for k, v in vars(context).items() if k not in ("needs_input_grad", "saved_tensors")}
        return *known[len(given) :], _Note(several, outputs, saved, attributes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *_, ctx.function, _ = inputs
        ctx.note = output[-1]
        for name, value in ctx.note.attributes.items():
            setattr(ctx, name, value)
        known = (*inputs, *output)
        ctx.save_for_backward(*(None if i is None else known[i] for i in ctx.note.saved))
        ctx.mark_non_differentiable(*output[ctx.note.outputs : -1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        found = ctx.function.backward(ctx, *upstream[: ctx.note.outputs])
        return *(found if isinstance(found, tuple) else (found,)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        return given[-2].vmap(info, in_dims, *given)


class _Twice(torch.autograd.Function):
    """The kernel's gradient, and its meaning not before that is differentiated."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        *tensors, kernel, ctx.meaning = given
        ctx.save_for_backward(*tensors)
        return kernel(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[: len(ctx.saved_tensors)]
        with torch.enable_grad():
            # Views are nodes of their own: two inputs may be one tensor.
            inputs = [t.view_as(t) if n else t for t, n in zip(ctx.saved_tensors, needed, strict=True)]
            outputs = ctx.meaning(*inputs)
        asked = [t for t, n in zip(inputs, needed, strict=True) if n]
        found = iter(
            torch.autograd.grad(outputs, asked, upstream, create_graph=torch.is_grad_enabled(), materialize_grads=True)
        )
        return *(next(found) if n else None for n in needed), None, None
