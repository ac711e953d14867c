"""A launch looks up the table of the device that its tensors are on, whichever is the current one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from fastgen.kernels import tuned
from torch import Tensor

from fastgen import functional as F
from fastgen.ops import backend

ROWS, MAPS = torch.rand(40, 8), torch.rand(2, 16, 8, 8)


def projected() -> None:
    given = MAPS.clone().requires_grad_()
    F.lpips_projection([given], [torch.ones(16)], dim=64).sum().backward()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("kernel", "call"),
    [
        ("langevin", lambda: F.langevin_step_(ROWS.clone(), ROWS, step_size=0.1, seed=0)),
        ("mmd_grad", lambda: F.mmd(torch.rand(1000, 8, requires_grad=True), ROWS)),
        ("nearest_filter", lambda: F.nearest(ROWS, ROWS)),
        ("lpips", lambda: F.lpips_distance([MAPS], [MAPS + 1], [torch.ones(16)])),
        ("lpips", projected),
    ],
    ids=["langevin", "mmd", "nearest", "lpips", "projection"],
)
def test_the_tables_device(kernel: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    inside, asked = [0], []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside[0] += 1
        yield
        inside[0] -= 1

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(tuned, "find", lambda kernel, key: asked.append((kernel, inside[0] > 0)))
    with backend.force("triton"):
        call()
    assert kernel in [name for name, _ in asked]
    assert all(there for _, there in asked), asked
