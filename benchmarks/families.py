"""The families by name: `benchmarks/<family>.py` sets its works up."""

import importlib
from typing import Any

from benchmarks.harness import Work

FAMILIES = ("mmd", "langevin", "perceptual", "nearest")


def works(family: str, scale: str) -> list[Work]:
    """What a family measures at a scale: demo (seconds), quick, full, huge (hours)."""
    found: list[Work] = module(family).works(scale)
    return found


def module(family: str) -> Any:
    return importlib.import_module(f"benchmarks.{family}")
