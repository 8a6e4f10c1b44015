"""The tensors of the Triton model: one table for its config.pbtxt, for reading a request and for the documentation."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from sdruntime.arrays import Array
from sdruntime.bundle.records import json_from_text
from sdruntime.errors import SettingError, UnknownName, plain
from sdruntime.pipeline.images.imagefile import gray_from, image_from_bytes
from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.pipeline.requests.request import Request
from sdruntime.serving.message import Images, Submit, message_from_json

Steps = Literal["steps", "preview", "off"]
Output = Literal["base64", "png", "raw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """A tensor. `dims`: -1 for any length. `field`: what it is of `message.RequestMessage`, if it is one of its fields."""

    name: str
    dtype: str
    what: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True
    field: str = ""


INPUTS = (
    TensorRow(name="PROMPT", dtype="STRING", what="what the image shows", optional=False, field="prompt"),
    TensorRow(name="NEGATIVE", dtype="STRING", what="what it should not show", field="negative"),
    TensorRow(name="SEED", dtype="UINT64", what="the seed (random)", field="seed"),
    TensorRow(name="STEPS", dtype="INT32", what="denoising steps (the model's own, or 20)", field="steps"),
    TensorRow(name="GUIDANCE", dtype="FP64", what="how closely to follow the prompt (the model's own, or 7.5)", field="guidance"),
    TensorRow(name="SAMPLER", dtype="STRING", what="a name of `sdruntime samplers` (the model's own)", field="sampler"),
    TensorRow(name="SCHEDULE", dtype="STRING", what="karras, sgm_uniform, … (the model's own)", field="schedule"),
    TensorRow(name="SIZE", dtype="INT32", dims=(2,), what="width and height in pixels (the model's own)"),
    TensorRow(name="START_IMAGE", dtype="STRING", what="an image file to start from: its bytes, or base64 of them"),
    TensorRow(name="MASK", dtype="STRING", what="an image file of the same size: its white parts are generated"),
    TensorRow(name="STRENGTH", dtype="FP64", what="how much of START_IMAGE is changed (0.8)", field="strength"),
    TensorRow(name="SETTINGS", dtype="STRING", what="a JSON object of further fields of a request, such as clip_skip"),
    TensorRow(name="PROGRESS", dtype="STRING", what="responses before the image: steps, preview or off (steps)"),
    TensorRow(name="OUTPUT", dtype="STRING", what="the image: base64 of the PNG, its bytes as png, or raw (base64)"),
)
OUTPUTS = (
    TensorRow(name="STEP", dtype="INT32", dims=(2,), what="after each step: how many are done, of how many"),
    TensorRow(
        name="PREVIEW", dtype="UINT8", dims=(-1, -1, 3), what="with it: the image so far, one pixel for each of the latents"
    ),
    TensorRow(name="PNG", dtype="STRING", what="the image file, as bytes or base64"),
    TensorRow(name="IMAGE", dtype="UINT8", dims=(-1, -1, 3), what="with OUTPUT raw: rows of RGB"),
    TensorRow(name="INFO", dtype="STRING", what="JSON: width, height, seed, sampler, parameters, timings in seconds, warnings"),
)
_PATHS = ("loras",)  # fields whose values hold paths: no path of a request is ever opened


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request of a client: the Request, and in which form it wants progress and the image."""

    request: Request
    progress: Steps
    output: Output


def order_of(tensors: Mapping[str, Array]) -> Order:
    """Return what the tensors of a client request. Raises SettingError, LibraryMissing for a format of an image."""
    values = {row.name: _value(row, tensors[row.name]) for row in INPUTS if row.name in tensors}
    named = {row.field: values[row.name] for row in INPUTS if row.field and row.name in values}
    if "SIZE" in values:
        named["width"], named["height"] = values["SIZE"]
    settings = _settings(values.get("SETTINGS", "{}"), named)
    message = message_from_json({"op": "submit", "job": 0, "request": {"prompt_syntax": "a1111", **settings, **named}})
    assert isinstance(message, Submit)
    return Order(
        request=message.request.request(_images(values)),
        progress=_one_of("PROGRESS", values, get_args(Steps)),
        output=_one_of("OUTPUT", values, get_args(Output)),
    )


def _value(row: TensorRow, array: Array) -> Any:
    """Return the Python value of a tensor: a number, text, the bytes of a file, or a list."""
    items = array.reshape(-1).tolist()
    if len(items) != row.dims[0]:
        raise SettingError(f"{row.name}: expected {row.dims[0]} value{'s' if row.dims[0] > 1 else ''}, got {len(items)}")
    if row.name in ("START_IMAGE", "MASK"):
        return items[0]
    if row.dtype == "STRING":
        try:
            return items[0].decode()
        except UnicodeDecodeError as error:
            raise SettingError(f"{row.name}: not UTF-8: {plain(error)}") from error
    return items if row.dims[0] > 1 else items[0]


def _settings(text: str, named: Mapping[str, Any]) -> dict[str, Any]:
    try:
        settings = json_from_text(text, infinity=False)
    except ValueError as error:
        raise SettingError(f"SETTINGS: not JSON: {plain(error)}") from error
    if not isinstance(settings, dict):
        raise SettingError(f"SETTINGS: expected a JSON object such as {json.dumps({'clip_skip': 1})}")
    for name in settings:
        if name in _PATHS:
            raise SettingError(f"SETTINGS: {name}: name LoRAs in the prompt, such as <lora:name:0.8>")
        if name in named:
            raise SettingError(f"SETTINGS: {name}: an input has it too: send one of them")
    return settings


def _images(values: Mapping[str, Any]) -> Images:
    if "MASK" in values and "START_IMAGE" not in values:
        raise SettingError("MASK: it marks a part of an image: send START_IMAGE too")
    image = _pixels("START_IMAGE", values["START_IMAGE"]) if "START_IMAGE" in values else None
    mask = gray_from(_pixels("MASK", values["MASK"])) if "MASK" in values else None
    return Images(image=image, mask=mask)


def _pixels(name: str, file: bytes) -> Pixels:
    try:
        return image_from_bytes(file)
    except SettingError as error:
        try:
            data = base64.b64decode(file, validate=True)
        except (binascii.Error, ValueError):
            raise SettingError(f"{name}: {error}, and not base64") from error
    try:
        return image_from_bytes(data)
    except SettingError as error:
        raise SettingError(f"{name}: {error}") from error


def _one_of(name: str, values: Mapping[str, Any], known: tuple[Any, ...]) -> Any:
    """Return the value of an input with few values, the first of which is the default."""
    value = values.get(name, known[0])
    if value not in known:
        raise UnknownName(name, value, known)
    return value


def text_array(text: str | bytes) -> Array:
    """Return the array of a tensor of type STRING."""
    return np.array([text.encode() if isinstance(text, str) else text], np.object_)
