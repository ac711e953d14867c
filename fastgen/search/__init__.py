"""Nearest-neighbour search beyond one call: FAISS indexes behind their guards, pools larger than memory."""

from fastgen.search.faiss_index import FaissIndex
from fastgen.search.streaming import StreamingNearest

__all__ = ["FaissIndex", "StreamingNearest"]
