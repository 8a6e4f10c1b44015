"""Keyword arguments that are not settings of a request: those of diffusers' pipelines, and near names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sdruntime.errors import SettingError, UnknownName, Unsupported

# Arguments of diffusers' pipelines, and the setting to write instead.
DIFFUSERS: Mapping[str, str] = {
    "num_inference_steps": "steps=…",
    "guidance_scale": "guidance=…",
    "guidance_rescale": "rescale=…",
    "negative_prompt": "negative=…",
    "negative_prompt_2": "negative_2=…",
    "num_images_per_prompt": "count=…",
    "generator": 'seed=…: image k has seed + k, and the noise of torch\'s CPU generator, or with rng="cuda" of the one on CUDA',
    "height": "size=(width, height)",
    "width": "size=(width, height)",
    "eta": 'options={"eta": …}',
    "scheduler": "sampler=…",
    "output_type": "image.pixels for an array, image.save(path) for a file",
    "callback_on_step_end": "a loop over pipe.stream(…)",
    "num_images": "count=…",
    "cfg_scale": "guidance=…",
    "denoising_strength": "strength=…",
    "init_image": "image=…",
    "mask_image": "mask=…",
    "crops_coords_top_left": "crop=(left, top)",
    "image_guidance_scale": "image_guidance=…",
    "depth_map": "depth=…",
    "padding_mask_crop": "mask_padding=…",
    "control_image": "control=Control(image=…)",
    "controlnet_conditioning_scale": "control=Control(image=…, scale=…)",
    "control_mode": "control=Control(image=…, type=…)",
    "control_guidance_start": "control=Control(image=…, start=…)",
    "control_guidance_end": "control=Control(image=…, end=…)",
    "ip_adapter_image": "image_prompt=ImagePrompt(image=…)",
    "ip_adapter_masks": "image_prompt=ImagePrompt(image=…, mask=…)",
}
# Arguments of diffusers' pipelines that are not supported.
UNSUPPORTED = (
    *("latents", "timesteps", "cross_attention_kwargs", "return_dict"),
    *("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    *("ip_adapter_image_embeds", "denoising_start", "denoising_end"),
)


def check_names(settings: Iterable[str], known: Sequence[str]) -> None:
    """Raise UnknownName for a setting that is not `known`. For an argument of diffusers, the error names what to write."""
    for name in settings:
        if name in DIFFUSERS:
            raise SettingError(f"unknown setting {name!r}: write {DIFFUSERS[name]}")
        if name in UNSUPPORTED:
            raise Unsupported(f"setting {name!r} of diffusers is not supported")
        if name == "count" and name not in known:
            raise SettingError("count: a Request is one image: pass the prompt as text, with count=…, or pass several Requests")
        if name not in known:
            raise UnknownName("setting", name, known)
