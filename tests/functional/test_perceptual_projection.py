"""The random projection of LPIPS's embedding: counters, every ISA, its distortion and how it is differentiated."""

import pytest
import torch

from fastgen import functional as F
from fastgen.nn import LPIPS, PerceptualEmbedding
from fastgen.ops import backend
from fastgen.ops import perceptual as ops
from fastgen.reference import perceptual as reference

EPS = {"lpips": (1e-10, False), "torchmetrics": (1e-8, True)}


@pytest.fixture(params=["baseline", "avx2", "avx512", "reference"])
def kernel(request):
    if request.param == "reference":
        with backend.force("reference"):
            yield request.param
        return
    extension = backend.extension()
    before = extension.isa()
    try:
        extension.set_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    extension.set_isa(before)


@pytest.mark.parametrize("eps_mode", list(EPS))
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3, 5, 7), 64), ((1, 5, 8, 17), 100), ((3, 2, 1, 1), 65), ((0, 2, 2, 2), 64)], ids=str
)
def test_against_the_oracle(oracle, kernel, shape, dim, eps_mode):
    f, weight = torch.randn(shape).double().relu(), torch.rand(shape[1]).double()
    for seed, layer in ((0, 0), (2**64 - 3, 4)):
        signed = seed - 2**64 if seed >= 2**63 else seed
        want = oracle.projection(f, weight, dim, seed, layer, eps_mode)
        got = ops.lpips_project(f, weight, dim, signed, layer, *EPS[eps_mode])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        for g in (f.float(), f.float().contiguous(memory_format=torch.channels_last), f.float().transpose(2, 3).mT):
            got = ops.lpips_project(g, weight.float(), dim, signed, layer, *EPS[eps_mode])
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    bad = f.float().clone()
    if shape[0]:
        bad[0, 0, 0, 0] = torch.nan
        assert ops.lpips_project(bad, weight.float(), dim, 0, 0, *EPS[eps_mode])[0].isnan().any()


@pytest.mark.parametrize("eps_mode", list(EPS))
@pytest.mark.parametrize(
    ("shape", "dim"),  # the last two of more than one block of pixels, torn and whole
    [((2, 3, 5, 7), 64), ((3, 2, 1, 1), 65), ((0, 2, 2, 2), 64), ((2, 5, 19, 17), 100), ((1, 9, 16, 32), 257)],
    ids=str,
)
def test_gradient_against_the_oracle(oracle, kernel, shape, dim, eps_mode):
    f, weight, upstream = torch.randn(shape).double().relu(), torch.rand(shape[1]).double(), torch.randn(shape[0], dim)
    if shape[0]:
        f[0, :, 0, 0] = 0
    for seed, layer in ((0, 0), (2**64 - 3, 4)):
        signed = seed - 2**64 if seed >= 2**63 else seed
        want = oracle.projection_gradient(f, weight, upstream, dim, seed, layer, eps_mode)
        options = (signed, layer, *EPS[eps_mode])
        got = ops.lpips_project_backward(upstream.double(), f, weight, *options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        for g in (f.float(), f.float().contiguous(memory_format=torch.channels_last), f.float().transpose(2, 3).mT):
            got = ops.lpips_project_backward(upstream, g, weight.float(), *options)
            assert got.stride() == torch.empty_like(g).stride()
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
        for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
            half = f.to(dtype)
            got = ops.lpips_project_backward(upstream, half, weight.float(), *options)
            wide = ops.lpips_project_backward(upstream, half.float(), weight.float(), *options)
            assert got.dtype == dtype
            torch.testing.assert_close(got.float(), wide, rtol=tolerance, atol=1e-6)


def test_threads_do_not_matter():
    f, weight, before = torch.randn(5, 33, 17, 19), torch.rand(33), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value = ops.lpips_project(f, weight, 128, 0, 0, 1e-10, False)
            found.append((value, ops.lpips_project_backward(value, f, weight, 0, 0, 1e-10, False)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_layers_add_up(oracle):
    maps = [torch.randn(2, 5, 3, 4).double(), torch.randn(2, 7, 2, 2).double()]
    weights = [torch.rand(5).double(), torch.rand(7).double()]
    want = sum(oracle.projection(f, w, 80, 9, i, "lpips") for i, (f, w) in enumerate(zip(maps, weights, strict=True)))
    torch.testing.assert_close(F.lpips_projection(maps, weights, dim=80, seed=9), want, rtol=1e-12, atol=1e-14)


def test_distortion_is_within_its_bound():
    """Mean and spread over seeds of ‖S(x) − S(y)‖² / LPIPS: 1, and at most √(2 / dim)."""
    x, y = ([torch.randn(1, c, s, s).relu() for c, s in ((64, 16), (128, 8), (256, 2))] for _ in "xy")
    weights = [torch.rand(c).square() for c in (64, 128, 256)]
    lpips = float(F.lpips_distance(x, y, weights))

    def ratio(dim, seed):
        a, b = (F.lpips_projection(maps, weights, dim=dim, seed=seed) for maps in (x, y))
        return float((a - b).square().sum()) / lpips

    for dim in (64, 256):
        ratios = torch.tensor([ratio(dim, seed) for seed in range(300)])
        spread = (2 / dim) ** 0.5
        assert abs(float(ratios.mean()) - 1) < 4 * spread / 300**0.5
        assert 0.8 * spread < float(ratios.std()) < 1.15 * spread


def test_gradients():
    f = [torch.randn(2, 3, 2, 2).double().requires_grad_(), torch.randn(2, 4, 1, 2).double().requires_grad_()]
    weights = [torch.rand(3).double(), torch.rand(4).double()]

    def call(*maps):
        return F.lpips_projection(maps, weights, dim=64)

    assert torch.autograd.gradcheck(call, f)
    assert torch.autograd.gradgradcheck(call, f)
    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(F.lpips_projection([zero], [torch.ones(3)], dim=64).sum(), zero)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_opcheck_and_compile():
    f, weight = torch.randn(2, 5, 3, 4), torch.rand(5)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.lpips_project.default, (f, weight, 64, -5, 1, 1e-10, False), test_utils=tests)
    pull = (torch.randn(2, 64), f.contiguous(memory_format=torch.channels_last), weight, -5, 1, 1e-10, False)
    torch.library.opcheck(ops.lpips_project_backward.default, pull, test_utils=tests)
    torch._dynamo.reset()
    compiled = torch.compile(lambda g: F.lpips_projection([g], [weight], dim=64), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(f), F.lpips_projection([f], [weight], dim=64))
    slopes = []
    for call in (compiled, lambda g: F.lpips_projection([g], [weight], dim=64)):
        leaf = f.clone().requires_grad_()
        slopes += torch.autograd.grad(call(leaf).square().sum(), leaf)
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("eps_mode", list(EPS))
def test_gradient_is_that_of_autograd(eps_mode):
    f, weight = torch.randn(2, 3, 5, 14).double().requires_grad_(), torch.rand(3).double()
    want, got = (
        torch.autograd.grad(value.square().sum(), f)[0]
        for value in (
            reference.lpips_project(f, weight, 64, -3, 0, *EPS[eps_mode]),
            F.lpips_projection([f], [weight], dim=64, seed=2**64 - 3, eps_mode=eps_mode),
        )
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_compact_embedding():
    lpips = LPIPS(pnet_rand=True)
    x, y = torch.rand(2, 3, 40, 40, requires_grad=True), torch.rand(2, 3, 40, 40)
    small = PerceptualEmbedding(lpips, dim=2048, seed=3)
    a, b = small(x), small(y)
    assert a.shape == (2, 2048)
    got = (a - b).square().sum(1)
    torch.testing.assert_close(got, lpips(x, y).flatten(), rtol=5 * (2 / 2048) ** 0.5, atol=0)
    assert not torch.equal(a, PerceptualEmbedding(lpips, dim=2048, seed=4)(x))
    (grad,) = torch.autograd.grad(got.sum(), x)
    (want,) = torch.autograd.grad(lpips(x, y).sum(), x)
    assert float(torch.nn.functional.cosine_similarity(grad.flatten(), want.flatten(), dim=0)) > 0.8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 63}, ValueError, "dim: expected an integer >= 64"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"eps_mode": "x"}, ValueError, "eps_mode"),
        ({"weights": [torch.rand(4)]}, ValueError, r"weights\[0\]: expected \[3\]"),
        ({"weights": [torch.rand(3, requires_grad=True)]}, NotImplementedError, r"weights\[0\].requires_grad=True"),
        ({"features": torch.rand(1, 3, 2, 2)}, TypeError, "features"),
    ],
)
def test_errors(options, error, message):
    arguments = {"features": [torch.rand(1, 3, 2, 2)], "weights": [torch.rand(3)], "dim": 64, **options}
    with pytest.raises(error, match=message):
        F.lpips_projection(arguments.pop("features"), arguments.pop("weights"), **arguments)
