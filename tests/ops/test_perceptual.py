"""The ops: registration, and kernels against the oracle for dtypes, layouts and odd shapes."""

import pytest
import torch
from torch import Tensor

from fastgen.ops import backend
from fastgen.ops import perceptual as ops

EPS = {"lpips": (1e-10, False), "torchmetrics": (1e-8, True)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 17, 1, 13), (2, 64, 4, 4), (1, 131, 3, 2), (0, 4, 2, 2)]


def layouts(f: Tensor) -> dict[str, Tensor]:
    n, c, h, w = f.shape
    wide = torch.full((n, c, h, 2 * w + 1), torch.nan, dtype=f.dtype)
    wide[..., 1::2] = f
    return {
        "contiguous": f,
        "channels_last": f.contiguous(memory_format=torch.channels_last),
        "strided": wide[..., 1::2],
        "transposed": f.transpose(2, 3).contiguous().transpose(2, 3),
    }


def maps(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    f0, f1 = (torch.randn(shape, dtype=torch.float64).relu().to(dtype) for _ in range(2))
    return f0, f1, torch.rand(shape[1], dtype=torch.float64).float(), torch.randn(shape[0], dtype=torch.float64)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert not got.isnan().any()
    scale = max(float(want.double().norm()), 0.1)  # of one channel only rounding is left
    assert float((got.double() - want).norm()) <= tolerance * scale


@pytest.fixture(params=["cpp", "reference"])
def kernel(request):
    """What runs without a compiler is held to the oracle too."""
    with backend.force(request.param):
        yield request.param


@pytest.mark.parametrize("eps_mode", list(EPS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_lpips_layer(oracle, kernel, dtype, shape, eps_mode):
    f0, f1, weight, upstream = maps(shape, dtype)
    upstream = upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)
    value = oracle.lpips_layer(f0, f1, weight, eps_mode)
    grads = oracle.lpips_layer_gradients(f0, f1, weight, upstream, eps_mode)
    value_tolerance = 1e-12 if dtype == torch.float64 else 1e-6  # sums are wide: half types lose nothing in the value
    first = None
    for (name, g0), g1 in zip(layouts(f0).items(), layouts(f1).values(), strict=True):
        got = ops.lpips_layer(g0, g1, weight, *EPS[eps_mode])
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        close(got, value, value_tolerance)
        both = ops.lpips_layer_backward_both(upstream, g0, g1, weight, *EPS[eps_mode])
        one = ops.lpips_layer_backward(upstream, g0, g1, weight, *EPS[eps_mode])
        other = ops.lpips_layer_backward(upstream, g1, g0, weight, *EPS[eps_mode])
        close(both[0], grads[0], TOLERANCE[dtype])
        close(both[1], grads[1], TOLERANCE[dtype])
        assert torch.equal(one, both[0]), name
        assert torch.equal(other, both[1]), name
        assert one.dtype == dtype
        assert one.stride() == torch.empty_like(g0).stride()
        close(ops.lpips_layer_backward_weight(upstream, g0, g1, *EPS[eps_mode]), grads[2], value_tolerance * 3)
        if name == "contiguous":
            first = got
        if name in ("strided", "transposed") and kernel == "cpp":
            assert torch.equal(got, first), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 37, 41)], ids=str)  # the last of more than one span of pixels
def test_what_the_forward_pass_keeps(kernel, dtype, shape):
    """Gradients from it are those that make their own, to the bit, of either side too."""
    f0, f1, weight, upstream = maps(shape, dtype)
    upstream = upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for eps in EPS.values():
        for g0, g1 in zip(layouts(f0).values(), layouts(f1).values(), strict=True):
            value, kept = ops.lpips_layer_kept(g0, g1, weight, *eps)
            assert torch.equal(value, ops.lpips_layer(g0, g1, weight, *eps))
            assert kept.shape == (2, 2, shape[0], shape[2], shape[3] if kernel == "cpp" else 0)
            both = ops.lpips_layer_backward_both(upstream, g0, g1, weight, *eps)
            got = ops.lpips_layer_backward_both(upstream, g0, g1, weight, *eps, kept)
            other = ops.lpips_layer_backward(upstream, g1, g0, weight, *eps, kept.flip(1))
            assert all(torch.equal(a, b) for a, b in zip(got, both, strict=True))
            assert torch.equal(other, both[1])


def test_mixed_layouts(oracle):
    f0, f1, weight, upstream = maps((2, 33, 4, 5), torch.float32)
    upstream = upstream.float()
    want = oracle.lpips_layer_gradients(f0, f1, weight, upstream, "lpips")
    last = f1.contiguous(memory_format=torch.channels_last)
    close(ops.lpips_layer(f0, last, weight, 1e-10, False), oracle.lpips_layer(f0, f1, weight, "lpips"), 1e-6)
    grads = ops.lpips_layer_backward_both(upstream, f0, last, weight, 1e-10, False)
    for got, expected, f in zip(grads, want[:2], (f0, last), strict=True):
        close(got, expected, 3e-6)
        assert got.stride() == f.stride()


@pytest.mark.parametrize("eps_mode", list(EPS))
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_zero_vectors_and_identity(kernel, eps_mode, last):
    f0, f1, weight, _ = maps((2, 19, 6, 6), torch.float32)
    f0[:, :, 2], f1[:, :, 3] = 0, 0
    f0[:, :, 4], f1[:, :, 4] = 0, 0
    if last:
        f0, f1 = (f.contiguous(memory_format=torch.channels_last) for f in (f0, f1))
    grad0, grad1 = ops.lpips_layer_backward_both(torch.ones(2), f0, f1, weight, *EPS[eps_mode])
    assert grad0.isfinite().all()
    assert grad1.isfinite().all()
    assert grad0[:, :, 0].abs().sum() > 0
    if eps_mode == "lpips":
        assert not grad0[:, :, 2].any()
        assert not grad1[:, :, 3].any()
    assert not grad0[:, :, 4].any()
    same = f0.clone(memory_format=torch.preserve_format)
    assert torch.equal(ops.lpips_layer(f0, same, weight, *EPS[eps_mode]), torch.zeros(2))
    assert not ops.lpips_layer_backward(torch.ones(2), f0, same, weight, *EPS[eps_mode]).any()
    swapped = ops.lpips_layer(f1, f0, weight, *EPS[eps_mode])
    assert torch.equal(ops.lpips_layer(f0, f1, weight, *EPS[eps_mode]), swapped)


@pytest.mark.parametrize("eps_mode", list(EPS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e19], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_not_finite(kernel, eps_mode, bad, last):
    f0, f1, weight, _ = maps((2, 9, 3, 3), torch.float32)
    if last:
        f0, f1 = (f.contiguous(memory_format=torch.channels_last) for f in (f0, f1))
    f0[1, 4, 1, 2] = bad
    for a, b in ((f0, f1), (f1, f0)):
        got = ops.lpips_layer(a, b, weight, *EPS[eps_mode])
        assert got[1].isnan()
        assert got[0].isfinite()
        grad = ops.lpips_layer_backward(torch.ones(2), a, b, weight, *EPS[eps_mode])
        assert grad[1, :, 1, 2].isnan().all()
        assert grad[0].isfinite().all()


@pytest.mark.parametrize("squared", [False, True], ids=["l1", "l2"])
@pytest.mark.parametrize("shape", [(2, 5), (1, 1, 1, 1), (3, 7, 5, 3), (2, 300, 9, 8), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_feature_distance(oracle, kernel, dtype, shape, squared):
    f0, f1 = torch.randn(shape, dtype=torch.float64).to(dtype), torch.randn(shape, dtype=torch.float64).to(dtype)
    upstream = torch.randn(shape[0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = oracle.feature_distance([f0], [f1], "l2" if squared else "l1", [1.0])
    difference = f0.double() - f1.double()
    size = f0[0].numel() if shape[0] else 1
    slope = (2 * difference if squared else difference.sign()) * upstream.double().reshape(-1, *[1] * (len(shape) - 1))
    pairs = [(f0, f1)]
    if len(shape) == 4:
        pairs += list(zip(layouts(f0).values(), layouts(f1).values(), strict=True))
        pairs.append((f0, layouts(f1)["channels_last"]))
    for g0, g1 in pairs:
        close(ops.feature_distance(g0, g1, squared), want, 1e-12 if dtype == torch.float64 else 1e-6)
        grad = ops.feature_distance_backward(upstream, g0, g1, squared)
        close(grad, slope / size, TOLERANCE[dtype])
        assert grad.dtype == dtype
        assert grad.stride() == torch.empty_like(g0).stride()


def test_feature_distance_ties_and_nan(kernel):
    f0, f1 = torch.randn(3, 40), torch.randn(3, 40)
    f0[0, 3], f0[1, 7] = f1[0, 3], torch.nan
    assert ops.feature_distance(f0, f1, False).isnan().tolist() == [False, True, False]
    grad = ops.feature_distance_backward(torch.ones(3), f0, f1, False)
    assert grad[0, 3] == 0
    assert grad.isnan().sum() == 1
    assert grad[1, 7].isnan()
    assert torch.equal(ops.feature_distance(f0[:1], f0[:1].clone(), False), torch.zeros(1))


def test_threads_do_not_matter():
    f0, f1, weight, upstream = maps((3, 70, 17, 19), torch.float32)
    upstream, found, before = upstream.float(), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for last in (torch.contiguous_format, torch.channels_last):
                a, b = f0.contiguous(memory_format=last), f1.contiguous(memory_format=last)
                found.append(
                    (
                        ops.lpips_layer(a, b, weight, 1e-10, False),
                        *ops.lpips_layer_backward_both(upstream, a, b, weight, 1e-10, False),
                        ops.feature_distance(a, b, True),
                    )
                )
    finally:
        torch.set_num_threads(before)
    for k, results in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(results, found[k % 2], strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(layout, dtype):
    f0, f1, weight, upstream = maps((2, 5, 3, 4), dtype)
    f0, f1 = layouts(f0)[layout], layouts(f1)[layout]
    upstream = upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, arguments in (
        (ops.lpips_layer, (f0, f1, weight, 1e-10, False)),
        (ops.lpips_layer_kept, (f0, f1, weight, 1e-10, False)),
        (ops.lpips_layer_backward, (upstream, f0, f1, weight, 1e-10, False)),
        (ops.lpips_layer_backward_both, (upstream, f0, f1, weight, 1e-8, True)),
        (ops.lpips_layer_backward_weight, (upstream, f0, f1, 1e-10, False)),
        (ops.feature_distance, (f0, f1, True)),
        (ops.feature_distance_backward, (upstream, f0, f1, False)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_cuda(oracle, last):
    f0, f1, weight, upstream = maps((2, 67, 5, 9), torch.float32)
    upstream = upstream.float()
    value = oracle.lpips_layer(f0, f1, weight, "lpips")
    grads = oracle.lpips_layer_gradients(f0, f1, weight, upstream, "lpips")
    layout = torch.channels_last if last else torch.contiguous_format
    g0, g1 = (f.cuda().contiguous(memory_format=layout) for f in (f0, f1))
    close(ops.lpips_layer(g0, g1, weight.cuda(), 1e-10, False).cpu(), value, 1e-6)
    got = ops.lpips_layer_backward_both(upstream.cuda(), g0, g1, weight.cuda(), 1e-10, False)
    close(got[0].cpu(), grads[0], 3e-6)
    close(got[1].cpu(), grads[1], 3e-6)
    close(ops.feature_distance(g0, g1, False).cpu(), oracle.feature_distance([f0], [f1], "l1", [1.0]), 1e-6)
