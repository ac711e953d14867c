"""Nearest-neighbour search beyond one call: FAISS indexes behind their guards."""
