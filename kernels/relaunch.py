"""Launches that are like one before, without Triton's look at their arguments.

For each launch Triton finds out the types of its arguments, which integers are 1 or multiples of 16 and which pointers
are multiples of 16 bytes, and looks up what it compiled for that: ten microseconds of the host, more than many of these
kernels run. Where a short key determines all of it, what was compiled is kept under the key and launched again as
Triton's own tutorials do with a compiled kernel, in a fraction of the time.
"""

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

MOST = 1024  # keys that are kept: beyond, all are forgotten, and Triton's own cache is asked again


class Relaunch:
    """`kernel` of one place in the code.

    A key must determine whatever Triton may compile another kernel for: of each tensor whether it is there, its dtype
    and `aligned`, of each integer that is specialised its value, all constants and options, and the device."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._kept: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def again(self, key: Hashable, arguments: Sequence[Any]) -> bool:
        """Launches what was launched under that key before, on the same grid; False where nothing was."""
        kept = self._kept.get(key)
        if kept is None:
            return False
        launch, constants = kept
        launch(*arguments, *constants)
        return True

    def first(self, key: Hashable, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        """Launches as `kernel[grid](*arguments, **constants)` does, and keeps that: `arguments` are what the kernel
        takes before its constants."""
        compiled = self.kernel[grid](*arguments, **constants)
        if compiled is None:  # interpreted
            return
        if len(self._kept) >= MOST:
            self._kept.clear()
        rest = tuple(constants[name] for name in self.kernel.arg_names[len(arguments) :])
        self._kept[key] = compiled[(*grid, 1, 1)[:3]], rest


def aligned(*tensors: Tensor | None) -> tuple[bool | None, ...]:
    """Of each tensor what Triton specialises on; None where it is not there."""
    return tuple([None if t is None else t.data_ptr() % 16 == 0 for t in tensors])  # a list: twice as soon
