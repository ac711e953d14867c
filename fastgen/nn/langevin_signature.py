"""What an energy is made of, so far as Python can look into it.

A recorded graph reads tensors where they lay and never runs the energy's Python again, so it may serve a later call
only where all that Python would look at is as it was. `signature` writes that down: of modules the parameters, buffers,
hooks and attributes; of functions the code, what they close over and the globals they name; of objects the attributes;
of tensors on the device where they lie, not what they hold. What belongs to an installed package, and what code asks of
anything by a name that it makes up, is taken to stay as it is.
"""

import argparse
import enum
import functools
import os
import sys
import sysconfig
import types
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

MOST = 20_000  # things looked at

_LIBRARIES = (
    "<frozen",
    *{sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__))) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,  # fastgen's own
)
_AS_THEY_ARE = frozenset((
    int, bool, str, bytes, complex, type(None), type(...), range, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size, types.WrapperDescriptorType, types.MethodDescriptorType, torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
))  # fmt: skip
_CONTAINERS = (dict, OrderedDict, tuple, list)
_NO_MATTER = frozenset(  # of a module, for what it computes; the last are recordings of a sampler's or a loss's own
    ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_kept")
)
_NORMS = (SpectralNorm, WeightNorm)  # hooks that make the weight, an attribute, anew each time
_ENTRIES = ("forward", "backward", "__call__")  # what of a class runs without being named


class _Opaque(Exception):
    """Met something that cannot be looked into."""


def signature(device: torch.device, *values: Any) -> Hashable | None:
    """Equal for equal values on `device`, and else not; None where something in them cannot be looked into."""
    look = _Look(device)
    try:
        for value in values:
            look.at(value)
    except (_Opaque, RecursionError):
        return None
    return tuple(look.found)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The globals and attributes that a function and those within it name."""
    inner = (name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


@functools.lru_cache(maxsize=4096)
def _installed(kind: type) -> bool:
    return _of_library(sys.modules.get(kind.__module__))


def _of_library(module: types.ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    if file is None:  # built in, or the user's own session
        return module is None or module.__name__ != "__main__"
    return str(file).startswith(_LIBRARIES)


def _own(kind: type) -> bool:
    """Whether instances of a class are their attributes and nothing else."""
    return kind is not object and all(
        base is object or not (_installed(base) or "__slots__" in vars(base)) for base in kind.__mro__
    )


class _Look:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: list[Any] = []
        self.seen: dict[int, tuple[int, Any]] = {}  # with the thing itself, whose id is then no other's
        self.classes: set[type] = set()

    def at(self, value: Any) -> None:
        kind, found = type(value), self.found
        found.append(kind)
        if kind in _AS_THEY_ARE:
            found.append(value)
        elif kind is float:
            found.append(value.hex())
        elif kind in _CONTAINERS and not value:
            pass
        elif id(value) in self.seen:
            found.append(-1 - self.seen[id(value)][0])  # no length
        elif len(found) > MOST:
            raise _Opaque
        else:
            self.seen[id(value)] = len(self.seen), value
            if kind in _CONTAINERS:
                self._items(value)
            elif isinstance(value, nn.Module):
                self._class(kind)
                made = [hook.name for hook in value._forward_pre_hooks.values() if isinstance(hook, _NORMS)]
                for name, part in vars(value).items():
                    if name in _NO_MATTER or name in made or (type(part) in _CONTAINERS and not part):  # empty: hooks
                        continue
                    found.append(name)
                    self.at(part)
            elif isinstance(value, Tensor):
                self._tensor(value)
            else:
                self._other(value)

    def _items(self, value: Any) -> None:
        self.found.append(len(value))
        for part in value.items() if isinstance(value, dict) else value:
            if type(part) is tuple:  # an item, which is made anew each time
                self.found.append(tuple)
                self._items(part)
            else:
                self.at(part)

    def _other(self, value: Any) -> None:
        kind: Any = type(value)
        if isinstance(value, (dict, tuple, list)):  # and more than that
            self._items(value)
            if not _installed(kind):
                self._class(kind)
                self.at(getattr(value, "__dict__", None))
        elif kind in (set, frozenset) and all(type(part) in _AS_THEY_ARE for part in value):
            self.found.append(frozenset((type(part), part) for part in value))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, slice):  # has no hash before Python 3.12
            self._items((value.start, value.stop, value.step))
        elif isinstance(value, types.BuiltinFunctionType):
            if value.__self__ is None or isinstance(value.__self__, (types.ModuleType, type)):  # a function
                self.found.append(value)
            else:
                self.found.append(value.__name__)
                self.at(value.__self__)
        elif isinstance(value, types.MethodType):
            self.at(value.__func__)
            self.at(value.__self__)
        elif isinstance(value, functools.partial):
            self._items((value.func, value.args, value.keywords))
        elif isinstance(value, (types.ModuleType, enum.Enum)):
            self.found.append(value)
        elif isinstance(value, type):
            self._class(value, ("__init__", *_ENTRIES))
        elif isinstance(value, (argparse.Namespace, types.SimpleNamespace, *_NORMS)) or _own(kind):
            self._class(kind)
            self.at(vars(value))
        elif isinstance(value, np.generic):
            self.found.append(value.tobytes())
        else:
            raise _Opaque

    def _tensor(self, value: Tensor) -> None:
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise _Opaque
        if value.device == self.device:
            where: Hashable = value.data_ptr()
        elif value.device.type == "cpu" and value.numel() == 1:  # a kernel gets it as a number
            where = repr(value.item())
        else:
            raise _Opaque
        self.found += (where, value.dtype, value.shape, value.stride(), value.is_neg(), value.is_conj())

    def _function(self, value: types.FunctionType) -> None:
        code = value.__code__
        self.found.append(code)
        self.at(value.__defaults__)
        self.at(value.__kwdefaults__)
        for cell in value.__closure__ or ():
            try:
                self.at(cell.cell_contents)
            except ValueError:  # not filled yet
                self.found.append(None)
        if not code.co_filename.startswith(_LIBRARIES):
            self._named(_names(code), value.__globals__)

    def _named(self, names: tuple[str, ...], among: dict[str, Any]) -> None:
        for name in names:
            if name in among:
                value = among[name]
                self.found.append(name)
                self.at(value)
                if isinstance(value, types.ModuleType) and not _of_library(value):
                    self._named(names, vars(value))

    def _class(self, kind: type, entries: tuple[str, ...] = _ENTRIES) -> None:
        """A class, and of one that is not installed what its methods name."""
        self.found.append(kind)
        if kind in self.classes:
            return
        self.classes.add(kind)
        own = [base for base in kind.__mro__ if not _installed(base)]
        todo, known = list(entries), set(entries)
        while own and todo:
            name = todo.pop()
            for base in own:
                if name in vars(base):
                    member = vars(base)[name]
                    self.found.append(name)
                    self.at(getattr(member, "__func__", None) or getattr(member, "fget", None) or member)
                    if isinstance(member, types.FunctionType):
                        more = [n for n in _names(member.__code__) if n not in known]
                        known.update(more)
                        todo += more
