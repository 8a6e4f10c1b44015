"""Networks in one file under the names of diffusers: their configs, from names and shapes. The weights keep their names."""

from __future__ import annotations

from typing import Any

from sdexport.checkpoint.original.expected import unet_weights, vae_weights
from sdexport.checkpoint.original.naming import Tensors, added_embedding, check_fit, children, outputs, size
from sdexport.checkpoint.weights.names import spellings

_LATENT = 4  # channels
_HEAD = 64  # channels of an attention head, where their number is not fixed


def read_unet(tensors: Tensors, *, heads: int | None, pooled: int | None, ids: int) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the weights of a UNet; the arguments are those of `sdexport.checkpoint.original.unet.read_unet`.

    Raises ValueError for names and shapes that are no UNet of Stable Diffusion, Misfit with those that do not fit the others.
    """
    blocks = children(tensors, "down_blocks")
    if not blocks or children(tensors, "up_blocks") != blocks:
        raise ValueError(
            f"{len(blocks)} down_blocks and {len(children(tensors, 'up_blocks'))} up_blocks: no UNet2DConditionModel"
        )
    down = [_depths(tensors, f"down_blocks.{block}") for block in blocks]
    up = [_depths(tensors, f"up_blocks.{block}") for block in blocks]
    middle = _depths(tensors, "mid_block")
    layers = [len(children(tensors, f"down_blocks.{block}.resnets")) for block in blocks]
    keys = [name for name in tensors if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
    projections = [name for name in tensors if name.endswith(".proj_in.weight")]
    depth: list[Any] = [_one(depths) or 1 for depths in down]
    if not down[-1] and middle:
        depth[-1] = middle[0]
    regular = all(set(there) == set(here) for there, here in zip(up, reversed(down), strict=True))
    if len(deep := [_one(depths) for depths in down if depths]) > 1 and all(depths == _one(middle) for depths in deep):
        depth = deep  # one number for all, also for blocks without attention
    config = {
        "in_channels": size(tensors, ("conv_in.weight", 4, 1), usual=_LATENT),
        "out_channels": outputs(tensors, "conv_out", usual=_LATENT),
        "block_out_channels": [_width(tensors, f"down_blocks.{block}") for block in blocks],
        "layers_per_block": _same(layers),
        "down_block_types": ["CrossAttnDownBlock2D" if depths else "DownBlock2D" for depths in down],
        "mid_block_type": _middle(tensors, middle),
        "up_block_types": ["CrossAttnUpBlock2D" if depths else "UpBlock2D" for depths in up],
        "transformer_layers_per_block": _same(depth),
        "cross_attention_dim": size(tensors, *((name, 2, 1) for name in keys or ["attn2.to_k.weight"])),
        "attention_head_dim": heads if heads else [max(1, _width(tensors, f"down_blocks.{block}") // _HEAD) for block in blocks],
        "use_linear_projection": 2 * sum(len(tensors[name].shape) == 2 for name in projections) > len(projections),
    }
    if not regular:
        config["reverse_transformer_layers_per_block"] = [_one(depths) or 1 for depths in up]
    if "time_embedding.cond_proj.weight" in tensors:
        config["time_cond_proj_dim"] = size(tensors, ("time_embedding.cond_proj.weight", 2, 1))
    config |= added_embedding(tensors, "add_embedding.linear_1.weight", pooled=pooled, ids=ids)
    check_fit(config, unet_weights(config), tensors)
    return config, tensors


def read_controlnet(tensors: Tensors) -> dict[str, Any]:
    """Return the settings of a ControlNet that its names and shapes show. Raises ValueError if they are of no ControlNet."""
    blocks = children(tensors, "down_blocks")
    if not blocks:
        raise ValueError("no down_blocks: no ControlNetModel")
    depths, middle = [_depths(tensors, f"down_blocks.{block}") for block in blocks], _depths(tensors, "mid_block")
    deep = [_one(block) or 1 for block in depths]
    if not depths[-1] and middle:
        deep[-1] = middle[0]
    keys = [name for name in tensors if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
    projections = [name for name in tensors if name.endswith(".proj_in.weight")]
    embedding, added = "controlnet_cond_embedding", "add_embedding.linear_1.weight"
    widths = [f"{embedding}.conv_in", *(f"{embedding}.blocks.{k}" for k in children(tensors, f"{embedding}.blocks")[1::2])]
    config = {
        "in_channels": size(tensors, ("conv_in.weight", 4, 1), usual=_LATENT),
        "conditioning_channels": size(tensors, (f"{embedding}.conv_in.weight", 4, 1), usual=3),
        "conditioning_embedding_out_channels": [outputs(tensors, convolution) for convolution in widths],
        "block_out_channels": [_width(tensors, f"down_blocks.{block}") for block in blocks],
        "layers_per_block": _same([len(children(tensors, f"down_blocks.{block}.resnets")) for block in blocks]),
        "down_block_types": ["CrossAttnDownBlock2D" if block else "DownBlock2D" for block in depths],
        "mid_block_type": _middle(tensors, middle),
        "transformer_layers_per_block": _same(deep),
        "cross_attention_dim": size(tensors, *((name, 2, 1) for name in keys or ["attn2.to_k.weight"])),
        "use_linear_projection": 2 * sum(len(tensors[name].shape) == 2 for name in projections) > len(projections),
    }
    if added in tensors:
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": size(tensors, (added, 2, 1))}
    return config


def read_vae(tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Return the config, except scaling_factor, and the weights of an autoencoder.

    Raises ValueError if it is no AutoencoderKL, Misfit.
    """
    blocks = children(tensors, "encoder.down_blocks")
    layers = max((len(children(tensors, f"encoder.down_blocks.{block}.resnets")) for block in blocks), default=0)
    if not layers:
        raise ValueError(f"encoder: {len(blocks)} down_blocks without resnets: no AutoencoderKL")
    config = {
        "in_channels": size(tensors, ("encoder.conv_in.weight", 4, 1), usual=3),
        "out_channels": outputs(tensors, "decoder.conv_out", usual=3),
        "latent_channels": outputs(tensors, "quant_conv", "encoder.conv_out") // 2,
        "block_out_channels": [_width(tensors, f"encoder.down_blocks.{block}") for block in blocks],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(blocks),
        "up_block_types": ["UpDecoderBlock2D"] * len(blocks),
        "use_quant_conv": any(name.startswith("quant_conv.") for name in tensors),
        "use_post_quant_conv": any(name.startswith("post_quant_conv.") for name in tensors),
        "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in tensors),
    }
    check_fit(config, vae_weights(config), tensors, spellings=spellings)
    return config, tensors


def _width(tensors: Tensors, block: str) -> int:
    """Return the channels of a block."""
    resnets = [f"{block}.resnets.{layer}" for layer in children(tensors, f"{block}.resnets")]
    return outputs(tensors, *(f"{resnet}.conv{k}" for resnet in resnets or [f"{block}.resnets.0"] for k in (1, 2)))


def _depths(tensors: Tensors, block: str) -> list[int]:
    """Return the number of transformer layers of each attention of a block."""
    return [
        len(children(tensors, f"{block}.attentions.{layer}.transformer_blocks"))
        for layer in children(tensors, f"{block}.attentions")
    ]


def _one(depths: list[int]) -> Any:
    """Return the number that all of a block's attentions have, or the list of them; 0 without any."""
    return _same(depths) if depths else 0


def _same(numbers: list[Any]) -> Any:
    return numbers[0] if all(number == numbers[0] for number in numbers) else numbers


def _middle(tensors: Tensors, depths: list[int]) -> str | None:
    if not any(name.startswith("mid_block.") for name in tensors):
        return None
    return "UNetMidBlock2DCrossAttn" if depths else "UNetMidBlock2D"
