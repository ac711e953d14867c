"""What a recorded chain's energy is known by: every change that Python could see makes another signature."""

import argparse
import enum
import functools
import math
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastgen.nn.cuda_graph import surroundings
from fastgen.nn.langevin_signature import signature

CPU, META = torch.device("cpu"), torch.device("meta")
SCALE: Any = 1.0


def factor(x: Tensor) -> Tensor:
    return SCALE * x


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return factor(x)


class Part(nn.Module):
    power = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(2, 1), "plain"

    def forward(self, x: Tensor) -> Tensor:
        return self.raised(self.linear(x))

    def raised(self, x: Tensor) -> Tensor:
        return Double.apply(x) ** self.power

    def unused(self) -> Any:
        return UNKNOWN


UNKNOWN = torch.Generator()


class Kind(enum.Enum):
    ONE, TWO = 1, 2


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, x: Tensor) -> Tensor:
        return self.value * x


class Slots:
    __slots__ = ("value",)


def closing(over: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: over * x


KEPT = torch.zeros(3)
VALUES: list[tuple[Any, Any]] = [
    (1, True), (1, 1.0), (0.0, -0.0), (1.0, 1.5), ("a", b"a"), (None, False), ((1, 2), [1, 2]), ((1, 2), (1, (2,))),
    ([[1], 2], [[1, 2]]), ({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), ({1, 2}, {1, 3}), ({1}, {True}),
    (np.float64(1), np.float64(2)), (np.int32(1), np.int64(1)), (set(), frozenset()), ((), []),
    (torch.float32, torch.float64), (Kind.ONE, Kind.TWO), (int, bool), (math.sin, math.cos), (torch, math),
    (torch.zeros(3), torch.zeros(3)), (KEPT[:2], KEPT[:1]), (KEPT[:2], KEPT[1:]), (KEPT, nn.Parameter(KEPT)),
    (KEPT, torch._neg_view(KEPT)), (KEPT, KEPT.view(torch.int32)),
    (functools.partial(factor, 1), functools.partial(factor, 2)), (closing(1.0), closing(2.0)),
    (closing(1.0), lambda x: x + 1.0), (lambda x: x * 2.0, lambda x: x * 3.0), (lambda x, y=1: x, lambda x, y=2: x),
    (argparse.Namespace(a=1), argparse.Namespace(a=2)), (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    (Plain(1), Plain(2)), (Plain(1).__call__, Plain(2).__call__), (nn.ReLU(), nn.SiLU()), (nn.ELU(0.5), nn.ELU(1.5)),
    ([KEPT, KEPT], [KEPT, KEPT[:]]), (slice(1), slice(2)), (slice(1), slice(1.0)), (KEPT.mul, KEPT[1:].mul),
    (KEPT.mul, KEPT.add), ({1: 2}.get, {1: 3}.get),
]  # fmt: skip


@pytest.mark.parametrize("pair", VALUES, ids=lambda pair: type(pair[0]).__name__)
def test_others_are_told_apart(pair: tuple[Any, Any]) -> None:
    one, other = (signature(CPU, value) for value in pair)
    assert one is not None
    assert other is not None
    assert one != other
    assert one == signature(CPU, pair[0])
    assert hash(one) == hash(signature(CPU, pair[0]))
    for wrap in (closing, Plain, lambda value: {"in": [value]}):
        assert signature(CPU, wrap(pair[0])) != signature(CPU, wrap(pair[1]))
        assert signature(CPU, wrap(pair[0])) == signature(CPU, wrap(pair[0]))


@pytest.mark.parametrize(
    "value",
    [
        torch.Generator(),
        np.zeros(3),
        object(),
        iter([1]),
        {object()},
        Slots(),
        KEPT.to_sparse(),
        KEPT.to(META),
        nn.UninitializedParameter(),
        torch.jit.ScriptModule(),
        random.random,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_looked_into(value: Any) -> None:
    for inside in (value, [value], closing(value), Plain(value), Plain(closing(value)).__call__):
        assert signature(CPU, inside) is None


def test_a_module_and_all_that_its_forward_names(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part()
    known = [signature(CPU, part)]

    def changed(same: bool = False) -> None:
        now = signature(CPU, part)
        assert now is not None
        assert (now == known[-1]) if same else (now not in known)
        known.append(now)

    changed(same=True)
    with torch.no_grad():
        part.linear.weight.add_(1)
    changed(same=True)
    part.linear.weight = nn.Parameter(torch.zeros(1, 2))
    changed()
    part.eval()
    changed()
    part.kind = "other"
    changed()
    part.linear.register_full_backward_hook(lambda module, inputs, outputs: None)
    changed()
    part.register_buffer("more", torch.zeros(1))
    changed()
    part.add_module("linear", nn.Linear(2, 1, bias=False))
    changed()
    monkeypatch.setattr(Part, "power", 3)
    changed()
    monkeypatch.setattr(Part, "raised", lambda self, x: self.power * Double.apply(x))
    changed()
    monkeypatch.setitem(globals(), "SCALE", 2.0)  # by way of a method, an autograd function and a function
    changed()
    monkeypatch.setitem(globals(), "SCALE", torch.Generator())
    assert signature(CPU, part) is None


def test_cycles_and_sizes() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    assert signature(CPU, ring) == signature(CPU, ring)
    part = Part()
    part.__dict__["owner"] = part
    assert signature(CPU, part) is not None
    assert signature(CPU, [[i] for i in range(100)]) is not None
    assert signature(CPU, [[i] for i in range(20_000)]) is None
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert signature(CPU, deep) is None


def test_tensors_elsewhere_are_numbers() -> None:
    """A number on the CPU goes into a kernel of the GPU as what it is."""
    one, same, other = torch.tensor(1.5), torch.tensor(1.5), torch.tensor(2.5)
    assert signature(META, one) == signature(META, same) != signature(META, other)
    assert signature(META, torch.zeros(2)) is None
    assert signature(CPU, one) != signature(CPU, same)


SWITCHES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: _Set(lambda: False, lambda on: torch.set_autocast_enabled("cuda", on), True),
    "default dtype": lambda: _Set(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "tf32": lambda: _Attribute(torch.backends.cuda.matmul, "allow_tf32", not torch.backends.cuda.matmul.allow_tf32),
    "cudnn tf32": lambda: _Attribute(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32),
    "cudnn": lambda: _Attribute(torch.backends.cudnn, "enabled", False),
    "sdp": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "default device": lambda: torch.device("meta"),
    "deterministic": lambda: _Set(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
}


class _Set:
    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> None:
        self.put, self.value, self.before = put, value, get()

    def __enter__(self) -> None:
        self.put(self.value)

    def __exit__(self, *_: object) -> None:
        self.put(self.before)


def _Attribute(owner: Any, name: str, value: Any) -> _Set:
    return _Set(lambda: getattr(owner, name), lambda v: setattr(owner, name, v), value)


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name: str) -> None:
    cuda = torch.device("cuda")
    before = surroundings(cuda)
    with SWITCHES[name]():
        during = surroundings(cuda)
    assert during is not None
    assert during not in (before, surroundings(cuda))
    hash(during)


def test_who_watches() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Mode():
        assert surroundings(CPU) is None
    with torch.autograd.set_detect_anomaly(True):
        assert surroundings(CPU) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert surroundings(CPU) is None
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert surroundings(CPU) is None
    finally:
        handle.remove()
    assert surroundings(CPU) is not None
