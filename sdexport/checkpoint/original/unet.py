"""A UNet in the original layout: its config, from names and shapes, and its weights under the names of diffusers.

The original code numbers its modules: `input_blocks.4.1` is what diffusers calls `down_blocks.1.attentions.0`. The numbers follow
from the order of residual blocks, attentions and resamplers, so the names alone say how deep and how wide the network is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdexport.checkpoint.original.expected import unet_weights
from sdexport.checkpoint.original.naming import (
    Tensors,
    added_embedding,
    check_fit,
    children,
    in_module,
    moved,
    outputs,
    renamed,
    reverse,
    size,
)
from sdruntime.adapters.names import OUTER, RESNET

_HEAD = 64  # channels of an attention head, where their number is not fixed
_RESNET = {original: name for name, original in RESNET.items()}
_CONVS = ("in_layers.2", "out_layers.3")  # of a residual block, both as wide as the block
_LATENT = 4  # channels
_TRANSFORMER = re.compile(
    r"(norm|proj_in|proj_out|transformer_blocks\.\d+\.(norm[123]|attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2)))\.(weight|bias)"
)


def read_unet(tensors: Tensors, *, heads: int | None, pooled: int | None, ids: int) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the weights of a UNet.

    Args:
        tensors: by their original names, without the prefix of the network.
        heads: attention heads of each block; None for as many as have 64 channels each.
        pooled: width of the pooled text embedding, of SDXL; None where there is none.
        ids: how many time ids it takes, of SDXL.

    Raises ValueError for names and shapes that are no UNet of Stable Diffusion, Misfit with those that do not fit the others.
    """
    down, places = down_blocks(tensors)
    up_depths = _up_blocks(tensors, places)
    middle = middle_block(tensors, places)
    widths = [outputs(tensors, *(f"input_blocks.{layer}.0.{part}" for layer in block for part in _CONVS)) for block in down]
    depths = [max(_depth(tensors, f"input_blocks.{layer}.1") for layer in block) for block in down]
    if up_depths != depths[::-1]:
        raise ValueError(f"the way up has {up_depths} transformer layers and the way down {depths}: not a known architecture")
    keys = [name for name in tensors if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
    projections = [name for name in tensors if name.endswith(".1.proj_in.weight")]
    counts = [len(block) for block in down]
    layers = [depth or 1 for depth in depths[:-1]] + [depths[-1] or middle or 1]  # the last block's number is the middle's too
    if len(deep := [depth for depth in depths if depth]) > 1 and {*deep, middle} == {middle}:
        layers = deep  # one number for all, also for blocks without attention
    config = {
        "in_channels": size(tensors, ("input_blocks.0.0.weight", 4, 1), usual=_LATENT),
        "out_channels": outputs(tensors, "out.2", usual=_LATENT),
        "block_out_channels": widths,
        "layers_per_block": counts[0] if len(set(counts)) == 1 else counts,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in up_depths],
        "transformer_layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "cross_attention_dim": size(tensors, *((name, 2, 1) for name in keys or ["attn2.to_k.weight"])),
        "attention_head_dim": heads if heads else [max(1, width // _HEAD) for width in widths],
        "use_linear_projection": 2 * sum(len(tensors[name].shape) == 2 for name in projections) > len(projections),
    }
    config |= added_embedding(tensors, "label_emb.0.0.weight", pooled=pooled, ids=ids)
    places = OUTER | places
    weights, unknown = renamed(tensors, places, inside)
    check_fit(config, unet_weights(config), weights, unknown=unknown, old=lambda name: old_name(name, places))
    return config, weights


def down_blocks(tensors: Tensors) -> tuple[list[list[int]], dict[str, str]]:
    """Return the numbers of the residual blocks of each block, and the new name of each module."""
    blocks: list[list[int]] = [[]]
    places: dict[str, str] = {}
    for index in children(tensors, "input_blocks")[1:]:
        block, here = len(blocks) - 1, f"input_blocks.{index}"
        if _has(tensors, f"{here}.0.op"):
            places[f"{here}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
            blocks.append([])
            continue
        places[f"{here}.0"] = f"down_blocks.{block}.resnets.{len(blocks[-1])}"
        places[f"{here}.1"] = f"down_blocks.{block}.attentions.{len(blocks[-1])}"
        blocks[-1].append(index)
    if not all(blocks):
        raise ValueError("input_blocks: a block without residual layers: no UNet of Stable Diffusion")
    return blocks, places


def _up_blocks(tensors: Tensors, places: dict[str, str]) -> list[int]:
    """Return the transformer layers of each block of the way up."""
    depths: list[list[int]] = []
    upsampler = None
    for index in children(tensors, "output_blocks"):
        if upsampler or not depths:
            depths.append([])
        here, block, layer = f"output_blocks.{index}", f"up_blocks.{len(depths) - 1}", len(depths[-1])
        places[f"{here}.0"] = f"{block}.resnets.{layer}"
        places[f"{here}.1"] = f"{block}.attentions.{layer}"
        depths[-1].append(_depth(tensors, f"{here}.1"))
        upsampler = next((child for child in (1, 2) if _has(tensors, f"{here}.{child}.conv")), None)
        if upsampler:
            places[f"{here}.{upsampler}.conv"] = f"{block}.upsamplers.0.conv"
    return [max(block) for block in depths]


def middle_block(tensors: Tensors, places: dict[str, str]) -> int:
    """Return the transformer layers of the middle, 0 where it has no attention."""
    depth = _depth(tensors, "middle_block.1")
    places["middle_block.0"] = "mid_block.resnets.0"
    places["middle_block.1"] = "mid_block.attentions.0" if depth else "mid_block.resnets.1"
    places["middle_block.2"] = "mid_block.resnets.1"
    return depth


def _has(tensors: Tensors, module: str) -> bool:
    return f"{module}.weight" in tensors or f"{module}.bias" in tensors


def _depth(tensors: Tensors, attention: str) -> int:
    return len(children(tensors, f"{attention}.transformer_blocks"))


def inside(place: str, rest: str) -> str | None:
    """Return the name within a module: residual blocks are named in another way, transformers are not."""
    if ".attentions." in place:
        return rest if _TRANSFORMER.fullmatch(rest) else None
    return in_module(rest, _RESNET if ".resnets." in place else {})


def old_name(name: str, places: Mapping[str, str]) -> str:
    """Return the original name of a weight, as far as its module is known."""

    def within_old(place: str, _: str, rest: str) -> str | None:
        return rest if ".attentions." in place else in_module(rest, reverse(_RESNET) if ".resnets." in place else {})

    return moved(name, reverse(places), within_old) or name
