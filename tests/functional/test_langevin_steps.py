"""Steps of one x again and again are `langevin_step_`'s, whatever gradient, scale or surroundings come between."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import functional as F
from fastgen.functional.langevin import Steps
from fastgen.ops import backend
from fastgen.ops import langevin as ops


class Watching(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Watching.seen += func is torch.ops.fastgen.langevin_step_.default
        return func(*args, **(kwargs or {}))


class Sub(Tensor):
    pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The steps that were taken without langevin_step_."""
    steps: list[int] = []
    repeated = ops.repeated

    def told(*arguments: Any) -> Any:
        again = repeated(*arguments)

        def counted(grad: Tensor, step: int, scalars: tuple[float, ...]) -> None:
            assert again is not None
            steps.append(step)
            again(grad, step, scalars)

        return None if again is None else counted

    monkeypatch.setattr(ops, "repeated", told)
    return steps


def shifted(grad: Tensor) -> Tensor:
    return torch.cat([grad.flatten()[:1], grad.flatten()])[1:].view(grad.shape)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda g: g, "shifted": shifted}
UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda g: g[:1, :1].expand(g.shape),
    "negative": lambda g: torch._neg_view(g),
    "subclass": lambda g: g.as_subclass(Sub),
    "with a graph": lambda g: g.clone().requires_grad_(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*PLAIN, *UNUSUAL])
@pytest.mark.parametrize("ids", [False, True])
def test_the_same_bits(kind: str, dtype: torch.dtype, ids: bool, quick: list[int]) -> None:
    x, options = torch.randn(5, 13).to(dtype), {"prior_scale": 0.7, "grad_clip": 1.2, "clamp": (-1.0, 1.5)}
    chain_id = torch.tensor([3, -1, 2**62, 0, 9]).repeat_interleave(2)[::2] if ids else None
    seed = 2**64 - 3
    expected = x.clone()
    steps = Steps(x, seed=seed, chain_id=chain_id, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for k, (h, s) in enumerate([(0.1, 0.3), (0.1, None), (0.05, 0.0), (torch.full((5,), 0.2), 0.1)]):
            grad = ({**PLAIN, **UNUSUAL})[kind](torch.randn(5, 13).to(dtype))
            if isinstance(h, Tensor):
                h = h.to(torch.float64 if dtype == torch.float64 else torch.float32)
            steps(grad, h, s, 2**28 - 4 + k)
            F.langevin_step_(
                expected, grad, step_size=h, noise_scale=s, seed=seed, step=2**28 - 4 + k, chain_id=chain_id, **options
            )  # type: ignore[arg-type]
            assert torch.equal(x, expected)
    assert quick == ([2**28 - 4 + k for k in range(3)] if kind in PLAIN and backend.extension() else [])


@pytest.mark.parametrize("around", ["mode", "reference", "state strided"])
def test_what_watches_sees_the_op(around: str, quick: list[int]) -> None:
    x = torch.randn(4, 6).T if around == "state strided" else torch.randn(6, 4)
    expected, grad = x.clone(), torch.randn(6, 4)
    within: dict[str, AbstractContextManager[Any]] = {"mode": Watching(), "reference": backend.force("reference")}
    Watching.seen = 0
    with within.get(around, nullcontext()):
        steps = Steps(x, prior_scale=None, grad_clip=None, clamp=None, seed=3, chain_id=None)
        steps(grad, 0.1, 0.2, 5)
    F.langevin_step_(expected, grad, step_size=0.1, noise_scale=0.2, seed=3, step=5)
    assert torch.equal(x, expected)
    assert quick == []
    assert Watching.seen == (around == "mode")


def test_a_graph_that_saved_the_state_sees_it_change() -> None:
    x = torch.randn(3, 4)
    steps = Steps(x, prior_scale=None, grad_clip=None, clamp=None, seed=3, chain_id=None)
    state = x.detach().requires_grad_()
    energy = state.square().sum()
    steps(torch.randn(3, 4), 0.1, 0.2, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        energy.backward()


def test_a_state_that_moves_to_shared_memory(quick: list[int]) -> None:
    x, grads = torch.randn(30, 50), torch.randn(3, 30, 50)
    expected = x.clone()
    steps = Steps(x, prior_scale=None, grad_clip=None, clamp=None, seed=3, chain_id=None)
    for k, grad in enumerate(grads):
        steps(grad, 0.1, 0.2, k)
        F.langevin_step_(expected, grad, step_size=0.1, noise_scale=0.2, seed=3, step=k)
        x.share_memory_()
    assert torch.equal(x, expected)
    assert quick == ([0, 1, 2] if backend.extension() else [])


def test_a_gradient_without_memory_is_zero() -> None:
    x, zero = torch.full((2, 4), 100.0), torch._efficientzerotensor((2, 4))
    expected = F.langevin_step_(x.clone(), torch.zeros(2, 4), step_size=0.1, noise_scale=0.2, seed=3)
    Steps(x, prior_scale=None, grad_clip=None, clamp=None, seed=3, chain_id=None)(zero, 0.1, 0.2, 0)
    assert torch.equal(x, expected)


def test_a_gradient_that_is_none_of_x_is_refused() -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    steps = Steps(x, prior_scale=None, grad_clip=None, clamp=None, seed=3, chain_id=None)
    for grad, error in (
        (torch.randn(3, 5), "grad: expected the shape of x"),
        (torch.randn(3, 4).double(), "grad: expected float32"),
        (torch.randn(3, 4).to_sparse(), "grad: expected a dense tensor"),
        (torch.randn(3, 4, device="meta"), "grad: expected"),
        ([1.0], "grad: expected a torch.Tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            steps(grad, 0.1, 0.2, 0)  # type: ignore[arg-type]
    both = torch.randn(24)
    steps = Steps(both[:12].view(3, 4), prior_scale=None, grad_clip=None, clamp=None, seed=3, chain_id=None)
    with pytest.raises(ValueError, match="x: expected memory of its own, got some of grad's"):
        steps(both[4:16].view(3, 4), 0.1, 0.2, 0)
    with pytest.raises(ValueError, match="step_size: expected"):
        steps(torch.randn(3, 4), -0.1, 0.2, 0)
    assert torch.equal(x, before)
