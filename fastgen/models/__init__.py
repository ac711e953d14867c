"""Models of the family, built on `fastgen.nn` and `fastgen.search`; they need the extra `train`."""
