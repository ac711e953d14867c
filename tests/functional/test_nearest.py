import subprocess
import sys

import pytest
import torch

from fastgen import functional as F
from fastgen.ops import backend


@pytest.fixture(params=["cpp", "reference"], autouse=True)
def kernel(request):
    """Every meaning is asked of the C++ kernel (on a GPU of the Triton kernels) and of the torch fallback."""
    chosen = "triton" if request.param == "cpp" and request.node.get_closest_marker("gpu") else request.param
    with backend.force(chosen):
        yield chosen


def gaussian(n, m, d):
    return torch.randn(n, d), torch.randn(m, d)


def offset(n, m, d):
    return 1000 + 0.01 * torch.randn(n, d), 1000 + 0.01 * torch.randn(m, d)


def clusters(n, m, d):
    centres = 5 * torch.randn(7, d)
    return (centres[torch.randint(7, (size,))] + 1e-3 * torch.randn(size, d) for size in (n, m))


def integers(n, m, d):
    return torch.randint(-1, 2, (n, d)).float(), torch.randint(-1, 2, (m, d)).float()


def collapsed(n, m, d):
    """A generator at its start: the pool is a point, nearly."""
    return torch.randn(n, d), 0.3 + 1e-5 * torch.randn(m, d)


def collapsed_queries(n, m, d):
    return 0.3 + 1e-5 * torch.randn(n, d), torch.randn(m, d)


def outliers(n, m, d):
    query, database = torch.randn(n, d), torch.randn(m, d)
    query[:: n // 3 + 1] *= 1e4
    database[:: m // 5 + 1] *= 1e5
    database[1 :: m // 5 + 1] *= 1e12
    return query, database


def tiny(n, m, d):
    return 1e-22 * torch.randn(n, d), 1e-22 * torch.randn(m, d)


def huge(n, m, d):
    return 1e16 * torch.randn(n, d), 1e16 * torch.randn(m, d)


def same(n, m, d):
    """Every row of the database is one row: all tie."""
    return torch.randn(n, d), torch.randn(1, d).expand(m, d)


def descending(n, m, d):
    """Ever nearer rows: every candidate beats the last."""
    return torch.randn(n, d), torch.linspace(50, 1, m)[:, None] * torch.ones(m, d)


def copies(n, m, d):
    database = torch.randn(m, d)
    return database[torch.randint(m, (n,))], database


def heavy(n, m, d):
    return torch.distributions.Cauchy(0.0, 1.0).sample((n, d)), torch.distributions.Cauchy(0.0, 1.0).sample((m, d))


DATA = [
    gaussian,
    offset,
    clusters,
    integers,
    collapsed,
    collapsed_queries,
    outliers,
    tiny,
    huge,
    same,
    descending,
    copies,
    heavy,
]


def assert_nearest(got, expected):
    assert got.index.dtype == torch.int64
    assert got.distance.dtype == torch.float32
    assert torch.equal(got.distance, expected[0])
    assert torch.equal(got.index, expected[1])


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 33, 3), (61, 257, 64), (29, 1031, 17)])
def test_equals_oracle(oracle, data, n, m, d):
    query, database = data(n, m, d)
    for k in {1, min(3, m), min(40, m)}:
        assert_nearest(F.nearest(query, database, k), oracle.nearest(query, database, k))


@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 31, 100, 784, 800])
def test_every_width(oracle, d):
    query, database = gaussian(23, 150, d)
    assert_nearest(F.nearest(query, database), oracle.nearest(query, database))


def test_k_up_to_all_rows(oracle):
    query, database = integers(9, 130, 5)
    assert_nearest(F.nearest(query, database, 130), oracle.nearest(query, database, 130))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(oracle, dtype):
    query, database = (x.to(dtype) for x in gaussian(31, 301, 20))
    assert_nearest(F.nearest(query, database, 2), oracle.nearest(query, database, 2))


def test_float64_is_not_narrowed(oracle):
    """Neighbours that differ by 1e-12 at an offset of 1: float32 inputs could not hold them, the distances can."""
    query = torch.ones(4, 3, dtype=torch.float64) + 1e-12 * torch.arange(4)[:, None]
    database = 1 + 1e-12 * torch.randn(500, 3, dtype=torch.float64)
    got = F.nearest(query, database, 3)
    assert_nearest(got, oracle.nearest(query, database, 3))
    assert (got.distance > 0).all()
    assert (got.distance < 1e-22).all()


def test_ties_go_to_the_lowest_index():
    database = torch.tensor([[9.0], [1.0], [-1.0], [1.0], [-1.0]]).repeat(50, 1)
    got = F.nearest(torch.zeros(3, 1), database, 4)
    assert got.index.tolist() == [[1, 2, 3, 4]] * 3
    assert got.distance.tolist() == [[1.0] * 4] * 3


def test_mask_hides_non_finite_rows(oracle):
    query, database = gaussian(37, 3000, 50)
    mask = torch.rand(3000) > 0.5
    database[~mask] = torch.tensor([torch.inf, -torch.inf, torch.nan])[torch.randint(3, (int((~mask).sum()),))][:, None]
    for k in (1, 5):
        assert_nearest(F.nearest(query, database, k, mask=mask), oracle.nearest(query, database, k, mask))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_mask_for_each_query(oracle, share):
    query, database = gaussian(40, 900, 12)
    mask = torch.rand(40, 900) < share
    mask[:, :3] = True
    mask[:, 7] = False
    database[7] = torch.nan
    for k in (1, 3):
        assert_nearest(F.nearest(query, database, k, mask=mask), oracle.nearest(query, database, k, mask))


def test_mask_that_forbids_the_nearest(oracle):
    """All but itself: leave-one-out over copies."""
    points = torch.randn(300, 16)
    mask = ~torch.eye(300, dtype=torch.bool)
    assert_nearest(F.nearest(points, points, mask=mask), oracle.nearest(points, points, 1, mask))


@pytest.mark.parametrize("data", [gaussian, offset, integers, outliers, copies, same], ids=lambda f: f.__name__)
def test_radius(oracle, data):
    query, database = data(37, 400, 6)
    typical = oracle.nearest(query, database)[0].clamp_min(1e-30).sqrt().quantile(0.6).item()
    for k, mask in ((1, None), (3, torch.rand(400) > 0.5), (2, torch.rand(37, 400) > 0.5)):
        for radius in (typical / 4, typical):
            left = oracle.left(query, database, mask, radius)
            if left.sum(1).min() < k:
                with pytest.raises(ValueError, match="exclude_radius: expected a radius that leaves"):
                    F.nearest(query, database, k, mask=mask, exclude_radius=radius)
                continue
            got = F.nearest(query, database, k, mask=mask, exclude_radius=radius)
            assert_nearest(got, oracle.nearest(query, database, k, mask, radius))


def test_another_query_rejects(oracle):
    """The row that is nearest to query 0 is too near to query 1: neither may choose it."""
    query, database = torch.tensor([[0.0], [1.5]]), torch.tensor([[1.0], [-3.0], [5.0]])
    got = F.nearest(query, database, exclude_radius=0.75)
    assert got.index.tolist() == [[1], [2]]
    assert F.nearest(query[:1], database, exclude_radius=0.75).index.tolist() == [[0]]
    alone = torch.eye(2, 3).bool() | torch.tensor([False, True, True])  # row 0 is query 0's alone: it is not rejected
    assert F.nearest(query, database, mask=alone, exclude_radius=0.75).index.tolist() == [[0], [2]]


def test_radius_gradients(oracle):
    query = torch.randn(19, 4, dtype=torch.float64, requires_grad=True)
    database = torch.randn(200, 4, dtype=torch.float64, requires_grad=True)
    got = F.nearest(query, database, 2, exclude_radius=0.8)
    expected = oracle.nearest(query, database, 2, None, 0.8)
    assert_nearest(F.Nearest(got.distance.detach(), got.index), expected)
    assert not torch.equal(got.index, F.nearest(query, database, 2).index)

    def twice(distance):
        grads = torch.autograd.grad(distance.double().square().sum(), (query, database), create_graph=True)
        return *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (query, database))

    for one, two in zip(twice(got.distance), twice(oracle.distance(query, database, got.index)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data", [gaussian, offset, integers], ids=lambda f: f.__name__)
def test_ieee_is_the_same_answer(oracle, data):
    query, database = data(29, 301, 17)
    mask = torch.rand(301) > 0.4
    hidden = database.masked_fill(~mask[:, None], torch.inf)
    assert_nearest(F.nearest(query, database, 3, precision="ieee"), oracle.nearest(query, database, 3))
    assert_nearest(F.nearest(query, hidden, 2, mask=mask, precision="ieee"), oracle.nearest(query, database, 2, mask))


def subnormal(n, m, d):
    """float32 below its smallest normal number; squared distances that float32 rounds to zero or to 1e-45."""
    query, database = 2.0**-149 * torch.randint(0, 50, (n, d)), 2.0**-149 * torch.randint(0, 50, (m, d))
    return query.float(), torch.cat([database.float(), 1e-22 * torch.rand(m, d)])


@pytest.mark.parametrize("k", [1, 5])
def test_subnormals(oracle, k):
    query, database = subnormal(31, 200, 9)
    got = F.nearest(query, database, k)
    assert_nearest(got, oracle.nearest(query, database, k))
    query, database = query + 1e-22, database[200:]
    assert_nearest(F.nearest(query, database, k), oracle.nearest(query, database, k))
    far = F.nearest(query.double(), database.double(), k)  # told apart by float64 alone: ties of float32
    assert_nearest(far, oracle.nearest(query.double(), database.double(), k))


def test_k_of_2048(oracle):
    query, database = torch.randn(6, 10), torch.randn(3000, 10)
    assert_nearest(F.nearest(query, database, 2048), oracle.nearest(query, database, 2048))


def test_layouts(oracle):
    query, database = torch.randn(30, 41).T[::2], torch.randn(30, 800).T[::3]
    mask = torch.rand(2 * len(database)).gt(0.3)[::2]
    got = F.nearest(query, database, 2, mask=mask)
    assert_nearest(got, oracle.nearest(query, database, 2, mask))


def test_threads_and_chunks_agree():
    query, database = clusters(300, 2000, 24)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = F.nearest(query, database, 2)
        torch.set_num_threads(2)
        two = F.nearest(query, database, 2)
    finally:
        torch.set_num_threads(before)
    parts = [F.nearest(part, database, 2) for part in query.split(77)]
    for got in (two, F.Nearest(torch.cat([p.distance for p in parts]), torch.cat([p.index for p in parts]))):
        assert torch.equal(got.distance, one.distance)
        assert torch.equal(got.index, one.index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_gradients(oracle, dtype, k):
    query = torch.randn(19, 11, dtype=dtype, requires_grad=True)
    database = torch.randn(50, 11, dtype=dtype, requires_grad=True)
    weight = torch.randn(19, k)
    got = F.nearest(query, database, k)
    assert not got.index.requires_grad
    grads = torch.autograd.grad((got.distance * weight).sum(), (query, database))
    meant = oracle.distance(query, database, got.index)
    expected = torch.autograd.grad((meant * weight).sum(), (query, database))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for grad, want in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), want.double(), rtol=tolerance, atol=tolerance)
    only = torch.autograd.grad(F.nearest(query.detach(), database, k).distance.mul(weight).sum(), database)[0]
    assert torch.equal(only, grads[1])


def test_the_distance_may_be_changed_in_place():
    query = torch.randn(7, 3, requires_grad=True)
    got = F.nearest(query, torch.randn(9, 3))
    plain = torch.autograd.grad(got.distance.sum(), query, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(got.distance.mul_(3).sum(), query)[0], 3 * plain)


def test_gradcheck_twice():
    # On a dyadic grid the float32 distances are exact, and a quadratic's central differences are too.
    query = (torch.randint(-8, 8, (4, 3)).double() / 4).requires_grad_()
    database = (torch.randint(-8, 8, (3, 3)).double() / 4 + torch.tensor([[0.0], [40], [80]])).requires_grad_()
    function = lambda q, b: F.nearest(q, b, 2).distance.double()  # noqa: E731
    assert torch.autograd.gradcheck(function, (query, database), eps=2.0**-6)
    assert torch.autograd.gradgradcheck(function, (query, database), eps=2.0**-6)


def test_second_order_against_autograd(oracle):
    query = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    database = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)

    def penalty(distance):
        grads = torch.autograd.grad(distance.double().exp().sum(), (query, database), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (query, database))

    got = F.nearest(query, database, 2)
    for one, two in zip(penalty(got.distance), penalty(oracle.distance(query, database, got.index)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_compiles_whole_and_once_for_every_size():
    compiled = torch.compile(
        lambda q, b: F.nearest(q, b, 2).distance.sum(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, m in ((6, 40), (11, 70), (17, 90)):
            query, database = gaussian(n, m, 4)
            query.requires_grad_()
            value = compiled(query, database)
            (grad,) = torch.autograd.grad(value, query)
            plain = F.nearest(query, database, 2).distance.sum()
            assert torch.equal(value, plain)
            assert torch.equal(grad, torch.autograd.grad(plain, query)[0])


def test_what_is_watched_is_the_same_answer():
    """Past torch's dispatcher and by it; to the dispatcher the ops are there."""
    query, database = gaussian(20, 100, 8)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    for k in (1, 3):
        alone = F.nearest(query, database, k)
        with Watch():
            watched = F.nearest(query, database, k)
        assert torch.equal(alone.index, watched.index)
        assert torch.equal(alone.distance, watched.distance)
    assert seen.count("fastgen.nearest.default") == seen.count("fastgen.nearest_distance.default") == 2


def test_autocast_changes_nothing():
    query, database = gaussian(20, 100, 8)
    plain = F.nearest(query, database)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = F.nearest(query, database)
    assert torch.equal(plain.distance, inside.distance)
    assert torch.equal(plain.index, inside.index)


def _with(tensor, place, value):
    out = tensor.clone()
    out[place] = value
    return out


Q, B = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(15.0).view(5, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "query: expected a torch.Tensor, got list", ([1.0], B), {}),
        (ValueError, "query: expected 2 dimensions", (Q[0], B), {}),
        (TypeError, "query: expected float64", (Q.long(), B), {}),
        (TypeError, "database: expected the dtype of query", (Q, B.double()), {}),
        (ValueError, r"database: expected shape \[M >= 1, 3\], got \[5, 2\]", (Q, B[:, :2]), {}),
        (ValueError, "query: expected at least one row", (Q[:0], B), {}),
        (ValueError, "database: expected shape", (Q, B[:0]), {}),
        (ValueError, "query: expected at least one row and one column", (Q[:, :0], B[:, :0]), {}),
        (ValueError, "k: expected an integer >= 1, got 0", (Q, B, 0), {}),
        (ValueError, "k: expected at most the 5 rows of database, got 6", (Q, B, 6), {}),
        (TypeError, "k: expected an integer", (Q, B, 1.0), {}),
        (TypeError, "mask: expected bool", (Q, B), {"mask": torch.ones(5)}),
        (ValueError, r"mask: expected shape \[5\] or \[4, 5\], got \[4\]", (Q, B), {"mask": torch.ones(4).bool()}),
        (ValueError, "k: .* that mask allows, 2, got 3", (Q, B, 3), {"mask": torch.arange(5) < 2}),
        (
            ValueError,
            "k: .* that mask allows for query 2, 0, got 1",
            (Q, B),
            {"mask": torch.arange(4)[:, None].ne(2).expand(4, 5)},
        ),
        (ValueError, "query: expected finite values, got NaN or infinity in row 2", (_with(Q, 2, torch.nan), B), {}),
        (ValueError, "database: .* row 3", (Q, _with(B, (3, 1), torch.inf)), {}),
        (ValueError, "database: .* row 3", (Q, _with(B, (3, 1), -torch.inf)), {"mask": torch.arange(5) > 2}),
        (ValueError, "within float32", (Q, B + 1e20), {}),
        (ValueError, "within float32", (Q.double() * 1e200, B.double()), {}),
        (ValueError, "exclude_radius: expected a finite number > 0", (Q, B), {"exclude_radius": 0.0}),
        (ValueError, "exclude_radius: expected a finite number > 0", (Q, B), {"exclude_radius": float("nan")}),
        (TypeError, "exclude_radius: expected a number", (Q, B), {"exclude_radius": "far"}),
        (
            ValueError,
            "exclude_radius: expected a radius that leaves 1 rows .* but 100.0 leaves fewer for query 0",
            (Q, B),
            {"exclude_radius": 100},
        ),
        (
            ValueError,
            "exclude_radius: .* leaves 1 rows .* but 1e-06 leaves fewer for query 2",
            (Q, torch.cat([Q[2:3], B[1:]])),
            {"exclude_radius": 1e-6, "mask": torch.arange(5).ne(0) ^ torch.arange(4)[:, None].eq(2)},
        ),
        (ValueError, "query: .* row 2", (_with(Q, 2, torch.nan), B), {"exclude_radius": 1e-6}),
        (ValueError, "database: .* row 3", (Q, _with(B, (3, 1), torch.inf)), {"precision": "ieee"}),
        (ValueError, "precision: expected one of 'certified', 'ieee', got 'bf16'", (Q, B), {"precision": "bf16"}),
    ],
)
def test_refuses(error, message, arguments, options):
    with pytest.raises(error, match=message):
        F.nearest(*arguments, **options)


def test_needs_no_faiss():
    code = (
        "import sys; sys.modules['faiss'] = None; import torch; from fastgen import functional as F; "
        "print(F.nearest(torch.eye(3), torch.eye(3).flip(0)).index.flatten().tolist(), 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[2, 1, 0] False"


@pytest.mark.gpu
@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("n", "m", "d"), [(61, 257, 64), (300, 5000, 130)])
@pytest.mark.parametrize("k", [1, 3])
def test_gpu_equals_oracle(oracle, data, n, m, d, k):
    query, database = data(n, m, d)
    expected = oracle.nearest(query, database, k)
    got = F.nearest(query.cuda(), database.cuda(), k)
    assert_nearest(F.Nearest(got.distance.cpu(), got.index.cpu()), expected)


def test_forward_mode_and_vmap_are_refused():
    x, y = torch.randn(10, 3), torch.randn(12, 3)
    with pytest.raises(NotImplementedError, match="forward-mode AD is not built"):
        torch.func.jvp(lambda a: F.nearest(a, y).distance, (x,), (x,))
    with pytest.raises(NotImplementedError, match="vmap is not built"):
        torch.vmap(lambda a: F.nearest(a, y).distance)(x[None])
    with pytest.raises(NotImplementedError, match="vmap is not built"):
        torch.vmap(lambda a: torch.ops.fastgen.nearest_distance(a, y, torch.zeros(10, 1, dtype=torch.int64)))(x[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_new_tensors_would_be_by_default_does_not_matter(dtype, kernel):
    query, database = torch.randn(7, 5).to(dtype), torch.randn(90, 5).to(dtype)
    expected = F.nearest(query, database, k=2)
    with torch.device("meta"):
        found = F.nearest(query, database, k=2)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
