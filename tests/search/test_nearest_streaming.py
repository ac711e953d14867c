import pytest
import torch

from fastgen import functional as F
from fastgen.search import StreamingNearest


@pytest.mark.parametrize("sizes", [(500,), (1, 499), (100, 0, 37, 363), (250, 250)])
def test_chunks_equal_the_whole(oracle, sizes):
    # Few values: ties within and between chunks.
    query, database = torch.randint(-1, 2, (60, 5)).float(), torch.randint(-1, 2, (500, 5)).float()
    stream = StreamingNearest(query)
    for chunk in database.split(sizes):
        stream.update(chunk)
    got, whole, expected = stream.result(), F.nearest(query, database), oracle.nearest(query, database)
    for one, two, three in zip(got, whole, expected, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_any_order_of_ids():
    query, database = torch.randint(-1, 2, (60, 5)).float(), torch.randint(-1, 2, (500, 5)).float()
    stream = StreamingNearest(query)
    for start in (300, 0, 400, 100, 200):
        stream.update(database[start : start + 100], first_id=start)
    assert torch.equal(stream.result().index, F.nearest(query, database).index)


def test_result_is_a_copy():
    stream = StreamingNearest(torch.zeros(2, 3)).update(torch.ones(1, 3))
    stream.result().distance.zero_()
    assert stream.result().distance.tolist() == [[3.0], [3.0]]


def test_refuses():
    stream = StreamingNearest(torch.randn(3, 4))
    with pytest.raises(ValueError, match="result: expected at least one chunk"):
        stream.result()
    with pytest.raises(ValueError, match=r"chunk: expected shape \[M, 4\], got \[2, 3\]"):
        stream.update(torch.randn(2, 3))
    with pytest.raises(TypeError, match="chunk: expected the dtype of query"):
        stream.update(torch.randn(2, 4).double())
    with pytest.raises(ValueError, match="first_id"):
        stream.update(torch.randn(2, 4), first_id=-1)
    with pytest.raises(ValueError, match="finite"):
        stream.update(torch.full((2, 4), torch.nan))
