"""The launch table: block sizes, warps and stages for each kernel, dtype and size, as plain data. No autotuner runs."""
