"""List the components of a checkpoint: the networks, their folders and their tensors.

Keep equal to DESIGN's "Component tensors". A call chooses the named dimensions of the inputs; output dimensions that follow from
them (the image's side from the latent's) have other names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdexport.checkpoint.checkpoint import Checkpoint
from sdexport.checkpoint.configs.controlnet import residuals_of
from sdexport.checkpoint.configs.misfits import text_width
from sdexport.checkpoint.configs.t2i_adapter import features_of_adapter, features_of_unet
from sdexport.checkpoint.configs.tables import IMAGE_PROJECTION
from sdexport.checkpoint.overrides import PREVIEW_VAE
from sdexport.checkpoint.pipelines import ASYMMETRIC_VAE, SCORE, TINY_VAE
from sdexport.checkpoint.weights.ip_adapter import attention_divisors
from sdruntime.bundle.dimensions import size_of
from sdruntime.bundle.interface import (
    CONTROL_IMAGE,
    CONTROL_SCALES,
    CONTROL_TYPE,
    FEATURE,
    IMAGE_BIAS,
    IMAGE_MASKED,
    IMAGE_MASKS,
    IMAGE_SCALE,
    IMAGE_TOKENS,
    LOGVAR,
    PRESENCE,
    TOKEN_VECTORS,
    sides_over,
)
from sdruntime.bundle.manifest import TensorSpec
from sdruntime.bundle.roles import IMAGE_ENCODER, PREVIEW, of_kind
from sdruntime.bundle.tasks import GUIDANCE, INPUTS, NOISE_LEVEL, SCORED, SIZES, TIME_IDS, channels

_VAE_WRAPPERS = {TINY_VAE: "Tiny", ASYMMETRIC_VAE: "Asymmetric"}
# images of an image prompt: as many as this many tokens hold, from 1 to MOST_IMAGES
TOKENS_OF_IMAGES, MOST_IMAGES = 64, 4
_EXAMPLE_TEXT = 77  # tokens; a UNet takes any number of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A network: its `name` in the bundle, `part` of the checkpoint, `wrapper` in sdexport.families.modules, and tensors."""

    name: str
    part: str
    wrapper: str
    config: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sides: Mapping[str, int]  # image or latent dimensions of the trace and of an example, in units of the component's input
    optional_inputs: tuple[TensorSpec, ...] = ()  # which sdexport.trace.optional_inputs adds to the traced graph

    @property
    def engine_inputs(self) -> tuple[TensorSpec, ...]:
        return (*self.inputs, *self.optional_inputs)

    def example_feeds(self, *, seed: int = 0, **sizes: int) -> dict[str, NDArray[Any]]:
        """Return random inputs of plausible range. `sizes` sets named dimensions; the others are small and valid."""
        dims = {"batch": 2, "sequence": _EXAMPLE_TEXT}
        dims |= dict(self.sides) | sizes
        random = np.random.default_rng(seed)
        feeds: dict[str, NDArray[Any]] = {}
        for spec in self.inputs:
            shape = [size_of(dim, dims) for dim in spec.shape]
            if spec.dtype == "int32":
                feeds[spec.name] = random.integers(0, self.config["vocab_size"], shape, dtype=np.int32)
            elif spec.name == "timestep":
                feeds[spec.name] = random.integers(0, 1000, shape).astype(np.float32)
            elif spec.name == NOISE_LEVEL:
                feeds[spec.name] = random.integers(0, self.config["num_class_embeds"], shape).astype(np.float32)
            elif spec.name == TIME_IDS:
                feeds[spec.name] = random.integers(0, 1024, shape).astype(np.float32)
            else:
                feeds[spec.name] = random.standard_normal(shape).astype(np.float32)
        return feeds


def components(checkpoint: Checkpoint) -> tuple[Component, ...]:
    """Return the components of a checkpoint in export order: small ones first, so that faults show early."""
    preview = (_preview_decoder(checkpoint),) if PREVIEW_VAE in checkpoint.parts else ()
    vae, unet = (_vae_encoder(checkpoint), _vae_decoder(checkpoint)), _unet(checkpoint)
    controlnets = tuple(_controlnet(checkpoint, name, unet) for name in of_kind(checkpoint.parts, "ControlNet"))
    adapters = tuple(_t2i_adapter(checkpoint, name) for name in of_kind(checkpoint.parts, "T2I-Adapter"))
    features = _features(unet.config)[: max((len(adapter.outputs) for adapter in adapters), default=0)]
    unet = dataclasses.replace(unet, optional_inputs=(*features, *(_residuals(unet.config) if controlnets else ())))
    encoder = (_image_encoder(checkpoint),) if IMAGE_ENCODER in checkpoint.parts else ()
    if encoder:
        unet = dataclasses.replace(unet, optional_inputs=(*unet.optional_inputs, *_image_prompt(*encoder, unet.config)))
    return (*_text_encoders(checkpoint), *encoder, *preview, *vae, *adapters, *controlnets, unet)


def _text_encoders(checkpoint: Checkpoint) -> tuple[Component, ...]:
    length, parts = checkpoint.text_length, checkpoint.parts
    if checkpoint.model.family != "sdxl":
        config = parts["text_encoder"].config
        last = _float("last_hidden_state", "batch", length, config["hidden_size"])
        return (_text_encoder("text_encoder", "TextEncoder", config, length, (last, _layers(config, length, 1))),)
    second = parts["text_encoder_2"].config
    outputs = _hidden(second, length), _float("text_embeds", "batch", second["projection_dim"]), _layers(second, length, 2)
    pooled = _text_encoder("text_encoder_2", "PooledTextEncoder", second, length, outputs)
    if "text_encoder" not in parts:  # the refiner
        return (pooled,)
    first = parts["text_encoder"].config
    states = _hidden(first, length), _layers(first, length, 2)
    return _text_encoder("text_encoder", "PenultimateTextEncoder", first, length, states), pooled


def _hidden(config: Mapping[str, Any], length: int) -> TensorSpec:
    return _float("hidden_states", "batch", length, config["hidden_size"])


def _layers(config: Mapping[str, Any], length: int, used: int) -> TensorSpec:
    """The states of the embeddings and of each layer, except the last `used` of them."""
    return _float("layers", "batch", config["num_hidden_layers"] + 1 - used, length, config["hidden_size"])


def _text_encoder(name: str, wrapper: str, config: Mapping[str, Any], length: int, outputs: tuple[TensorSpec, ...]) -> Component:
    ids = TensorSpec(name="input_ids", dtype="int32", shape=("batch", length))
    vectors = _float(TOKEN_VECTORS, "batch", length, config["hidden_size"])
    return Component(
        name=name,
        part=name,
        wrapper=wrapper,
        config=config,
        inputs=(ids,),
        outputs=outputs,
        sides={},
        optional_inputs=(vectors,),
    )


def _unet(checkpoint: Checkpoint) -> Component:
    config, model = checkpoint.parts["unet"].config, checkpoint.model
    inputs = [
        _float("sample", "batch", model.latent_channels, "height", "width"),
        _float("timestep", "batch"),
        _float("encoder_hidden_states", "batch", "sequence", text_width(config)),
    ]
    if model.family == "sdxl":
        width = checkpoint.parts["text_encoder_2"].config["projection_dim"]
        inputs += [
            _float("text_embeds", "batch", width),
            _float(TIME_IDS, "batch", SCORED if checkpoint.index.get(SCORE) else SIZES),
        ]
    if checkpoint.task:
        added = channels(checkpoint.task, model.latent_channels)
        inputs += [_float(name, "batch", count, "height", "width") for name, count in added.items()]
    if config["num_class_embeds"] is not None:
        inputs.append(_float(NOISE_LEVEL, "batch"))
    if config["time_cond_proj_dim"]:
        inputs.append(_float(GUIDANCE, "batch", config["time_cond_proj_dim"]))
    # odd at every level, so that the trace crops after each upsampling
    cells = 2 * model.size_multiple // model.vae_factor + 1
    return Component(
        name="unet",
        part="unet",
        wrapper="Unet",
        config=config,
        inputs=tuple(inputs),
        outputs=(_float("out_sample", "batch", config["out_channels"], "height", "width"),),
        sides={"height": cells, "width": cells},
    )


def _residuals(config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        _float(residual.name, "batch", residual.channels, *sides_over(residual.divisor)) for residual in residuals_of(config)
    )


def _features(config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Return the features of T2I-Adapters that a UNet can take."""
    return tuple(
        _float(f"{FEATURE}{index}", "batch", feature.channels, *sides_over(feature.divisor))
        for index, feature in enumerate(features_of_unet(config))
    )


def _t2i_adapter(checkpoint: Checkpoint, name: str) -> Component:
    config, factor = checkpoint.parts[name].config, checkpoint.model.vae_factor
    features = features_of_adapter(config, factor)
    cells = config["downscale_factor"] * 2  # of the smallest feature but one
    return Component(
        name=name,
        part=name,
        wrapper="T2iAdapter",
        config=config,
        inputs=(_float(CONTROL_IMAGE, "batch", config["in_channels"], "height", "width"),),
        outputs=tuple(
            _float(f"{FEATURE}{index}", "batch", feature.channels, *sides_over(factor * feature.divisor))
            for index, feature in enumerate(features)
        ),
        sides={"height": cells * 2, "width": cells * 3},
    )


def _controlnet(checkpoint: Checkpoint, name: str, unet: Component) -> Component:
    config, factor = checkpoint.parts[name].config, checkpoint.model.vae_factor
    residuals = _residuals(config)
    if config["global_pool_conditions"]:
        residuals = tuple(dataclasses.replace(tensor, shape=(*tensor.shape[:2], 1, 1)) for tensor in residuals)
    own = {tensor for task in INPUTS for tensor in channels(task, 0)} | {GUIDANCE, NOISE_LEVEL}
    inputs = [tensor for tensor in unet.inputs if tensor.name not in own]
    inputs += [
        _float(CONTROL_IMAGE, "batch", config["conditioning_channels"], f"height*{factor}", f"width*{factor}"),
        _float(CONTROL_SCALES, "batch", len(residuals)),
    ]
    types = config.get("num_control_type")  # of a ControlNet-Union
    inputs += [] if types is None else [_float(CONTROL_TYPE, "batch", types)]
    return Component(
        name=name,
        part=name,
        wrapper="ControlNet" if types is None else "ControlNetUnion",
        config=config,
        inputs=tuple(inputs),
        outputs=residuals,
        sides=unet.sides,
    )


def _image_encoder(checkpoint: Checkpoint) -> Component:
    config = checkpoint.parts[IMAGE_ENCODER].config
    side, projection = config["image_size"], config[IMAGE_PROJECTION]
    tokens = projection["tokens"] or (side // config["patch_size"]) ** 2 + 1
    return Component(
        name=IMAGE_ENCODER,
        part=IMAGE_ENCODER,
        wrapper="ImageEncoder",
        config=config,
        inputs=(_float("pixel_values", "batch", 3, side, side), _float(PRESENCE, "batch")),
        outputs=(_float(IMAGE_TOKENS, "batch", tokens, projection["width"]),),
        sides={},
    )


def _image_prompt(encoder: Component, unet: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Return the optional inputs of a UNet with an IP-Adapter: tokens of several images, what to add to their attention before
    the softmax, how much they count, and their masks at each size of the layers. `unet`: its config."""
    _, tokens, width = encoder.outputs[0].shape
    assert isinstance(tokens, int)
    images = max(1, min(MOST_IMAGES, TOKENS_OF_IMAGES // tokens))
    return (
        _float(IMAGE_TOKENS, "batch", tokens * images, width),
        _float(IMAGE_BIAS, "batch", tokens * images),
        _float(IMAGE_SCALE, "batch"),
        _float(IMAGE_MASKED, "batch"),
        *(_float(IMAGE_MASKS[divisor], "batch", *sides_over(divisor), images) for divisor in attention_divisors(unet)),
    )


def _vae_decoder(checkpoint: Checkpoint) -> Component:
    config, channels = checkpoint.parts["vae"].config, checkpoint.model.latent_channels
    return Component(
        name="vae_decoder",
        part="vae",
        wrapper=_VAE_WRAPPERS.get(checkpoint.vae, "") + "VaeDecoder",
        config=config,
        inputs=(_float("latent_sample", "batch", channels, "height", "width"),),
        outputs=(_float("sample", "batch", 3, "image_height", "image_width"),),
        sides={"height": 2, "width": 2},
    )


def _preview_decoder(checkpoint: Checkpoint) -> Component:
    decoder = _vae_decoder(checkpoint)
    config = checkpoint.parts[PREVIEW_VAE].config
    return dataclasses.replace(decoder, name=PREVIEW, part=PREVIEW_VAE, wrapper="TinyVaeDecoder", config=config)


def _vae_encoder(checkpoint: Checkpoint) -> Component:
    config, model = checkpoint.parts["vae"].config, checkpoint.model
    latent = ("batch", model.latent_channels, "latent_height", "latent_width")
    return Component(
        name="vae_encoder",
        part="vae",
        wrapper=_VAE_WRAPPERS.get(checkpoint.vae, "") + "VaeEncoder",
        config=config,
        inputs=(_float("sample", "batch", 3, "height", "width"),),
        outputs=(_float("latent_mean", *latent), *(() if checkpoint.vae == TINY_VAE else (_float(LOGVAR, *latent),))),
        sides={"height": 2 * model.vae_factor, "width": 2 * model.vae_factor},
    )


def _float(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)
