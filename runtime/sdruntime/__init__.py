"""Stable Diffusion on the device: NumPy and an engine library, nothing else."""

__version__ = "0.1.0"
