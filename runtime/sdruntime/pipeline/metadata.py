"""How an image was made, as text that other programs read.

`Origin` is what generated it. `parameters` writes it as AUTOMATIC1111's web UI does ("infotext"): the prompt, the negative
prompt, and a last line of `key: value` pairs, where a value with a comma, colon, quote or line break is a JSON string.
Keys and values are the web UI's (1.10) where it has them; the settings that it does not have follow under keys of our own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdruntime import __version__
from sdruntime.arrays import Array
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.pipeline.images.imagefile import Fit
from sdruntime.pipeline.images.png import XMP
from sdruntime.pipeline.request import Request
from sdruntime.sampling.own_sigmas import own_steps
from sdruntime.sampling.samplers import A1111_SCHEDULES, identified, settled

VERSION = f"sdruntime {__version__}"  # a bare number would be taken for a version of the web UI
RNG = "CPU"  # whose noise ours is: torch's generator on a CPU
AUTOMATIC = "Automatic"
# The web UI's samplers that keep to their own timesteps whatever the schedule type.
OWN_TIMESTEPS = ("DDIM", "PLMS", "UniPC")
# Its schedule type with the levels of each timestep_spacing. A wrong one would be another image, for "Automatic" often is Karras.
SPACINGS: Mapping[str, str] = {"linspace": A1111_SCHEDULES[None] or "", "leading": "DDIM", "trailing": "Simple"}
RESIZE_MODES: Mapping[Fit, str] = {"resize": "Just resize", "crop": "Crop and resize"}
MACHINE_MADE = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What generated an image, beside its request. `sampler`, `schedule`: AUTOMATIC1111's names, or ours if it has no name.

    `ours`: our name of a schedule that shares its name there with another. `spacing`: the timestep_spacing in use, "" with a
    schedule. `steps`: those that the request's sigmas make. `backend`: the UNet's engine library, its version and target.
    """

    model: str
    sampler: str
    schedule: str = AUTOMATIC
    ours: str = ""
    spacing: str = ""
    steps: int | None = None
    backend: str = ""
    precision: str = ""

    @classmethod
    def of(cls, request: Request, config: Mapping[str, Any], model: str, unet: EngineSpec | None) -> Origin:
        """`config`: the checkpoint's scheduler_config.json. `unet`: None for networks of the caller's. Raises SettingError."""
        given: dict[str, Any] = {"sampler": request.sampler, "schedule": request.schedule, **request.options}
        row, kind = identified(config, **given)
        found, settings = settled(config, **given)
        name = row.a1111[0] if row and row.a1111 else row.name if row else found.diffusers or found.name
        spacing, steps = "" if kind else settings.get("timestep_spacing", ""), None
        if request.sigmas is not None:  # in the place of any schedule or spacing
            kind, spacing, steps = None, "", own_steps(found, settings, request.sigmas)
        plain = AUTOMATIC if name in OWN_TIMESTEPS else SPACINGS.get(spacing, AUTOMATIC)
        return cls(
            model=model,
            sampler=name,
            schedule=A1111_SCHEDULES[kind] if kind else plain,
            ours="lu" if kind == "lu" else "",  # "Exponential" there, as is our exponential
            spacing=spacing,
            steps=steps,
            backend=f"{unet.backend} {unet.version} {unet.target}" if unet else "",
            precision=unet.precision if unet else "",
        )


def parameters(request: Request, size: tuple[int, int], origin: Origin) -> str:
    """The infotext of an image of `size`, (width, height) in pixels."""
    options = dict(request.options)
    eta = options.pop("eta", None)
    settings = {
        "Steps": request.steps if origin.steps is None else origin.steps,
        "Sampler": origin.sampler,
        "Schedule type": origin.schedule,
        "CFG scale": request.guidance,
        "Seed": request.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": origin.model,
        "Denoising strength": None if request.pixels is None else request.strength,
        "Init image hash": None if request.pixels is None else image_hash(request.pixels),
        "Schedule": origin.ours or None,
        "Resize mode": RESIZE_MODES[request.fit] if request.pixels is not None and request.fit else None,
        "Eta DDIM" if origin.sampler == "DDIM" else "Eta": eta,
        "CFG Rescale": request.rescale or None,
        "RNG": RNG,
        "Sigmas": None if request.sigmas is None else ", ".join(map(_number, request.sigmas)),
        "Timestep spacing": origin.spacing or None,
        "Sampler options": json.dumps(options, sort_keys=True, default=lambda number: number.item()) if options else None,
        "Backend": origin.backend or None,
        "Precision": origin.precision or None,
        "Version": VERSION,
    }
    line = ", ".join(f"{key}: {_written(value)}" for key, value in settings.items() if value is not None)
    negative = f"Negative prompt: {request.negative}" if request.negative else ""
    return "\n".join(part for part in (request.prompt, negative, line) if part)


def image_hash(pixels: Array) -> str:
    """MD5 of the RGB bytes, by which the web UI names an image to begin from."""
    return hashlib.md5(pixels.tobytes(), usedforsecurity=False).hexdigest()


def png_text(parameters: str) -> dict[str, str]:
    """PNG text keys: the settings, and XMP that says machine-made (IPTC digital source type trainedAlgorithmicMedia)."""
    return {"parameters": parameters, XMP: MACHINE_MADE}


def _number(value: float) -> str:
    return str(value).removesuffix(".0")


def _written(value: object) -> str:
    text = _number(value) if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
