"""Exact nearest neighbours: the one row of the database closest to each query, whole and streamed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import nearest_ring
from benchmarks.harness import DEVICES, Provider, Run, Work

# (N, M, D)
GRID = {
    "demo": [(4000, 40_000, 64)],
    "quick": [(2000, 20_000, 64), (10_000, 10_000, 64)],
    "full": [
        *((n, n, 64) for n in (1000, 3000)),
        *((n, 100_000, 64) for n in (1, 16)),
        *((10_000, 10_000, d) for d in (64, 128, 784, 800)),
    ],
}
GRID["huge"] = [
    *GRID["full"],
    (4000, 40_000, 64),
    (30_000, 30_000, 64),
    (128, 100_000, 128),
    *((n, n, d) for n in (100_000, 1_000_000) for d in (128, 800)),
]
# Rows that are drawn as they are searched, by chunks: no provider ever has them all.
STREAMED = {
    "demo": [],
    "quick": [(1000, 200_000, 64)],
    "full": [(1000, 1_000_000, 64)],
    "huge": [(1000, 1_000_000, 64), (1000, 10_000_000, 64), (10_000, 10_000_000, 128)],
}
# Where FAISS's search on a CPU goes wrong without a word.
BAD = {"demo": [], "quick": [(2000, 20_000, 64)], "full": [(10_000, 10_000, 64)], "huge": [(10_000, 10_000, 64)]}
RING = {"demo": [], "quick": [], "full": [(8000, 80_000, 64)], "huge": [(8000, 80_000, 64)]}
CHUNK = 50_000
CHECKED = 500  # queries that the oracle answers
Inputs = tuple[Tensor, Tensor]
Found = tuple[Tensor, Tensor]  # squared distances and rows, [N] each
Expected = tuple[Tensor, Tensor, Tensor]  # queries [Q], their two least distances and rows, [Q, 2] each


def works(scale: str) -> list[Work]:
    # The small first: what they take tells which of the large are beyond anyone's patience.
    found = [_work(*size, scale) for size in GRID[scale]] + [_streamed_work(*size) for size in STREAMED[scale]]
    found += [make(*size) for size in BAD[scale] for make in (_offset_work, _masked_work)]
    found += [_ring_work(*size) for size in RING[scale]]
    return sorted(found, key=lambda work: work.operations)


def growing(series: str, n: int) -> Work:
    work = _work(n, n, 64)  # without those whose time ends the search long before memory does
    slow = ("keops", "torch.compile")
    return replace(work, providers={name: one for name, one in work.providers.items() if name not in slow})


GROWING = {"top-1, D = 64": 2048}


def _work(n: int, m: int, d: int, scale: str = "full") -> Work:
    few = ("cuda",) if (scale, d) in (("full", 128), ("full", 800)) else DEVICES  # between and beside those of all
    providers: dict[str, Any] = {
        "fastgen": fastgen,
        "faiss": Provider(faiss, outside=True),
        # On a CPU its search takes seconds where others take milliseconds: shown where the sizes start small.
        **({} if scale in ("demo", "quick") else {"keops": Provider(keops, few, outside=True)}),
        "flash-kmeans": Provider(flash_kmeans, ("cuda",)),
        "eager": eager,
        "torch.cdist": Provider(cdist, few),
        "torch.compile": Provider(compiled, few),
    }
    return Work(
        "nearest",
        f"top-1 of {n} x {m} x {d}",
        partial(gaussian, n, m, d),
        providers,
        partial(oracle, lambda inputs: [inputs[1]]),
        tolerance=1e-4,
        error=error,
        facts=facts,
        series="top-1",
        size={"N": n, "M": m, "D": d},
        operations=2.0 * n * m * d,
        moved=4.0 * d * (n + m) + 12.0 * n,
        once=n * m >= 10**11,
    )


def _streamed_work(n: int, m: int, d: int) -> Work:
    providers: dict[str, Any] = {"fastgen": streamed_fastgen, "faiss": Provider(streamed_faiss, outside=True)}
    if m < 10**6:
        providers["eager"] = streamed_eager  # seconds a call beyond
    return Work(
        "nearest",
        f"top-1 of {n} x {m} x {d}, streamed",
        partial(stream, n, m, d),
        providers,
        partial(oracle, chunks, most=100),
        tolerance=1e-4,
        error=error,
        facts=facts,
        series="top-1, streamed",
        size={"N": n, "M": m, "D": d},
        operations=2.0 * n * m * d,
        moved=4.0 * d * (n + m) + 12.0 * n,
        once=n * m >= 10**9,
    )


def _offset_work(n: int, m: int, d: int) -> Work:
    """Far from the origin the expansion ‖q‖² − 2 q·b + ‖b‖² cancels."""
    work = _work(n, m, d, "full")
    kept = {name: one for name, one in work.providers.items() if name != "torch.compile"}
    return replace(
        work,
        name=f"{work.name}, mean 1000 and deviation 0.01",
        inputs=partial(offset, n, m, d),
        providers=kept,
        series="top-1 far off",
    )


def _masked_work(n: int, m: int, d: int) -> Work:
    """Half the rows are infinite, as RS-IMLE rejects them, and masked where a provider has a mask."""
    providers: dict[str, Any] = {
        "fastgen": masked_fastgen,
        "faiss": Provider(lambda inputs: faiss(inputs[:2]), ("cpu",)),
        "faiss, rows copied": Provider(masked_faiss, ("cpu",)),
        "eager": masked_eager,
    }
    return replace(
        _work(n, m, d),
        name=f"top-1 of {n} x {m} x {d}, half the rows infinite",
        inputs=partial(half_infinite, n, m, d),
        providers=providers,
        oracle=partial(oracle, lambda inputs: [inputs[1].masked_fill(~inputs[2][:, None], 1e9)]),
        series="top-1 of half",
    )


def _ring_work(n: int, m: int, d: int) -> Work:
    """One thread a process; all on one CPU."""
    return replace(
        _work(n, m, d),
        name=f"top-1 of {n} x {m} x {d}, a thread each",
        providers={**nearest_ring.providers(), "eager": Provider(eager_alone, ("cpu",), apart=True)},
        series=nearest_ring.SERIES,
    )


def gaussian(n: int, m: int, d: int, device: torch.device) -> Inputs:
    # Drawn where they are used: a CPU takes a quarter of a minute for the largest.
    generator = torch.Generator(device).manual_seed(0)
    query, database = (torch.randn(size, d, generator=generator, device=device) for size in (n, m))
    return query, database


def offset(n: int, m: int, d: int, device: torch.device) -> Inputs:
    query, database = gaussian(n, m, d, device)
    return 1000 + 0.01 * query, 1000 + 0.01 * database


def half_infinite(n: int, m: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    query, database = gaussian(n, m, d, device)
    mask = (torch.rand(m, generator=torch.Generator().manual_seed(2)) > 0.5).to(device)
    return query, database.masked_fill(~mask[:, None], float("inf")), mask


def stream(n: int, m: int, d: int, device: torch.device) -> tuple[Tensor, int]:
    return torch.randn(n, d, generator=torch.Generator(device).manual_seed(0), device=device), m


def chunks(inputs: tuple[Tensor, int]) -> Iterator[Tensor]:
    """Slices of one block, each shifted by its own point: rows that differ, and drawing them costs next to nothing."""
    query, m = inputs
    device = query.device
    generator = torch.Generator(device).manual_seed(1)
    block = torch.randn(CHUNK, query.shape[1], generator=generator, device=device)
    shifts = torch.randn(-(-m // CHUNK), query.shape[1], generator=generator, device=device) * 0.1
    for i, shift in enumerate(shifts):
        yield block[: m - i * CHUNK] + shift


def oracle(database: Callable[[Any], Any], inputs: Any, most: int = CHECKED) -> Expected:
    """Some queries, the distances in float64 and the rows of the nearest two, over the chunks of `database`."""
    query = inputs[0]
    index = torch.linspace(0, len(query) - 1, min(most, len(query)), device=query.device).round().long()
    centre = query.double().mean(0)
    some = query[index].double() - centre
    best = some.new_full((len(some), 2), float("inf"))
    winner, first = index.new_zeros(len(some), 2), 0
    for chunk in database(inputs):
        for rows in chunk.split(10_000):
            rows = rows.double() - centre
            near = (rows.square().sum(1) - 2 * some @ rows.T).topk(min(2, len(rows)), largest=False).indices
            distance = torch.cat([best, (some[:, None] - rows[near]).square().sum(2)], 1)
            best, order = (part[:, :2] for part in distance.sort(stable=True, dim=1))
            winner = torch.cat([winner, near + first], 1).gather(1, order)
            first += len(rows)
    return index, best, winner


def error(result: Found, expected: Expected) -> float:
    """The greatest relative error of a distance, and of what a wrong row lies farther off at the least: one cannot hide
    among many, nor behind the right distance."""
    index, best, winner = expected
    if not bool(result[0].isfinite().all()):
        return float("inf")
    want = best[:, 0]
    off = (result[0][index].double() - want).abs()
    farther = torch.where(result[1][index].long() == winner[:, 0], 0.0, best[:, 1] - want)
    return float((torch.maximum(off, farther) / want).max())


def facts(result: Found, expected: Expected) -> dict[str, Any]:
    index, _, winner = expected
    return {"right": float((result[1][index].long() == winner[:, 0]).double().mean()), "checked": len(index)}


def _found(inputs: Inputs, index: Tensor) -> Found:
    return (inputs[0] - inputs[1][index]).square().sum(1), index


def fastgen(inputs: Inputs) -> Run:
    from fastgen import functional as F

    def run() -> Found:
        found = F.nearest(*inputs)
        return found.distance[:, 0], found.index[:, 0]

    return run


def faiss(inputs: Inputs) -> Run:
    """`faiss.knn`, its function for a database that is used once, as IMLE's is."""
    import faiss

    if inputs[0].device.type == "cuda":
        import faiss.contrib.torch_utils

        resources = faiss.StandardGpuResources()
        return lambda: tuple(part[:, 0] for part in faiss.knn_gpu(resources, *inputs, 1))
    faiss.omp_set_num_threads(torch.get_num_threads())
    query, database = (x.numpy() for x in inputs)
    return lambda: tuple(torch.from_numpy(part)[:, 0] for part in faiss.knn(query, database, 1))


def keops(inputs: Inputs) -> Run:
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)

    query, database = inputs

    def run() -> Found:
        square = ((LazyTensor(query[:, None]) - LazyTensor(database[None])) ** 2).sum(-1)
        return _found(inputs, square.argKmin(K=1, dim=1)[:, 0])

    return run


def flash_kmeans(inputs: Inputs) -> Run:
    """Its assignment step is a fused top-1, in TF32."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    query, database = (t[None].contiguous() for t in inputs)
    return lambda: _found(inputs, euclid_assign_triton(query, database, query.square().sum(-1))[0].long())


def masked_fastgen(inputs: tuple[Tensor, Tensor, Tensor]) -> Run:
    from fastgen import functional as F

    def run() -> Found:
        found = F.nearest(*inputs[:2], mask=inputs[2])
        return found.distance[:, 0], found.index[:, 0]

    return run


def masked_faiss(inputs: tuple[Tensor, Tensor, Tensor]) -> Run:
    import faiss as installed  # a missing one is missing before the first call  # noqa: F401

    def run() -> Found:
        distance, index = faiss((inputs[0], inputs[1][inputs[2]]))()
        return distance, inputs[2].nonzero()[:, 0][index]

    return run


def masked_eager(inputs: tuple[Tensor, Tensor, Tensor]) -> Run:
    query, database, mask = inputs

    def run() -> Found:
        norms = database.square().sum(1)
        parts = [(norms - 2 * part @ database.T).masked_fill(~mask, torch.inf).argmin(1) for part in query.split(1000)]
        return _found((query, database), torch.cat(parts))

    return run


def _search(query: Tensor, database: Tensor) -> Tensor:
    # In parts: the whole matrix of the largest work is gigabytes, which users learn to avoid.
    norms = database.square().sum(1)
    return torch.cat([(norms - 2 * part @ database.T).argmin(1) for part in query.split(1000)])


def eager(inputs: Inputs) -> Run:
    return lambda: _found(inputs, _search(*inputs))


def eager_alone(inputs: Inputs) -> Run:
    def run() -> Found:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _found(inputs, _search(*inputs))
        finally:
            torch.set_num_threads(before)

    return run


def cdist(inputs: Inputs) -> Run:
    def run() -> Found:
        distance, index = torch.cdist(*inputs).min(1)
        return distance.square(), index

    return run


def compiled(inputs: Inputs) -> Run:

    def part(query: Tensor, database: Tensor, norms: Tensor) -> Tensor:
        return (norms - 2 * query @ database.T).argmin(1)

    search = torch.compile(part, dynamic=False)

    def run() -> Found:
        query, database = inputs
        norms = database.square().sum(1)
        return _found(inputs, torch.cat([search(rows, database, norms) for rows in query.split(1000)]))

    return run


def streamed_fastgen(inputs: tuple[Tensor, int]) -> Run:
    from fastgen.search import StreamingNearest

    def run() -> Found:
        search = StreamingNearest(inputs[0])
        for chunk in chunks(inputs):
            search.update(chunk)
        found = search.result()
        return found.distance[:, 0], found.index[:, 0]

    return run


def _merged(search: Callable[[Inputs], Run], inputs: tuple[Tensor, int]) -> Run:
    def run() -> Found:
        best = inputs[0].new_full((len(inputs[0]),), float("inf"))
        winner, first = torch.zeros(len(best), dtype=torch.int64, device=best.device), 0
        for chunk in chunks(inputs):
            distance, index = search((inputs[0], chunk))()
            winner = torch.where(distance < best, index + first, winner)
            best = torch.minimum(best, distance)
            first += len(chunk)
        return best, winner

    return run


def streamed_faiss(inputs: tuple[Tensor, int]) -> Run:
    import faiss as installed  # a missing one is missing before the first chunk  # noqa: F401

    return _merged(faiss, inputs)


def streamed_eager(inputs: tuple[Tensor, int]) -> Run:
    return _merged(eager, inputs)
