"""A text encoder in the original layout: CLIP's as transformers names it, or OpenCLIP's, under the names of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdexport.checkpoint.original.expected import text_weights
from sdexport.checkpoint.original.naming import (
    Tensors,
    check_fit,
    children,
    in_module,
    moved,
    outputs,
    renamed,
    reverse,
    size,
    within,
)

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
_TABLES = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "text_projection.weight": "text_projection",
}
_VOCABULARY, _POSITIONS = 49408, 77  # of CLIP
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_IDLE = (
    "logit_scale",
    "attn_mask",
    "position_ids",
    "embeddings.position_ids",
)  # of the pair with an image encoder, and constants


def read_clip(tensors: Tensors, *, activation: str, projected: bool = False) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the weights of a text encoder; `tensors` by the names of transformers, from `text_model.` on.

    Raises ValueError for what is no text encoder, Misfit with the names and shapes that do not fit the others.
    """
    weights = {name: tensor for name, tensor in within(tensors, "text_model.").items() if name not in _IDLE}
    projection = {name: tensor for name, tensor in tensors.items() if name == "text_projection.weight"}
    config = _config(weights, activation, layers=len(children(weights, "encoder.layers")))
    projected = projected or bool(projection)
    if projected:
        config["projection_dim"] = size(tensors, ("text_projection.weight", 2, 0), usual=config["hidden_size"])
    unknown = [name for name in tensors if not name.startswith("text_model.") and name not in (*projection, *_IDLE)]
    weights |= projection
    check_fit(config, text_weights(config, projected=projected), weights, unknown=unknown)
    return config, weights


def read_open_clip(tensors: Tensors, *, projected: bool) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the weights of OpenCLIP's text encoder; `tensors` by its names, without the network's prefix.

    `projected`: with the projection of the pooled text, as SDXL has it; without it the last layer is left away, since Stable
    Diffusion 2 conditions on the one before it. Raises ValueError for what is no text encoder, Misfit.
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
            whole = tensor.shape and tensor.shape[0] % len(_PROJECTIONS) == 0
            plain[f"{stem}.self_attn.{part}.{kind}"] = tensor.rows(index, len(_PROJECTIONS)) if whole else tensor
    weights, unknown = renamed(plain, places, _inside)
    if "positional_embedding" in tensors:
        weights["embeddings.position_embedding.weight"] = tensors["positional_embedding"]
    config = _config(weights, "gelu", layers=len(layers))
    if projected:
        if "text_projection" in tensors:
            weights["text_projection.weight"] = tensors["text_projection"].transposed()
        config["projection_dim"] = size(weights, ("text_projection.weight", 2, 0), usual=config["hidden_size"])
    check_fit(
        config,
        text_weights(config, projected=projected),
        weights,
        unknown=unknown,
        old=lambda name: _old(name, places),
        stored_shape=_stored_shape,
        file=tensors,
    )
    return config, weights


def _config(weights: Tensors, activation: str, *, layers: int) -> dict[str, Any]:
    layers = max(1, layers)  # `check_fit` reports the names
    stems = [f"encoder.layers.{layer}" for layer in range(layers)]
    norms = [f"{layer}.layer_norm{k}" for layer in stems for k in (1, 2)]
    width = outputs(weights, "final_layer_norm", *norms, axes=1)
    vocabulary = size(weights, ("embeddings.token_embedding.weight", 2, 0), usual=_VOCABULARY)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": outputs(weights, *(f"{layer}.mlp.fc1" for layer in stems), axes=2),
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // _HEAD),
        "max_position_embeddings": size(weights, ("embeddings.position_embedding.weight", 2, 0), usual=_POSITIONS),
        "hidden_act": activation,
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
    }


def _inside(place: str, rest: str) -> str | None:
    return in_module(rest, _LAYER)


def _old(name: str, places: Mapping[str, str]) -> str:
    """Return OpenCLIP's name of a weight."""
    if name in _TABLES:
        return _TABLES[name]

    def inside(place: str, module: str, rest: str) -> str | None:
        part, _, kind = rest.rpartition(".")
        whole = part.removeprefix("self_attn.") in _PROJECTIONS
        return f"attn.in_proj_{kind}" if whole else in_module(rest, reverse(_LAYER))

    return moved(name, reverse(places), inside) or name


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that OpenCLIP stores a weight of this shape in."""
    if name == "text_projection.weight":
        return shape[::-1]
    whole = name.split(".")[-2] in _PROJECTIONS
    return (shape[0] * len(_PROJECTIONS), *shape[1:]) if whole else shape
