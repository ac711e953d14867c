"""What is launched again is what was launched before; a kernel that Triton would compile anew is not taken for it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgen.kernels import relaunch, tuned

ROOT = Path(__file__).parents[2]


class Compiled:
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.seen.append(("again", grid, arguments))


class Kernel:
    arg_names = ("a_ptr", "n", "BLOCK", "FLAG")

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Compiled:
            self.seen.append(("first", grid, arguments, constants))
            return Compiled(self.seen)

        return launch


def test_again_passes_what_first_passed() -> None:
    kernel = Kernel()
    launcher = relaunch.Relaunch(kernel)
    constants = {"FLAG": True, "num_warps": 4, "BLOCK": 64}
    assert not launcher.again("key", (1, 2))
    launcher.first("key", (7,), (1, 2), constants)
    assert launcher.again("key", (3, 4))
    assert not launcher.again("other", (3, 4))
    assert kernel.seen == [("first", (7,), (1, 2), constants), ("again", (7, 1, 1), (3, 4, 64, True))]


def test_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaunch, "MOST", 3)
    launcher = relaunch.Relaunch(Kernel())
    for key in range(4):
        launcher.first(key, (1,), (1, 2), {"BLOCK": 1, "FLAG": 1})
    assert [launcher.again(key, (1, 2)) for key in range(4)] == [False, False, False, True]


def test_aligned() -> None:
    x = torch.zeros(64)
    assert relaunch.aligned(x, None, x[1:], x[4:]) == (True, None, False, True)


def test_a_search_changes_the_key() -> None:
    before = tuned.changes()
    with tuned.forced("langevin", "groups", {}):
        inside = tuned.changes()
    assert len({before, inside, tuned.changes()}) == 3


# Triton's own launch is replaced by one that says what it would compile and with which arguments it would run.
DRIVER = """
import itertools, math
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

class Compiled:
    function = packed_metadata = None
    def __init__(self, key):
        self.key = key
    def launch_metadata(self, *rest):
        pass
    def run(self, g0, g1, g2, stream, function, packed, metadata, enter, leave, *arguments):
        seen.append((self.key, (g0, g1, g2), arguments))
    def __getitem__(self, grid):
        return lambda *arguments: self.run(*grid, 0, None, None, None, None, None, *arguments)

def compile(self, key, *rest):
    self.device_caches[0][0][key] = made = Compiled(key)
    return made

driver.set_active(Driver())
JITFunction._do_compile = compile
seen = []

def check(calls, launch, launcher, given):  # `given`: how many of the arguments are the caller's own
    for arguments in calls():
        start = len(seen)
        for _ in range(2):
            launch(*arguments)
        first, again = seen[start:]
        for i, (a, b) in enumerate(zip(first[2], again[2], strict=True)):
            if isinstance(a, torch.Tensor):
                assert a is b if i < given else (a.dtype, a.shape) == (b.dtype, b.shape)
            else:
                assert a == b
        assert first[:2] == again[:2]
        launcher._kept.clear()
        launch(*arguments)
        assert seen[-1][:2] == first[:2], "kept for another call"
    for arguments in calls():  # and with all keys kept at once
        launch(*arguments)
        key = seen[-1][:2]
        before, launcher._kept = launcher._kept, {}
        launch(*arguments)
        launcher._kept = before
        assert seen[-1][:2] == key
    print(len({key for key, *_ in seen}))
"""

LANGEVIN = """
from fastgen.kernels import langevin

INF = math.inf
def calls():
    for dtype, chains, elements, shift in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), (1, 2, 16), (1, 12, 16, 3072), (0, 1)
    ):
        x = torch.zeros(chains * elements + shift, dtype=dtype)[shift:].view(chains, elements)
        each = torch.ones(chains, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        number = torch.zeros((), dtype=torch.int64)
        for more in (0, 1):
            ids, many, count = (torch.arange(chains), each, number) if more else (None,) * 3
            for clip, low, seed in ((INF, -INF, 1), (1.0, -1.0, 2**63 - 1)):
                yield (x, x.clone(), x.clone() if more else None, None, ids, many, many, count, count,
                       0.1, 0.0 if seed == 1 else 0.2, 4.0, clip, low, -low, 0.1, bool(more), seed, 5)

check(calls, langevin.step_, langevin._launcher, 99)
"""

MMD = """
from fastgen.kernels import mmd_small

def calls():
    one = torch.ones(1, 3, dtype=torch.float64)
    for dtype, batch, n, d, shift in itertools.product(
        (torch.float32, torch.bfloat16), ((), (1,), (3,)), (1, 16, 65), (1, 3, 16, 32), (0, 1)
    ):
        x, y = (
            torch.zeros(math.prod((*batch, k, d)) + shift, dtype=dtype)[shift:].view(*batch, k, d) for k in (n, 64)
        )
        for sides, terms in ((0, 7), (1, 1), (2, 7)):
            yield x, y, sides, "bf16x3", None, "rbf", (1.0, 2.0), "biased", None, None, None, terms
        yield x, y, 1, "tf32", None, "polynomial", (2.0, 0.5, 1.0), "unbiased", None, None, one[0].expand(*batch, 3)
        p, q = (torch.ones(math.prod(batch) * k + shift)[shift:].view(-1, k) for k in (n, 64))
        yield x, y, 1, "ieee", None, "imq", (1.0, 2.0), "unbiased", p, q, one

check(calls, mmd_small.mmd, mmd_small._launcher, 2)
"""


NEAREST = """
from fastgen.kernels import nearest_launch

known = nearest_launch._launcher

def ran(launch, arguments):
    start = len(seen)
    launch(*arguments)
    return [(key, grid) for key, grid, _ in seen[start:]]

def same(*call):
    nearest_launch._launcher = known.__wrapped__  # a new one each time, which has nothing to launch again
    want = ran(*call)
    nearest_launch._launcher = known
    assert ran(*call) == want == ran(*call), "kept for another call"

mask = torch.ones(4 * 4096, dtype=torch.bool)
for dtype, n, m, d, shift in itertools.product(
    (torch.float32, torch.bfloat16), (1, 16), (16, 300), (1, 16, 80), (0, 1)
):
    q, b = (torch.zeros(k * d + shift, dtype=dtype)[shift:].view(k, d) for k in (n, m))
    for allowed in (None, mask[: 2 * m : 2], mask[1 : 1 + 2 * m : 2], mask[1 : m + 1], mask[:m]):
        same(nearest_launch.search, (q, b, allowed))
    for k in (1, 2):
        same(nearest_launch.distance, (q, b, torch.zeros(n * k + shift, dtype=torch.int64)[shift:].view(n, k)))
print(len({key for key, *_ in seen}))
"""


def relaunched(code: str) -> int:
    """What `check` finds, in a process of its own: the kernels that Triton would compile for the calls."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


def test_langevin_steps_are_relaunched_as_triton_would_launch_them() -> None:
    assert relaunched(LANGEVIN) > 40


def test_small_mmds_are_relaunched_as_triton_would_launch_them() -> None:
    assert relaunched(MMD) > 40


def test_searches_are_relaunched_as_triton_would_launch_them() -> None:
    assert relaunched(NEAREST) > 30
