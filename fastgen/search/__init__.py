"""Nearest-neighbour search beyond one call: FAISS indexes behind their guards, pools larger than memory, shards."""

from fastgen.search.faiss_index import FaissIndex
from fastgen.search.perceptual import perceptual_nearest
from fastgen.search.ring import ring_nearest
from fastgen.search.streaming import StreamingNearest

__all__ = ["FaissIndex", "StreamingNearest", "perceptual_nearest", "ring_nearest"]
