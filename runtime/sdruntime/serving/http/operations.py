"""What keeps a server running: liveness, readiness, metrics, and the description of the routes."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sdruntime import __version__
from sdruntime.serving.http import a1111, jobs, openai
from sdruntime.serving.http.page import capabilities
from sdruntime.serving.http.settings import shared
from sdruntime.serving.message import ControlMessage, LoraMessage, RequestMessage
from sdruntime.serving.metrics import Metric, exposition

_BUILD = Metric("sdruntime_build_info", "The version.", "gauge", ("version",), values={(__version__,): 1.0})
_FILE = {"type": "string", "contentEncoding": "base64", "description": "an image file"}


async def alive(request: Request) -> Response:
    return PlainTextResponse("ok")


async def ready(request: Request) -> Response:
    """200 if a model is open and none that jobs wait for is out of order, else 503."""
    room = shared(request).room
    models = {model.name: {"stage": model.stage, "fault": model.fault} for model in room.models.values()}
    return JSONResponse({"ready": room.ready, "models": models}, status_code=200 if room.ready else 503)


async def metrics(request: Request) -> Response:
    guard = request.app.state.guard
    everything = (_BUILD, *shared(request).room.metrics, guard.requests, guard.seconds)
    return PlainTextResponse(exposition(everything), media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    return JSONResponse(description())


def description() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the server."""
    paths: dict[str, dict[str, Any]] = {}
    for route in (*jobs.ROUTES, *openai.ROUTES, *a1111.ROUTES, *capabilities.ROUTES, *ROUTES):
        operations = paths.setdefault(route.path.replace(":path", ""), {})
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operations[method.lower()] = _operation(route, method)
    request = _record(RequestMessage, without=("loras", "image_prompt_scale"))
    properties = request["properties"] | {
        "image_prompt_scale": {"type": "number"},
        "model": {"type": "string"},
        "n": {"type": "integer", "minimum": 1},
        "preview": {"type": "boolean"},
        "image": _FILE,
        "mask": _FILE,
        "depth": _FILE,
        "image_prompt": {"type": "array", "items": _FILE},
        "image_prompt_mask": {"type": "array", "items": _FILE},
        "controls": {"type": "array", "items": _with(_record(ControlMessage, without=("size",)), "image", _FILE)},
        "loras": {"type": "array", "items": _with(_record(LoraMessage, without=("path",)), "name", {"type": "string"})},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "sdruntime", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Job": {**request, "properties": properties}}},
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}_{route.name}",
        "responses": {"default": {"description": "the answer, or an error: {error: {message, type, code}}"}},
    }
    names = [part.strip("{}").partition(":")[0] for part in route.path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    if route.endpoint is jobs.submit:
        schema = {"$ref": "#/components/schemas/Job"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif method == "POST" and (route.endpoint is capabilities.settings or route.path.startswith(("/v1/images", "/sdapi"))):
        form = route.endpoint in (openai.edits, openai.variations)
        kind = "multipart/form-data" if form else "application/json"
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": {"type": "object"}}}}
    return operation


def _with(record: dict[str, Any], name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "properties": {**record["properties"], name: schema}, "required": [*record.get("required", []), name]}


def _record(record: type, without: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON schema of a record of messages."""
    hints = typing.get_type_hints(record)
    fields = [field for field in dataclasses.fields(record) if field.name not in without]
    required = [
        field.name for field in fields if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {field.name: _schema(hints[field.name]) for field in fields},
        "additionalProperties": False,
    }
    return schema | ({"required": required} if required else {})


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(argument) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return {"type": "array", "items": _schema(arguments[0])}
        count = len(arguments)
        return {"type": "array", "prefixItems": [_schema(part) for part in arguments], "minItems": count, "maxItems": count}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    return {"type": "object"}


_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
ROUTES = [
    Route("/healthz", alive, methods=["GET"]),
    Route("/readyz", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/openapi.json", openapi, methods=["GET"]),
]
