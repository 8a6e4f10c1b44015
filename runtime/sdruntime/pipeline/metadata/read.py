"""Read the settings of an image from the infotext in its file: ours, and that of AUTOMATIC1111's web UI and its relatives.

    text = text_of_image("fox.png").get("parameters", "")
    settings = settings_of(infotext(text))
    pipe(**settings.request)

The text is the prompt, the negative prompt after `Negative prompt:`, and a last line of three or more `key: value` pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdruntime.errors import SettingError, shown
from sdruntime.pipeline.metadata.write import (
    A1111_EMPHASES,
    A1111_FILLS,
    A1111_RNGS,
    A1111_UPSCALERS,
    AUTOMATIC,
    RESIZE_MODES,
)
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.samplers import resolve, resolve_schedule

MOST_LETTERS = 1 << 20  # of an infotext
_NEGATIVE = "Negative prompt:"
_FEWEST = 3  # pairs; a line with fewer belongs to the prompt
_OURS = "sdruntime "
_NOT_IN_KEYS = re.compile(r"[^\w \-/]")
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
# Schedule of the web UI's samplers at "Automatic"; the others have even timesteps.
AUTOMATIC_SCHEDULES: Mapping[str, str] = {
    **dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "DPM2", "DPM2 a", "Restart"), "karras"),
    **dict.fromkeys(("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"), "exponential"),
}
# What a text names and does not hold: the field of a Request for each part, by its key.
_PARTS: Mapping[str, str] = {
    "Init image hash": "image",
    "Mask hash": "mask",
    "Depth hash": "depth",
    "Image prompt": "image_prompt",
    "Refiner": "refiner",
}
_CONTROL = re.compile(r"ControlNet \d+")
# What says where an image comes from, and is no setting of a Request.
_ORIGIN = frozenset(
    ("Model", "Model hash", "VAE", "VAE hash", "Backend", "Precision", "VAE tile", "Lora hashes", "TI hashes", "Version")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Infotext:
    """The parts of an infotext: `pairs` has the key and the value of each setting, as text."""

    prompt: str = ""
    negative: str = ""
    pairs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an infotext says for a Request.

    `request`: fields of a Request and their values. `missing`: the parts that the text names but does not hold, such as
    "image". `unused`: a line for each key that has no counterpart here, or whose value is not valid.
    """

    request: Mapping[str, Any]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def infotext(text: str) -> Infotext:
    """Return the parts of an infotext, by the rules of the web UI. Any text is one: without pairs it is a prompt.

    Raises SettingError if it has more than MOST_LETTERS letters.
    """
    if len(text) > MOST_LETTERS:
        raise SettingError(f"the settings in the image have {len(text):,} letters: at most {MOST_LETTERS:,} are read")
    *lines, last = text.strip().split("\n")
    pairs = list(_pairs(last))
    if len(pairs) < _FEWEST:
        lines, pairs = [*lines, last], []
    texts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in lines:
        if line.strip().startswith(_NEGATIVE):
            negative, line = True, line.strip().removeprefix(_NEGATIVE)
        texts[negative].append(line.strip())
    prompt, other = ("\n".join(part).strip() for part in texts)
    return Infotext(prompt=prompt, negative=other, pairs=dict(pairs))


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of a line. A key is what stands before a colon; a value is quoted, or ends before a comma."""
    start = 0
    while (colon := line.find(":", start)) >= 0:
        key = _NOT_IN_KEYS.split(line[start:colon])[-1].strip()
        begin = colon + 1
        while line[begin : begin + 1].isspace():
            begin += 1
        quoted = _QUOTED.match(line, begin)
        if quoted and line[quoted.end() : quoted.end() + 1] in ("", ","):
            value, start = _unquoted(quoted[0]), quoted.end() + 1
        else:
            comma = line.find(",", begin)
            end = len(line) if comma < 0 else comma
            value, start = line[begin:end].strip(), end + 1
        if len(key) > 1:
            yield key, value


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def settings_of(text: Infotext) -> Settings:
    """Return the settings of a Request that an infotext has.

    A text of another program follows the web UI's defaults: its prompt syntax, the noise of a GPU, and at the schedule
    "Automatic" what its sampler then takes.
    """
    pairs, ours = text.pairs, text.pairs.get("Version", "").startswith(_OURS)
    unused: list[str] = []
    request: dict[str, Any] = {"prompt": text.prompt}
    if text.negative:
        request["negative"] = text.negative
    if not ours and pairs:
        request |= {"prompt_syntax": "a1111", "rng": "cuda"}
    for key, value in pairs.items():
        if key in _FIELDS:
            name, convert = _FIELDS[key]
            try:
                request |= _checked(name, convert(value))
            except (ValueError, KeyError) as error:
                reason = str(error) if isinstance(error, SettingError) else "not a value of this setting"
                unused.append(f"{key}: {shown(value)}: {reason}")
        elif key not in _PARTS and key not in _ORIGIN and key not in _COMBINED and not _CONTROL.fullmatch(key):
            unused.append(f"{key}: {shown(value)}: no such setting here")
    for setting in (_schedule, _options, _strengths):
        try:
            request |= setting(pairs, ours)
        except ValueError as error:
            unused.append(str(error))
    if request.get("sigmas") is not None:
        request.pop("steps", None)
    missing = [name for key, name in _PARTS.items() if key in pairs]
    missing += ["control"] if any(map(_CONTROL.fullmatch, pairs)) else []
    return Settings(request=request, missing=tuple(missing), unused=tuple(unused))


def _checked(name: str, value: Any) -> dict[str, Any]:
    """Return the setting. Raises SettingError if a Request refuses its value."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    Request(prompt="", image=pixels, **{name: value})
    return {name: value}


def _schedule(pairs: Mapping[str, str], ours: bool) -> dict[str, Any]:
    """Return the schedule: our own name, else the web UI's. A spacing is the checkpoint's, or stands in the options."""
    kind = pairs.get("Schedule") or pairs.get("Schedule type", AUTOMATIC)
    if "Timestep spacing" in pairs or (ours and kind == AUTOMATIC) or "Sigmas" in pairs:
        return {}
    if kind == AUTOMATIC:
        kind = AUTOMATIC_SCHEDULES.get(pairs.get("Sampler", ""), "")
    try:
        return {"schedule": resolve_schedule(kind)} if kind else {}
    except SettingError as error:
        raise SettingError(f"Schedule type: {error}") from None


def _options(pairs: Mapping[str, str], ours: bool) -> dict[str, Any]:
    """Return the options of the sampler."""
    options: dict[str, Any] = {}
    if "Sampler options" in pairs:
        try:
            options = dict(json.loads(pairs["Sampler options"]))
        except (TypeError, ValueError):
            raise SettingError(f"Sampler options: {shown(pairs['Sampler options'])}: not a JSON object") from None
    for key in ("Eta", "Eta DDIM"):
        if key in pairs:
            options["eta"] = _number(pairs[key], key)
    return _checked("options", options) if options else {}


def _strengths(pairs: Mapping[str, str], ours: bool) -> dict[str, Any]:
    """Return the strength of the image, and that of the second pass, which the web UI writes under the same key."""
    request: dict[str, Any] = {}
    if "Denoising strength" in pairs:
        second = "Hires upscale" in pairs and "Init image hash" not in pairs
        name = "hires_strength" if second else "strength"
        request |= _checked(name, _number(pairs["Denoising strength"], "Denoising strength"))
    if "Hires denoising strength" in pairs:
        request |= _checked("hires_strength", _number(pairs["Hires denoising strength"], "Hires denoising strength"))
    return request


def _number(text: str, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SettingError(f"{key}: {shown(text)}: expected a number") from None


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _sides(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def _sampler(text: str) -> str:
    resolve(text)
    return text


def _flag(text: str) -> bool:
    return {"True": True, "False": False}[text]


def _named(names: Mapping[Any, str | None]) -> Callable[[str], Any]:
    """Return the function from the web UI's names to ours."""
    ours = {theirs: name for name, theirs in names.items() if theirs}
    return lambda text: ours[text]


_FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("steps", int),
    "Sampler": ("sampler", _sampler),
    "CFG scale": ("guidance", float),
    "Guidance": ("guidance", _numbers),
    "Guidance interval": ("guidance_interval", _numbers),
    "CFG Rescale": ("rescale", float),
    "CFG PP": ("cfg_pp", _flag),
    "Image CFG scale": ("image_guidance", float),
    "Seed": ("seed", int),
    "Size": ("size", _sides),
    "Variation seed": ("variation_seed", int),
    "Variation seed strength": ("variation_strength", float),
    "Seed resize from": ("seed_resize", _sides),
    "RNG": ("rng", {"GPU": "cuda", **{theirs: ours for ours, theirs in A1111_RNGS.items()}}.__getitem__),
    "Sigmas": ("sigmas", _numbers),
    "Resize mode": ("fit", _named(RESIZE_MODES)),
    "Mask blur": ("mask_blur", float),
    "Masked area padding": ("mask_padding", int),
    "Masked content": ("mask_fill", _named(A1111_FILLS)),
    "Overlay": ("overlay", _flag),
    "Extend": ("extend", _whole_numbers),
    "Refiner switch at": ("refiner_at", float),
    "Hires upscale": ("hires", float),
    "Hires steps": ("hires_steps", lambda text: int(text) or None),
    "Hires upscaler": ("hires_resize", _named(A1111_UPSCALERS)),
    "Noise level": ("noise_level", int),
    "Guess mode": ("guess_mode", _flag),
    "Prompt syntax": ("prompt_syntax", str),
    "Emphasis": ("emphasis", _named({**A1111_EMPHASES, "original": "Original"})),
    "Clip skip": ("clip_skip", lambda text: int(text) - 1),
    "Prompt 2": ("prompt_2", str),
    "Negative prompt 2": ("negative_2", str),
    "Original size": ("original_size", _sides),
    "Crop": ("crop", _whole_numbers),
    "Target size": ("target_size", _sides),
    "Aesthetic score": ("aesthetic_score", float),
    "Negative aesthetic score": ("negative_aesthetic_score", float),
}
_COMBINED = frozenset(
    (
        *("Schedule", "Schedule type", "Timestep spacing", "Sampler options", "Eta", "Eta DDIM"),
        *("Denoising strength", "Hires denoising strength", "Inpaint area"),
    )
)
