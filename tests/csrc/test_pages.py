"""Memory that is to be written whole comes in large pages: which addresses are asked for, read back from the kernel."""

import re
from pathlib import Path

import pytest
import torch

from fastgen import functional as F
from fastgen.ops import backend

MIB = 1 << 20
SMAPS = Path("/proc/self/smaps")

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without large pages"
)


def asked_for(start: int, end: int) -> int:
    """How many bytes of the addresses lie in mappings that are to be of large pages."""
    found, edges = 0, (0, 0)
    for line in SMAPS.read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            edges = int(head[1], 16), int(head[2], 16)
        elif line.startswith("VmFlags:") and "hg" in line.split():
            found += max(0, min(end, edges[1]) - max(start, edges[0]))
    return found


@pytest.mark.parametrize(("offset", "size"), [(0, 64 * MIB), (4097, 40 * MIB + 3), (64, 32 * MIB), (0, 32 * MIB - 1)])
def test_whole_pages_within_the_memory(offset: int, size: int) -> None:
    module = backend.extension()
    assert module is not None
    memory = torch.empty(size + offset + 16 * MIB, dtype=torch.uint8)
    base, large = memory.data_ptr(), 2 * MIB
    start, end = base + offset, base + offset + size
    before = asked_for(base, base + len(memory))
    module.large_pages(start, size)
    expected = end // large * large - -(-start // large) * large if size >= 32 * MIB else 0
    assert asked_for(start, end) - before == expected
    assert asked_for(base, base + len(memory)) - before == expected
    module.large_pages(0, size)


@pytest.mark.parametrize("kind", ["noise", "distance"])
def test_outputs_are_asked_for(kind: str) -> None:
    if kind == "noise":
        out = F.langevin_noise((1, 40 * MIB // 4), seed=1)
    else:
        maps = [torch.ones(1, 64, 512, 512).requires_grad_()]
        (out,) = torch.autograd.grad(
            F.lpips_distance(maps, [torch.zeros(1, 64, 512, 512)], [torch.ones(64)]).sum(), maps
        )
    assert asked_for(out.data_ptr(), out.data_ptr() + out.nbytes) >= out.nbytes - 4 * MIB
