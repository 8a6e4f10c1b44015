"""Generation settings as metadata that other programs read.

`parameters` writes the "infotext" of AUTOMATIC1111's web UI: the prompt, the negative prompt, and a last line of `key: value`
pairs, where a value with a comma, colon, quote or line break is a JSON string. Keys and values are those of web UI 1.10;
settings that it does not have follow under our own keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdruntime import __version__
from sdruntime.arrays import Array
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.bundle.model import Defaults
from sdruntime.bundle.tasks import Task
from sdruntime.pipeline.images.imagefile import Fit
from sdruntime.pipeline.images.maps import CANNY
from sdruntime.pipeline.images.png import XMP
from sdruntime.pipeline.requests.control import ControlFit
from sdruntime.pipeline.requests.ranges import WHOLE
from sdruntime.pipeline.requests.request import HiresResize, MaskFill, Request
from sdruntime.pipeline.requests.tags import tag_of
from sdruntime.pipeline.text.emphasis import Emphasis
from sdruntime.sampling.noise.image import Rng
from sdruntime.sampling.own_sigmas import own_steps
from sdruntime.sampling.samplers import A1111_SCHEDULES, identified, settled

VERSION = f"sdruntime {__version__}"  # other programs take a bare number for a version of the web UI
# The web UI's "NV" is its own NumPy version of CUDA's noise; "GPU", which it does not write, depends on the GPU for large images.
A1111_RNGS: Mapping[Rng, str] = {"cpu": "CPU", "cuda": "NV"}
AUTOMATIC = "Automatic"
# The web UI's samplers that ignore the schedule type.
OWN_TIMESTEPS = ("DDIM", "PLMS", "UniPC")
# The web UI's schedule type with the noise levels of each timestep_spacing. "Automatic" would often be Karras: another image.
SPACINGS: Mapping[str, str] = {"linspace": A1111_SCHEDULES[None] or "", "leading": "DDIM", "trailing": "Simple"}
# The web UI writes no key for "Original".
A1111_EMPHASES: Mapping[Emphasis, str | None] = {"original": None, "no-norm": "No norm", "ignore": "Ignore"}
A1111_FILLS: Mapping[MaskFill, str | None] = {
    "original": None,
    "fill": "fill",
    "noise": "latent noise",
    "zeros": "latent nothing",
}
A1111_UPSCALERS: Mapping[HiresResize, str] = {
    "latent": "Latent",
    "latent-bicubic": "Latent (bicubic)",
    "latent-nearest": "Latent (nearest)",
    "latent-nearest-exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
_SEPARATORS = re.compile("[:,]")  # which the web UI removes from the names of LoRAs
RESIZE_MODES: Mapping[Fit, str] = {"resize": "Just resize", "crop": "Crop and resize"}
CONTROL_RESIZE_MODES: Mapping[ControlFit, str] = {
    "resize": "Just Resize",
    "crop": "Crop and Resize",
    "exact": "Just Resize",  # of an image that has the size
}
MACHINE_MADE = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What generated an image, besides its request. `sampler`, `schedule`: AUTOMATIC1111's names, or ours if it has none.

    `ours`: our name of a schedule whose name in the web UI is ambiguous. `spacing`: the timestep_spacing, "" with a schedule.
    `steps`: the number of steps, if the request has sigmas. `tile`: the size of the VAE's tiles, "" if it took the whole image.
    `backend`: backend, version and target of the UNet's engine. `task`: the UNet's.
    `size`: (width, height) that was generated, None for that of the image. `refiner`: the name of the model that went on, or "".
    `embeddings`: the hash of each embedding in the texts, by its name.
    `loras`: the hash of each LoRA by its name.
    """

    model: str
    sampler: str
    schedule: str = AUTOMATIC
    ours: str = ""
    spacing: str = ""
    steps: int | None = None
    tile: str = ""
    backend: str = ""
    precision: str = ""
    task: Task | None = None
    size: tuple[int, int] | None = None
    refiner: str = ""
    embeddings: Mapping[str, str] = field(default_factory=dict)
    loras: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        request: Request,
        config: Mapping[str, Any],
        model: str,
        unet: EngineSpec | None,
        task: Task | None = None,
        *,
        tile: str = "",
        size: tuple[int, int] | None = None,
        refiner: str = "",
        embeddings: Mapping[str, str] | None = None,
        loras: Mapping[str, str] | None = None,
    ) -> Origin:
        """Return the origin of a request's image. Raises SettingError.

        `config`: the checkpoint's scheduler_config.json. `unet`: None for engines of the caller; `task`: the UNet's.
        """
        chosen: dict[str, Any] = {"sampler": request.sampler, "schedule": request.schedule, **request.options}
        row, kind = identified(config, **chosen)
        sampler, settings = settled(config, **chosen)
        name = row.a1111[0] if row and row.a1111 else row.name if row else sampler.diffusers or sampler.name
        spacing, steps = "" if kind else settings.get("timestep_spacing", ""), None
        if request.sigmas is not None:  # which replace the schedule and the spacing
            kind, spacing, steps = None, "", own_steps(sampler, settings, request.sigmas)
        plain = AUTOMATIC if name in OWN_TIMESTEPS else SPACINGS.get(spacing, AUTOMATIC)
        return cls(
            model=model,
            sampler=name,
            schedule=A1111_SCHEDULES[kind] if kind else plain,
            ours="lu" if kind == "lu" else "",  # the web UI calls both lu and our exponential "Exponential"
            spacing=spacing,
            steps=steps,
            tile=tile,
            backend=f"{unet.backend} {unet.version} {unet.target}" if unet else "",
            task=task,
            size=size,
            refiner=refiner,
            embeddings=embeddings or {},
            loras=loras or {},
            precision=unet.precision if unet else "",
        )


def parameters(request: Request, size: tuple[int, int], origin: Origin) -> str:
    """Return the infotext of an image of `size`, (width, height) in pixels."""
    request = request.completed(Defaults())
    options = dict(request.options)
    eta = options.pop("eta", None)
    strengths = [request.strength] if request.pixels is not None else []
    strengths += [request.hires_strength] if request.hires else []
    settings = {
        "Steps": request.steps if origin.steps is None else origin.steps,
        "Sampler": origin.sampler,
        "Schedule type": origin.schedule,
        "CFG scale": max(request.guidances),
        "Seed": request.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": origin.model,
        "Variation seed": request.variation_seed if request.variation_strength else None,
        "Variation seed strength": request.variation_strength or None,
        "Seed resize from": _size(request.seed_resize),
        "Denoising strength": strengths[0] if strengths else None,  # of the web UI's two passes, that of the second
        "Init image hash": None if request.pixels is None else image_hash(request.pixels),
        "Depth hash": None if request.depth_map is None else image_hash(request.depth_map),
        "Mask hash": None if request.mask_pixels is None else image_hash(request.mask_pixels),
        **_mask_settings(request),
        **_control_settings(request),
        "Image prompt": _image_prompt(request),
        "Lora hashes": ", ".join(f"{_SEPARATORS.sub('', name)}: {digest}" for name, digest in origin.loras.items()) or None,
        "Refiner": origin.refiner or None,
        "Refiner switch at": request.refiner_at if origin.refiner else None,
        "Hires upscale": request.hires,
        "Hires steps": request.hires_steps if request.hires else None,
        "Hires upscaler": A1111_UPSCALERS[request.hires_resize] if request.hires else None,
        "Hires denoising strength": strengths[1] if len(strengths) > 1 else None,
        "Noise level": request.noise_level if origin.task == "upscaling" else None,
        "Image CFG scale": request.image_guidance if origin.task == "instruct_pix2pix" else None,
        "Schedule": origin.ours or None,
        "Resize mode": RESIZE_MODES[request.fit] if request.pixels is not None and request.fit else None,
        "Eta DDIM" if origin.sampler == "DDIM" else "Eta": eta,
        "Guidance": ", ".join(map(_number, request.guidances)) if len(request.guidances) > 1 else None,
        "Guidance interval": None if request.guidance_interval == WHOLE else ", ".join(map(_number, request.guidance_interval)),
        "CFG Rescale": request.rescale or None,
        "CFG PP": True if request.cfg_pp else None,
        "Emphasis": A1111_EMPHASES[request.emphasis] if request.prompt_syntax == "a1111" else None,
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,  # the web UI counts from 1
        "Prompt syntax": "a1111" if request.prompt_syntax == "a1111" else None,
        "Prompt 2": request.prompt_2,
        "Negative prompt 2": request.negative_2,
        "Original size": _size(request.original_size),
        "Crop": "{},{}".format(*request.crop) if any(request.crop) else None,
        "Target size": _size(request.target_size),
        "Aesthetic score": request.aesthetic_score if origin.task == "refining" else None,
        "Negative aesthetic score": request.negative_aesthetic_score if origin.task == "refining" else None,
        "RNG": A1111_RNGS[request.rng],
        "Sigmas": None if request.sigmas is None else ", ".join(map(_number, request.sigmas)),
        "Timestep spacing": origin.spacing or None,
        "Sampler options": json.dumps(options, sort_keys=True, default=lambda number: number.item()) if options else None,
        "VAE tile": origin.tile or None,
        "Backend": origin.backend or None,
        "Precision": origin.precision or None,
        "TI hashes": ", ".join(f"{name}: {digest}" for name, digest in origin.embeddings.items()) or None,
        "Version": VERSION,
    }
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in settings.items() if value is not None)
    negative = f"Negative prompt: {request.negative}" if request.negative else ""
    prompt = " ".join(filter(None, (request.prompt, *map(tag_of, request.loras))))
    return "\n".join(part for part in (prompt, negative, line) if part)


def _mask_settings(request: Request) -> dict[str, object]:
    if not request.inpaints:
        return {}
    return {
        "Mask blur": request.mask_blur or None,
        "Inpaint area": None if request.mask_padding is None else "Only masked",
        "Masked area padding": request.mask_padding,
        "Masked content": A1111_FILLS[request.mask_fill],
        "Overlay": True if request.overlay else None,
        "Extend": ",".join(map(str, request.extend)) if any(request.extend) else None,
    }


def _control_settings(request: Request) -> dict[str, object]:
    """Return the settings of the ControlNets under the keys of the web UI's extension, in its form."""
    settings: dict[str, object] = {
        f"ControlNet {index}": ", ".join(
            [
                f"Module: {control.preprocess or 'none'}",
                f"Model: {control.net or 'None'}",
                *([] if control.type is None else [f"Control Type: {control.type}"]),
                f"Weight: {_number(control.scale)}",
                f"Resize Mode: {CONTROL_RESIZE_MODES[control.fit]}",
                *(
                    [f"Threshold A: {_number(control.low)}", f"Threshold B: {_number(control.high)}"]
                    if control.preprocess == CANNY
                    else []
                ),
                f"Guidance Start: {_number(control.start)}",
                f"Guidance End: {_number(control.end)}",
                f"Image hash: {image_hash(control.pixels)}",
                *([] if control.mask is None else [f"Mask hash: {image_hash(control.mask)}"]),
            ]
        )
        for index, control in enumerate(request.controls)
    }
    return settings | ({"Guess mode": True} if request.controls and request.guess_mode else {})


def _image_prompt(request: Request) -> str | None:
    prompt = request.image_prompt
    if prompt is None:
        return None
    hashes = {"Image hash": prompt.images, "Mask hash": prompt.masks}
    parts = [f"{key}: {image_hash(pixels)}" for key, images in hashes.items() for pixels in images]
    return ", ".join([f"Scale: {_number(prompt.scale)}", *parts])


def image_hash(pixels: Array) -> str:
    """Return the MD5 of the RGB bytes: the web UI's "Init image hash"."""
    return hashlib.md5(pixels.tobytes(), usedforsecurity=False).hexdigest()


def png_text(parameters: str) -> dict[str, str]:
    """Return PNG text keys: the infotext, and XMP with the IPTC digital source type trainedAlgorithmicMedia."""
    return {"parameters": parameters, XMP: MACHINE_MADE}


def _size(size: tuple[int, int] | None) -> str | None:
    return None if size is None else f"{size[0]}x{size[1]}"


def _number(value: float) -> str:
    return str(value).removesuffix(".0")


def _quoted(value: object) -> str:
    text = _number(value) if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
