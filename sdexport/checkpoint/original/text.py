"""A text encoder in the original layout: CLIP's as transformers names it, or OpenCLIP's, under the names of transformers."""

from __future__ import annotations

from typing import Any

from sdexport.checkpoint.original.naming import Tensors, children, in_module, renamed, shape_of, within

_HEAD = 64  # channels of an attention head, in every text encoder of Stable Diffusion
_OUTER = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    **{f"self_attn.{part}": f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")},
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_IDLE = (
    "logit_scale",
    "attn_mask",
    "position_ids",
    "embeddings.position_ids",
)  # of the pair with an image encoder, and constants


def read_clip(tensors: Tensors, *, activation: str) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the weights of a text encoder; `tensors` by the names of transformers, from `text_model.` on.

    Raises ValueError for what is no text encoder.
    """
    weights = {name: tensor for name, tensor in within(tensors, "text_model.").items() if name not in _IDLE}
    projection = {name: tensor for name, tensor in tensors.items() if name == "text_projection.weight"}
    config = _config(weights, activation, layers=len(children(weights, "encoder.layers")))
    if projection:
        config["projection_dim"] = shape_of(tensors, "text_projection.weight", 2)[0]
    return config, weights | projection


def read_open_clip(tensors: Tensors, *, projected: bool) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the weights of OpenCLIP's text encoder; `tensors` by its names, without the network's prefix.

    `projected`: with the projection of the pooled text, as SDXL has it; without it the last layer is left away, since Stable
    Diffusion 2 conditions on the one before it. Raises ValueError for what is no text encoder.
    """
    layers = children(tensors, "transformer.resblocks")
    if not projected:
        layers = layers[:-1]
    places = _OUTER | {f"transformer.resblocks.{layer}": f"encoder.layers.{layer}" for layer in layers}
    last = f"transformer.resblocks.{len(layers)}."
    single = {"positional_embedding", "text_projection", *_IDLE}
    plain: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name in single or (not projected and name.startswith(last)):
            continue
        stem, _, kind = name.rpartition(".attn.in_proj_")
        if not stem:
            plain[name] = tensor
            continue
        for index, part in enumerate(_PROJECTIONS):  # query, key and value are stored as one
            plain[f"{stem}.self_attn.{part}.{kind}"] = tensor.rows(index, len(_PROJECTIONS))
    weights = renamed(plain, places, _inside)
    shape_of(tensors, "positional_embedding", 2)
    weights["embeddings.position_embedding.weight"] = tensors["positional_embedding"]
    config = _config(weights, "gelu", layers=len(layers))
    if projected:
        config["projection_dim"] = shape_of(tensors, "text_projection", 2)[1]
        weights["text_projection.weight"] = tensors["text_projection"].transposed()
    return config, weights


def _config(weights: Tensors, activation: str, *, layers: int) -> dict[str, Any]:
    vocabulary, width = shape_of(weights, "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(weights, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // _HEAD),
        "max_position_embeddings": shape_of(weights, "embeddings.position_embedding.weight", 2)[0],
        "hidden_act": activation,
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
    }


def _inside(place: str, rest: str) -> str | None:
    return in_module(rest, _LAYER)
