"""FAISS indexes for torch tensors, without FAISS's silent failures."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.nearest import Nearest

_GPU_MOST = 2048  # neighbours of a query


class FaissIndex:
    """A FAISS index in squared L2: any factory string, on the CPU or, with a GPU build of FAISS, on a CUDA device.

    Args:
        spec: FAISS factory string: "Flat" (default, exhaustive), "IVF256,Flat", "HNSW32", "PQ16" …
        device: None or "cpu" (default), a CUDA device, or several of them, each with an index of its own, in threads.
        split: for several devices "shards" (default: each holds a part of the rows, which a search merges) or
            "replicas" (each holds all rows and answers a part of the queries).
        block: rows that are converted and handed to FAISS at a time, default 65,536.

    Points and queries are tensors or numpy arrays. Each block is centred where it is and FAISS reads and writes it
    through its pointer: an index on one CUDA device takes and answers CUDA tensors on torch's current stream, nothing
    passes through the host. (Several indexes, and transforms such as "PCA64,Flat", FAISS merges or makes on the CPU:
    there it does.) Arrays on disk (np.load(path, mmap_mode="r"), np.memmap) are read a block at a time: only the index
    need fit.

    Raises:
        ImportError: FAISS is not installed.
        NotImplementedError: a CUDA device and a FAISS without GPU support, or a spec that FAISS has on the CPU alone.
        ValueError: a spec that FAISS does not read (when the first points come: it depends on their width).

    Notes:
        Distances are FAISS's own, in float32 by the expansion ‖q‖² − 2 q·b + ‖b‖²: for exact and reproducible answers
        take `functional.nearest`. Points are centred on the mean of the first that come (train, else add), because the
        expansion cancels far from the origin; squared L2 does not change. A coordinate whose mean is below its standard
        deviation stays as it is: a few far points would carry all others away from the origin. Points that are not
        finite are refused, since FAISS lets one of them spoil the answers of others, and so is an answer that lacks
        neighbours (index −1). A spec that changes the points (a code, "L2norm", the bits of "LSH") has its distances
        between what it makes of them.
        Not differentiable. A copy (by copy or pickle) is an index of its own on the same device; as `save`, not built
        for several devices. FAISS brings an OpenMP of its own, which each call gives torch's number of threads.

    Source:
        Johnson, Douze, Jégou (2017), "Billion-scale similarity search with GPUs"; faiss.index_factory.
    """

    def __init__(
        self,
        spec: str = "Flat",
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        *,
        split: str = "shards",
        block: int = 1 << 16,
    ) -> None:
        self.spec = spec
        several = device if isinstance(device, Sequence) and not isinstance(device, str) else [device or "cpu"]
        self.devices = [torch.device(one) for one in several]
        self.split = check.choice("split", split, ("shards", "replicas"))
        self.block = check.integer("block", block, least=1)
        self._faiss = _faiss()
        if not self.devices:
            raise ValueError("device: expected at least one device, got an empty sequence")
        for one in self.devices:
            if one.type not in ("cpu", "cuda"):
                raise ValueError(f"device: expected a CPU or CUDA device, got {one}")
            if one.type == "cuda" and not hasattr(self._faiss, "StandardGpuResources"):
                check.not_built("device", str(one), "device='cpu' (the FAISS that is installed has no GPU support)")
        self._index: Any = None
        self._inner: Any = None  # the index behind the centring
        self._mean: Tensor | None = None
        self._home = torch.device("cpu")  # where the pointers that it takes point to
        self._resources: list[tuple[Any, torch.device]] = []
        self._parts: list[Any] = []

    def __len__(self) -> int:
        return 0 if self._index is None else int(self._index.ntotal)

    def train(self, points: Tensor | np.ndarray) -> "FaissIndex":
        """Fit the index (its clusters, its codes) and the centre to points [M, D]; "Flat" and HNSW need no call."""
        raw = torch.cat(list(self._raw("points", points)))
        if len(self):
            raise ValueError(f"points: expected training before the first add, got an index of {len(self)} rows")
        self._build(raw)
        rows = self._handed(raw)
        with _named("points", f"enough of them to train {self.spec!r}"):
            self._inner.train_c(len(rows), self._pointer(rows))
        self._index.is_trained = self._inner.is_trained
        return self

    def add(self, points: Tensor | np.ndarray) -> "FaissIndex":
        """Append points [M, D]; their indices go on from the last. Where one is refused, none is added."""
        first = None
        for raw in self._raw("points", points):  # all of them, before anything is built
            first = raw if first is None else first
        if self._index is None:
            assert first is not None
            self._build(first)
        if not self._index.is_trained:
            self._index = None if not len(self) else self._index
            raise ValueError(f"points: expected a trained index for spec {self.spec!r}: call train first")
        for raw in self._raw("points", points):
            rows = self._handed(raw)
            with _named("points", f"rows that {self.spec!r} can add"):
                self._inner.add_c(len(rows), self._pointer(rows))
        self._index.ntotal = self._inner.ntotal
        return self

    def tune(self, parameters: str) -> "FaissIndex":
        """Set search parameters, as FAISS writes them: "nprobe=16", "efSearch=64"."""
        if not isinstance(parameters, str):  # a number would be taken for one of FAISS's own combinations
            raise TypeError(f"parameters: expected a string, as 'nprobe=16', got {check.describe(parameters)}")
        if self._index is None:
            raise ValueError(f"parameters: expected rows in the index before {parameters!r}")
        on_gpu = any(one.type == "cuda" for one in self.devices)
        space = self._faiss.GpuParameterSpace() if on_gpu else self._faiss.ParameterSpace()
        with _named("parameters", f"ones of spec {self.spec!r}, as 'nprobe=16'"):
            space.set_index_parameters(self._index, parameters)
        return self

    def search(self, query: Tensor | np.ndarray, k: int = 1) -> Nearest:
        """Nearest(distance [N, k] float32, index [N, k] int64) of query [N, D], on its device (an array's: CPU)."""
        k = check.integer("k", k, least=1)
        if k > len(self):
            raise ValueError(f"k: expected at most the {len(self)} rows of the index, got {k}")
        if k > _GPU_MOST and self._home.type == "cuda":
            raise ValueError(f"k: expected at most {_GPU_MOST} on a GPU, got {k}")
        parts = []
        for raw in self._raw("query", query):
            rows = self._handed(raw)
            distance = torch.empty(len(rows), k, dtype=torch.float32, device=self._home)
            index = torch.empty(len(rows), k, dtype=torch.int64, device=self._home)
            with _named("query", f"ones that {self.spec!r}, as it is tuned, can search"):
                self._inner.search_c(len(rows), self._pointer(rows), k, self._pointer(distance), self._pointer(index))
            parts.append((distance, index))
        distance, index = (torch.cat(found) for found in zip(*parts, strict=True))
        if (index < 0).any():
            short = int((index < 0).any(1).sum())
            raise ValueError(
                f"k: expected {k} neighbours for each query, but spec {self.spec!r} found fewer for {short} of "
                f"{len(index)}: search more of the index, as with tune('nprobe=16'), or take a lower k"
            )
        device = query.device if isinstance(query, Tensor) else "cpu"
        return Nearest(distance.to(device), index.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index in FAISS's format, centre included: beside and renamed, a kill leaves the old file whole."""
        if self._index is None:
            raise ValueError("save: expected an index with rows, got an empty one")
        path, index = os.fspath(path), self._on_cpu("save")
        try:
            with _named("path", "a file that can be written"):
                self._faiss.write_index(index, path + ".part")
            os.replace(path + ".part", path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + ".part")

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device | None = None) -> "FaissIndex":
        """An index that `save` or faiss.write_index wrote."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"path: expected a saved index, found no file {os.fspath(path)}")
        loaded = cls(f"loaded from {os.fspath(path)}", device)
        with _named("path", "an index that FAISS wrote"):
            index = loaded._faiss.read_index(os.fspath(path))
        if index.metric_type != loaded._faiss.METRIC_L2:
            raise ValueError(
                f"path: expected an index in squared L2, FAISS's metric {loaded._faiss.METRIC_L2}, "
                f"got metric {index.metric_type} in {os.fspath(path)}"
            )
        loaded._take(index)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        """Plain values, and the index as FAISS writes it."""
        index = None if self._index is None else self._faiss.serialize_index(self._on_cpu("copy")).tobytes()
        devices = [str(one) for one in self.devices]
        return {"spec": self.spec, "device": devices, "split": self.split, "block": self.block, "index": index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FaissIndex.__init__(self, state["spec"], state["device"], split=state["split"], block=state["block"])
        if state["index"] is not None:
            self._take(self._faiss.deserialize_index(np.frombuffer(state["index"], np.uint8)))

    def _on_cpu(self, what: str) -> Any:
        if len(self.devices) > 1:
            check.not_built(what, f"over {len(self.devices)} devices", "an index on one device")
        if self.devices[0].type == "cpu":
            return self._index
        inner = self._faiss.index_gpu_to_cpu(self._inner)  # FAISS clones no centring
        return inner if self._mean is None else self._centred(inner)

    def _take(self, index: Any) -> None:
        """What `_on_cpu` gave, as this one's."""
        inner = index
        if isinstance(index, self._faiss.IndexPreTransform) and index.chain.size() == 1:
            centring = self._faiss.downcast_VectorTransform(index.chain.at(0))
            if isinstance(centring, self._faiss.CenteringTransform):
                self._mean = torch.from_numpy(self._faiss.vector_to_array(centring.mean))
                inner = index.index
        self._index, self._inner = index, self._place(inner, self.devices[0])
        if self._inner is not inner:
            self._index = self._inner if self._mean is None else self._centred(self._inner)
        self._home = self._home_of(self._inner, self.devices[0])

    def _build(self, raw: Tensor) -> None:
        faiss, d = self._faiss, raw.shape[1]
        self._index, self._inner, self._resources = None, None, []  # a second training's take the place of the first's
        mean, spread = raw.mean(0, dtype=torch.float64), raw.var(0, correction=0)
        self._mean = torch.where(mean.square() > spread, mean, 0.0).float()
        parts = [self._factory(d, one) for one in self.devices]
        index = parts[0]
        self._home = self._home_of(index, self.devices[0])
        if len(parts) > 1:
            shards = self.split == "shards"
            index = faiss.IndexShards(d, True, False) if shards else faiss.IndexReplicas(d, True)
            # A shard's rows are numbered by FAISS as a whole; not every index can hold numbers that are given.
            self._parts = [faiss.IndexIDMap(part) if shards else part for part in parts]  # FAISS keeps bare pointers
            for part in self._parts:
                index.add_shard(part) if shards else index.add_replica(part)
            self._home = torch.device("cpu")
        self._inner = index
        self._index = self._centred(index)

    def _centred(self, index: Any) -> Any:
        """With the centring before it: what is saved; here `_handed` does its work."""
        assert self._mean is not None
        centring = self._faiss.CenteringTransform(index.d)
        self._faiss.copy_array_to_vector(self._mean.cpu().numpy(), centring.mean)
        centring.is_trained = True
        return self._faiss.IndexPreTransform(centring, index)

    def _factory(self, d: int, device: torch.device) -> Any:
        with _named("spec", "a FAISS factory string"):
            index = self._faiss.index_factory(d, self.spec, self._faiss.METRIC_L2)
        return self._place(index, device)

    def _place(self, index: Any, device: torch.device) -> Any:
        if device.type == "cpu":
            return index
        resources = self._faiss.StandardGpuResources()
        self._resources.append((resources, device))
        try:
            return self._faiss.index_cpu_to_gpu(resources, device.index or 0, index)
        except RuntimeError as error:
            if "not implemented on GPU" not in str(error):
                raise
            check.not_built("spec", self.spec, "device='cpu' (FAISS has no such index on a GPU)")

    def _home_of(self, index: Any, device: torch.device) -> torch.device:
        on_gpu = device.type == "cuda" and isinstance(index, self._faiss.GpuIndex)
        return torch.device("cuda", device.index or 0) if on_gpu else torch.device("cpu")

    def _handed(self, raw: Tensor) -> Tensor:
        """Float32 rows where the inner index takes them; float64 points are centred first: far from the origin they
        differ only then."""
        rows = raw if self._mean is None else raw - self._mean.to(raw.device)
        # FAISS works in the order of torch's stream: after what has been queued there, before what will be.
        for resources, device in self._resources:
            stream = self._faiss.cast_integer_to_cudastream_t(torch.cuda.current_stream(device).cuda_stream)
            resources.setDefaultStream(device.index or 0, stream)
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        return rows.to(self._home, torch.float32).contiguous()

    def _pointer(self, values: Tensor) -> Any:
        cast = self._faiss.cast_integer_to_float_ptr, self._faiss.cast_integer_to_idx_t_ptr
        return cast[values.dtype == torch.int64](values.data_ptr())

    def _raw(self, name: str, points: Tensor | np.ndarray) -> Iterator[Tensor]:
        """Rows that are finite in float32, `block` at a time where they are, float64 where points are, else float32."""
        if isinstance(points, np.ndarray):
            check.rows(name, points)
        else:
            check.tensor(name, points, ndim=(2,))
        if 0 in points.shape or (self._index is not None and points.shape[1] != self._index.d):
            width = "D >= 1" if self._index is None else self._index.d
            raise ValueError(f"{name}: expected shape [at least 1, {width}], got {list(points.shape)}")
        for start in range(0, len(points), self.block):
            part = points[start : start + self.block]
            rows = part.detach() if isinstance(part, Tensor) else torch.from_numpy(np.array(part))  # maps are read-only
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            finite = check.finite_rows(rows.float())
            if not finite.all():
                row = start + int((~finite).nonzero()[0, 0])
                raise ValueError(f"{name}: expected finite float32 values, got NaN or infinity in row {row}")
            yield rows


@contextlib.contextmanager
def _named(name: str, expected: str) -> Iterator[None]:
    """FAISS's RuntimeError as one that names the argument."""
    try:
        yield
    except RuntimeError as error:
        why = re.sub(r"^Error in .* at \S+:\d+: (Error: '.*?' failed: )?", "", str(error), flags=re.S)
        raise ValueError(f"{name}: expected {expected}, but FAISS says: {why}") from error


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("FaissIndex needs FAISS: pip install 'fastgen[faiss]' (or faiss-gpu)") from error
    return faiss
