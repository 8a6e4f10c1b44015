"""Decoupled cross-attention in PyTorch: the reference of sdexport.trace.image_prompt.

IP-Adapter, Ye et al. 2023 (arXiv 2308.06721), equation 5, and for masks diffusers' IPAdapterAttnProcessor2_0, which takes neither
a scale for each row nor a bias, and has either masks in all rows or in none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sdexport.checkpoint.weights.ip_adapter import attentions, divisor, name
from sdexport.checkpoint.weights.safetensors import StoredTensor
from sdruntime.bundle.interface import IMAGE_BIAS, IMAGE_MASKED, IMAGE_MASKS, IMAGE_SCALE, IMAGE_TOKENS


@contextlib.contextmanager
def prompted(unet: Any, weights: Mapping[str, StoredTensor], inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let a UNet2DConditionModel attend to image tokens. `weights`: the adapter's among others; `inputs`: tensors by name."""
    before = dict(unet.attn_processors)
    places = attentions(f"{processor.removesuffix('.processor')}.to_k.weight" for processor in before)
    masks = {place: IMAGE_MASKS[divisor(place, len(unet.config["down_block_types"]))] for place in places}
    own = {f"{place}.processor": _Decoupled(place, weights, inputs, masks[place]) for place in places}
    unet.set_attn_processor({**before, **own})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


class _Decoupled:
    """A processor of diffusers' Attention, without what its cross-attention in a UNet does not use."""

    def __init__(self, place: str, weights: Mapping[str, StoredTensor], inputs: Mapping[str, Any], mask: str) -> None:
        import torch

        self._keys, self._values = (
            torch.from_numpy(weights[name(place, letter)].read().astype(np.float32, copy=False)) for letter in "kv"
        )
        self._inputs, self._mask = inputs, mask

    def __call__(self, attention: Any, hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> Any:
        import torch
        from torch.nn.functional import linear, scaled_dot_product_attention

        def split(states: Any) -> Any:
            return states.unflatten(2, (attention.heads, -1)).transpose(1, 2)

        query, tokens = split(attention.to_q(hidden_states)), self._inputs[IMAGE_TOKENS]
        keys, values = (split(part(encoder_hidden_states)) for part in (attention.to_k, attention.to_v))
        text = scaled_dot_product_attention(query, keys, values)
        keys, values = (split(linear(tokens, weight)) for weight in (self._keys, self._values))
        bias = self._inputs[IMAGE_BIAS][:, None, None, :]
        image = scaled_dot_product_attention(query, keys, values, attn_mask=bias)
        if IMAGE_MASKED in self._inputs:
            masks = self._inputs[self._mask].flatten(1, 2)[:, None]  # [B, 1, Q, M]
            parts = (part.split(tokens.shape[1] // masks.shape[3], dim=dim) for part, dim in ((keys, 2), (values, 2), (bias, 3)))
            attended = [scaled_dot_product_attention(query, *part) for part in zip(*parts, strict=True)]
            apart = sum(mask[..., None] * result for mask, result in zip(masks.unbind(3), attended, strict=True))
            image = torch.where((self._inputs[IMAGE_MASKED] > 0)[:, None, None, None], apart, image)
        total = (text + self._inputs[IMAGE_SCALE][:, None, None, None] * image).transpose(1, 2).flatten(2)
        return attention.to_out[1](attention.to_out[0](total))
