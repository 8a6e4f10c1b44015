"""What a T2I-Adapter adds to a UNet, and whether it fits it (arXiv 2302.08453)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A tensor that a T2I-Adapter adds inside the UNet: its channels, and by what its sides are smaller than the latents'."""

    channels: int
    divisor: int


def features_of_unet(config: Mapping[str, Any]) -> tuple[Feature, ...]:
    """Return the features that a UNet can take, by its settings: those of each down block, and of the middle if there is one.

    diffusers adds one before the downsampler of a block with attention, and after that of a block without.
    """
    widths: list[int] = config["block_out_channels"]
    features, divisor = [], 1
    for index, (width, kind) in enumerate(zip(widths, config["down_block_types"], strict=True)):
        below = divisor if index == len(widths) - 1 else 2 * divisor
        features.append(Feature(channels=width, divisor=divisor if "Attn" in kind else below))
        divisor = below
    middle = [] if config["mid_block_type"] is None else [Feature(channels=widths[-1], divisor=divisor)]
    return (*features, *middle)


def features_of_adapter(config: Mapping[str, Any], factor: int) -> tuple[Feature, ...]:
    """Return the features of a T2I-Adapter; `factor`: the VAE's. A divisor is 0 if cells are smaller than those of latents."""
    widths, first = config["channels"], config["downscale_factor"] // factor
    if config["adapter_type"] == "full_adapter_xl":
        divisors = [first, first, *([2 * first] * (len(widths) - 2))]
    else:
        widths = [*widths, widths[-1]] if config["adapter_type"] == "light_adapter" else widths
        divisors = [first << index for index in range(len(widths))]
    return tuple(Feature(channels=width, divisor=part) for width, part in zip(widths, divisors, strict=False))


def adapter_misfits(name: str, adapter: Mapping[str, Any], unet: Mapping[str, Any], *, factor: int) -> Iterator[str]:
    """Yield a fault if the features of a T2I-Adapter do not fit the UNet; `name`: its component, `factor`: the VAE's."""
    ours, theirs = features_of_adapter(adapter, factor), features_of_unet(unet)
    if ours != theirs[: len(ours)] or len(ours) < len(unet["block_out_channels"]):
        written = " and ".join(
            ", ".join(f"{feature.channels} at 1/{feature.divisor}" for feature in features) for features in (ours, theirs)
        )
        yield (
            f"{name}/config.json: the features of this {adapter['adapter_type']} and of the UNet are {written} of the latents: "
            "this T2I-Adapter is for another model family"
        )
