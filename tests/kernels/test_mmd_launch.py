"""What Triton's own launcher makes of real calls: every kind of them compiles, with integers that are 1 and tensors
that are None turned into constants. A GPU would compile at the call; the interpreter does neither."""

from collections.abc import Callable

CODE = """
from fastgen.kernels import mmd_launch, mmd_small

IMQ = ("imq", [1.0, 2.0, 3.0], "biased")
ONE = torch.ones(3, dtype=torch.float64)


def points(n, m, d, dtype=torch.float32):
    return torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)


def mmd(n, m, d, sides, *options, precision="bf16x3", dtype=torch.float32):
    return aot.launched(mmd_launch.mmd, *points(n, m, d, dtype), sides, precision, None, *options)


calls = {
    "small": mmd(140, 3, 20, 2, *IMQ, torch.ones(140), None, ONE),
    "small single points": mmd(1, 1, 1, 0, *IMQ, dtype=torch.bfloat16),
    "small in multiples of 16": mmd(16, 16, 16, 1, *IMQ, dtype=torch.float16),
}
mmd_small.MOST = 0
calls |= {
    "weights": mmd(140, 3, 20, 2, *IMQ, torch.ones(140), None, ONE),
    "single points": mmd(1, 1, 1, 1, *IMQ, dtype=torch.bfloat16),
    "of many coordinates": mmd(1, 140, 129, 1, "polynomial", [3.0, 1.0, 1.0], "biased", None, torch.ones(140), ONE),
    "directions": aot.launched(mmd_launch.hessian_product, *points(9, 2, 200), *points(9, 2, 200), "bf16x3", *IMQ),
}
"""


def test_every_kind_of_call_compiles(compiled: Callable[[str], dict[str, list[str]]]) -> None:
    assert compiled(CODE) == {
        "small": ["mmd_small"],
        "small single points": ["mmd_small"],
        "small in multiples of 16": ["mmd_small"],
        "weights": ["mmd_pack", "mmd_grad"],
        "single points": ["mmd_pack", "mmd_grad", "mmd_value"],
        "of many coordinates": ["mmd_pack", "mmd_slope", "mmd_pull", "mmd_value"],
        "directions": ["mmd_pack", "mmd_pack", *["mmd_slope", "mmd_pull", "mmd_pull"] * 2],
    }
