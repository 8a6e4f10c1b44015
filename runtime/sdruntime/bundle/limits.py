"""What a bundle or a request may ask for. Calls are padded to an engine's least sizes, and arrays made as a manifest says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

LARGEST_SIDE = 16_384  # pixels
# of a profile's dimensions, those of images and latents
MOST: Mapping[str, int] = {"batch": 1024, "jobs": 1024, "width": LARGEST_SIDE, "height": LARGEST_SIDE}
MOST_THREADS = 1024
LARGEST_DIM, MOST_AXES = 1 << 28, 8  # of any tensor or profile
MODEL: tuple[tuple[str, float, float], ...] = (
    ("scaling_factor", 1e-6, 1e6),
    ("shift_factor", -1e6, 1e6),
    ("latent_channels", 1, 512),
    ("vae_factor", 1, 512),
    ("size_multiple", 1, LARGEST_SIDE),
)


def any_shape(dimensions: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """Return the widest profile that an engine of these dimensions may have: that of a component's own ONNX, or of a module."""
    return {name: (1, 1, MOST.get(name, LARGEST_DIM)) for name in dimensions}
