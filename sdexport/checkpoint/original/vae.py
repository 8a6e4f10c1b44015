"""An autoencoder in the original layout: its config, from names and shapes, and its weights under the names of diffusers."""

from __future__ import annotations

from typing import Any

from sdexport.checkpoint.original.naming import Tensors, children, in_module, renamed, shape_of

_OUTER = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{f"{side}.{name}": f"{side}.{name}" for side in ("encoder", "decoder") for name in ("conv_in", "conv_out")},
    **{f"{side}.norm_out": f"{side}.conv_norm_out" for side in ("encoder", "decoder")},
}
_RESNET = {"nin_shortcut": "conv_shortcut", **{name: name for name in ("norm1", "conv1", "norm2", "conv2")}}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def read_vae(tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Return the config, except scaling_factor, and the weights of an autoencoder.

    `tensors`: by their original names, without the network's prefix.

    Raises ValueError for names and shapes that are no AutoencoderKL.
    """
    levels = children(tensors, "encoder.down")
    places = dict(_OUTER)
    for side, top in (("encoder", "down"), ("decoder", "up")):
        for level in children(tensors, f"{side}.{top}"):
            # the decoder's levels are counted from the image, its blocks from the latents
            block = level if side == "encoder" else len(levels) - 1 - level
            here, there = f"{side}.{top}.{level}", f"{side}.{top}_blocks.{block}"
            for layer in children(tensors, f"{here}.block"):
                places[f"{here}.block.{layer}"] = f"{there}.resnets.{layer}"
            places[f"{here}.{top}sample.conv"] = f"{there}.{top}samplers.0.conv"
        places[f"{side}.mid.block_1"] = f"{side}.mid_block.resnets.0"
        places[f"{side}.mid.attn_1"] = f"{side}.mid_block.attentions.0"
        places[f"{side}.mid.block_2"] = f"{side}.mid_block.resnets.1"
    counts = {len(children(tensors, f"encoder.down.{level}.block")) for level in levels}
    if not levels or counts == {0} or len(counts) != 1:
        raise ValueError(f"encoder.down: {len(levels)} levels of {sorted(counts)} residual blocks: no AutoencoderKL")
    layers = counts.pop()
    quant = "quant_conv.weight" in tensors
    moments = shape_of(tensors, "quant_conv.weight" if quant else "encoder.conv_out.weight", 4)[0]
    config = {
        "in_channels": shape_of(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape_of(tensors, "decoder.conv_out.weight", 4)[0],
        "latent_channels": moments // 2,
        "block_out_channels": [shape_of(tensors, f"encoder.down.{each}.block.0.conv2.weight", 4)[0] for each in levels],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "use_quant_conv": quant,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }
    weights = renamed(tensors, places, _inside)
    # the original code multiplies by 1x1 convolutions where diffusers has matrices
    return config, {
        name: tensor.reshaped(tensor.shape[:2]) if ".attentions." in name and len(tensor.shape) == 4 else tensor
        for name, tensor in weights.items()
    }


def _inside(place: str, rest: str) -> str | None:
    parts = _ATTENTION if ".attentions." in place else _RESNET if ".resnets." in place else {}
    return in_module(rest, parts)
