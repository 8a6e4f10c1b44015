"""The models of the original layout: where their networks lie in a file, and what no weight says about them.

Schedulers, sizes and scaling factors are those of the models' own diffusers folders (runwayml/stable-diffusion-v1-5,
stabilityai/stable-diffusion-2-1 and -2-1-base, stabilityai/stable-diffusion-xl-base-1.0 and -refiner-1.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sdexport.checkpoint.pipelines import SCORE

UNET, VAE = "model.diffusion_model.", "first_stage_model."
VAE_FACTOR = 8  # pixels per latent cell, of the VAE of each standard
_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LATENT_DIFFUSION = _BETAS | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
_EULER = _BETAS | {"timestep_spacing": "leading", "steps_offset": 1, "interpolation_type": "linear", "use_karras_sigmas": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """`prefix`: of its names in the file, whose `sign` is there if it is. `pad`: the padding token of its tokenizer."""

    part: str
    prefix: str
    layout: Literal["clip", "open_clip"]
    projected: bool = False
    activation: str = "quick_gelu"
    pad: str = "<|endoftext|>"

    @property
    def sign(self) -> str:
        return self.prefix + ("text_model.embeddings.token_embedding.weight" if self.layout == "clip" else "ln_final.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standard:
    """`unet`, `vae`: the prefixes of their names, which are those of the original code or `of_diffusers`. `size`: pixels of a
    side. `heads`: attention heads of each block of the UNet; None: 64 channels each.

    `settings`: of model_index.json, beside the pipeline and the parts.
    """

    name: str
    pipeline: str
    encoders: tuple[TextEncoder, ...]
    scheduler: Mapping[str, Any]
    scaling_factor: float
    size: int
    heads: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    unet: str = UNET
    vae: str = VAE
    of_diffusers: bool = False

    @property
    def pooled(self) -> bool:
        """Whether the UNet takes a pooled text, that of the second text encoder."""
        return any(encoder.projected for encoder in self.encoders)

    def in_diffusers_layout(self) -> Standard:
        """Return the same model with the names of diffusers, each behind that of its folder."""
        encoders = tuple(
            replace(
                encoder, prefix=f"{encoder.part}.", layout="clip", activation="quick_gelu" if encoder.layout == "clip" else "gelu"
            )
            for encoder in self.encoders
        )
        return replace(self, encoders=encoders, unet="unet.", vae="vae.", of_diffusers=True)


STANDARDS = (
    Standard(
        name="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        encoders=(
            TextEncoder(part="text_encoder", prefix="conditioner.embedders.0.transformer.", layout="clip"),
            TextEncoder(
                part="text_encoder_2", prefix="conditioner.embedders.1.model.", layout="open_clip", projected=True, pad="!"
            ),
        ),
        scheduler={"_class_name": "EulerDiscreteScheduler"} | _EULER,
        scaling_factor=0.13025,
        size=1024,
    ),
    Standard(
        name="Stable Diffusion XL refiner",
        pipeline="StableDiffusionXLImg2ImgPipeline",
        encoders=(
            TextEncoder(
                part="text_encoder_2", prefix="conditioner.embedders.0.model.", layout="open_clip", projected=True, pad="!"
            ),
        ),
        scheduler={"_class_name": "EulerDiscreteScheduler"} | _EULER,
        scaling_factor=0.13025,
        size=1024,
        settings={SCORE: True, "force_zeros_for_empty_prompt": False},
    ),
    Standard(
        name="Stable Diffusion 2",
        pipeline="StableDiffusionPipeline",
        encoders=(TextEncoder(part="text_encoder", prefix="cond_stage_model.model.", layout="open_clip", pad="!"),),
        scheduler={"_class_name": "DDIMScheduler"} | _LATENT_DIFFUSION,
        scaling_factor=0.18215,
        size=512,
    ),
    Standard(
        name="Stable Diffusion 1",
        pipeline="StableDiffusionPipeline",
        encoders=(TextEncoder(part="text_encoder", prefix="cond_stage_model.transformer.", layout="clip"),),
        scheduler={"_class_name": "PNDMScheduler"} | _LATENT_DIFFUSION,
        scaling_factor=0.18215,
        size=512,
        heads=8,
    ),
)
ALL_STANDARDS = STANDARDS + tuple(standard.in_diffusers_layout() for standard in STANDARDS)
SIZE_OF_V = 768  # of Stable Diffusion 2 models that were trained for the velocity

# names of other models that have the parts of one of the above
VARIANTS = {
    f"{UNET}label_emb.weight": "an upscaling model in one file: use its diffusers folder",
    "unet.class_embedding.weight": "an upscaling model in one file: use its diffusers folder",
    "embedder.model.visual.": "unCLIP, which takes the embedding of an image",
    ".time_stack.": "a video model",
    "control_model.": "a model with a ControlNet",
    ".position_net.": "GLIGEN, which takes boxes",
}
# names of other models, by which they are refused: the first that some tensor's name holds
OTHERS = {
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "lora_down": "a LoRA, not a checkpoint",
    "lora_A": "a LoRA, not a checkpoint",
    "lora_unet": "a LoRA, not a checkpoint",
    "input_hint_block.": "a ControlNet, not a checkpoint",
    "controlnet_cond_embedding.": "a ControlNet, not a checkpoint",
    "clip_mapper.": "Stable Cascade",
    "motion_modules.": "AnimateDiff, which makes videos",
    "temporal_transformer": "a video model",
    ".time_stack.": "a video model",
    "emb_params": "a textual inversion, not a checkpoint",
    "string_to_param": "a textual inversion, not a checkpoint",
}
