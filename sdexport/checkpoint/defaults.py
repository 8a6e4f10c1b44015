"""The settings that a checkpoint is made for: number of steps, guidance and size, from its configs and its model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from sdexport.checkpoint.card import Card
from sdruntime.bundle.model import NO_DEFAULTS, Defaults
from sdruntime.errors import SettingError
from sdruntime.system.sizes import parse_size

_CONSISTENCY = Defaults(steps=4, guidance=8.5)  # of diffusers' LatentConsistencyModelPipeline
_UPSCALING = Defaults(steps=75, guidance=9.0)  # of diffusers' StableDiffusionUpscalePipeline
_FEW_STEPS = Defaults(steps=4, guidance=1.0)
_DISTILLED = ("LCMScheduler", "TCDScheduler")
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


def defaults_of(unet: Mapping[str, Any], scheduler: Mapping[str, Any], card: Card) -> tuple[Defaults, str]:
    """Return the defaults of a checkpoint, and what they follow from; "" if nothing is known.

    A model card may name them. Otherwise, a UNet that takes the guidance as an input is a latent consistency model; the
    schedulers of LCM and TCD, and Euler's with trailing timesteps, are those of models distilled to few steps (SD-Turbo).
    """
    if card.steps is not None or card.guidance is not None or card.size is not None:
        return Defaults(steps=card.steps, guidance=card.guidance, size=card.size), "the model card's inference parameters"
    if unet.get("num_class_embeds") is not None:
        return _UPSCALING, "the UNet takes the level of the noise in an image (num_class_embeds)"
    if unet.get("time_cond_proj_dim") is not None:
        return _CONSISTENCY, "the UNet takes the guidance as an input (time_cond_proj_dim)"
    named = scheduler.get("_class_name")
    if named in _DISTILLED:
        return _FEW_STEPS, f"{named} is of models distilled to few steps"
    trailing = scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr")
    if named in _EULER and trailing and scheduler.get("prediction_type", "epsilon") == "epsilon":
        return _FEW_STEPS, f"{named} with trailing timesteps is of models distilled to few steps, such as SD-Turbo"
    return NO_DEFAULTS, ""


def parsed(text: str) -> Defaults:
    """Return defaults from "steps=4,guidance=1,sampler=euler_a,size=768x512". Raises SettingError."""
    kinds: dict[str, Callable[[str], Any]] = {"steps": int, "guidance": float, "sampler": str, "size": parse_size}
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in kinds:
            raise SettingError(f"defaults {text!r}: expected {', '.join(f'{name}=…' for name in kinds)}; got {part!r}")
        try:
            values[name] = kinds[name](value)
        except SettingError as error:
            raise SettingError(f"defaults {text!r}: {error}") from error
        except ValueError as error:
            raise SettingError(f"defaults {text!r}: {name} {value!r} is not a number") from error
    try:
        return Defaults(**values)
    except ValueError as error:
        raise SettingError(f"defaults {text!r}: {error}") from error


def merged(own: Defaults, chosen: Defaults) -> Defaults:
    """Return `own` with what `chosen` has in its place."""
    values = {field.name: getattr(chosen, field.name) for field in fields(Defaults)}
    return replace(own, **{name: value for name, value in values.items() if value is not None})
