"""The benchmarks stand beside the package: their tests import them from the checkout's root."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Callable[[str], ModuleType]:
    """Name -> module of benchmarks/."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def harness(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("harness")


@pytest.fixture
def measurer(harness: ModuleType) -> Callable[..., Any]:
    """Quick, with limits that need no measuring."""
    limits = {"copy": 1e9, "float32": 1e9}
    return lambda **more: harness.Measurer(torch.device("cpu"), rounds=4, at_least=0.001, limits=limits, **more)
