"""Stable Diffusion out of PyTorch: a diffusers checkpoint becomes a bundle that `sdruntime` runs."""

import sdruntime.backends.ort  # noqa: F401  before anything here, or a library that it imports, loads ONNX Runtime

__version__ = "0.1.0"
