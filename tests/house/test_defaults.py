"""torch.set_default_dtype and torch.set_default_device, which training code sets, change no result: kernels write
float32 and int64 through addresses on the CPU, whatever torch would have put there."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastgen import functional as F
from fastgen import metrics, nn, search
from fastgen.ops import backend

x, y = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
CALLS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "nearest": lambda: F.nearest(x, y, 3),
    "radius": lambda: F.nearest(x, y, 2, exclude_radius=0.5),
    "stream": lambda: search.StreamingNearest(x).update(y).result(),
    "permutation": lambda: F.mmd_permutation_test(x, y, n_permutations=20),
    "median": lambda: (F.median_squared_distance(x, y), F.wae_mmd(x, y, kernel="rbf")),
    "mmd": lambda: (F.mmd(x, y), F.mmd(x, y, x_weight=y[:, 0].abs())),
    "fresh": lambda: nn.ReplayBuffer(9, (3,), init="normal", device="cpu").sample(4),
    "langevin": lambda: (nn.LangevinSampler(lambda a: a.square().sum(1), step_size=0.1, n_steps=2)(x, seed=1),),
    "metrics": lambda: (torch.tensor(metrics.manifold(x, y), dtype=torch.float64, device="cpu"),),
}


@pytest.fixture
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    try:
        if isinstance(request.param, torch.dtype):
            torch.set_default_dtype(request.param)
        else:
            torch.set_default_device(request.param)
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


EXPECTED = {name: call() for name, call in CALLS.items()}


# A kernel that wrote into a narrower type's memory would take the process with it: the wider one comes first.
@pytest.mark.parametrize("defaults", [torch.float64, torch.bfloat16, "meta"], indirect=True, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_no_default_of_torch_changes_a_result(defaults: None, name: str) -> None:
    for found, expected in zip(CALLS[name](), EXPECTED[name], strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("defaults", [torch.float64, torch.bfloat16], indirect=True, ids=str)
def test_nor_of_the_reference(defaults: None) -> None:
    with backend.force("reference"):
        for found, expected in zip(F.nearest(x, y, 3), EXPECTED["nearest"], strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize("defaults", [torch.float64, torch.bfloat16], indirect=True, ids=str)
def test_nor_an_approximate_index(defaults: None) -> None:
    pytest.importorskip("faiss")
    found = search.FaissIndex().add(y).search(x, 2)
    assert torch.equal(found.index, F.nearest(x, y, 2).index)
    torch.testing.assert_close(found.distance, F.nearest(x, y, 2).distance, rtol=1e-5, atol=1e-5)
