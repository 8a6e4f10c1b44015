"""Measurements of `sdruntime serve` and of the model for Triton: `python -m benchmarks.serving`."""
