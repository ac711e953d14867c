"""What a recording of a loss asks of torch.cuda, in which order: a capture itself needs a GPU."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastgen.nn import perceptual_replay


class Stream:
    made = 0

    def __init__(self) -> None:
        Stream.made += 1
        self.name = f"stream {Stream.made}"

    def wait_stream(self, other: Any) -> None:
        Cuda.said.append(f"{self.name} waits for {other.name}")


class Cuda:
    """As much of torch.cuda as Recorder uses."""

    said: ClassVar[list[str]] = []
    now: Any = None

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
            Cuda.said.append("captured")
            if kind is None:  # torch's does not go back where its capture fails
                Cuda.now = self.before


def test_how_a_recorder_records(monkeypatch: pytest.MonkeyPatch) -> None:
    user = Stream()
    monkeypatch.setattr(Cuda, "said", [])
    monkeypatch.setattr(Cuda, "now", user)
    monkeypatch.setattr(Stream, "made", 0)
    monkeypatch.setattr(perceptual_replay, "_streams", {})
    for name in ("CUDAGraph", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(Cuda, name))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Cuda.now)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: Cuda.said.append("clear"), raising=False)
    for name in ("endAllocateToPool", "releasePool"):
        told = lambda device, pool, name=name: Cuda.said.append(f"{name} {pool} of {device}")  # noqa: E731
        monkeypatch.setattr(torch._C, f"_cuda_{name}", told, raising=False)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: Cuda.said.append(f"sleep by {Cuda.now.name}"))
    user.name = "user"

    def run() -> list[Tensor]:
        assert perceptual_replay.capturing.locked()
        Cuda.said.append(f"run by {Cuda.now.name}")
        return [torch.ones(1)]

    recorder = perceptual_replay.Recorder()
    replay, outputs = recorder(run)
    before = ["stream 1 waits for user", "run by stream 1", "user waits for stream 1", "clear"]
    before.append("capture by stream 2: pool, thread_local")
    assert Cuda.said == [*before, "run by stream 2", "captured", "clear"]
    assert Cuda.now is user
    replay()
    assert Cuda.said[-1] == "replay"
    assert outputs == [1]
    Cuda.said.clear()

    def fails() -> list[Tensor]:
        if Cuda.now.name == "stream 2":
            raise RuntimeError("not permitted")
        return run()

    with pytest.raises(RuntimeError, match="not permitted"):
        perceptual_replay.Recorder()(fails)
    after = ["endAllocateToPool pool of 0", "releasePool pool of 0", "capture by stream 2: None, thread_local"]
    assert Cuda.said == [*before, "captured", *after, "sleep by stream 2", "captured", "clear"]
    assert Cuda.now is user
