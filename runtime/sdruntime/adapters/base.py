"""What model an adapter was made for, as far as its keys, shapes and metadata tell."""

from __future__ import annotations

from collections.abc import Mapping

from sdruntime.adapters.names import split_key
from sdruntime.adapters.safetensors import Extent
from sdruntime.bundle.roles import role

UNET, OTHER = "unet", "other"
# what keys of a component begin with; the first that fits
_PREFIXES = {
    "text_encoder_2": ("lora_te2_", "lycoris_te2_", "text_encoder_2.", "text_encoders.clip_g."),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_te", "text_encoder.", "text_encoders.clip_l."),
    UNET: ("lora_unet_", "unet.", "lycoris_", "diffusion_model.", "down_blocks.", "mid_block.", "up_blocks."),
}
# width of the text in cross-attention -> the model
_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL refiner"}
_CROSS = ("attn2.to_k", "attn2_to_k", "attn2.processor.to_k")
# in keys of models that are not supported
_OTHERS = {
    "double_blocks": "Flux",
    "single_blocks": "Flux",
    "single_transformer_blocks": "Flux",
    "joint_blocks": "Stable Diffusion 3",
    "joint_attention": "Stable Diffusion 3",
    "lora_te3_": "Stable Diffusion 3",
    "transformer.transformer_blocks": "a transformer (Flux, Stable Diffusion 3)",
    "temporal": "a video model",
    "motion_modules": "a video model",
}
_VERSIONS = {"sdxl": "SDXL", "sd_xl": "SDXL", "stable-diffusion-xl": "SDXL", "sd_v2": "SD 2.x", "stable-diffusion-v2": "SD 2.x"}
_VERSIONS |= {"sd_v1": "SD 1.x", "stable-diffusion-v1": "SD 1.x", "sd_1.5": "SD 1.x", "flux": "Flux", "sd3": "Stable Diffusion 3"}
_METADATA = ("ss_base_model_version", "modelspec.architecture")


def component_of(key: str) -> str:
    """Return the component that a key belongs to by its beginning, or "other"."""
    return next((component for component, starts in _PREFIXES.items() if key.startswith(starts)), OTHER)


def base_of(tensors: Mapping[str, Extent], metadata: Mapping[str, str]) -> str | None:
    """Return the name of the model that an adapter looks made for, or None if nothing tells."""
    for mark, model in _OTHERS.items():
        if any(mark in key for key in tensors):
            return model
    for key, tensor in tensors.items():
        parts = split_key(key)
        if parts and parts[1] == "down" and parts[0].removesuffix("_lora").endswith(_CROSS) and len(tensor.shape) > 1:
            return _WIDTHS.get(tensor.shape[1], f"a model with texts of width {tensor.shape[1]}")
    if any(role(component_of(key)).takes_second_texts for key in tensors):
        return "SDXL"
    for name in _METADATA:
        written = metadata.get(name, "").lower()
        if model := next((model for start, model in _VERSIONS.items() if start in written), ""):
            return model
    return None
