"""The weights that the networks of a config have: their names, which are those of diffusers and transformers, and shapes.

Written down here, since a checkpoint is read without torch. A test compares each table with the module of that config.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from sdexport.checkpoint.configs.controlnet import residuals_of

Shapes = dict[str, tuple[int, ...]]


def unet_weights(config: Mapping[str, Any]) -> Shapes:
    """Return the weights of a UNet2DConditionModel."""
    widths = config["block_out_channels"]
    count, first, last = len(widths), widths[0], widths[-1]
    time = 4 * first
    up_depths = config.get("reverse_transformer_layers_per_block") or _each(config["transformer_layers_per_block"], count)[::-1]
    layers = _each(config["layers_per_block"], count)
    shapes = _way_down(config)
    before = last
    for block, kind in enumerate(config["up_block_types"]):
        name, width, below = f"up_blocks.{block}", widths[-1 - block], widths[max(count - 2 - block, 0)]
        more = layers[-1 - block] + 1
        for layer in range(more):
            into = (before if layer == 0 else width) + (below if layer == more - 1 else width)
            shapes |= _resnet(f"{name}.resnets.{layer}", into, width, time)
            if kind.startswith("CrossAttn"):
                shapes |= _attention(config, f"{name}.attentions.{layer}", width, up_depths[block], layer)
        if block < count - 1:
            shapes |= _conv(f"{name}.upsamplers.0.conv", width, width)
        before = width
    return shapes | _norm("conv_norm_out", first) | _conv("conv_out", config["out_channels"], first)


def controlnet_weights(config: Mapping[str, Any]) -> Shapes:
    """Return the weights of a ControlNetModel."""
    widths, hints = config["block_out_channels"], config["conditioning_embedding_out_channels"]
    hint, shapes = "controlnet_cond_embedding", _way_down(config)
    shapes |= _conv(f"{hint}.conv_in", hints[0], config["conditioning_channels"]) | _conv(
        f"{hint}.conv_out", widths[0], hints[-1]
    )
    for level, (into, out) in enumerate(pairwise(hints)):
        shapes |= _conv(f"{hint}.blocks.{2 * level}", into, into) | _conv(f"{hint}.blocks.{2 * level + 1}", out, into)
    *down, middle = residuals_of(config)
    for index, residual in enumerate(down):
        shapes |= _conv(f"controlnet_down_blocks.{index}", residual.channels, residual.channels, 1)
    return shapes | _conv("controlnet_mid_block", middle.channels, middle.channels, 1)


def _way_down(config: Mapping[str, Any]) -> Shapes:
    """Return the weights of a UNet up to its middle, which a ControlNet has too."""
    widths = config["block_out_channels"]
    count, first, last = len(widths), widths[0], widths[-1]
    time = 4 * first
    depths = _each(config["transformer_layers_per_block"], count)
    layers = _each(config["layers_per_block"], count)
    shapes = _conv("conv_in", first, config["in_channels"])
    shapes |= _linear("time_embedding.linear_1", time, first) | _linear("time_embedding.linear_2", time, time)
    if (guidance := config.get("time_cond_proj_dim")) is not None:
        shapes["time_embedding.cond_proj.weight"] = (first, guidance)
    if (added := config.get("projection_class_embeddings_input_dim")) is not None:
        shapes |= _linear("add_embedding.linear_1", time, added) | _linear("add_embedding.linear_2", time, time)
    if (classes := config.get("num_class_embeds")) is not None:
        shapes["class_embedding.weight"] = (classes, time)
    for block, (width, kind) in enumerate(zip(widths, config["down_block_types"], strict=True)):
        name, into = f"down_blocks.{block}", widths[max(block - 1, 0)]
        for layer in range(layers[block]):
            shapes |= _resnet(f"{name}.resnets.{layer}", into if layer == 0 else width, width, time)
            if kind.startswith("CrossAttn"):
                shapes |= _attention(config, f"{name}.attentions.{layer}", width, depths[block], layer)
        if block < count - 1:
            shapes |= _conv(f"{name}.downsamplers.0.conv", width, width)
    if (middle := config["mid_block_type"]) is not None:
        shapes |= _resnet("mid_block.resnets.0", last, last, time)
        if middle == "UNetMidBlock2DCrossAttn":
            shapes |= _attention(config, "mid_block.attentions.0", last, depths[-1], 0) | _resnet(
                "mid_block.resnets.1", last, last, time
            )
    return shapes


def vae_weights(config: Mapping[str, Any]) -> Shapes:
    """Return the weights of an AutoencoderKL."""
    widths, latent, layers = config["block_out_channels"], config["latent_channels"], config["layers_per_block"]
    first, last, count = widths[0], widths[-1], len(widths)
    shapes = _conv("encoder.conv_in", first, config["in_channels"]) | _conv("decoder.conv_in", last, latent)
    for block, width in enumerate(widths):
        for layer in range(layers):
            into = widths[max(block - 1, 0)] if layer == 0 else width
            shapes |= _resnet(f"encoder.down_blocks.{block}.resnets.{layer}", into, width)
        up = widths[-1 - block]
        for layer in range(layers + 1):
            into = widths[-max(block, 1)] if layer == 0 else up
            shapes |= _resnet(f"decoder.up_blocks.{block}.resnets.{layer}", into, up)
        if block < count - 1:
            shapes |= _conv(f"encoder.down_blocks.{block}.downsamplers.0.conv", width, width)
            shapes |= _conv(f"decoder.up_blocks.{block}.upsamplers.0.conv", up, up)
    for side in ("encoder", "decoder"):
        for layer in (0, 1):
            shapes |= _resnet(f"{side}.mid_block.resnets.{layer}", last, last)
        if config.get("mid_block_add_attention", True):
            attention = f"{side}.mid_block.attentions.0"
            shapes |= _norm(f"{attention}.group_norm", last)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= _linear(f"{attention}.{part}", last, last)
    shapes |= _norm("encoder.conv_norm_out", last) | _conv("encoder.conv_out", 2 * latent, last)
    shapes |= _norm("decoder.conv_norm_out", first) | _conv("decoder.conv_out", config["out_channels"], first)
    if config["use_quant_conv"]:
        shapes |= _conv("quant_conv", 2 * latent, 2 * latent, 1)
    if config["use_post_quant_conv"]:
        shapes |= _conv("post_quant_conv", latent, latent, 1)
    return shapes


def text_weights(config: Mapping[str, Any], *, projected: bool) -> Shapes:
    """Return the weights of a CLIPTextModel, or `projected` of a CLIPTextModelWithProjection."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layers.{layer}"
        shapes |= _norm(f"{name}.layer_norm1", width) | _norm(f"{name}.layer_norm2", width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{name}.self_attn.{part}", width, width)
        shapes |= _linear(f"{name}.mlp.fc1", wide, width) | _linear(f"{name}.mlp.fc2", width, wide)
    shapes |= _norm("final_layer_norm", width)
    if projected:
        shapes["text_projection.weight"] = (config["projection_dim"], width)
    return shapes


def _attention(config: Mapping[str, Any], name: str, width: int, depth: Any, layer: int) -> Shapes:
    blocks, context = depth[layer] if isinstance(depth, list) else depth, config["cross_attention_dim"]
    return _transformer(name, width, blocks, context=context, linear=bool(config["use_linear_projection"]))


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] * count


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _conv(name: str, out: int, into: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (out, into, size, size), f"{name}.bias": (out,)}


def _resnet(name: str, into: int, out: int, time: int | None = None) -> Shapes:
    shapes = _norm(f"{name}.norm1", into) | _conv(f"{name}.conv1", out, into)
    if time is not None:
        shapes |= _linear(f"{name}.time_emb_proj", out, time)
    shapes |= _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2", out, out)
    return shapes | (_conv(f"{name}.conv_shortcut", out, into, 1) if into != out else {})


def _transformer(name: str, width: int, blocks: int, *, context: int, linear: bool) -> Shapes:
    shapes = _norm(f"{name}.norm", width)
    for part in ("proj_in", "proj_out"):
        shapes |= _linear(f"{name}.{part}", width, width) if linear else _conv(f"{name}.{part}", width, width, 1)
    for block in range(blocks):
        here = f"{name}.transformer_blocks.{block}"
        for part in ("norm1", "norm2", "norm3"):
            shapes |= _norm(f"{here}.{part}", width)
        for attention, source in (("attn1", width), ("attn2", context)):
            shapes |= {f"{here}.{attention}.to_{part}.weight": (width, source) for part in "kv"}
            shapes |= {f"{here}.{attention}.to_q.weight": (width, width)} | _linear(f"{here}.{attention}.to_out.0", width, width)
        shapes |= _linear(f"{here}.ff.net.0.proj", 8 * width, width) | _linear(f"{here}.ff.net.2", width, 4 * width)
    return shapes
