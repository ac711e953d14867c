"""The benchmarks stand beside the package: their tests import them from the checkout's root."""

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Callable[[str], ModuleType]:
    """Name -> module of benchmarks/."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def harness(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("harness")
