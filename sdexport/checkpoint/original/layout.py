"""Recognise the model in a single file, and return what the documents of its diffusers folder would say.

The names and shapes of the tensors decide, and the file's metadata where they cannot. The name of the file has no influence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdexport.checkpoint.original import diffusers
from sdexport.checkpoint.original.naming import Misfit, Tensors, within
from sdexport.checkpoint.original.standard import (
    ALL_STANDARDS,
    OTHERS,
    SIZE_OF_V,
    STANDARDS,
    UNET,
    VAE,
    VAE_FACTOR,
    VARIANTS,
    Standard,
)
from sdexport.checkpoint.original.text import read_clip, read_open_clip
from sdexport.checkpoint.original.unet import read_unet
from sdexport.checkpoint.original.vae import read_vae
from sdexport.checkpoint.pipelines import SCORE
from sdruntime.bundle.tasks import SCORED, SIZES

_EMA = "model_ema."
_SECOND = "Stable Diffusion 2"
_OF_VAE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # a VAE alone may come with the loss of its training
_PLACE = rf"{re.escape(UNET)}output_blocks\.(\d{{1,4}})\.(1)|unet\.up_blocks\.(\d{{1,4}})\.attentions\.(\d{{1,4}})"
_BIASES = re.compile(rf"(?:{_PLACE})\.transformer_blocks\.0\.norm1\.bias", re.ASCII)
_V, _EPSILON = "v_prediction", "epsilon"
_SPREAD_OF_V = 0.09


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """What a file holds.

    `index`, `scheduler` and `configs` are the documents of a diffusers folder, `weights` the tensors of each part by the names of
    diffusers, and `pads` the padding token of each tokenizer. `inferred` has a line for each conclusion and its reason.
    """

    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, Tensors]
    pads: Mapping[str, str]
    inferred: tuple[str, ...]


def read_original(tensors: Tensors, metadata: Mapping[str, str], *, with_vae: bool = True) -> Original:
    """Return what the tensors of one file are; without `with_vae`, of the VAE only the scaling factor that the model has.

    Raises ValueError with every fault, one a line.
    """
    tensors = _with_text_model(tensors)
    standard = _standard(tensors)
    inferred = [f"{standard.name}: the file has {standard.encoders[-1].sign}"]
    if any(name.startswith(_EMA) for name in tensors):
        inferred.append(f"the weights without averaging are used, as diffusers uses them, not those of {_EMA}*")
    faults: list[str] = []
    configs: dict[str, Mapping[str, Any]] = {}
    weights: dict[str, Tensors] = {}

    def take(part: str, prefix: str, read: Any, **settings: Any) -> None:
        own = within(tensors, prefix)
        if not own:
            advice = "add --vae with the VAE to use" if part == "vae" else "use a checkpoint of the whole model"
            faults.append(f"{part}: no tensor's name begins with {prefix}: {advice}")
            return
        try:
            configs[part], weights[part] = read(own, **settings)
        except ValueError as error:
            faults.extend(f"{part}: {line}" for line in str(error).split("\n"))
            if isinstance(error, Misfit):
                configs[part] = error.config

    for encoder in standard.encoders:
        if encoder.layout == "clip":
            take(encoder.part, encoder.prefix, read_clip, activation=encoder.activation, projected=encoder.projected)
        else:
            take(encoder.part, encoder.prefix, read_open_clip, projected=encoder.projected)
    pooled = configs.get("text_encoder_2", {}).get("projection_dim", 0) if standard.pooled else None
    ids = SCORED if standard.settings.get(SCORE) else SIZES
    take(
        "unet",
        standard.unet,
        diffusers.read_unet if standard.of_diffusers else read_unet,
        heads=standard.heads,
        pooled=pooled,
        ids=ids,
    )
    if with_vae:
        take("vae", standard.vae, diffusers.read_vae if standard.of_diffusers else read_vae)
    if faults:
        raise ValueError("\n".join(faults))
    configs["vae"] = {**configs.get("vae", {}), "scaling_factor": standard.scaling_factor}
    kind, reason = _prediction(standard, tensors, metadata)
    inferred.append(f"prediction type {kind}: {reason}")
    scheduler = dict(standard.scheduler) | {"prediction_type": kind}
    if "ztsnr" in tensors:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        inferred.append("a schedule that ends without signal: the file has ztsnr")
    size, why = _size(standard, kind, metadata)
    inferred.append(f"default size {size}x{size}: {why}")
    widths = configs["vae"].get("block_out_channels")
    configs["unet"] = {**configs["unet"], "sample_size": size // (2 ** (len(widths) - 1) if widths else VAE_FACTOR)}
    tokenizers = {encoder.part.replace("text_encoder", "tokenizer"): encoder.pad for encoder in standard.encoders}
    return Original(
        index=_index(standard, tokenizers),
        scheduler=scheduler,
        configs=configs,
        weights=weights,
        pads=tokenizers,
        inferred=tuple(inferred),
    )


def read_vae_alone(tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Return the config, except scaling_factor, and the weights of the VAE in a file of a VAE or of a whole checkpoint.

    Raises ValueError if there is none.
    """
    for prefix in (VAE, "vae.", ""):
        own = {name: tensor for name, tensor in within(tensors, prefix).items() if name.startswith(_OF_VAE)}
        if "encoder.conv_in.weight" in own:
            of_diffusers = any(name.startswith("encoder.down_blocks.") for name in own)
            return diffusers.read_vae(own) if of_diffusers else read_vae(own)
    raise ValueError(f"no VAE: neither {VAE}encoder.conv_in.weight nor encoder.conv_in.weight is in the file")


def _with_text_model(tensors: Tensors) -> Tensors:
    """Return the tensors with the prefix of CLIP's text encoder that some files omit."""
    prefixes = {encoder.prefix for standard in ALL_STANDARDS for encoder in standard.encoders if encoder.layout == "clip"}
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        rest = name.removeprefix(prefix)
        omitted = prefix and rest.startswith(("embeddings.", "encoder.", "final_layer_norm."))
        renamed[f"{prefix}text_model.{rest}" if omitted else name] = tensor
    return renamed


def _standard(tensors: Tensors) -> Standard:
    """Raises ValueError for other models, by their names where they are known."""
    linear = any(
        name.startswith("unet.") and name.endswith(".proj_in.weight") and len(tensors[name].shape) == 2 for name in tensors
    )
    for standard in ALL_STANDARDS:
        fits = linear or not standard.of_diffusers or standard.name != _SECOND  # 1 and 2 differ in nothing else
        if fits and all(encoder.sign in tensors for encoder in standard.encoders):
            _refuse(tensors, VARIANTS)
            return standard
    _refuse(tensors, OTHERS)
    for standard in ALL_STANDARDS:  # without the sign, which is among the missing names then
        prefixes = [standard.unet, *(encoder.prefix for encoder in standard.encoders)]
        if all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes):
            return standard
    if any(name.startswith(UNET) for name in tensors):
        signs = ", ".join(standard.encoders[-1].sign for standard in STANDARDS)
        raise ValueError(f"a UNet without a text encoder: none of {signs} is in the file: use a checkpoint of the whole model")
    raise ValueError(f"not a checkpoint of Stable Diffusion: no tensor's name begins with {UNET}")


def _refuse(tensors: Tensors, signs: Mapping[str, str]) -> None:
    for sign, model in signs.items():
        if name := next((name for name in tensors if sign in name), None):
            raise ValueError(f"not supported: {model} ({name:.80})")


def _prediction(standard: Standard, tensors: Tensors, metadata: Mapping[str, str]) -> tuple[str, str]:
    if "v_pred" in tensors:
        return _V, "the file has v_pred"
    written = metadata.get("modelspec.prediction_type", "")
    if written:
        return (_V if written.startswith("v") else _EPSILON), f"modelspec.prediction_type of its metadata is {written:.40}"
    if standard.name != _SECOND:
        return _EPSILON, f"as {standard.name} has it"
    architecture = metadata.get("modelspec.architecture", "")
    if architecture:
        return (_V if "-v" in architecture else _EPSILON), f"modelspec.architecture of its metadata is {architecture:.60}"
    last = max(filter(_BIASES.fullmatch, tensors), key=_place, default="")
    if not last or not tensors[last].readable or not tensors[last].size:
        raise ValueError("the file does not say what the model predicts: no metadata, and no transformer on the way up")
    spread = float(np.std(tensors[last].read().astype(np.float32)))
    what = f"{last} has the standard deviation {spread:.3f}; in models trained for v it is above {_SPREAD_OF_V}"
    return (_V if spread > _SPREAD_OF_V else _EPSILON), what


def _place(name: str) -> tuple[int, ...]:
    match = _BIASES.fullmatch(name)
    return tuple(int(number) for number in match.groups() if number) if match else ()


def _size(standard: Standard, prediction: str, metadata: Mapping[str, str]) -> tuple[int, str]:
    written = metadata.get("modelspec.resolution", "")
    sides = written.split("x")
    if len(sides) == 2 and all(side.isascii() and side.isdecimal() and 64 <= int(side[:6]) <= 8192 for side in sides):
        return min(map(int, sides)), f"modelspec.resolution of its metadata is {written:.40}"
    if standard.name == _SECOND and prediction == _V:
        return SIZE_OF_V, f"as {standard.name} has it for {_V}"
    return standard.size, f"as {standard.name} has it"


def _index(standard: Standard, tokenizers: Mapping[str, str]) -> dict[str, Any]:
    parts = {encoder.part: ["transformers", _encoder_class(encoder.projected)] for encoder in standard.encoders}
    parts |= {tokenizer: ["transformers", "CLIPTokenizer"] for tokenizer in tokenizers}
    parts |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    scheduler = ["diffusers", standard.scheduler["_class_name"]]
    return {"_class_name": standard.pipeline, "scheduler": scheduler, **standard.settings, **parts}


def _encoder_class(projected: bool) -> str:
    return "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
