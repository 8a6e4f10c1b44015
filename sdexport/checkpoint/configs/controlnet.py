"""What a ControlNet adds to a UNet, and whether it fits it (arXiv 2302.05543)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# settings that decide what the inputs of the UNet mean
_SHARED = ("cross_attention_dim", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A tensor that a ControlNet adds to the UNet: its channels, and by what its sides are smaller than the latents'."""

    name: str
    channels: int
    divisor: int


def residuals_of(config: Mapping[str, Any]) -> tuple[Residual, ...]:
    """Return the residuals of a ControlNet, or those that a UNet can take, by its settings.

    diffusers' order: the first convolution, then of each block its layers and its downsampler, then the middle.
    """
    widths: list[int] = config["block_out_channels"]
    layers = as_list(config["layers_per_block"])
    layers = layers * len(widths) if len(layers) == 1 else layers
    places, divisor = [(widths[0], 1)], 1
    for index, (width, count) in enumerate(zip(widths, layers, strict=True)):
        places += [(width, divisor)] * count
        if index < len(widths) - 1:
            divisor *= 2
            places.append((width, divisor))
    down = [Residual(name=f"down_block_{k}", channels=width, divisor=part) for k, (width, part) in enumerate(places)]
    return (*down, Residual(name="mid_block", channels=widths[-1], divisor=divisor))


def controlnet_misfits(
    name: str, control: Mapping[str, Any], unet: Mapping[str, Any], *, latents: int, factor: int
) -> Iterator[str]:
    """Yield a fault for each setting of a ControlNet that does not fit the UNet; `name`: its component.

    `latents`: channels of the latents; `factor`: the VAE's.
    """
    where, another = f"{name}/config.json", "this ControlNet is for another model family"
    blocks = [len(config["block_out_channels"]) for config in (control, unet)]
    layers = control["layers_per_block"]
    if len(control["down_block_types"]) != blocks[0] or (isinstance(layers, list) and len(layers) != blocks[0]):
        yield f"{where}: down_block_types and layers_per_block must have an entry for each of {blocks[0]} block_out_channels"
        return
    if residuals_of(control) != residuals_of(unet):
        widths = " and ".join(
            f"{config['block_out_channels']} with {config['layers_per_block']} layers per block" for config in (control, unet)
        )
        yield f"{where}: block_out_channels of the ControlNet and of the UNet are {widths}: {another}"
        return
    for key in _SHARED:
        ours, theirs = (as_list(config[key]) for config in (control, unet))
        if {*ours} != {*theirs}:
            yield f"{where}: {key} {control[key]}, but the UNet has {unet[key]}: {another}"
    if control["in_channels"] != latents:
        yield f"{where}: in_channels {control['in_channels']}, but the latents have {latents}: {another}"
    widths = control["conditioning_embedding_out_channels"]
    if (strides := 1 << (len(widths) - 1)) != factor:
        yield (
            f"{where}: conditioning_embedding_out_channels {widths} is for control images {strides} times as large as the "
            f"latents, but the VAE's images are {factor} times as large: {another}"
        )
    if "num_control_type" in control:  # of a ControlNet-Union
        first, embedded = control["block_out_channels"][0], control["addition_time_embed_dim"]
        for key in ("num_trans_channel", "num_proj_channel"):
            if control[key] != first:
                yield f"{where}: {key} {control[key]} is not the first of block_out_channels, {first}"
        if control["num_trans_channel"] % control["num_trans_head"]:
            yield f"{where}: num_trans_channel {control['num_trans_channel']} is no multiple of num_trans_head"
        if embedded is None:
            yield f"{where}: addition_time_embed_dim is missing, which embeds the control type"
    groups = control["norm_num_groups"]
    if any(width % groups for width in control["block_out_channels"]):
        yield f"{where}: block_out_channels {control['block_out_channels']} are not multiples of norm_num_groups {groups}"


def as_list(value: Any) -> list[Any]:
    """Return a setting that may be one value for all blocks as a list."""
    return value if isinstance(value, list) else [value]
