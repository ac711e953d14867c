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
    index = torch.ops.fastgen.nearest(query, database, allowed, 3)
    torch.library.opcheck(torch.ops.fastgen.nearest.default, (query, database, allowed, 3))
    torch.library.opcheck(torch.ops.fastgen.nearest_distance.default, (query, database, index))


@pytest.mark.parametrize("d", [1, 7, 8, 9, 63, 300])
def test_distance_is_rounded_in_one_order(d):
    """The sum that the definition names, written out with Python floats."""
    query, database = torch.randn(3, d, dtype=torch.float64), torch.randn(5, d, dtype=torch.float64)
    index = torch.tensor([[4, 0], [1, 1], [2, 3]])
    got = torch.ops.fastgen.nearest_distance(query, database, index)
    for n in range(3):
        for j in range(2):
            p = [0.0] * 8
            for t, (a, b) in enumerate(zip(query[n].tolist(), database[index[n, j]].tolist(), strict=True)):
                p[t % 8] += (a - b) * (a - b)
            p = [p[i] + p[i + 4] for i in range(4)]
            assert got[n, j] == torch.tensor((p[0] + p[2]) + (p[1] + p[3])).float()


@pytest.mark.parametrize("allowed", [None, (70,), (9, 70)], ids=str)
def test_equals_the_exhaustive_meaning(allowed):
    query, database = torch.randint(-2, 3, (9, 4)).float(), torch.randint(-2, 3, (70, 4)).float()
    mask = None if allowed is None else torch.rand(allowed).gt(0.5)
    if mask is not None:
        mask[..., 5:10] = True
    distance, index = reference.exhaustive(query, database, mask, 4)
    got = torch.ops.fastgen.nearest(query, database, mask, 4)
    assert torch.equal(got, index)
    assert torch.equal(torch.ops.fastgen.nearest_distance(query, database, got), distance)
