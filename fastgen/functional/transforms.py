"""Our autograd.Functions under the transforms of torch.func, and what is differentiated twice there as elsewhere.

Torch refuses a Function whose `forward` fills its own context. One with `setup_context` it takes, but binds the
arguments of every call to its signature, which takes longer than some of our kernels: so a single one stands for all.

Torch.compile, within a transform, goes through a Function in such a way that the gradient it makes is a constant to
whatever differentiates that again, without a word: there it is kept from looking inside (transforms_compiled).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

known: list[type["Function"]] = []


def _no_tangent(ctx: Any, *tangents: Any) -> NoReturn:
    """The rule for forward mode where check.no_tangent has not seen it before, as in a gradient: torch's hessian."""
    raise NotImplementedError(
        "fastgen: forward-mode AD (torch.func.jvp, jacfwd, hessian) is not built; what works: reverse mode, twice"
    )


class Function(torch.autograd.Function):
    """What `apply` takes. Dynamo takes none with a rule of its own for forward mode."""

    place: Callable[[], int]

    def __init_subclass__(cls) -> None:
        place = len(known)
        known.append(cls)
        cls.place = staticmethod(lambda: place)  # all that dynamo can be told of a Function


def wanted(*values: Any, unknown: bool = True) -> tuple[bool, ...]:
    """Which of them are tensors whose gradient is asked for; within transforms dynamo cannot tell: `unknown` then."""
    if not torch._C._are_functorch_transforms_active():
        if not torch.is_grad_enabled():
            return (False,) * len(values)
        return tuple([isinstance(v, Tensor) and v.requires_grad for v in values])
    if torch.compiler.is_dynamo_compiling():
        return tuple([unknown and isinstance(v, Tensor) for v in values])
    # Each transform has flags and a grad mode of its own, of which a tensor shows those of the innermost.
    return tuple([any(t.requires_grad for t in _layers(v)) for v in values])


def batched(*values: Any) -> bool:
    """Whether a torch.vmap that is under way goes over one of them."""
    if torch.compiler.is_dynamo_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(torch._C._functorch.is_batchedtensor(t) for v in values for t in _layers(v))


def apply(function: type[Function], *args: Any) -> Any:
    """function.apply(*args), within transforms of torch.func too."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if torch.compiler.is_dynamo_compiling():
        from fastgen.functional import transforms_compiled  # loads dynamo

        return transforms_compiled.apply(function.place(), *_filled(args))
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


def _filled(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dynamo would not hand on a None: an empty tuple stands for it."""
    return tuple([() if v is None else _filled(v) if isinstance(v, tuple) else v for v in values])


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

    jvp = staticmethod(_no_tangent)

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
        ctx.of_upstream = inputs[-2].backward  # looked up here: dynamo, come upon `backward`, would not get through
        ctx.note = output[-1]
        for name, value in ctx.note.attributes.items():
            setattr(ctx, name, value)
        known = (*inputs, *output)
        ctx.save_for_backward(*(None if i is None else known[i] for i in ctx.note.saved))
        ctx.mark_non_differentiable(*output[ctx.note.outputs : -1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        found = ctx.of_upstream(ctx, *upstream[: ctx.note.outputs])
        return *(found if isinstance(found, tuple) else (found,)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        return given[-2].vmap(info, in_dims, *given)


class _Twice(Function):
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
