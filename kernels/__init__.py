"""Triton kernels and their launchers, installed as `fastgen.kernels`: imports torch and triton only, nothing public."""
