"""A model for NVIDIA Triton's Python backend."""
