"""Tasks that a UNet was trained for: the inputs that it takes beside the noisy latents, the timestep and the text.

The exported graph concatenates those of INPUTS to `sample` along the channels, in the order given here, as diffusers' pipelines
do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from sdruntime.bundle.manifest import ComponentSpec

Task = Literal["inpainting", "instruct_pix2pix", "depth", "upscaling", "refining"]
LATENT = "C"  # as many channels as the latents have

# inpainting: 1 where the image is regenerated, and the latents of the image without that part (arXiv 2112.10752, section 4.5)
# instruct_pix2pix: the latents of the image to edit (arXiv 2211.09800)
# depth: how near each part of the image is, from -1 to 1
# upscaling: the image to enlarge, with noise, one pixel for each cell of the latents
INPUTS: Mapping[Task, Mapping[str, int | str]] = {
    "inpainting": {"mask": 1, "masked_image_latents": LATENT},
    "instruct_pix2pix": {"image_latents": LATENT},
    "depth": {"depth": 1},
    "upscaling": {"low_res_image": 3},
}
# of upscaling models: the level of the noise in the image, a whole number
NOISE_LEVEL = "noise_level"
# of latent consistency models (arXiv 2310.04378): the guidance as an input, in place of an unconditional row
GUIDANCE = "timestep_cond"
# of SDXL's kind: the sizes that an image would have had (arXiv 2307.01952, section 2.2), (height, width) or (top, left) each
TIME_IDS = "time_ids"
SIZES = 6  # original size, corner of the crop, target size
SCORED = 5  # of SDXL's refiner: original size, corner of the crop, aesthetic score


def channels(task: Task, latent: int) -> dict[str, int]:
    """Return the number of channels of each input of a task; `latent`: those of the latents."""
    return {name: latent if count == LATENT else int(count) for name, count in INPUTS.get(task, {}).items()}


def task_of(unet: ComponentSpec) -> Task | None:
    """Return the task of a UNet, or None."""
    names = {tensor.name for tensor in unet.inputs}
    channels = next((task for task, inputs in INPUTS.items() if names.issuperset(inputs)), None)
    return channels or ("refining" if time_ids_width(unet) == SCORED else None)


def guidance_width(unet: ComponentSpec) -> int | None:
    """Return the width of the embedding of the guidance that a distilled UNet takes as an input; None if it takes none."""
    return _width(unet, GUIDANCE)


def time_ids_width(unet: ComponentSpec) -> int | None:
    """Return how many time ids a UNet takes; None if it takes none."""
    return _width(unet, TIME_IDS)


def _width(unet: ComponentSpec, name: str) -> int | None:
    shape = next((tensor.shape for tensor in unet.inputs if tensor.name == name), ())
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None


def task_for(in_channels: int, latent: int) -> Task | None:
    """Return the task of a UNet with so many input channels; None without a task. Raises ValueError for an unknown number."""
    totals = {latent: None} | {latent + sum(channels(task, latent).values()): task for task in INPUTS}
    if in_channels not in totals:
        known = ", ".join(f"{total} ({task or 'text to image'})" for total, task in totals.items())
        raise ValueError(f"in_channels {in_channels} with {latent} latent channels is not one of {known}")
    return totals[in_channels]
