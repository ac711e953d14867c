import pytest
import torch

from fastgen.ops import backend
from fastgen.reference import nearest as reference


@pytest.fixture(params=["cpp", "reference"], autouse=True)
def kernel(request):
    with backend.force(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, (30,), (7, 30)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(dtype, mask, layout):
    query, database = torch.randn(7, 5), torch.randn(30, 5)
    if layout == "transposed":
        query, database = query.T.contiguous().T, database.T.contiguous().T
    query, database = query.to(dtype), database.to(dtype)
    allowed = None if mask is None else torch.rand(mask).gt(0.2)
    if allowed is not None:
        allowed[..., :4] = True
    for radius, precision in ((None, "certified"), (0.1, "certified"), (None, "ieee")):
        arguments = (query, database, allowed, 3, radius, precision)
        index = torch.ops.fastgen.nearest(*arguments)
        torch.library.opcheck(torch.ops.fastgen.nearest.default, arguments)
    torch.library.opcheck(torch.ops.fastgen.nearest_distance.default, (query, database, index))
    torch.library.opcheck(torch.ops.fastgen.nearest_rows.default, (database, index[:, 0]))


def in_the_defined_order(query, row):
    """The sum that the definition names, written out with Python floats."""
    p = [0.0] * 8
    for t, (a, b) in enumerate(zip(query.tolist(), row.tolist(), strict=True)):
        p[t % 8] += (a - b) * (a - b)
    p = [p[i] + p[i + 4] for i in range(4)]
    return torch.tensor((p[0] + p[2]) + (p[1] + p[3])).float()


@pytest.mark.parametrize("d", [1, 7, 8, 9, 63, 300])
def test_distance_is_rounded_in_one_order(d):
    query, database = torch.randn(3, d, dtype=torch.float64), torch.randn(5, d, dtype=torch.float64)
    index = torch.tensor([[4, 0], [1, 1], [2, 3]])
    got = torch.ops.fastgen.nearest_distance(query, database, index)
    for n in range(3):
        for j in range(2):
            assert got[n, j] == in_the_defined_order(query[n], database[index[n, j]])


def test_the_order_shows_in_float32():
    """2^54 + 2^30 lies halfway between two floats: which small squares meet before the large one decides."""
    query = torch.zeros(64, 27, dtype=torch.float64)
    query[:, 0], query[:, 1] = 2.0**27, 2.0**15
    query[:, 2:] = 1.4 * torch.rand(64, 25).lt(0.15)
    got = torch.ops.fastgen.nearest_distance(query, torch.zeros_like(query[:1]), torch.zeros(64, 1, dtype=torch.int64))
    expected = torch.stack([in_the_defined_order(row, torch.zeros(27)) for row in query])
    assert torch.equal(got[:, 0], expected)
    assert len(expected.unique()) == 2


@pytest.mark.parametrize("allowed", [None, (70,), (9, 70)], ids=str)
def test_equals_the_exhaustive_meaning(allowed):
    query, database = torch.randint(-2, 3, (9, 4)).float(), torch.randint(-2, 3, (70, 4)).float()
    mask = None if allowed is None else torch.rand(allowed).gt(0.5)
    if mask is not None:
        mask[..., 5:10] = True
    distance, index = reference.exhaustive(query, database, mask, 4)
    got = torch.ops.fastgen.nearest(query, database, mask, 4, None, "certified")
    assert torch.equal(got, index)
    assert torch.equal(torch.ops.fastgen.nearest_distance(query, database, got), distance)
