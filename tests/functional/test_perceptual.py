"""The public functions: values and gradients of any side, second order, compile, autocast, error messages."""

import functools
import itertools

import pytest
import torch
import torch._dynamo.testing

from fastgen import functional as F
from fastgen.ops import backend


def pyramid(n=2, dtype=torch.float64, relu=True):
    shapes = [(n, 5, 3, 2), (n, 7, 2, 1)]
    features = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [f.relu() for f in features] if relu else features


def heads(dtype=torch.float64):
    return [torch.rand(5, dtype=dtype), torch.rand(7, dtype=dtype)]


@pytest.mark.parametrize("eps_mode", ["lpips", "torchmetrics"])
def test_lpips_distance(oracle, eps_mode):
    f0, f1, w = pyramid(3), pyramid(3), heads()
    want = sum(oracle.lpips_layer(a, b, c, eps_mode) for a, b, c in zip(f0, f1, w, strict=True))
    torch.testing.assert_close(F.lpips_distance(f0, f1, w, eps_mode=eps_mode), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eps_mode", ["lpips", "torchmetrics"])
@pytest.mark.parametrize("sides", [(True, False, False), (False, True, False), (True, True, False), (True, True, True)])
def test_lpips_gradients(eps_mode, sides):
    f0, f1, w = pyramid(relu=False), pyramid(relu=False), heads()
    inputs = [t.requires_grad_(need) for group, need in zip((f0, f1, w), sides, strict=True) for t in group]

    def call(*t):
        return F.lpips_distance(t[0:2], t[2:4], t[4:6], eps_mode=eps_mode)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_lpips_gradient_against_oracle(oracle):
    f0, f1, w = pyramid(3), pyramid(3), heads()
    upstream = torch.randn(3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*f0, *f1, *w)]
    got = torch.autograd.grad(F.lpips_distance(f0, f1, w), leaves, upstream)
    for k in range(2):
        want = oracle.lpips_layer_gradients(f0[k], f1[k], w[k], upstream, "lpips")
        for g, expected in zip(got[k::2], want, strict=True):
            torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_the_gradient_is_right_whatever_ran_the_forward_pass(sides):
    f0, f1, w = pyramid(3), pyramid(3), heads()
    leaves = [t.requires_grad_() for group, need in zip((f0, f1), sides, strict=True) if need for t in group]
    found = []
    for kernels in itertools.product(("cpp", "reference"), repeat=2):
        with backend.force(kernels[0]):
            value = F.lpips_distance(f0, f1, w)
        with backend.force(kernels[1]):
            found.append(torch.autograd.grad(value.sum(), leaves))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-15)


def test_create_graph_gives_the_same_gradient():
    f0, f1, w = pyramid(), pyramid(), heads()
    leaves = [t.requires_grad_() for t in (*f0, *f1, *w)]
    for call in (lambda: F.lpips_distance(f0, f1, w), lambda: F.feature_distance(f0, f1, distance="l2")):
        plain, graph = (
            torch.autograd.grad(call().sum(), leaves, create_graph=create, allow_unused=True)
            for create in (False, True)
        )
        for a, b in zip(plain, graph, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_second_order_at_zero_vectors_is_finite():
    f0, f1, w = pyramid(relu=False), pyramid(relu=False), heads()
    f0[0][:, :, 1] = 0
    leaf = f0[0].requires_grad_()
    (grad,) = torch.autograd.grad(F.lpips_distance(f0, f1, w).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    assert second.isfinite().all()
    assert not second[:, :, 1].any()


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_feature_distance(oracle, distance):
    f0, f1 = [*pyramid(3), torch.randn(3, 4).double()], [*pyramid(3), torch.randn(3, 4).double()]
    got = F.feature_distance(f0, f1, distance=distance, layer_weight=[1.0, 0.25, 3.0])
    torch.testing.assert_close(got, oracle.feature_distance(f0, f1, distance, [1.0, 0.25, 3.0]), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        F.feature_distance(f0, f1, distance=distance), oracle.feature_distance(f0, f1, distance, [1.0] * 3)
    )


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_feature_distance_gradients(distance, sides):
    groups = (pyramid(relu=False), pyramid(relu=False))
    inputs = [t.requires_grad_(need) for group, need in zip(groups, sides, strict=True) for t in group]

    def call(*t):
        return F.feature_distance(t[:2], t[2:], distance=distance, layer_weight=[2.0, 0.5])

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize(("shape", "levels"), [((2, 3, 28, 28), 3), ((1, 1, 17, 23), 2), ((3, 2, 2, 5), 1)])
def test_laplacian_pyramid_loss(oracle, shape, levels):
    x, y = torch.rand(shape).double(), torch.rand(shape).double()
    got = F.laplacian_pyramid_loss(x, y, levels=levels)
    assert got.shape == shape[:1]
    assert float(got.mean()) == pytest.approx(oracle.laplacian_pyramid_loss(x, y, levels), rel=1e-12)
    one = [oracle.laplacian_pyramid_loss(x[i : i + 1], y[i : i + 1], levels) for i in range(shape[0])]
    assert got.tolist() == pytest.approx(one, rel=1e-12)


def test_laplacian_pyramid_gradcheck():
    x, y = torch.rand(1, 2, 6, 5).double().requires_grad_(), torch.rand(1, 2, 6, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: F.laplacian_pyramid_loss(a, b, levels=2), (x, y))


def naive_laplacian_gradient(x, y, levels, kernel):
    """Σ_j Lᵀ_j sign(L_j (x − y)) / size_j from the pyramid written out as matrices."""
    shape, size = x.shape[2:], x[0, 0].numel()
    channels = x.shape[1]
    current, found = torch.eye(size).double(), torch.zeros(x.shape).double()
    flat = (x - y).flatten(2).double()
    r = len(kernel) // 2

    def share(matrix):
        maps = flat @ matrix.t()
        scale = channels * matrix.shape[0]
        return (maps.sign() @ matrix / scale).view(x.shape)

    for _ in range(levels):
        h, w = shape
        blur = torch.zeros(h * w, h * w).double()
        for i in range(h):
            for j in range(w):
                for a in range(-r, r + 1):
                    for b in range(-r, r + 1):
                        at = min(max(i + a, 0), h - 1) * w + min(max(j + b, 0), w - 1)
                        blur[i * w + j, at] += kernel[a + r, b + r]
        found += share(current - blur @ current)
        half = (h // 2, w // 2)
        pool = torch.zeros(half[0] * half[1], h * w).double()
        for i in range(half[0]):
            for j in range(half[1]):
                for a in (0, 1):
                    for b in (0, 1):
                        pool[i * half[1] + j, (2 * i + a) * w + 2 * j + b] = 0.25
        current, shape = pool @ blur @ current, half
    return found + share(current)


KERNELS = {
    "minimal_glo": None,
    "burt_adelson": torch.tensor([[a * b / 256 for a in (1, 4, 6, 4, 1)] for b in (1, 4, 6, 4, 1)]),
    "own": torch.tensor([[0.0, 0.1, 0.0], [0.25, 0.5, 0.05], [0.0, 0.3, -0.2]]),
}


@pytest.mark.parametrize("name", list(KERNELS))
def test_laplacian_kernels(oracle, name):
    x, y = torch.rand(2, 2, 9, 12).double().requires_grad_(), torch.rand(2, 2, 9, 12).double()
    kernel = KERNELS[name]
    got = F.laplacian_pyramid_loss(x, y, levels=2, kernel=kernel if name == "own" else name)
    for i in range(2):
        want = oracle.laplacian_pyramid_loss(x.detach()[i : i + 1], y[i : i + 1], 2, kernel)
        assert float(got[i].detach()) == pytest.approx(want, rel=1e-6 if name == "own" else 1e-12)
    if name == "minimal_glo":
        bump = [torch.tensor(-((i - 2) ** 2) / 4).double().exp() for i in range(5)]
        kernel = torch.tensor([[a + b for a in bump] for b in bump]).double()
        kernel = kernel / kernel.sum()
    (grad,) = torch.autograd.grad(got.sum(), x)
    want = naive_laplacian_gradient(x.detach(), y, 2, kernel.double())
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-12)
    tied = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.laplacian_pyramid_loss(tied, x.detach(), levels=2).sum(), tied)
    assert not grad.any()


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 17, 2, 2), (0, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_gram_matrix(oracle, shape, last):
    f = torch.randn(shape).double()
    if last:
        f = f.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(F.gram_matrix(f), oracle.gram(f), rtol=1e-12, atol=1e-14)
    if shape[0]:
        g = f[:, :, :2, :3].requires_grad_()
        assert torch.autograd.gradcheck(F.gram_matrix, g)
        assert torch.autograd.gradgradcheck(F.gram_matrix, g)
        (grad,) = torch.autograd.grad(F.gram_matrix(g).square().sum(), g)
        leaf = g.detach().clone().requires_grad_()
        flat = leaf.flatten(2)
        (want,) = torch.autograd.grad(((flat @ flat.mT) / flat[0].numel()).square().sum(), leaf)
        torch.testing.assert_close(grad, want)


def test_gram_sums_are_float32(oracle):
    f = torch.full((1, 64, 16, 16), 250.0, dtype=torch.float16)  # Σf² = 1.6e7 a channel
    f[:, ::2] *= -1
    got = F.gram_matrix(f)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), oracle.gram(f), rtol=1e-6, atol=0)
    g = torch.randn(2, 8, 40, 40).bfloat16().requires_grad_()
    torch.testing.assert_close(F.gram_matrix(g).double(), oracle.gram(g.detach()), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.gram_matrix(g), F.gram_matrix(g.detach()))
    (grad,) = torch.autograd.grad(F.gram_matrix(g).sum(), g)
    assert grad.dtype == torch.bfloat16


def test_dtypes_promote_and_sums_are_wide():
    f0, f1, w = pyramid(dtype=torch.float32), pyramid(dtype=torch.float32), heads(torch.float32)
    half = [f.to(torch.bfloat16) for f in f1]
    want = F.lpips_distance(f0, [f.float() for f in half], w)
    assert torch.equal(F.lpips_distance(f0, half, w), want)
    # squares of 300 overflow float16, their sum float16 again
    big = [torch.full((1, 64, 2, 2), 300.0, dtype=torch.float16)]
    other = [torch.cat([big[0][:, :32], -big[0][:, 32:]], 1)]
    value = F.lpips_distance(big, other, [torch.ones(64)])
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(2.0, rel=1e-6)
    assert float(F.feature_distance(big, other, distance="l2")) == pytest.approx(180000.0, rel=1e-6)


def test_autocast():
    f0, f1, w = pyramid(dtype=torch.float32), pyramid(dtype=torch.float32), heads(torch.float32)
    x, y = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    f0[0].requires_grad_()
    plain = F.lpips_distance(f0, f1, w)
    (want,) = torch.autograd.grad(plain.sum(), f0[0])
    with torch.autocast("cpu", torch.bfloat16):
        value = F.lpips_distance(f0, f1, w)
        (got,) = torch.autograd.grad(value.sum(), f0[0])
        lap = F.laplacian_pyramid_loss(x, y, levels=2)
    assert torch.equal(value, plain)
    assert torch.equal(got, want)
    assert torch.equal(lap, F.laplacian_pyramid_loss(x, y, levels=2))


def test_compile_without_break_or_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(f0, f1, w):
        return F.lpips_distance(f0, f1, w) + F.feature_distance(f0, f1, distance="l1")

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    w = heads(torch.float32)
    for n in (4, 6, 9):
        f0, f1 = pyramid(n, torch.float32), pyramid(n, torch.float32)
        for f in f0:
            f.requires_grad_()
        want = step(f0, f1, w)
        grads = torch.autograd.grad(want.sum(), f0)
        got = compiled(f0, f1, w)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got.sum(), f0), grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_laplacian_pyramid_compiles_to_code_for_every_number():
    """Inductor's own code: it lays convolutions out otherwise than eager does, which other backends do not see."""
    torch._dynamo.reset()
    step = functools.partial(F.laplacian_pyramid_loss, levels=1)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (2, 5):
            x, y = torch.rand(n, 3, 8, 10, requires_grad=True), torch.rand(n, 3, 8, 10)
            (want,) = torch.autograd.grad(step(x, y).sum(), x)
            value = compiled(x, y)
            torch.testing.assert_close(value, step(x, y))
            torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, w: F.lpips_distance(f[0], f, w), TypeError, r"features0: expected a list of feature maps"),
        (lambda f, w: F.lpips_distance(f, f[:1], w), ValueError, r"features1: expected 2 maps"),
        (lambda f, w: F.lpips_distance(f, [f[0], f[1][:1]], w), ValueError, r"features1\[1\]: expected shape"),
        (lambda f, w: F.lpips_distance(f, f, w[:1]), ValueError, r"weights: expected a list of 2"),
        (lambda f, w: F.lpips_distance(f, f, w[::-1]), ValueError, r"weights\[0\]: expected \[5\].*got \[7\]"),
        (lambda f, w: F.lpips_distance(f, f, w, eps_mode="piq"), ValueError, r"eps_mode: .*'torchmetrics'.*'piq'"),
        (lambda f, w: F.lpips_distance([f[0].long()] * 2, f, w), TypeError, r"features0\[0\]: .*got int64"),
        (lambda f, w: F.lpips_distance([f[0][0]], [f[0][0]], w[:1]), ValueError, r"features0\[0\]: expected 4"),
        (lambda f, w: F.lpips_distance([f[0][:, :, :0]] * 2, [f[0][:, :, :0]] * 2, w), ValueError, "at least one"),
        (lambda f, w: F.lpips_distance([f[0], f[1][:1]], [f[0], f[1][:1]], w), ValueError, "expected 2 samples, got 1"),
        (lambda f, w: F.feature_distance(f, f, distance="linf"), ValueError, "distance: .*'linf'"),
        (lambda f, w: F.feature_distance(f, f, layer_weight=[1.0]), ValueError, "layer_weight: expected 2 numbers"),
        (lambda f, w: F.feature_distance(f, f, layer_weight=[1.0, "x"]), TypeError, r"layer_weight\[1\]"),
        (lambda f, w: F.feature_distance(f, f, layer_weight=[1.0, float("nan")]), ValueError, r"layer_weight\[1\]"),
        (lambda f, w: F.laplacian_pyramid_loss(f[0], f[0]), ValueError, r"x: .*2\*\*levels = 8"),
        (lambda f, w: F.laplacian_pyramid_loss(f[0], f[0][:1], levels=1), ValueError, "y: expected the shape of x"),
        (lambda f, w: F.laplacian_pyramid_loss(f[0], f[0], levels=0), ValueError, "levels"),
        (lambda f, w: F.laplacian_pyramid_loss(f[0], f[0], levels=10**7), ValueError, "levels: .*got 10000000"),
        (lambda f, w: F.laplacian_pyramid_loss(f[0], f[0], levels=1, kernel="box"), ValueError, "kernel: .*'box'"),
        (lambda f, w: F.laplacian_pyramid_loss(f[0], f[0], levels=1, kernel=w[0]), ValueError, "kernel: expected 2"),
        (lambda f, w: F.laplacian_pyramid_loss(f[0], f[0], levels=1, kernel=f[0][0, 0]), ValueError, "of an odd k"),
        (lambda f, w: F.gram_matrix(f[0][0]), ValueError, "features: expected 4 dimensions"),
        (lambda f, w: F.gram_matrix(f[0][:, :0]), ValueError, "features: expected at least one element"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(pyramid(), heads())


def test_vmap_is_refused_clearly():
    f = torch.randn(3, 2, 5, 3, 2)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda a, b: F.lpips_distance([a], [b], [torch.ones(5)]))(f, f)
