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


@pytest.mark.parametrize("sides", [(112, 112), (111, 113)], ids=str)  # rows that begin with a vector, or do not
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_that_are_written_past_the_caches(isa, dtype, sides, last):
    """Together they are; each of the images' own, of under 4 MiB, is not: to the bit the same."""
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (3, 32, *sides)
    f0, f1 = (torch.randn(shape, dtype=dtype).relu().contiguous(memory_format=layout) for _ in "01")
    weight, upstream = torch.rand(shape[1], dtype=dtype), torch.randn(shape[0], dtype=dtype)
    whole = (*ops.lpips_layer_backward_both(upstream, f0, f1, weight, 1e-10, False),)
    whole = (*whole, ops.lpips_layer_backward(upstream, f0, f1, weight, 1e-10, False))
    assert f0.nbytes >= 1 << 22 > f0[0].nbytes
    for k in range(shape[0]):
        one = (upstream[k : k + 1], f0[k : k + 1], f1[k : k + 1], weight, 1e-10, False)
        each = (*ops.lpips_layer_backward_both(*one), ops.lpips_layer_backward(*one))
        for got, want in zip(whole, each, strict=True):
            assert want.any()
            assert torch.equal(got[k : k + 1], want)


HALVES = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # their least subnormals


@pytest.mark.parametrize("shape", [(2, 3, 33, 33), (1, 136, 16, 17), (2, 64, 8, 8), (1, 1, 5, 5)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", list(HALVES), ids=str)
def test_half_types_are_the_floats_they_stand_for(isa, dtype, shape, last):
    """To the bit: values those of the widened maps, gradients theirs rounded to nearest even."""
    layout = torch.channels_last if last else torch.contiguous_format
    f0, f1 = (torch.randn(shape).mul(3).relu().to(dtype).contiguous(memory_format=layout) for _ in "01")
    f0[0, :, 0, 0], f1[0, 0, 1, 1] = HALVES[dtype], 3 * HALVES[dtype]
    weight = torch.rand(shape[1])
    for size in (1.0, 1e-4):  # subnormal gradients too
        upstream = torch.randn(shape[0]) * size
        for eps in ((1e-10, False), (1e-8, True)):
            wide, half = ((f0.float(), f1.float()), (f0, f1))
            assert torch.equal(ops.lpips_layer(*half, weight, *eps), ops.lpips_layer(*wide, weight, *eps))
            for got, want in zip(
                (
                    *ops.lpips_layer_backward_both(upstream, *half, weight, *eps),
                    ops.lpips_layer_backward(upstream, *half, weight, *eps),
                ),
                (
                    *ops.lpips_layer_backward_both(upstream, *wide, weight, *eps),
                    ops.lpips_layer_backward(upstream, *wide, weight, *eps),
                ),
                strict=True,
            ):
                assert got.dtype == dtype
                assert torch.equal(got, want.to(dtype))
            for signed in (0, -3):
                got, want = (ops.lpips_project(f, weight, 70, signed, 1, *eps) for f in (f0, f0.float()))
                assert torch.equal(got, want)
        for squared in (False, True):
            assert torch.equal(ops.feature_distance(*half, squared), ops.feature_distance(*wide, squared))
            got, want = (ops.feature_distance_backward(upstream, *pair, squared) for pair in (half, wide))
            assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("dtype", list(HALVES), ids=str)
def test_every_half_is_read_and_written(isa, dtype):
    """All 65,536 patterns through (x − 0)², and each float32 near a boundary back."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    zero = torch.zeros_like(every)
    pairs = every.view(-1, 1), zero.view(-1, 1)
    got, want = ops.feature_distance(*pairs, False), every.float().abs()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()], want[~want.isnan()])
    slopes = torch.cat([every.float(), (every.float() * (1 + 2.0**-9)), every.float() * (1 + 2.0**-12), want * 1.5])
    ones, none = torch.ones(len(slopes), 1, dtype=dtype), torch.zeros(len(slopes), 1, dtype=dtype)
    got, want = ops.feature_distance_backward(slopes, ones, none, False).view(-1), slopes.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()], want[~want.isnan()])
