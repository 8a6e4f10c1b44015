"""Export Stable Diffusion from PyTorch: build a bundle for `sdruntime` from a diffusers checkpoint."""

import sdruntime.backends.ort  # noqa: F401  must come before any other import that loads ONNX Runtime

__version__ = "0.1.0"
