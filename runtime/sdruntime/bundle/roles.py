"""The role of each component in the pipeline: one table for all code that treats components differently."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "text encoder",
    "image encoder",
    "denoiser",
    "ControlNet",
    "T2I-Adapter",
    "VAE decoder",
    "VAE encoder",
    "preview decoder",
    "sampler step",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """`rows`: what the axis `batch` (or `jobs`) counts: texts (and images to encode), images, rows of guided images (two per
    image), or jobs.

    `stage`: with little memory, only the engines of one stage are loaded. `in_pixels`: `height` and `width` are those of the
    image, not of the latents. `late`: opened on first use, because most images do not need it. `has_reference`: it has reference
    outputs from PyTorch. `takes_second_texts`: it encodes a request's prompt_2 and negative_2, if there are any.
    """

    kind: Kind
    rows: Literal["texts", "images", "guided", "jobs"]
    stage: Literal["text", "denoise", "vae"]
    in_pixels: bool = False
    late: bool = False
    has_reference: bool = True
    takes_second_texts: bool = False

    def factor(self, vae_factor: int) -> int:
        """Return how many image pixels one unit of the component's `height` and `width` is, given the VAE's factor."""
        return 1 if self.in_pixels else vae_factor


PREVIEW = "preview_decoder"
IMAGE_ENCODER = "image_encoder"  # of an IP-Adapter
# a bundle may have more of them: controlnet_NAME, t2i_adapter_NAME
CONTROLNET, T2I_ADAPTER = "controlnet", "t2i_adapter"
_TEXT_ENCODER = Role(kind="text encoder", rows="texts", stage="text")
ROLES: Mapping[str, Role] = {
    "text_encoder": _TEXT_ENCODER,
    "text_encoder_2": dataclasses.replace(_TEXT_ENCODER, takes_second_texts=True),
    IMAGE_ENCODER: Role(kind="image encoder", rows="texts", stage="text", late=True),
    "unet": Role(kind="denoiser", rows="guided", stage="denoise"),
    CONTROLNET: Role(kind="ControlNet", rows="guided", stage="denoise", late=True),
    T2I_ADAPTER: Role(kind="T2I-Adapter", rows="images", stage="text", in_pixels=True, late=True),
    "vae_decoder": Role(kind="VAE decoder", rows="images", stage="vae"),
    "vae_encoder": Role(kind="VAE encoder", rows="images", stage="vae", in_pixels=True, late=True),
    PREVIEW: Role(kind="preview decoder", rows="images", stage="vae", late=True),
    "step": Role(kind="sampler step", rows="jobs", stage="denoise", late=True, has_reference=False),
}


def role(component: str) -> Role:
    """Return the role of a component. An unknown component has the role of the denoiser, but is never called."""
    return _known(component) or ROLES["unet"]


def _known(component: str) -> Role | None:
    return ROLES.get(component.removesuffix(f"_{short_name(component)}"))


def of_kind(components: Iterable[str], *kinds: Kind) -> list[str]:
    """Return the components whose role is one of `kinds`."""
    return [name for name in components if (part := _known(name)) is not None and part.kind in kinds]


def short_name(component: str) -> str:
    """Return the name that requests call a ControlNet or a T2I-Adapter by: "canny" for controlnet_canny."""
    for name in (CONTROLNET, T2I_ADAPTER):
        if component.startswith(f"{name}_"):
            return component.removeprefix(f"{name}_")
    return component
