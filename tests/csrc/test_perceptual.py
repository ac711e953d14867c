"""The C++ kernels on every instruction set of this processor, and that they are what the CPU runs."""

import pytest
import torch

from fastgen.ops import backend
from fastgen.ops import perceptual as ops


def test_the_cpu_runs_them():
    assert backend.explain("perceptual", "cpu")[0] == "cpp"


# strips of 8, 16 and 32 pixels, blocks of 1024, 240 and 64, groups of 16; whole and torn at the end
@pytest.mark.parametrize(
    "shape", [(2, 3, 33, 33), (1, 136, 16, 17), (2, 512, 8, 9), (3, 7, 1, 31), (1, 1, 5, 5)], ids=str
)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_isa(isa, dtype, shape, last):
    layout = torch.channels_last if last else torch.contiguous_format
    f0, f1 = (torch.randn(shape, dtype=torch.float64).relu().to(dtype).contiguous(memory_format=layout) for _ in "01")
    weight, upstream = torch.rand(shape[1], dtype=dtype), torch.randn(shape[0], dtype=dtype)
    f0[0, :, 0, 3], f1[0, :, 0, 4] = 0, 0
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6

    def run(a, b, w, u):
        for eps in ((1e-10, False), (1e-8, True)):
            yield ops.lpips_layer(a, b, w, *eps)
            yield ops.lpips_layer_backward(u, a, b, w, *eps)
            yield from ops.lpips_layer_backward_both(u, a, b, w, *eps)
        for squared in (False, True):
            yield ops.feature_distance(a, b, squared)
            yield ops.feature_distance_backward(u, a, b, squared)

    got = list(run(f0, f1, weight, upstream))
    with backend.force("reference"):
        want = list(run(f0.double(), f1.double(), weight.double(), upstream.double()))
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert float((a.double() - b).norm()) <= tolerance * max(float(b.norm()), 0.1), k
    assert not got[1][0, :, 0, 3].any()
    assert torch.equal(ops.lpips_layer(f0, f0.clone(), weight, 1e-10, False), torch.zeros(shape[0], dtype=dtype))
