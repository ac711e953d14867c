"""What tests of models share."""

import multiprocessing
import socket
from collections.abc import Callable

import pytest

Apart = Callable[..., list[int | None]]


@pytest.fixture
def run_apart() -> Apart:
    """`run_apart(code, processes=1)`."""
    return _run_apart


def _run_apart(code: str, processes: int = 1) -> list[int | None]:
    """Exit codes of processes that run `code` as torchrun would start them; their imports are made once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "fastgen.models.imle_image", "fastgen.models.imle_reverse"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        told = {name: str(value) for name, value in environment.items()} if processes > 1 else {}
        before = f"import os, torch; os.environ.update({told!r}); torch.set_num_threads(1)\n"
        child = context.Process(target=exec, args=(before + code, {"__name__": "child"}))
        child.start()
        started.append(child)
    for child in started:
        child.join(200)
        child.kill()
    return [child.exitcode for child in started]
