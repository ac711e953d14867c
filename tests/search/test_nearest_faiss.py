import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from fastgen import functional as F
from fastgen.search import FaissIndex

faiss = pytest.importorskip("faiss")


def test_flat_finds_the_neighbours(oracle):
    query, database = torch.randn(40, 12), torch.randn(900, 12)
    index = FaissIndex().add(database[:400]).add(database[400:])
    got = index.search(query, 3)
    expected = oracle.nearest(query, database, 3)
    assert len(index) == 900
    assert torch.equal(got.index, expected[1])
    torch.testing.assert_close(got.distance, expected[0], rtol=1e-4, atol=1e-4)


def test_far_from_the_origin():
    """Where the bare FAISS loses nearly every answer."""
    query, database = 1000 + 0.01 * torch.randn(400, 800), 1000 + 0.01 * torch.randn(500, 800)
    right = F.nearest(query, database).index
    bare = faiss.IndexFlatL2(800)
    bare.add(database.numpy())
    assert (torch.from_numpy(bare.search(query.numpy(), 1)[1]) == right).float().mean() < 0.5
    assert (FaissIndex().add(database).search(query).index == right).float().mean() > 0.98


@pytest.mark.parametrize("far", [1e8, 1e10, 1e18])
def test_a_far_point_leaves_the_others_where_they_are(far):
    query, database = torch.randn(200, 16), torch.randn(2000, 16)
    database[17] += far
    assert torch.equal(FaissIndex().add(database).search(query).index, F.nearest(query, database).index)


@pytest.mark.parametrize("spec", ["Flat", "IVF8,Flat"])
def test_save_and_load(tmp_path, spec):
    database = 50 + torch.randn(600, 8)
    index = FaissIndex(spec).train(database).add(database)
    index.save(tmp_path / "index.faiss")
    before, after = index.search(database[:20], 2), FaissIndex.load(tmp_path / "index.faiss").search(database[:20], 2)
    assert torch.equal(before.index, after.index)
    assert torch.equal(before.distance, after.distance)
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]


def test_tune_reaches_the_index():
    database = torch.randn(2000, 8)
    index = FaissIndex("IVF64,Flat").train(database).add(database)
    query = torch.randn(200, 8)
    exact = F.nearest(query, database).index
    few = (index.search(query).index == exact).float().mean()
    every = (index.tune("nprobe=64").search(query).index == exact).float().mean()
    assert few < 0.95
    assert every == 1


@pytest.mark.parametrize("split", ["shards", "replicas"])
@pytest.mark.parametrize("spec", ["Flat", "IVF4,Flat", "PCA6,Flat"])
def test_several_indexes(spec, split):
    """Ids as from one index, however often rows are added."""
    query, database = 100 + torch.randn(50, 8), 100 + torch.randn(900, 8)
    several, one = FaissIndex(spec, ["cpu"] * 3, split=split), FaissIndex(spec)
    for index in (several, one):
        index.train(database)
        for part in database.split((500, 7, 393)):
            index.add(part)
    assert len(several) == 900
    if spec.startswith("IVF"):
        several.tune("nprobe=4")
        one.tune("nprobe=4")
    got, expected = several.search(query, 4), one.search(query, 4)
    assert torch.equal(got.index, expected.index)
    assert torch.equal(got.distance, expected.distance)
    with pytest.raises(NotImplementedError, match="over 3 devices"):
        several.save("nowhere")


@pytest.mark.parametrize("spec", ["PQ8x4", "SQ8", "HNSW16", "IVF8,PQ8x4", "PCA4,Flat", "LSH"])
def test_any_factory_string(spec):
    database = 10 + torch.randn(1000, 16) * torch.linspace(3, 0.1, 16)
    index = FaissIndex(spec).train(database).add(database)
    found = index.search(database[:200], 5)
    assert found.index.shape == (200, 5)
    hits = (found.index == torch.arange(200)[:, None]).any(1).float().mean()
    assert hits > (0.05 if spec == "LSH" else 0.3)


def test_arrays_on_disk_in_blocks(tmp_path):
    query, database = torch.randn(70, 8), torch.randn(500, 8)
    for name, points in (("query", query), ("database", database)):
        np.save(tmp_path / f"{name}.npy", points.numpy())
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("query", "database")}
    got = FaissIndex(block=33).add(mapped["database"]).search(mapped["query"], 3)
    assert torch.equal(got.index, F.nearest(query, database, 3).index)
    spoilt = mapped["database"].copy()
    spoilt[450, 1] = np.nan
    index = FaissIndex(block=33)
    with pytest.raises(ValueError, match=r"points: .* NaN or infinity in row 450"):
        index.add(spoilt)
    assert len(index) == 0
    with pytest.raises(TypeError, match=r"points: expected a .* array of float32, float64 or float16, got int64"):
        index.add(np.zeros((3, 4), dtype=np.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="FAISS without GPU support")
@pytest.mark.parametrize("devices", ["cuda", ["cuda:0", "cuda:0"]], ids=str)
def test_gpu(devices):
    query, database = torch.randn(100, 32).cuda(), torch.randn(5000, 32).cuda()
    got = FaissIndex(device=devices).add(database).search(query)
    assert got.index.is_cuda
    assert torch.equal(got.index.cpu(), F.nearest(query.cpu(), database.cpu()).index)


class OnGpu:
    """FAISS with a GPU build's names: what it would be told to do there is written down and done on the CPU."""

    def __init__(self, monkeypatch):
        told, home_of = self.told, self.homes = [], []

        class GpuIndex(faiss.IndexFlatL2):
            def add_c(self, n, x):
                told.append(("add", n))
                super().add_c(n, x)

            def search_c(self, n, x, k, distance, index):
                told.append(("search", n))
                super().search_c(n, x, k, distance, index)

        class Resources:
            def setDefaultStream(self, device, stream):
                told.append((device, stream))

        def placed(resources, device, index):
            if not isinstance(index, faiss.IndexFlat):
                raise RuntimeError("Error in ... at gpu/GpuCloner.cpp:1: This index type is not implemented on GPU.")
            told.append(("placed", device))
            return GpuIndex(index.d)

        real = FaissIndex._home_of

        def home(index, *arguments):
            home_of.append(str(real(index, *arguments)))
            return torch.device("cpu")

        monkeypatch.setattr(FaissIndex, "_home_of", home)
        streams = iter(range(100, 200))
        stream = lambda device: type("Stream", (), {"cuda_stream": (str(device), next(streams))})  # noqa: E731
        monkeypatch.setattr(torch.cuda, "current_stream", stream)
        for name, value in (
            ("GpuIndex", GpuIndex),
            ("StandardGpuResources", Resources),
            ("index_cpu_to_gpu", placed),
            ("cast_integer_to_cudastream_t", lambda value: value),
        ):
            monkeypatch.setattr(faiss, name, value, raising=False)


def test_a_gpu_index_takes_pointers_in_the_order_of_torchs_stream(monkeypatch):
    gpu = OnGpu(monkeypatch)
    query, database = 100 + torch.randn(70, 8), 100 + torch.randn(500, 8)
    index = FaissIndex(device="cuda:1", block=400).add(database[:450]).add(database[450:])

    def through_the_host(self, *_):
        raise AssertionError("a copy through the host")

    with monkeypatch.context() as patch:
        for name in ("cpu", "numpy"):
            patch.setattr(torch.Tensor, name, through_the_host)
        found = index.search(query, 3)
    assert torch.equal(found.index, F.nearest(query, database, 3).index)
    assert gpu.homes == ["cuda:1"]
    calls = [("placed", 1)]
    for i, call in enumerate([("add", 400), ("add", 50), ("add", 50), ("search", 70)]):
        calls += [(1, ("cuda:1", 100 + i)), call]
    assert gpu.told == calls


def test_a_second_training_lets_go_of_the_firsts_resources(monkeypatch):
    gpu = OnGpu(monkeypatch)
    held = weakref.WeakSet()
    made = faiss.StandardGpuResources

    def resources():
        new = made()
        held.add(new)
        return new

    monkeypatch.setattr(faiss, "StandardGpuResources", resources)
    points = torch.randn(30, 4)
    index = FaissIndex(device=["cuda:0", "cuda:1"]).train(points).train(10 + points)
    assert len(held) == 2
    gpu.told.clear()
    index.add(points)
    assert [told[0] for told in gpu.told if told[0] != "add"] == [0, 1]  # streams are set for those in use alone


def test_what_a_gpu_has_not(monkeypatch):
    gpu = OnGpu(monkeypatch)
    with pytest.raises(NotImplementedError, match=r"spec='HNSW8' is not built yet; what works: device='cpu'"):
        FaissIndex("HNSW8", "cuda").add(torch.randn(9, 4))
    index = FaissIndex(device="cuda").add(torch.randn(3000, 4))
    index._home = torch.device("cuda")
    with pytest.raises(ValueError, match="k: expected at most 2048 on a GPU, got 2049"):
        index.search(torch.randn(2, 4), 2049)
    several = FaissIndex(device=["cuda:0", "cuda:1"]).add(torch.randn(30, 4))
    assert several._home.type == "cpu"
    assert [told for told in gpu.told if told[0] == "placed"] == [("placed", 0), ("placed", 0), ("placed", 1)]
    assert [told[0] for told in gpu.told[-2:]] == [0, 1]  # the streams of both


def test_minus_one_is_refused():
    database = torch.randn(700, 4)
    index = FaissIndex("IVF64,Flat").train(database).add(database)
    with pytest.raises(
        ValueError, match=r"k: expected 100 neighbours for each query, but spec 'IVF64,Flat' found fewer"
    ):
        index.search(torch.randn(3, 4), 100)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e300])
def test_non_finite_is_refused(bad):
    points = torch.randn(50, 4, dtype=torch.float64)
    points[7, 2] = bad
    for call in (FaissIndex().add, FaissIndex().train, FaissIndex().add(points[:5]).search):
        with pytest.raises(ValueError, match="expected finite float32 values, got NaN or infinity in row 7"):
            call(points)


def test_refuses():
    index = FaissIndex()
    with pytest.raises(ValueError, match="k: expected at most the 0 rows"):
        index.search(torch.randn(1, 4))
    with pytest.raises(ValueError, match="call train first"):
        FaissIndex("IVF8,Flat").add(torch.randn(9, 4))
    with pytest.raises(ValueError, match=r"query: expected shape \[at least 1, 4\], got \[2, 3\]"):
        index.add(torch.randn(9, 4)).search(torch.randn(2, 3))
    with pytest.raises(ValueError, match="before the first add"):
        index.train(torch.randn(9, 4))
    with pytest.raises(TypeError, match=r"points: expected a torch.Tensor"):
        index.add([[1.0]])
    with pytest.raises(ValueError, match="save: expected an index with rows"):
        FaissIndex().save("nowhere")
    with pytest.raises(FileNotFoundError, match="found no file"):
        FaissIndex.load("nowhere")
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(NotImplementedError, match="what works: device='cpu'"):
            FaissIndex(device="cuda")


@pytest.mark.parametrize("spec", ["nonsense", "", "PQ3", "IVF4,Nonsense"])
def test_a_bad_factory_string_is_named(spec):
    with pytest.raises(ValueError, match=r"spec: expected a FAISS factory string, but FAISS says: \w"):
        FaissIndex(spec).add(torch.randn(50, 4))


def test_what_faiss_refuses_is_named(tmp_path):
    points = torch.randn(500, 4)
    with pytest.raises(
        ValueError, match=r"points: expected enough of them to train 'IVF64,Flat', but FAISS says: .* \(5\) should"
    ):
        FaissIndex("IVF64,Flat").train(points[:5])
    with pytest.raises(ValueError, match="points: expected rows that 'IDMap,Flat' can add, but FAISS says: add does"):
        FaissIndex("IDMap,Flat").add(points)
    index = FaissIndex("IVF4,Flat").train(points).add(points)
    for wrong in ("nprobe", "efSearch=3"):
        with pytest.raises(ValueError, match="parameters: expected ones of spec 'IVF4,Flat'"):
            index.tune(wrong)
    with pytest.raises(TypeError, match="parameters: expected a string, as 'nprobe=16', got int 3"):
        index.tune(3)
    with pytest.raises(ValueError, match="query: expected ones that 'IVF4,Flat', as it is tuned, can search"):
        index.tune("nprobe=0").search(points)
    with pytest.raises(ValueError, match=r"points: expected shape \[at least 1, D >= 1\], got \[5, 0\]"):
        FaissIndex().add(torch.empty(5, 0))
    with pytest.raises(ValueError, match="path: expected a file that can be written, but FAISS says: could not open"):
        index.save(tmp_path / "nowhere" / "index")
    index.save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for content in (b"", b"no index at all", whole[:9], whole[: len(whole) // 2], whole[:-1]):
        (tmp_path / "cut").write_bytes(content)
        with pytest.raises(ValueError, match="path: expected an index that FAISS wrote, but FAISS says: "):
            FaissIndex.load(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(whole)
    assert len(FaissIndex.load(tmp_path / "cut")) == 500


def test_loads_lazily():
    code = "import sys; from fastgen import search, functional; print('faiss' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'fastgen\[faiss\]'"):
        FaissIndex()


def test_another_metric_is_refused(tmp_path):
    faiss = pytest.importorskip("faiss")
    path = str(tmp_path / "inner")
    faiss.write_index(faiss.IndexFlatIP(3), path)
    with pytest.raises(ValueError, match="squared L2"):
        FaissIndex.load(path)


def test_float64_far_from_the_origin(tmp_path):
    pytest.importorskip("faiss")
    points, query = torch.randn(50, 4).double() + 1e8, torch.randn(9, 4).double() + 1e8
    index = FaissIndex().add(points)
    index.save(tmp_path / "index")
    for one in (index, FaissIndex.load(tmp_path / "index")):
        assert torch.equal(one.search(query).index, F.nearest(query, points).index)


def test_a_refused_add_builds_nothing():
    pytest.importorskip("faiss")
    points = torch.randn(8, 3)
    points[6] = torch.nan
    index = FaissIndex(block=4)
    with pytest.raises(ValueError, match="row 6"):
        index.add(points)
    assert len(index.add(torch.randn(5, 2))) == 5  # of another width
