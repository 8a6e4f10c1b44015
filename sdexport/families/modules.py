"""Wrap diffusers' and transformers' modules for tracing, with the inputs and outputs of DESIGN's table.

Importing this file loads torch. Each wrapper is created from a component's config.json alone and keeps the names of the
checkpoint's weights. The wrappers do not apply scaling_factor: the runtime does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    ControlNetUnionModel,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from sdexport.checkpoint.configs.tables import IMAGE_PROJECTION

_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id"),
)
_VISION_KEYS = (
    *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
# diffusers' DiagonalGaussianDistribution clamps the posterior's log variance to this range
_LOGVAR = (-30.0, 20.0)


class TextEncoder(nn.Module):
    """input_ids [B,S] -> last_hidden_state [B,S,D] after the final layer norm: the conditioning of SD1 and SD2.

    The output `layers` [B,L,S,D] has the states before it, after the same norm, for clip skip.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.weights = CLIPTextModel(_text_config(config))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.weights(input_ids, position_ids=_positions(input_ids), output_hidden_states=True)
        transformer = getattr(self.weights, "text_model", self.weights)  # transformers 5 has no prefix
        layers = transformer.final_layer_norm(torch.stack(output.hidden_states[:-1], dim=1))
        return output.last_hidden_state, layers


class PenultimateTextEncoder(nn.Module):
    """input_ids [B,S] -> hidden_states [B,S,D] before the last layer: the first encoder of SDXL.

    The output `layers` [B,L,S,D] has the states before it, for clip skip.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.weights = CLIPTextModel(_text_config(config))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.weights(input_ids, position_ids=_positions(input_ids), output_hidden_states=True).hidden_states
        return states[-2], torch.stack(states[:-2], dim=1)


class PooledTextEncoder(nn.Module):
    """input_ids [B,S] -> hidden_states [B,S,D] before the last layer, text_embeds [B,P]: the second encoder of SDXL.

    The output `layers` is as for the first one.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.weights = CLIPTextModelWithProjection(_text_config(config))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = self.weights(input_ids, position_ids=_positions(input_ids), output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds, torch.stack(output.hidden_states[:-2], dim=1)


class ImageEncoder(nn.Module):
    """pixel_values [B,3,S,S], presence [B] -> image_tokens [B,N,D] of an IP-Adapter, for `presence` 1; for 0 those of no image.

    diffusers' IPAdapterMixin: without an image, a plain adapter projects zeros, the others encode an image of zeros.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        settings = config[IMAGE_PROJECTION]
        self.weights = CLIPVisionModelWithProjection(_vision_config(config))
        self.projection = _PROJECTIONS[settings["kind"]](settings)
        self.plain = settings["kind"] == "plain"
        embeddings = self.weights.vision_model.embeddings
        embeddings.forward = functools.partial(_patches, embeddings)

    def forward(self, pixel_values: Tensor, presence: Tensor) -> Tensor:
        if self.plain:
            states = self.weights(pixel_values).image_embeds * presence[:, None]
        else:
            pixel_values = pixel_values * presence[:, None, None, None]
            states = self.weights(pixel_values, output_hidden_states=True).hidden_states[-2]
        output: Tensor = self.projection(states)
        return output


_PROJECTIONS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "plain": lambda settings: ImageProjection(
        image_embed_dim=settings["input"], cross_attention_dim=settings["width"], num_image_text_embeds=settings["tokens"]
    ),
    "full": lambda settings: IPAdapterFullImageProjection(
        image_embed_dim=settings["input"], cross_attention_dim=settings["width"]
    ),
    "plus": lambda settings: IPAdapterPlusImageProjection(
        embed_dims=settings["input"],
        output_dims=settings["width"],
        hidden_dims=settings["hidden"],
        heads=settings["heads"],
        num_queries=settings["tokens"],
    ),
}


class Unet(nn.Module):
    """sample [B,C,h,w], timestep [B], encoder_hidden_states [B,S,D] -> out_sample [B,C,h,w].

    SDXL's UNet also takes text_embeds [B,P] and time_ids [B,6], its refiner's [B,5]. The inputs of a task
    (sdruntime.bundle.tasks), each [B,·,h,w], are concatenated to `sample` in the order of the arguments. noise_level [B] is a
    whole number. timestep_cond [B,G] is the embedding of the guidance. `residuals`: those of ControlNets, by name, the middle one
    last; `features`: those of T2I-Adapters, the largest first. Neither is part of the trace.
    h and w may be any: an upsampled image is cropped to the size of the one that it is joined with.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.weights = UNet2DConditionModel.from_config(_architecture(config))
        for block in self.weights.up_blocks:
            for upsampler in block.upsamplers or ():
                upsampler.forward = functools.partial(_upsampled, upsampler)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        mask: Tensor | None = None,
        masked_image_latents: Tensor | None = None,
        image_latents: Tensor | None = None,
        depth: Tensor | None = None,
        low_res_image: Tensor | None = None,
        noise_level: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        residuals: Mapping[str, Tensor] | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        added = [tensor for tensor in (mask, masked_image_latents, image_latents, depth, low_res_image) if tensor is not None]
        if added:
            sample = torch.cat([sample, *added], dim=1)
        pooled = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        *down, middle = (residuals or {}).values() or (None,)
        output: Tensor = self.weights(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels=None if noise_level is None else noise_level.long(),
            timestep_cond=timestep_cond,
            added_cond_kwargs=pooled,
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=middle,
            down_intrablock_additional_residuals=list(features.values()) if features else None,
            return_dict=False,
        )[0]
        return output


class ControlNet(nn.Module):
    """The UNet's inputs, controlnet_cond [B,3,fh,fw] in [0,1], conditioning_scale [B,K] -> K residuals, the middle one last.

    A factor for each residual also expresses diffusers' guess_mode.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.weights = ControlNetModel.from_config(_architecture(config))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        pooled = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        down, middle = self.weights(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond,
            added_cond_kwargs=pooled,
            return_dict=False,
        )
        factors = conditioning_scale[:, :, None, None, None].unbind(1)
        return tuple(residual * factor for residual, factor in zip((*down, middle), factors, strict=True))


class ControlNetUnion(nn.Module):
    """As ControlNet, and control_type [B,M] -> K residuals: 1 for the type of the image, 0 for the others."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.weights = ControlNetUnionModel.from_config(_architecture(config))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: Tensor,
        control_type: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        pooled = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        down, middle = self.weights(
            sample,
            timestep,
            encoder_hidden_states,
            [controlnet_cond],
            control_type,
            [control_type.argmax(dim=1)],
            conditioning_scale=[1.0],
            added_cond_kwargs=pooled,
            return_dict=False,
        )
        factors = conditioning_scale[:, :, None, None, None].unbind(1)
        return tuple(residual * factor for residual, factor in zip((*down, middle), factors, strict=True))


class T2iAdapter(nn.Module):
    """controlnet_cond [B,1|3,H,W] in [0,1] -> features, the largest first."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.weights = T2IAdapter.from_config(_architecture(config))

    def forward(self, controlnet_cond: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.weights(controlnet_cond))


class VaeDecoder(nn.Module):
    """latent_sample [B,C,h,w] -> sample [B,3,fh,fw] in [-1,1]."""

    architecture: Any = AutoencoderKL

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        vae = self.architecture.from_config(_architecture(config))
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        output: Tensor = self.decoder(latent_sample)
        return output


class VaeEncoder(nn.Module):
    """sample [B,3,H,W] in [-1,1] -> latent_mean, latent_logvar [B,C,h,w] of the posterior."""

    architecture: Any = AutoencoderKL

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        vae = self.architecture.from_config(_architecture(config))
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.encoder(sample)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*_LOGVAR)


class AsymmetricVaeDecoder(VaeDecoder):
    """As VaeDecoder, without the image and the mask that the decoder can also take."""

    architecture = AsymmetricAutoencoderKL

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.decoder.condition_encoder = None


class AsymmetricVaeEncoder(VaeEncoder):
    """As VaeEncoder."""

    architecture = AsymmetricAutoencoderKL


class TinyVaeDecoder(nn.Module):
    """latent_sample [B,C,h,w] -> sample [B,3,fh,fw] in about [-1,1]."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.decoder = AutoencoderTiny.from_config(_architecture(config)).decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        output: Tensor = self.decoder(latent_sample)
        return output


class TinyVaeEncoder(nn.Module):
    """sample [B,3,H,W] in [-1,1] -> latent_mean [B,C,h,w]: the latents themselves, as there is no posterior."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = AutoencoderTiny.from_config(_architecture(config)).encoder

    def forward(self, sample: Tensor) -> Tensor:
        output: Tensor = self.encoder(sample)
        return output


WRAPPERS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    wrapper.__name__: wrapper
    for wrapper in (
        TextEncoder,
        PenultimateTextEncoder,
        PooledTextEncoder,
        ImageEncoder,
        Unet,
        ControlNet,
        ControlNetUnion,
        T2iAdapter,
        VaeDecoder,
        VaeEncoder,
        AsymmetricVaeDecoder,
        AsymmetricVaeEncoder,
        TinyVaeDecoder,
        TinyVaeEncoder,
    )
}


def _upsampled(upsampler: Any, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Run an Upsample2D of a UNet: to `size`, which is twice the image's or a row or a column less.

    diffusers scales to `size` instead, with the same result. Here the scale is a constant, which engines read.
    """
    large = functional.interpolate(image, scale_factor=2.0, mode="nearest")
    output: Tensor = upsampler.conv(large if size is None else large[:, :, : size[0], : size[1]])
    return output


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's settings without diffusers' internal ones."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _text_config(config: Mapping[str, Any]) -> CLIPTextConfig:
    # transformers' own keys are omitted: they choose the code that runs (_attn_implementation) and the form of its outputs
    known = {key: value for key, value in config.items() if key in _TEXT_KEYS}
    # eager attention is MatMul, scale, mask, Softmax, MatMul, which engines can fuse
    return CLIPTextConfig(**(known | {"attn_implementation": "eager"}))


def _vision_config(config: Mapping[str, Any]) -> CLIPVisionConfig:
    known = {key: value for key, value in config.items() if key in _VISION_KEYS}
    return CLIPVisionConfig(**(known | {"attn_implementation": "eager"}))


def _patches(embeddings: Any, pixel_values: Tensor, **_: Any) -> Tensor:
    """Run the embeddings of an image encoder without their table of positions, which has no data under fake tensors."""
    patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    first = embeddings.class_embedding.expand(pixel_values.shape[0], 1, -1)
    output: Tensor = torch.cat([first, patches], dim=1) + embeddings.position_embedding.weight
    return output


def _positions(input_ids: Tensor) -> Tensor:
    # the module's own table of positions is a buffer filled at construction, which has no data under fake tensors
    return torch.arange(input_ids.shape[1])[None]
