import pytest
import torch

from fastgen import _C
from fastgen.ops import nearest as ops

KERNELS = [("baseline", False), ("avx2", False), ("avx512", False), ("avx512", True)]


@pytest.fixture(params=KERNELS, ids=lambda one: f"{one[0]}{'-vnni' * one[1]}")
def search(request):
    """The kernel compiled for one instruction set."""
    before = _C.isa()
    try:
        _C.set_isa(request.param[0])
    except ValueError as error:
        pytest.skip(str(error))
    yield lambda q, b, k=1, mask=None: ops.search(_C, q, b, mask, k, vnni=request.param[1])
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(1, 1, 1, 1), (13, 31, 2, 31), (15, 33, 3, 2), (90, 700, 65, 1), (28, 64, 800, 5)]
)
def test_equals_oracle(oracle, search, dtype, n, m, d, k):
    query, database = torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype)
    assert torch.equal(search(query, database, k), oracle.nearest(query, database, k)[1])


@pytest.mark.parametrize("k", [1, 7, 70])
def test_ties_without_number(oracle, search, k):
    """More equal rows than a list of candidates holds: it must be measured, emptied and filled again."""
    query, database = torch.randint(0, 2, (17, 3)).float(), torch.randint(0, 2, (2000, 3)).float()
    assert torch.equal(search(query, database, k), oracle.nearest(query, database, k)[1])


def test_extremes_of_the_integers(oracle, search):
    """One coordinate carries all of the norm: it reaches the largest integer, both signs, and keys their ends."""
    query = torch.cat([torch.eye(5), -torch.eye(5)]) * 3.0
    database = torch.cat([torch.eye(5), -torch.eye(5)]).repeat(20, 1) * (3 - 1e-4 * torch.arange(200.0)[:, None])
    for k in (1, 30):
        assert torch.equal(search(query, database, k), oracle.nearest(query, database, k)[1])


def test_near_ties_beyond_the_integers(oracle, search):
    """Differences far below a step of the 16-bit integers are decided by the direct distances."""
    query = torch.randn(20, 10)
    database = torch.randn(1, 10) + 1e-6 * torch.randn(400, 10)
    assert torch.equal(search(query, database, 3), oracle.nearest(query, database, 3)[1])


def test_masks(oracle, search):
    query, database = torch.randn(50, 6), torch.randn(300, 6)
    for mask in (torch.rand(300) > 0.4, torch.rand(50, 300) > 0.4):
        assert torch.equal(search(query, database, 2, mask), oracle.nearest(query, database, 2, mask)[1])


def test_threads_agree(search):
    query, database = torch.randn(900, 20), torch.randn(3000, 20)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(search(query, database, 2))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
