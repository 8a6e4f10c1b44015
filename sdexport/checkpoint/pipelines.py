"""The pipelines of diffusers that a checkpoint may name, and the one that runs a UNet's task.

A UNet's task follows from its number of input channels, whatever pipeline the checkpoint was saved from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdruntime.bundle.tasks import Task

Classes = tuple[tuple[str, str], ...]  # (library, class): one of them

_CLIP = ("transformers", "CLIPTextModel")
_TOKENIZERS = (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast"))
TINY_VAE = "AutoencoderTiny"  # TAESD: no posterior
ASYMMETRIC_VAE = "AsymmetricAutoencoderKL"  # its decoder can also take an image and a mask (arXiv 2306.04632)
CONTROLNET = "ControlNetModel"
CONTROLNET_UNION = "ControlNetUnionModel"  # one network for maps of several types (xinsir6/ControlNetPlus)
CONTROLNETS = (CONTROLNET, CONTROLNET_UNION)
T2I_ADAPTER = "T2IAdapter"
IMAGE_ENCODER_CLASS = "CLIPVisionModelWithProjection"
VAES: Classes = (("diffusers", "AutoencoderKL"), ("diffusers", TINY_VAE), ("diffusers", ASYMMETRIC_VAE))
# other networks that control images, by their class
UNSUPPORTED: Mapping[str, str] = {
    "MultiControlNetUnionModel": "several ControlNet-Unions, each of which needs a --controlnet of its own",
    "MultiControlNetModel": "several ControlNets, each of which needs a --controlnet of its own",
    "MultiAdapter": "several T2I-Adapters, each of which needs a --t2i-adapter of its own",
    "ControlNetXSAdapter": "a ControlNet-XS",
    "UNetControlNetXSModel": "a UNet with a ControlNet-XS",
    "SparseControlNetModel": "a ControlNet for videos",
    "SD3ControlNetModel": "a ControlNet for Stable Diffusion 3",
    "FluxControlNetModel": "a ControlNet for Flux",
    "HunyuanDiT2DControlNetModel": "a ControlNet for HunyuanDiT",
}
_ONE_ENCODER: Mapping[str, Classes] = {
    "text_encoder": (_CLIP,),
    "tokenizer": _TOKENIZERS,
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "vae": VAES,
}
_TWO_ENCODERS: Mapping[str, Classes] = {
    "text_encoder": (_CLIP,),
    "text_encoder_2": (("transformers", "CLIPTextModelWithProjection"),),
    "tokenizer": _TOKENIZERS,
    "tokenizer_2": _TOKENIZERS,
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "vae": VAES,
}
LOW_RES = "low_res_scheduler"  # of an upscaling model: the noise that is added to the image
MOST_NOISE = "max_noise_level"  # of model_index.json: the most of it
_TASKS = ("", "Img2Img", "Inpaint", "InstructPix2Pix")
DISTILLED = "LatentConsistencyModelPipeline"  # of models that take the guidance as an input
PARTS: Mapping[str, Mapping[str, Classes]] = {
    **{f"StableDiffusion{task}Pipeline": _ONE_ENCODER for task in _TASKS},
    **{f"StableDiffusionXL{task}Pipeline": _TWO_ENCODERS for task in _TASKS},
    "StableDiffusionDepth2ImgPipeline": _ONE_ENCODER,  # its depth_estimator is not exported
    "StableDiffusionUpscalePipeline": {**_ONE_ENCODER, LOW_RES: (("diffusers", "DDPMScheduler"),)},
    **dict.fromkeys((DISTILLED, "LatentConsistencyModelImg2ImgPipeline"), _ONE_ENCODER),
}
# other models, by a part of their pipeline's name: the first that fits
OTHERS: Mapping[str, str] = {
    "StableDiffusion3": "Stable Diffusion 3",
    "StableCascade": "Stable Cascade",
    "UnCLIP": "unCLIP, which takes the embedding of an image",
    "Upscale": "an upscaling model of another kind",
    "Video": "a video model",
    "Animat": "a video model",
    **{
        name: name for name in ("Flux", "Kandinsky", "PixArt", "Wuerstchen", "HunyuanDiT", "AuraFlow", "Sana", "Lumina", "Kolors")
    },
    "ControlNet": "a model with a ControlNet",
}
_BY_TASK: Mapping[Task | None, str] = {
    None: "",
    "inpainting": "Inpaint",
    "instruct_pix2pix": "InstructPix2Pix",
    "depth": "Depth2Img",
    "upscaling": "Upscale",
    "refining": "Img2Img",
}
_FIRST_ENCODER = ("text_encoder", "tokenizer")
SCORE = "requires_aesthetics_score"  # of model_index.json: the UNet takes an aesthetic score in place of a target size


def parts_of(index: Mapping[str, Any]) -> Mapping[str, Classes] | None:
    """Return the parts that a checkpoint must have, by its model_index.json; None for an unknown pipeline.

    diffusers' pipelines of XL also run with the second text encoder alone, as the refiner has it.
    """
    parts = PARTS.get(str(index.get("_class_name")))
    if parts is _TWO_ENCODERS and all(index.get(part) in (None, [None, None]) for part in _FIRST_ENCODER):
        return {part: classes for part, classes in parts.items() if part not in _FIRST_ENCODER}
    return parts


def pipeline_of(index: Mapping[str, Any], task: Task | None) -> str:
    """Return the pipeline that runs a UNet's task, for a checkpoint with this model_index.json."""
    named = str(index["_class_name"])
    if task is None and named.startswith("LatentConsistencyModel"):
        return DISTILLED
    return f"StableDiffusion{'XL' if PARTS[named] is _TWO_ENCODERS else ''}{_BY_TASK[task]}Pipeline"
