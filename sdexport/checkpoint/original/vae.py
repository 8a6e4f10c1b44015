"""An autoencoder in the original layout: its config, from names and shapes, and its weights under the names of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdexport.checkpoint.original.expected import vae_weights
from sdexport.checkpoint.original.naming import Tensors, check_fit, children, in_module, moved, outputs, renamed, reverse, size

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

    Raises ValueError for names and shapes that are no AutoencoderKL, Misfit with those that do not fit the others.
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
    layers = {level: children(tensors, f"encoder.down.{level}.block") for level in levels}
    if not levels or not any(layers.values()):
        raise ValueError(f"encoder.down: {len(levels)} levels without residual blocks: no AutoencoderKL")
    config = {
        "in_channels": size(tensors, ("encoder.conv_in.weight", 4, 1), usual=3),
        "out_channels": outputs(tensors, "decoder.conv_out", usual=3),
        "latent_channels": outputs(tensors, "quant_conv", "encoder.conv_out") // 2,
        "block_out_channels": [
            outputs(tensors, *(f"encoder.down.{level}.block.{layer}.conv{k}" for layer in blocks or [0] for k in (1, 2)))
            for level, blocks in layers.items()
        ],
        "layers_per_block": max(map(len, layers.values())),
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "use_quant_conv": any(name.startswith("quant_conv.") for name in tensors),
        "use_post_quant_conv": any(name.startswith("post_quant_conv.") for name in tensors),
    }
    stored, unknown = renamed(tensors, places, _inside)
    # the original code multiplies by 1x1 convolutions where diffusers has matrices
    weights = {
        name: tensor.reshaped(tensor.shape[:2]) if ".attentions." in name and tensor.shape[2:] == (1, 1) else tensor
        for name, tensor in stored.items()
    }
    check_fit(
        config,
        vae_weights(config),
        weights,
        unknown=unknown,
        old=lambda name: _old(name, places),
        stored_shape=lambda name, shape: (*shape, 1, 1) if ".attentions." in name and len(shape) == 2 else shape,
        file=tensors,
    )
    return config, weights


def _old(name: str, places: Mapping[str, str]) -> str:
    """Return the original name of a weight, as far as its module is known."""
    return moved(name, reverse(places), lambda place, _, rest: in_module(rest, reverse(_parts(place)))) or name


def _inside(place: str, rest: str) -> str | None:
    return in_module(rest, _parts(place))


def _parts(place: str) -> Mapping[str, str]:
    return _ATTENTION if ".attentions." in place else _RESNET if ".resnets." in place else {}
