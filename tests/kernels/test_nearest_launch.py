"""What Triton's own launcher makes of real calls: every kind of them compiles, with integers that are 1 and tensors
that are None turned into constants. A GPU would compile at the call; the interpreter does neither."""

from collections.abc import Callable

CODE = """
from fastgen.kernels import nearest_launch


def search(n, m, d, mask=None, dtype=torch.float32):
    return aot.launched(nearest_launch.search, torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype), mask)


def distance(n, m, d, dtype):
    points = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    return aot.launched(nearest_launch.distance, *points, torch.zeros(n, 1, dtype=torch.int64))


calls = {
    "single points": search(1, 1, 1) + distance(1, 1, 1, torch.float32),
    "a mask": search(3, 200, 20, torch.arange(200) % 2 == 0, torch.bfloat16) + distance(3, 200, 20, torch.float64),
    "of many coordinates": search(130, 3000, 800) + distance(16, 3000, 800, torch.bfloat16),
    "many queries": search(5000, 300, 32) + search(5000, 300, 33),
}
"""


def test_every_kind_of_call_compiles(compiled: Callable[[str], dict[str, list[str]]]) -> None:
    search = [f"nearest_{kernel}" for kernel in ("extent", "centre", "pack", "filter", "rank")]
    every = [*search, "nearest_distance"]
    assert compiled(CODE) == {
        "single points": every,
        "a mask": every,
        "of many coordinates": every,
        "many queries": search + search,
    }
