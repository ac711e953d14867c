"""Launch configurations that a search (`make gpu STAGE=tune`) found fastest on a device: tuned/<device>.json.

{kernel: {key: configuration}}. Where a device has no file, or a kernel no key, the table in `launch.py` stands.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"
_forced: dict[tuple[str, str], dict[str, Any]] = {}
_alone = False
_changes = 0


def slug(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


@functools.cache
def _table_of(index: int) -> dict[str, dict[str, dict[str, Any]]]:
    return _table(torch.cuda.get_device_name(index))


@functools.cache
def _table(device: str) -> dict[str, dict[str, dict[str, Any]]]:
    file = FOLDER / f"{slug(device)}.json"
    if not file.exists():
        return {}
    table: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text())["configurations"]
    return table


def find(kernel: str, key: str) -> dict[str, Any] | None:
    """What to launch `kernel` with for `key` on the current CUDA device; None where nothing was searched."""
    if (kernel, key) in _forced:
        return _forced[kernel, key]
    if _alone or not torch.cuda.is_initialized():
        return None
    return _table_of(torch.cuda.current_device()).get(kernel, {}).get(key)


def changes() -> int:
    """Another number whenever `find` may find something else."""
    return _changes


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block the launchers choose by themselves, as if nothing had been searched."""
    global _alone, _changes
    _alone, before = True, _alone
    _changes += 1
    try:
        yield
    finally:
        _changes += 1
        _alone = before


@contextmanager
def forced(kernel: str, key: str, configuration: dict[str, Any]) -> Iterator[None]:
    """Inside the block this configuration is launched (the search itself, tests)."""
    global _changes
    before = _forced.get((kernel, key))
    _forced[kernel, key] = configuration
    _changes += 1
    try:
        yield
    finally:
        _changes += 1
        del _forced[kernel, key]
        if before is not None:
            _forced[kernel, key] = before
