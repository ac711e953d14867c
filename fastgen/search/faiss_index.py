"""FAISS indexes for torch tensors, without FAISS's silent failures."""

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

from fastgen import check
from fastgen.functional.nearest import Nearest


class FaissIndex:
    """A FAISS index in squared L2: any factory string, on the CPU or, with a GPU build of FAISS, on a CUDA device.

    Args:
        spec: FAISS factory string: "Flat" (default, exhaustive), "IVF256,Flat", "HNSW32", "PQ16" …
        device: None or "cpu" (default), or a CUDA device.

    Raises:
        ImportError: FAISS is not installed.
        NotImplementedError: a CUDA device and a FAISS without GPU support.

    Notes:
        Distances are FAISS's own, in float32 by the expansion ‖q‖² − 2 q·b + ‖b‖²: for exact and reproducible answers
        take `functional.nearest`. Points are centred on the mean of the first that come (train, else add), because the
        expansion cancels far from the origin; squared L2 does not change. Points that are not finite are refused, since
        FAISS lets one of them spoil the answers of others, and so is an answer that lacks neighbours (index −1).
        Not differentiable. FAISS brings an OpenMP of its own, which each call gives torch's number of threads.

    Source:
        Johnson, Douze, Jégou (2017), "Billion-scale similarity search with GPUs"; faiss.index_factory.
    """

    def __init__(self, spec: str = "Flat", device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.device = torch.device("cpu" if device is None else device)
        self._faiss = _faiss()
        if self.device.type == "cuda" and not hasattr(self._faiss, "StandardGpuResources"):
            check.not_built("device", str(self.device), "device='cpu' (the FAISS that is installed has no GPU support)")
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected a CPU or CUDA device, got {self.device}")
        self._index: Any = None
        self._resources: Any = None

    def __len__(self) -> int:
        return 0 if self._index is None else int(self._index.ntotal)

    def train(self, points: Tensor) -> "FaissIndex":
        """Fit the index (its clusters, its codes) and the centre to points [M, D]; "Flat" and HNSW need no call."""
        rows = self._rows("points", points)
        if len(self):
            raise ValueError(f"points: expected training before the first add, got an index of {len(self)} rows")
        self._build(points.double().mean(0).float().cpu())
        self._threads()
        self._index.train(rows)
        return self

    def add(self, points: Tensor) -> "FaissIndex":
        """Append points [M, D]; their indices go on from the last."""
        rows = self._rows("points", points)
        if self._index is None:
            self._build(points.double().mean(0).float().cpu())
        if not self._index.is_trained:
            self._index = None if not len(self) else self._index
            raise ValueError(f"points: expected a trained index for spec {self.spec!r}: call train first")
        self._threads()
        self._index.add(rows)
        return self

    def tune(self, parameters: str) -> "FaissIndex":
        """Set search parameters, as FAISS writes them: "nprobe=16", "efSearch=64"."""
        if self._index is None:
            raise ValueError(f"parameters: expected rows in the index before {parameters!r}")
        space = self._faiss.GpuParameterSpace() if self.device.type == "cuda" else self._faiss.ParameterSpace()
        space.set_index_parameters(self._index, parameters)
        return self

    def search(self, query: Tensor, k: int = 1) -> Nearest:
        """Nearest(distance [N, k] float32, index [N, k] int64) of query [N, D], on query's device."""
        check.integer("k", k, least=1)
        if k > len(self):
            raise ValueError(f"k: expected at most the {len(self)} rows of the index, got {k}")
        rows = self._rows("query", query)
        self._threads()
        distance, index = (torch.from_numpy(found) for found in self._index.search(rows, k))
        if (index < 0).any():
            short = int((index < 0).any(1).sum())
            raise ValueError(
                f"k: expected {k} neighbours for each query, but spec {self.spec!r} found fewer for {short} of "
                f"{len(index)}: search more of the index, as with tune('nprobe=16'), or take a lower k"
            )
        return Nearest(distance.to(query.device), index.to(query.device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index in FAISS's format, centre included: beside and renamed, a kill leaves the old file whole."""
        if self._index is None:
            raise ValueError("save: expected an index with rows, got an empty one")
        path = os.fspath(path)
        index = self._faiss.index_gpu_to_cpu(self._index) if self.device.type == "cuda" else self._index
        try:
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
        loaded._place(loaded._faiss.read_index(os.fspath(path)))
        return loaded

    def _build(self, centre: Tensor) -> None:
        faiss = self._faiss
        centring = faiss.CenteringTransform(len(centre))
        faiss.copy_array_to_vector(centre.numpy(), centring.mean)
        centring.is_trained = True
        index = faiss.IndexPreTransform(centring, faiss.index_factory(len(centre), self.spec, faiss.METRIC_L2))
        index.is_trained = index.index.is_trained
        self._place(index)

    def _place(self, index: Any) -> None:
        if self.device.type == "cuda":
            self._resources = self._faiss.StandardGpuResources()
            index = self._faiss.index_cpu_to_gpu(self._resources, self.device.index or 0, index)
        self._index = index

    def _rows(self, name: str, points: Tensor) -> Any:
        check.tensor(name, points, ndim=(2,))
        if points.shape[0] == 0 or (self._index is not None and points.shape[1] != self._index.d):
            width = "D" if self._index is None else self._index.d
            raise ValueError(f"{name}: expected shape [at least 1, {width}], got {list(points.shape)}")
        rows = points.detach().float().cpu().contiguous()
        if not rows.isfinite().all():
            row = int((~rows.isfinite().all(1)).nonzero()[0, 0])
            raise ValueError(f"{name}: expected finite float32 values, got NaN or infinity in row {row}")
        return rows.numpy()

    def _threads(self) -> None:
        self._faiss.omp_set_num_threads(torch.get_num_threads())


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("FaissIndex needs FAISS: pip install 'fastgen[faiss]' (or faiss-gpu)") from error
    return faiss
