"""One run in several processes, as `torchrun` starts them: who leads, who waits, what is shared."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from fastgen.check import UserError

T = TypeVar("T")


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def joined() -> Iterator[dict[str, Any]]:
    """Join the processes that torchrun started (none where it did not); yields what lightning.Trainer is told of it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield {}
        return
    own = not dist.is_initialized()
    if own:
        # What goes round before Lightning has given each process its device, or for good where it trains on the CPU,
        # would else meet on the first GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
        # A module's buffers are the same everywhere already; sent with every step they would be most of the traffic.
        strategy = DDPStrategy(broadcast_buffers=False)
        yield {"strategy": strategy, "devices": local, "num_nodes": world // local, "use_distributed_sampler": False}
    finally:
        if own:
            dist.destroy_process_group()


def lead(action: Callable[[], T], follow: Callable[[], T]) -> T:
    """`action()` in the first process, then `follow()` in the others; a UserError or OSError of the first is
    everybody's."""
    if size() == 1:
        return action()
    told: list[str | None] = [None]
    result: T | None = None
    if rank() == 0:
        try:
            result = action()
        except (UserError, OSError) as error:
            told = [str(error)]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise UserError(told[0])
    return follow() if result is None else result


def smallest(distance: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """min over (distance, index) of all processes, row by row: associative, so the same for any split."""
    if size() > 1:
        least = distance.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        index = torch.where(distance == least, index, torch.iinfo(torch.int64).max)
        dist.all_reduce(index, dist.ReduceOp.MIN)
        distance = least
    return distance, index


def summed(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values
