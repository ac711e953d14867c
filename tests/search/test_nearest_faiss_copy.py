"""FaissIndex in copy.deepcopy and pickle: an index of its own that answers to the bit as the one it was made of."""

import copy
import pickle
import pickletools
from collections.abc import Callable

import pytest
import torch

from fastgen.search import FaissIndex

faiss = pytest.importorskip("faiss")
WAYS: dict[str, Callable[[FaissIndex], FaissIndex]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda index: pickle.loads(pickle.dumps(index)),
}


@pytest.fixture(params=WAYS)
def copied(request: pytest.FixtureRequest) -> Callable[[FaissIndex], FaissIndex]:
    return WAYS[request.param]


def answers(index: FaissIndex, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    distance, found = index.search(query, 3)
    return distance.clone(), found.clone()


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("spec", ["Flat", "IVF8,Flat", "HNSW16", "PQ8x4", "IVF8,PQ8x4", "PCA4,Flat", "SQ8"])
def test_answers_and_is_apart(copied, spec):
    points, query = 100 + torch.randn(900, 16, dtype=torch.float64), 100 + torch.randn(40, 16, dtype=torch.float64)
    index = FaissIndex(spec, block=333).train(points).add(points)
    if spec.startswith("IVF"):
        index.tune("nprobe=3")
    before = answers(index, query)
    other = copied(index)
    kept = ("spec", "devices", "split", "block", "_home")
    assert [getattr(other, name) for name in kept] == [getattr(index, name) for name in kept]
    assert same(answers(other, query), before)
    assert torch.equal(other._mean, index._mean)
    other.add(query)
    assert (len(other), len(index)) == (940, 900)
    assert same(answers(index, query), before)
    assert (other.search(query).index[:, 0] >= 900).float().mean() > 0.3
    after = answers(other, query)
    index.add(query[:7])
    assert same(answers(other, query), after)


def test_what_is_empty(copied):
    assert len(copied(FaissIndex("IVF4,Flat"))) == 0
    points = torch.randn(300, 4)
    trained = FaissIndex("IVF4,Flat").train(points)
    other = copied(trained)
    assert same(answers(other.add(points), points), answers(trained.add(points), points))
    assert len(copied(FaissIndex(device=["cpu", "cpu"], split="replicas")).add(points)) == 300


def test_several_devices_are_refused(copied):
    with pytest.raises(NotImplementedError, match="over 2 devices"):
        copied(FaissIndex(device=["cpu", "cpu"]).add(torch.randn(9, 4)))


def test_a_pickle_holds_plain_values():
    text = pickle.dumps(FaissIndex("HNSW8").add(torch.randn(50, 4)), protocol=2)
    named = {value for code, value, _ in pickletools.genops(text) if code.name == "GLOBAL"}
    assert named == {"copy_reg __newobj__", "fastgen.search.faiss_index FaissIndex", "_codecs encode"} & named
    assert "fastgen.search.faiss_index FaissIndex" in named


def saved(index, path):
    index.save(path / "index")
    return FaissIndex.load(path / "index", device=index.devices[0])


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "saved"])
def test_a_gpu_index_goes_by_way_of_the_cpu(way, centred, monkeypatch, tmp_path):
    """FAISS moves what it can clone, which a centring is not."""
    told = []

    def to_cpu(index):
        told.append("to cpu")
        return faiss.clone_index(index)

    def to_gpu(resources, device, index):
        told.append(("to gpu", device))
        return faiss.clone_index(index)

    for name, value in (("StandardGpuResources", object), ("index_gpu_to_cpu", to_cpu), ("index_cpu_to_gpu", to_gpu)):
        monkeypatch.setattr(faiss, name, value, raising=False)
    monkeypatch.setattr(faiss, "GpuIndex", type("GpuIndex", (), {}), raising=False)
    centre = lambda self, raw: (raw if self._mean is None else raw - self._mean).float().contiguous()  # noqa: E731
    monkeypatch.setattr(FaissIndex, "_handed", centre)
    points = 100 + torch.randn(50, 4)
    if centred:
        index = FaissIndex(device="cuda:1").add(points)
    else:
        bare = faiss.IndexFlatL2(4)
        bare.add(points.numpy())
        faiss.write_index(bare, str(tmp_path / "bare"))
        index = FaissIndex.load(tmp_path / "bare", "cuda:1")
    other = saved(index, tmp_path) if way == "saved" else WAYS[way](index)
    assert told == [("to gpu", 1), "to cpu", ("to gpu", 1)]
    assert other.devices == [torch.device("cuda:1")]
    assert [device for _, device in other._resources] == other.devices
    assert other._resources[0][0] is not index._resources[0][0]
    assert same(answers(other, points), answers(index, points))
    assert (other._mean is not None) == centred
    assert len(other.add(points)) == 100


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="FAISS without GPU support")
def test_on_a_gpu(copied, tmp_path):
    points = 100 + torch.randn(5000, 32, device="cuda")
    index = FaissIndex(device="cuda").add(points)
    for other in (copied(index), saved(index, tmp_path)):
        assert other._home == index._home
        assert same(answers(other, points[:70]), answers(index, points[:70]))
