"""Fixtures of every floor. The suite refuses to run on the reference by accident: it would test nothing."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before fastgen.kernels loads

import pytest
import torch

HERE = Path(__file__).parent


def _mend_the_interpreter() -> None:
    """Triton 3.6's takes the bounds of a loop out of arrays of one element as numpy 2.4 refuses to (triton #9171); and
    it keeps bfloat16 as bits, which it multiplies as the integers that they are, and cuts off what it should round."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def multiplied(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (cast(self, p, tl.float32) if p.dtype.scalar == tl.bfloat16 else p for p in (a, b))
        return dot(self, a, b, *rest)

    def rounded(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            bits = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, source, to)

    interpreter._patch_lang_tensor = patched
    builder.create_dot, builder.cast_impl = multiplied, rounded


def pytest_configure(config: pytest.Config) -> None:
    from fastgen.ops import backend

    _mend_the_interpreter()
    if backend.extension() is None and os.environ.get("FASTGEN_ALLOW_REFERENCE") != "1":
        raise pytest.UsageError(
            "fastgen._C is not built, so the suite would test the reference against itself: "
            "run `make build`, or set FASTGEN_ALLOW_REFERENCE=1 to mean it"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def oracle(request: pytest.FixtureRequest) -> ModuleType:
    """tests/oracle/<stem>.py for a test in any test_<stem>.py: the naive float64 meaning of the family."""
    stem = request.path.stem.removeprefix("test_").split("_")[0]
    spec = importlib.util.spec_from_file_location(f"oracle_{stem}", HERE / "oracle" / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels run on one instruction set after the other, as far as the processor has them."""
    from fastgen.ops import backend

    extension = backend.extension()
    if extension is None:
        pytest.skip("fastgen._C is not built")
    before = extension.isa()
    try:
        extension.set_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    extension.set_isa(before)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
