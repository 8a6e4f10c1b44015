"""Decoupled cross-attention in PyTorch: the reference of sdexport.trace.image_prompt.

IP-Adapter, Ye et al. 2023 (arXiv 2308.06721), equation 5. diffusers' processor takes neither a scale for each row nor a bias.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sdexport.checkpoint.weights.ip_adapter import attentions, name
from sdexport.checkpoint.weights.safetensors import StoredTensor
from sdruntime.bundle.interface import IMAGE_BIAS, IMAGE_SCALE, IMAGE_TOKENS


@contextlib.contextmanager
def prompted(unet: Any, weights: Mapping[str, StoredTensor], inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let a UNet2DConditionModel attend to image tokens. `weights`: the adapter's among others; `inputs`: tensors by name."""
    before = dict(unet.attn_processors)
    places = attentions(f"{processor.removesuffix('.processor')}.to_k.weight" for processor in before)
    own = {f"{place}.processor": _Decoupled(place, weights, inputs) for place in places}
    unet.set_attn_processor({**before, **own})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


class _Decoupled:
    """A processor of diffusers' Attention, without what its cross-attention in a UNet does not use."""

    def __init__(self, place: str, weights: Mapping[str, StoredTensor], inputs: Mapping[str, Any]) -> None:
        import torch

        self._keys, self._values = (
            torch.from_numpy(weights[name(place, letter)].read().astype(np.float32, copy=False)) for letter in "kv"
        )
        self._inputs = inputs

    def __call__(self, attention: Any, hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> Any:
        from torch.nn.functional import linear, scaled_dot_product_attention

        def split(states: Any) -> Any:
            return states.unflatten(2, (attention.heads, -1)).transpose(1, 2)

        query, tokens = split(attention.to_q(hidden_states)), self._inputs[IMAGE_TOKENS]
        keys, values = (split(part(encoder_hidden_states)) for part in (attention.to_k, attention.to_v))
        text = scaled_dot_product_attention(query, keys, values)
        keys, values = (split(linear(tokens, weight)) for weight in (self._keys, self._values))
        bias = self._inputs[IMAGE_BIAS][:, None, None, :]
        image = scaled_dot_product_attention(query, keys, values, attn_mask=bias)
        total = (text + self._inputs[IMAGE_SCALE][:, None, None, None] * image).transpose(1, 2).flatten(2)
        return attention.to_out[1](attention.to_out[0](total))
