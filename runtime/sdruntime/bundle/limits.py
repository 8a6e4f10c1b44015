"""Upper limits for bundles and requests, because arrays are allocated in the sizes that a manifest or a request specifies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

LARGEST_SIDE = 16_384  # pixels
# for the dimensions of images and latents in a profile
MOST: Mapping[str, int] = {"batch": 1024, "jobs": 1024, "width": LARGEST_SIDE, "height": LARGEST_SIDE}
MOST_THREADS = 1024
MOST_CHUNKS = 32  # of one text: inputs of the text encoder whose outputs are joined
LARGEST_DIM, MOST_AXES = 1 << 28, 8  # for any tensor or profile
MOST_GUIDANCE = 100
NOISE_LEVELS = 1000  # of the image that an upscaling model enlarges
MODEL: tuple[tuple[str, float, float], ...] = (
    ("scaling_factor", 1e-6, 1e6),
    ("shift_factor", -1e6, 1e6),
    ("latent_channels", 1, 512),
    ("vae_factor", 1, 512),
    ("size_multiple", 1, LARGEST_SIDE),
)


def any_shape(dimensions: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """Return the widest allowed profile for these dimensions, which applies to a component's ONNX file or PyTorch module."""
    return {name: (1, 1, MOST.get(name, LARGEST_DIM)) for name in dimensions}
