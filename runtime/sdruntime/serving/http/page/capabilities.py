"""What a front end needs to know before it submits a job, and the settings that an image file holds.

GET   /v1/capabilities    limits, samplers, schedules, LoRAs, and for each model its sizes, defaults, tasks and ControlNets
POST  /v1/settings        {"image": base64} or {"parameters": text}: the fields of a job
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdruntime import __version__
from sdruntime.bundle.roles import of_kind, short_name
from sdruntime.errors import SettingError
from sdruntime.pipeline.images.imagefile import text_from_bytes
from sdruntime.pipeline.metadata.read import infotext, settings_of
from sdruntime.pipeline.requests.tags import files_of
from sdruntime.sampling.samplers import SAMPLERS, resolve
from sdruntime.sampling.schedules import SCHEDULES
from sdruntime.serving.http.images import file_of
from sdruntime.serving.http.jobs import document_of
from sdruntime.serving.http.problem import Problem
from sdruntime.serving.http.settings import shared
from sdruntime.serving.room import Model


async def capabilities(request: Request) -> Response:
    parts = shared(request)
    limits, folder = parts.settings.limits, parts.settings.lora_dir
    return JSONResponse(
        {
            "version": __version__,
            "limits": {name: getattr(limits, name) for name in ("body", "pixels", "steps", "images", "letters", "jobs")},
            "samplers": list(SAMPLERS),
            "schedules": list(SCHEDULES),
            "loras": [] if folder is None else sorted(await asyncio.to_thread(files_of, folder)),
            "models": [_model(model) for model in parts.room.models.values()],
        }
    )


def _model(model: Model) -> dict[str, Any]:
    """Return what is known of a model. `abilities` is null until the model has been open."""
    return {"name": model.name, "stage": model.stage, "fault": model.fault, "abilities": _abilities(model)}


def _abilities(model: Model) -> dict[str, Any] | None:
    if model.document is None:
        return None
    spec, sizes, components = model.document["model"], model.document["sizes"], list(model.document["components"])
    defaults = spec.get("defaults") or {}
    return {
        "sampler": model.document["sampler"],
        "steps": defaults.get("steps"),
        "guidance": defaults.get("guidance"),
        "size": sizes["default"],
        "multiple": sizes["multiple"],
        "sizes": sizes["engines"],
        "images": bool(of_kind(components, "VAE encoder")),
        "controlnets": [short_name(name) for name in of_kind(components, "ControlNet", "T2I-Adapter")],
    }


async def settings(request: Request) -> Response:
    """Return the fields of a job that an image file or an infotext has, and what of it has no counterpart."""
    body = await document_of(request)
    if not isinstance(body, dict) or not {"image", "parameters"} & body.keys():
        raise Problem(422, 'expected an object with an "image" or "parameters"', "invalid_request")
    try:
        text = body.get("parameters")
        if text is None:
            text = (await asyncio.to_thread(text_from_bytes, file_of("image", body["image"]))).get("parameters", "")
        if not isinstance(text, str):
            raise Problem(422, "parameters: expected text", "invalid_request")
        read = await asyncio.to_thread(settings_of, infotext(text))
    except SettingError as error:
        raise Problem(422, f"image: {error}", "invalid_image") from error
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in read.request.items()}
    if "sampler" in fields:
        fields["sampler"] = resolve(str(fields["sampler"]))[0].name
    if "size" in fields:
        fields["width"], fields["height"] = fields.pop("size")
    return JSONResponse({"parameters": text, "fields": fields, "missing": list(read.missing), "unused": list(read.unused)})


ROUTES = [
    Route("/v1/capabilities", capabilities, methods=["GET"]),
    Route("/v1/settings", settings, methods=["POST"]),
]
