"""Stable Diffusion out of PyTorch: a diffusers checkpoint becomes a bundle that `sdruntime` runs."""

__version__ = "0.1.0"
