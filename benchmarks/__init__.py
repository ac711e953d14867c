"""Benchmarks of each family against its peers: `python -m benchmarks --help`. Never imported by the package."""
