"""Fixtures of every floor. The suite refuses to run on the reference by accident: it would test nothing."""

import importlib.util
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before fastgen.kernels loads

import pytest
import torch

HERE = Path(__file__).parent
# What takes long to import and processes of the tests need: their server does it, once for each of pytest's workers.
IMPORTED = ["lightning.pytorch", "fastgen.cli", "fastgen.models.imle_image", "fastgen.models.imle_reverse"]
APART = """
import os, sys
for stream, path in enumerate(streams, 1):
    os.dup2(os.open(path, os.O_WRONLY), stream)
sys.stdout.reconfigure(line_buffering=True)
os.environ.update(environment)
os.chdir(folder)
import torch
torch.set_num_threads(1)
"""


class Done(NamedTuple):
    returncode: int | None
    stdout: str
    stderr: str


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
    return _oracle(request.path.stem.removeprefix("test_").split("_")[0])


@pytest.fixture
def oracles() -> Callable[[str], ModuleType]:
    """By the stem, for a test of several families."""
    return _oracle


def _oracle(stem: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"oracle_{stem}", HERE / "oracle" / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def not_interpreted() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted: the suite's GPU stage runs without TRITON_INTERPRET")


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


@pytest.fixture
def run_apart(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Done]]:
    """`run_apart(code, processes=1, folder=..., seconds=200, **names)`: `code` in that folder, with its `rank` and
    `names`, forked from a server that has imported what takes long; several processes as torchrun starts them."""

    def run(code: str, processes: int = 1, folder: Path = HERE.parent, seconds: int = 200, **names: Any) -> list[Done]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        out = tmp_path_factory.mktemp("apart")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "TORCHELASTIC_RUN_ID": "none"}
        group |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        started = []
        for rank in range(processes):
            told = {**group, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            names |= {"__name__": "child", "rank": rank, "folder": str(folder)}
            names |= {"environment": {name: str(value) for name, value in told.items()}}
            names |= {"streams": [str(out / f"{name}{rank}") for name in ("out", "err")]}
            for path in names["streams"]:
                Path(path).touch()
            started.append(context.Process(target=exec, args=(APART + code, dict(names))))
        try:
            for child in started:
                child.start()
            for child in started:
                child.join(seconds)
        finally:
            for child in started:
                child.kill()
                child.join()
        texts = [[(out / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(processes)]
        return [Done(child.exitcode, *text) for child, text in zip(started, texts, strict=True)]

    return run


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
