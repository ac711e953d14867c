"""The 3x3 convolution by transformed kernels, compiled for each instruction set, against sums in float64."""

import pytest
import torch
import torch.nn.functional as tf

from fastgen.ops import perceptual_conv as ops

SHAPES = [  # n, h, w, in, out: odd sides, a side of 1, an odd number of panels, tasks of whole and of split channels
    (2, 7, 5, 16, 16),
    (1, 1, 1, 32, 48),
    (3, 6, 9, 48, 80),
    (2, 13, 2, 64, 16),
    (1, 1, 40, 16, 32),
    (1, 30, 37, 16, 64),
    (5, 4, 4, 512, 96),
    (2, 33, 34, 32, 32),
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(n: int, h: int, w: int, channels: int, out: int) -> tuple[torch.Tensor, ...]:
    x, mask = torch.randn(2, n, channels, h, w)
    return x, mask, torch.randn(out, channels, 3, 3), torch.randn(out)


def expected(x, weight, bias, relu=False, mask=None):
    """And Σ |x| |w|, of which float32 may lose some roundings."""
    x, weight = x.double(), weight.double()
    x = x if mask is None else torch.where(mask > 0, x, 0)
    y = tf.conv2d(x, weight, None if bias is None else bias.double(), padding=1)
    return (y.relu() if relu else y), tf.conv2d(x.abs(), weight.abs(), padding=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_equals_sums_in_float64(isa, shape, masked, relu):
    x, mask, weight, bias = drawn(*shape)
    mask, bias = (mask if masked else None), (None if masked else bias)
    y = ops.conv3x3(x, ops.transformed(weight), bias, relu, mask)
    want, scale = expected(x, weight, bias, relu, mask)
    assert y.shape == want.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert float(((y - want).abs() / scale).max()) < 2e-6
    assert float((y - want).norm() / want.norm()) < 6e-7  # torch's own float32 sums: 2e-7


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_for_any_threads(isa, threads, shape):
    x, mask, weight, bias = drawn(*shape)
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(ops.conv3x3(x, ops.transformed(weight), bias, mask=mask))
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_sample_does_not_depend_on_the_others(isa):
    x, _, weight, bias = drawn(5, 9, 31, 32, 48)
    kernel = ops.transformed(weight)
    whole = ops.conv3x3(x, kernel, bias)
    assert torch.equal(whole, torch.cat([ops.conv3x3(one[None], kernel, bias) for one in x]))


def test_what_is_not_finite(isa):
    """It stays, through a ReLU and a mask too, and goes no further than a pixel beyond where sums would have it."""
    x, mask, weight, bias = drawn(1, 12, 12, 16, 16)
    x[0, 3, 6, 5] = float("nan")
    y = ops.conv3x3(x, ops.transformed(weight), bias, relu=True)
    bad = ~y.isfinite()
    assert bad[0, :, 5:8, 4:7].all()
    assert not bad[0, :, [*range(4), *range(9, 12)]].any()
    assert not bad[0, :, :, [*range(3), *range(8, 12)]].any()
    want, _ = expected(x, weight, bias, relu=True)
    torch.testing.assert_close(y[~bad].double(), want[~bad], rtol=1e-4, atol=1e-4)
    mask[0, 3, 6, 5] = float("nan")  # as torch's threshold_backward has it
    assert ops.conv3x3(torch.ones_like(x), ops.transformed(weight), bias, mask=mask).isfinite().all()
    assert ops.conv3x3(x, ops.transformed(weight), bias, mask=mask).isnan().any()
    mask[0, 3, 6, 5] = -1.0
    assert ops.conv3x3(x, ops.transformed(weight), bias, mask=mask).isfinite().all()


def test_no_images():
    kernel = ops.transformed(torch.randn(32, 16, 3, 3))
    assert ops.conv3x3(torch.empty(0, 16, 4, 4), kernel, None).shape == (0, 32, 4, 4)


def test_where_it_serves():
    x, weight = torch.empty(2, 16, 4, 4), torch.empty(32, 16, 3, 3)
    assert ops.fits(x, weight, (1, 1))
    assert not ops.fits(x[:1], weight, (1, 1))  # four tiles
    assert not ops.fits(x, weight, (0, 0))
    assert not ops.fits(x, torch.empty(32, 16, 1, 1), (1, 1))
    assert not ops.fits(x, torch.empty(24, 16, 3, 3), (1, 1))
    assert not ops.fits(torch.empty(2, 3, 4, 4), torch.empty(32, 3, 3, 3), (1, 1))
