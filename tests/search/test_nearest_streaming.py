import numpy as np
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


def test_any_split_in_any_order(oracle):
    """The minimum of (distance, id) is associative: a property, so many random cases."""
    generator = np.random.default_rng(0)
    for case in range(25):
        n, m, d = generator.integers(1, 40), generator.integers(1, 300), generator.integers(1, 6)
        query, database = torch.randint(-2, 3, (n, d)).float(), torch.randint(-2, 3, (m, d)).float()
        edges = np.sort(generator.integers(0, m + 1, generator.integers(0, 9)))
        parts = list(zip([0, *edges], [*edges, m], strict=True))
        stream = StreamingNearest(query)
        for i in generator.permutation(len(parts)):
            start, stop = (int(edge) for edge in parts[i])
            stream.update(database[start:stop], first_id=start)
        for got, want in zip(stream.result(), oracle.nearest(query, database), strict=True):
            assert torch.equal(got, want), case


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("radius", [None, 1.5])
def test_queries_and_chunks_on_disk(oracle, tmp_path, dtype, radius):
    query, database = torch.randint(-3, 4, (97, 4)), torch.randint(-3, 4, (500, 4)).numpy().astype(dtype)
    np.save(tmp_path / "query.npy", query.numpy().astype(dtype))
    mapped = np.load(tmp_path / "query.npy", mmap_mode="r")
    np.save(tmp_path / "database.npy", database + dtype(0.5))
    shifted = np.load(tmp_path / "database.npy", mmap_mode="r")
    for block in (10, 97, 1000):
        stream = StreamingNearest(mapped, block=block, exclude_radius=radius)
        for start in range(0, 500, 130):
            chunk = shifted[start : start + 130]  # read-only: torch would warn of it
            stream.update(chunk if start % 260 else torch.from_numpy(np.array(chunk)))
        expected = oracle.nearest(query.double(), torch.from_numpy(database) + 0.5, 1, None, radius)
        for got, want in zip(stream.result(), expected, strict=True):
            assert torch.equal(got, want)


def test_radius_in_chunks(oracle):
    """Also where a chunk has no row left, for one query or for all."""
    query, database = torch.randn(40, 3), torch.randn(300, 3)
    database[50:60] = query[:10]
    expected = oracle.nearest(query, database, 1, None, 0.6)
    for sizes in ((300,), (50, 10, 240), (1,) * 300):
        stream = StreamingNearest(query, exclude_radius=0.6)
        for chunk in database.split(sizes):
            stream.update(chunk)
        for got, want in zip(stream.result(), expected, strict=True):
            assert torch.equal(got, want)
    stream = StreamingNearest(query, exclude_radius=0.6).update(query)
    with pytest.raises(ValueError, match=r"exclude_radius=0\.6 .* none of the 40 so far is left for query 0"):
        stream.result()


def test_state_is_twelve_bytes_a_query():
    stream = StreamingNearest(torch.randn(1000, 3)).update(torch.randn(50, 3))
    kept = [x for x in (*stream._best, stream._waiting) if isinstance(x, torch.Tensor)]
    assert sum(x.numel() * x.element_size() for x in kept) == 12 * 1000


@pytest.mark.gpu
def test_overlap_with_the_generator(oracle):
    query, database = torch.randn(500, 20), torch.randn(40_000, 20)
    stream = StreamingNearest(query.cuda(), overlap=True)
    for start in range(0, 40_000, 5000):
        torch.cuda._sleep(1_000_000)  # the chunk is made long after update is called
        stream.update(database[start : start + 5000].cuda(non_blocking=True) * 2 / 2)
    for got, want in zip(stream.result(), oracle.nearest(query, database), strict=True):
        assert torch.equal(got.cpu(), want)


def test_result_is_a_copy():
    stream = StreamingNearest(torch.zeros(2, 3)).update(torch.ones(1, 3))
    stream.result().distance.zero_()
    assert stream.result().distance.tolist() == [[3.0], [3.0]]


def test_refuses():
    with pytest.raises(TypeError, match=r"query: expected a \[N, D\] array of float32, float64 or float16, got int64"):
        StreamingNearest(np.zeros((3, 4), dtype=np.int64))
    with pytest.raises(ValueError, match="exclude_radius: expected a finite number > 0"):
        StreamingNearest(torch.randn(3, 4), exclude_radius=-1.0)
    with pytest.raises(ValueError, match="device: expected that of query, cpu, got meta"):
        StreamingNearest(torch.randn(3, 4), device="meta")
    split = StreamingNearest(np.zeros((3, 4), dtype=np.float32), exclude_radius=1.0, block=1)
    with pytest.raises(ValueError, match="chunk: expected finite values"):
        split.update(torch.full((2, 4), torch.nan))
    stream = StreamingNearest(torch.randn(3, 4))
    with pytest.raises(ValueError, match="result: expected at least one chunk"):
        stream.result()
    with pytest.raises(ValueError, match=r"chunk: expected shape \[M, 4\], got \[2, 3\]"):
        stream.update(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"chunk: expected a \[N, D\] array of float32, float64 or float16, got int64"):
        stream.update(np.zeros((2, 4), dtype=np.int64))
    with pytest.raises(TypeError, match="chunk: expected the dtype of query"):
        stream.update(np.zeros((2, 4)))
    with pytest.raises(TypeError, match="chunk: expected the dtype of query"):
        stream.update(torch.randn(2, 4).double())
    with pytest.raises(ValueError, match="first_id"):
        stream.update(torch.randn(2, 4), first_id=-1)
    with pytest.raises(ValueError, match="chunk: expected finite values, got NaN or infinity in row 0"):
        stream.update(torch.full((2, 4), torch.nan))


@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize("block", [4, 64])
def test_rows_of_queries_on_disk_are_numbered_as_the_caller_has_them(radius, block):
    query, chunk = np.zeros((10, 3), dtype=np.float32), torch.ones(5, 3)
    stream = StreamingNearest(query, exclude_radius=radius, block=block)
    chunk[2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"^chunk: expected finite values, got NaN or infinity in row 2$"):
        stream.update(chunk)
    with pytest.raises(ValueError, match=r"^query, chunk: expected squared distances within float32"):
        stream.update(torch.full((5, 3), 1e25))
    query[7, 2] = np.nan
    with pytest.raises(ValueError, match=r"^query: expected finite values, got NaN or infinity in row 7$"):
        stream.update(torch.ones(5, 3))


def test_a_refused_chunk_leaves_no_trace():
    query, chunk = torch.randn(4, 3), torch.randn(5, 3)
    stream = StreamingNearest(query)
    with pytest.raises(ValueError, match="NaN or infinity"):
        stream.update(chunk * torch.nan)
    with pytest.raises(ValueError, match="at least one chunk"):
        stream.result()
    assert torch.equal(stream.update(chunk).result().index, F.nearest(query, chunk).index)
    with pytest.raises(ValueError, match="first_id"):
        stream.update(chunk, first_id=2**63 - 3)


@pytest.mark.parametrize("inside", [(True, False), (False, True)])
def test_made_and_updated_within_inference_mode_or_outside(inside):
    query, database = torch.randn(4, 3), torch.randn(20, 3)
    with torch.inference_mode(inside[0]):
        stream = StreamingNearest(query).update(database[:10])
    with torch.inference_mode(inside[1]):
        found = stream.update(database[10:]).result()
    assert torch.equal(found.index, F.nearest(query, database).index)
