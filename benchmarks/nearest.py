"""Exact nearest neighbours: the one row of the database closest to each query."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Run, Work

SIZES = {
    "demo": [(4000, 40_000, 64)],
    "quick": [(2000, 20_000, 64), (10_000, 10_000, 64)],
    "full": [(4000, 40_000, 64), (10_000, 10_000, 64), (10_000, 10_000, 784), (128, 100_000, 128)],
}
Inputs = tuple[Tensor, Tensor]


def works(scale: str) -> list[Work]:
    providers: dict[str, Callable[[Any], Run]] = {
        "fastgen": fastgen,
        "faiss": faiss,
        "eager": eager,
        "torch.compile": compiled,
    }
    return [
        Work(
            "nearest",
            f"top-1 of {n} x {m} x {d}",
            partial(gaussian, n, m, d),
            providers,
            oracle,
            1e-4,
        )
        for n, m, d in SIZES[scale]
    ]


def gaussian(n: int, m: int, d: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, d, generator=generator).to(device) for size in (n, m))  # type: ignore[return-value]


def oracle(inputs: Inputs) -> Tensor:
    """The float64 distances of the winners: an answer that is as near is as good, whatever its index."""
    query, database = (x.double() for x in inputs)
    norms = database.square().sum(1)
    best = torch.cat([(norms - 2 * part @ database.T).argmin(1) for part in query.split(500)])
    return (query - database[best]).square().sum(1)


def _distance(inputs: Inputs, index: Tensor) -> Tensor:
    return (inputs[0] - inputs[1][index]).square().sum(1)


def fastgen(inputs: Inputs) -> Run:
    from fastgen import functional as F

    return lambda: F.nearest(*inputs).distance[:, 0]


def faiss(inputs: Inputs) -> Run:
    """A fresh database each time, as IMLE has it; adding it costs FAISS a copy."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    if inputs[0].device.type == "cuda":
        import faiss.contrib.torch_utils

        resources = faiss.StandardGpuResources()
        return lambda: faiss.knn_gpu(resources, *inputs, 1)[0][:, 0]
    query, database = (x.numpy() for x in inputs)

    def run() -> Tensor:
        index = faiss.IndexFlatL2(database.shape[1])
        index.add(database)
        return torch.from_numpy(index.search(query, 1)[0])[:, 0]

    return run


def _search(query: Tensor, database: Tensor) -> Tensor:
    # In parts: the whole matrix of the largest work is 0.6 GB, which users learn to avoid.
    norms = database.square().sum(1)
    return torch.cat([(norms - 2 * part @ database.T).argmin(1) for part in query.split(1000)])


def eager(inputs: Inputs) -> Run:
    return lambda: _distance(inputs, _search(*inputs))


def compiled(inputs: Inputs) -> Run:
    search = torch.compile(_search)
    return lambda: _distance(inputs, search(*inputs))
