"""Triton kernels and their launchers, installed as `fastgen.kernels`. Imports torch and triton only; nothing here is public."""
