"""Checkpoints in one file: the key layout of the original Stable Diffusion code, read as the networks of a diffusers folder."""
