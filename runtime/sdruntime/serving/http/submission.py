"""The jobs of a request: its document, checked against the limits before any work.

The document has the fields of the service's request (`message.RequestMessage`) and: `model`, `n` images of which number k has the
seed `seed` + k, `preview`; images as files in base64: `image`, `mask`, `depth`, `controls` (each with an `image`), `image_prompt`
and `image_prompt_mask` (lists); `loras` by the names of files in the server's folder, each {"name", "scale", "text_scale",
"blocks"}.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any

from sdruntime.arrays import Array
from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.requests.tags import files_of, with_tagged
from sdruntime.serving.blob import images_of
from sdruntime.serving.http.images import mask_of, pixels_of
from sdruntime.serving.http.problem import Problem
from sdruntime.serving.http.settings import Shared
from sdruntime.serving.job import RoomJob
from sdruntime.serving.message import Submit, message_from_json

_OWN = ("model", "n", "preview", "image", "mask", "depth", "controls", "image_prompt", "image_prompt_mask", "loras")
_SEEDS = 2**64


def jobs_of(shared: Shared, document: Any, owner: str) -> list[RoomJob]:
    """Return the jobs of a document. Raises Problem, SettingError. Reads images, so it is called on a thread of its own."""
    if not isinstance(document, dict):
        raise Problem(422, "expected a JSON object", "invalid_request")
    limits = shared.settings.limits
    count = document.get("n", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= limits.images:
        raise Problem(422, f"n {count!r}: expected a whole number from 1 to {limits.images}", "invalid_setting")
    name = document.get("model") or next(iter(shared.room.models))
    if name not in shared.room.models:
        raise UnknownName("model", str(name), shared.room.models)
    request = {"prompt_syntax": "a1111", **{key: value for key, value in document.items() if key not in _OWN}}
    if "loras" in document:
        request["loras"] = _loras(shared, document["loras"])
    if request.get("seed") is None:
        request["seed"] = secrets.randbelow(2**32)
    fields, arrays = _images(document, limits.pixels)
    if document.get("preview"):
        fields["preview"] = True
    blob = b"".join(array.tobytes() for array in arrays)
    message = message_from_json({"op": "submit", "job": 0, "request": request, **fields})
    assert isinstance(message, Submit)
    checked = message.request.request(images_of(message, blob, len(blob)), message.controls)
    _check(shared, with_tagged(checked, shared.settings.lora_dir))
    return [
        RoomJob(
            model=name,
            fields={"request": {**request, "seed": (checked.seed + k) % _SEEDS}, **fields},
            blob=blob or None,
            owner=owner,
            patience=shared.settings.patience,
        )
        for k in range(count)
    ]


def _images(document: Mapping[str, Any], most: int) -> tuple[dict[str, Any], list[Array]]:
    """Return the fields of the service's message that name the images, and the images in the order of its blob."""
    fields: dict[str, Any] = {}
    arrays: list[Array] = []
    if document.get("image") is not None:
        arrays.append(pixels_of("image", document["image"], most))
        fields["image"] = _size(arrays[-1])
    if document.get("mask") is not None:
        mask = mask_of("mask", document["mask"], most)
        if fields.get("image", _size(mask)) != _size(mask):
            raise Problem(422, "mask: it and the image have other sizes: they must be equal", "invalid_image")
        arrays.append(mask)
        fields["mask"] = True
    if document.get("depth") is not None:
        arrays.append(mask_of("depth", document["depth"], most))
        fields["depth"] = _size(arrays[-1])
    for key in ("controls", "image_prompt", "image_prompt_mask"):
        if not isinstance(document.get(key, []), list):
            raise Problem(422, f"{key}: expected a list", "invalid_request")
    controls = []
    for k, control in enumerate(document.get("controls", [])):
        if not isinstance(control, dict) or "image" not in control:
            raise Problem(422, f'controls[{k}]: expected an object with an "image"', "invalid_request")
        arrays.append(pixels_of(f"controls[{k}].image", control["image"], most))
        controls.append({**{key: value for key, value in control.items() if key != "image"}, "size": _size(arrays[-1])})
    if controls:
        fields["controls"] = controls
    for key, read in (("image_prompt", pixels_of), ("image_prompt_mask", mask_of)):
        images = [read(f"{key}[{k}]", value, most) for k, value in enumerate(document.get(key, []))]
        if images:
            fields[key] = [_size(pixels) for pixels in images]
        arrays += images
    return fields, arrays


def _size(pixels: Array) -> list[int]:
    return [pixels.shape[1], pixels.shape[0]]


def _loras(shared: Shared, loras: Any) -> list[dict[str, Any]]:
    """Return LoRAs with the paths of their files. Names only: no path of a request is opened."""
    if not isinstance(loras, list) or not all(isinstance(lora, dict) and isinstance(lora.get("name"), str) for lora in loras):
        raise Problem(422, 'loras: expected a list of objects with a "name"', "invalid_request")
    if loras and shared.settings.lora_dir is None:
        raise Problem(422, "loras: not available on this server: start it with --lora-dir", "invalid_setting")
    files = files_of(shared.settings.lora_dir) if shared.settings.lora_dir is not None else {}
    paths = []
    for lora in loras:
        if lora["name"] not in files:
            raise UnknownName("LoRA", lora["name"], files)
        if "path" in lora:
            raise Problem(422, "loras: path: name a file of the server's folder", "invalid_request")
        paths.append({**{key: value for key, value in lora.items() if key != "name"}, "path": str(files[lora["name"]])})
    return paths


def _check(shared: Shared, request: Request) -> None:
    """Raises SettingError if a request is over the limits."""
    limits = shared.settings.limits
    texts = [text for text in (request.prompt, request.negative, request.prompt_2, request.negative_2) if text]
    if (letters := sum(map(len, texts))) > limits.letters:
        raise SettingError(f"prompts of {letters:,} letters: at most {limits.letters:,}")
    steps = max(request.steps or 0, len(request.sigmas or ()), request.hires_steps or 0)
    if steps > limits.steps:
        raise SettingError(f"steps {steps}: at most {limits.steps} on this server")
    sides = request.size or request.image_size or (0, 0)
    pixels = math.prod(sides) * (request.hires or 1.0) ** 2
    if pixels > limits.pixels:
        raise SettingError(f"an image of {pixels:,.0f} pixels: at most {limits.pixels:,} on this server")
