"""What recordings of chains and of losses ask of torch.cuda, in which order: a capture itself needs a GPU."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fastgen.nn import cuda_graph, langevin_graph, perceptual_replay

LOSSES = ["stream 1 waits for user", "run by stream 1", "user waits for stream 1"]  # a run beforehand
RECORDING = {"chains": [], "losses": LOSSES}


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        Cuda.said.append(f"{self.name} waits for {other.name}")


class Cuda:
    """As much of torch.cuda as recording uses."""

    said: list[str]
    now: Any
    streams: int

    @classmethod
    def Stream(cls, device: Any = None) -> Stream:
        cls.streams += 1
        return Stream(f"stream {cls.streams}")

    class CUDAGraph:
        def replay(self) -> None:
            Cuda.said.append("replay")

    class stream:
        def __init__(self, to: Any) -> None:
            self.to = to

        def __enter__(self) -> None:
            self.before, Cuda.now = Cuda.now, self.to

        def __exit__(self, *error: Any) -> None:
            Cuda.now = self.before

    class graph:
        def __init__(self, graph: Any, pool: Any = None, *, stream: Any, capture_error_mode: str) -> None:
            self.stream, self.told = stream, f"{pool}, {capture_error_mode}"

        def __enter__(self) -> None:
            Cuda.said.append(f"capture by {self.stream.name}: {self.told}")
            self.before, Cuda.now = Cuda.now, self.stream

        def __exit__(self, kind: Any, *error: Any) -> None:
            Cuda.said.append("captured" if kind is None else "failed")
            if kind is None:  # torch's does not go back where its capture fails
                Cuda.now = self.before


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> Stream:
    user = Stream("user")
    for name, value in (("said", []), ("now", user), ("streams", 0)):
        monkeypatch.setattr(Cuda, name, value, raising=False)
    for name in ("CUDAGraph", "stream", "graph", "Stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(Cuda, name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Cuda.now)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: Cuda.said.append(f"sleep by {Cuda.now.name}"))
    reserved = iter((100, 164))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: Cuda.said.append("clear"), raising=False)
    for module in (langevin_graph, perceptual_replay):
        monkeypatch.setattr(module, "_streams", {})
    return user


def record(kind: str, work: Callable[[], Any]) -> Any:
    if kind == "chains":
        return langevin_graph._record(torch.device("cpu"), work, None)
    return perceptual_replay.Recorder()(work)


@pytest.mark.parametrize("kind", ["chains", "losses"])
def test_how_it_is_recorded(kind: str, user: Stream) -> None:
    """One capture at a time: it is broken by a thread that waits for the device, as each one does as it begins."""
    capturer = "stream 1" if kind == "chains" else "stream 2"

    def work() -> list[str]:
        assert cuda_graph.capturing.locked()
        assert torch.is_autocast_cache_enabled() == (Cuda.now.name != capturer)
        Cuda.said.append(f"run by {Cuda.now.name}")
        return ["its results"]

    found, other = record(kind, work)
    capture = ["clear", f"capture by {capturer}: a pool, thread_local", f"run by {capturer}", "captured", "clear"]
    assert Cuda.said == [*RECORDING[kind], *capture]
    assert Cuda.now is user
    assert torch.is_autocast_cache_enabled()
    assert not cuda_graph.capturing.locked()
    found.replay() if kind == "chains" else found()
    assert Cuda.said[-1] == "replay"
    assert other == (64 if kind == "chains" else ["its results"])


@pytest.mark.parametrize("ended", [False, True], ids=["torch 2.11", "newer"])
@pytest.mark.parametrize("kind", ["chains", "losses"])
def test_a_capture_that_fails_is_ended(kind: str, ended: bool, user: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older torch leaves its allocator and its generator as if it went on; a capture that goes well ends the latter."""
    capturer = "stream 1" if kind == "chains" else "stream 2"

    def end(device: int, pool: Any) -> None:
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        Cuda.said.append(f"end {pool} of {device}")

    def work() -> list[str]:
        if Cuda.now.name == capturer:
            raise RuntimeError("operation not permitted when stream is capturing")
        Cuda.said.append(f"run by {Cuda.now.name}")
        return []

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    release = lambda device, pool: Cuda.said.append(f"release {pool} of {device}")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    with pytest.raises(RuntimeError, match="not permitted"):
        record(kind, work)
    after = ["end a pool of 7", "release a pool of 7", f"capture by {capturer}: None, thread_local"]
    after += [f"sleep by {capturer}", "captured"]
    capture = ["clear", f"capture by {capturer}: a pool, thread_local", "failed", *(() if ended else after), "clear"]
    assert Cuda.said == [*RECORDING[kind], *capture]
    assert Cuda.now is user
    assert torch.is_autocast_cache_enabled()
    assert not cuda_graph.capturing.locked()
