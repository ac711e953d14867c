"""What Triton's own launcher makes of real calls: every kind of them compiles, with integers that are 1 and tensors
that are None turned into constants. A GPU would compile at the call; the interpreter does neither."""

from collections.abc import Callable

CODE = """
from fastgen.kernels import nearest_launch


def search(n, m, d, mask=None, dtype=torch.float32):
    return aot.launched(nearest_launch.search, torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype), mask)


calls = {
    "single points": search(1, 1, 1),
    "a mask": search(3, 200, 20, torch.arange(200) % 2 == 0, torch.bfloat16),
    "of many coordinates": search(130, 3000, 800),
}
"""


def test_every_kind_of_call_compiles(compiled: Callable[[str], dict[str, list[str]]]) -> None:
    every = ["nearest_pack", "nearest_pack", "nearest_filter", "nearest_rank"]
    assert compiled(CODE) == {"single points": every, "a mask": every, "of many coordinates": every}
