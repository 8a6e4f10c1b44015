"""OpenAI's Images API: generations, edits, variations, models. Its clients work unchanged with `base_url=http://HOST:PORT/v1`.

Beyond its fields: `seed`, `steps`, `guidance`, `negative_prompt`, `sampler`, `schedule`, `strength`. Settings without a
counterpart (`quality`, `background`, `moderation`, `style`, `user`, `input_fidelity`) are accepted and have no effect.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sdruntime.pipeline.images.imagefile import fitted
from sdruntime.pipeline.images.png import png_from_image
from sdruntime.serving.http.images import KINDS, encoded, mask_of, pixels_of, preview_png, transparency_of
from sdruntime.serving.http.jobs import document_of, event, owner_of, preview_of
from sdruntime.serving.http.problem import Problem, problem_of_failure
from sdruntime.serving.http.settings import Shared, shared
from sdruntime.serving.http.submission import jobs_of
from sdruntime.serving.job import RoomJob

_OURS = {
    "prompt": "prompt",
    "negative_prompt": "negative",
    "model": "model",
    "n": "n",
    "seed": "seed",
    "steps": "steps",
    "guidance": "guidance",
    "sampler": "sampler",
    "schedule": "schedule",
    "strength": "strength",
}
_NUMBERS = {"n": int, "seed": int, "steps": int, "guidance": float, "strength": float, "partial_images": int}
_NUMBERS |= {"output_compression": int}
_VARIATION = 0.6  # strength
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_MOST_PARTIAL = 3


async def generations(request: Request) -> Response:
    return await _answer(request, "image_generation", await document_of(request))


async def edits(request: Request) -> Response:
    """Generate the transparent parts of the mask, or its white ones if it has none; without a mask, those of the image."""
    body = await document_of(request)
    _check_object(body)
    images = body.pop("image", None)
    images = images if isinstance(images, list) else [images]
    if not images or images[0] is None:
        raise Problem(422, "image: expected the image to edit", "invalid_request")
    if len(images) > 1:
        raise Problem(422, f"image: {len(images)} images: this model edits one", "unsupported")
    body["image"] = images[0]
    return await _answer(request, "image_edit", body)


async def variations(request: Request) -> Response:
    body = await document_of(request)
    _check_object(body)
    return await _answer(request, "image_variation", {"prompt": "", "strength": _VARIATION, **body})


def _check_object(body: Any) -> None:
    if not isinstance(body, dict):
        raise Problem(422, "expected an object", "invalid_request")


def _ours(body: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Return our document of a request. Numbers of forms are text. Raises Problem."""
    fields: dict[str, Any] = {
        _OURS[key]: _number(key, value) for key, value in body.items() if key in _OURS and value is not None
    }
    if not isinstance(fields.get("prompt"), str):
        raise Problem(422, "prompt: expected text", "invalid_request")
    size = body.get("size") or "auto"
    if size != "auto":
        matched = _SIZE.fullmatch(str(size))
        if matched is None:
            raise Problem(422, f"size {size!r}: expected WIDTHxHEIGHT, such as 1024x1024, or auto", "invalid_setting")
        fields |= {"width": int(matched[1]), "height": int(matched[2])}
    if "image" in body:
        image = pixels_of("image", body["image"], most)
        alpha = transparency_of("mask" if body.get("mask") else "image", body.get("mask") or body["image"])
        mask = mask_of("mask", body["mask"], most) if alpha is None and body.get("mask") else alpha
        sides = fields.get("width") or image.shape[1], fields.get("height") or image.shape[0]
        fields["image"] = png_from_image(fitted(image, sides, "crop"))
        if mask is not None:
            fields["mask"] = png_from_image(np.repeat(fitted(mask, sides, "crop")[..., None], 3, axis=2))
            fields.setdefault("strength", 1.0)
    return fields


def _number(key: str, value: Any) -> Any:
    if key not in _NUMBERS or not isinstance(value, str):
        return value
    try:
        return _NUMBERS[key](value)
    except ValueError:
        raise Problem(422, f"{key} {value!r}: expected a number", "invalid_setting") from None


async def _answer(request: Request, kind: str, body: Any) -> Response:
    _check_object(body)
    parts = shared(request)
    form = body.get("output_format") or "png"
    if form not in KINDS:
        raise Problem(422, f"output_format {form!r}: expected one of {', '.join(KINDS)}", "invalid_setting")
    response_format = body.get("response_format") or "b64_json"
    if response_format not in ("b64_json", "url"):
        raise Problem(422, f"response_format {response_format!r}: expected b64_json or url", "invalid_setting")
    stream = body.get("stream") in (True, "true")
    partial = _number("partial_images", body.get("partial_images") or 0)
    if partial not in range(_MOST_PARTIAL + 1):
        raise Problem(422, f"partial_images {partial!r}: expected 0 to {_MOST_PARTIAL}", "invalid_setting")
    quality = _number("output_compression", body.get("output_compression"))
    if quality is not None and not (isinstance(quality, int) and 1 <= quality <= 100):
        raise Problem(422, f"output_compression {quality!r}: expected 1 to 100", "invalid_setting")
    limits = parts.settings.limits
    document = await asyncio.to_thread(_ours, body, limits.pixels)
    if stream:
        document["preview"] = partial > 0
    jobs = await asyncio.to_thread(jobs_of, parts, document, owner_of(request))
    parts.jobs.submit(jobs)
    if stream:
        streamed = _stream(parts, jobs, kind, partial, form, quality)
        return StreamingResponse(streamed, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    await finished_or_left(request, parts, jobs)
    data = []
    for job in jobs:
        if response_format == "url":
            data.append({"url": str(request.base_url.replace(path=f"/v1/jobs/{job.id}/image", query=f"format={form}"))})
        else:
            data.append({"b64_json": await _text(job, form, quality)})
    assert jobs[0].finished is not None
    height, width = jobs[0].finished.pixels.shape[:2]
    return JSONResponse({"created": int(time.time()), "data": data, "output_format": form, "size": f"{width}x{height}"})


async def finished_or_left(request: Request, parts: Shared, jobs: list[RoomJob]) -> None:
    """Wait for all jobs. If one fails, or the client leaves, cancel the others. Raises Problem."""
    left = asyncio.ensure_future(_left(request))
    waits = [asyncio.ensure_future(job.wait()) for job in jobs]
    try:
        while not all(wait.done() for wait in waits):
            await asyncio.wait({left, *(wait for wait in waits if not wait.done())}, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                raise Problem(499, "the client has left", "client_closed")
            for job in jobs:
                if job.failure is not None:
                    raise problem_of_failure(job.failure)
        for job in jobs:
            if job.failure is not None:
                raise problem_of_failure(job.failure)
    finally:
        left.cancel()
        for job in jobs:
            if not job.over:
                parts.room.cancel(job)
        for wait in waits:
            wait.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _text(job: RoomJob, form: str, quality: int | None) -> str:
    assert job.finished is not None
    return base64.b64encode(await asyncio.to_thread(encoded, job.finished, form, quality)).decode()


async def _stream(
    parts: Shared, jobs: list[RoomJob], kind: str, partial: int, form: str, quality: int | None
) -> AsyncIterator[str]:
    """Yield the events of OpenAI's stream for each image, the progress as comments, which its clients ignore."""
    try:
        for job in jobs:
            shown = 0
            async for now in job.watch():
                if now.over:
                    break
                yield f": step {now.step} of {now.steps}\n\n"
                due = partial and now.steps and now.clean is not None and now.step * (partial + 1) >= now.steps * (shown + 1)
                if due and now.clean is not None and shown < partial:
                    data = await asyncio.to_thread(preview_png, now.clean, preview_of(parts, job), 8)
                    if data is not None:
                        partial_image = {"b64_json": base64.b64encode(data).decode(), "partial_image_index": shown}
                        yield _event(f"{kind}.partial_image", {**partial_image, "output_format": "png"})
                    shown += 1
            if job.failure is not None:
                yield event("error", {"type": "error", **problem_of_failure(job.failure).document})
                return
            assert job.finished is not None
            height, width = job.finished.pixels.shape[:2]
            text = await _text(job, form, quality)
            yield _event(f"{kind}.completed", {"b64_json": text, "output_format": form, "size": f"{width}x{height}"})
    finally:
        for job in jobs:
            if not job.over:
                parts.room.cancel(job)


def _event(kind: str, fields: Mapping[str, Any]) -> str:
    known = {"created_at": int(time.time()), "background": "opaque", "quality": "high", "size": "auto"}
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    whole = {"type": kind, **known, **({"usage": usage} if kind.endswith("completed") else {}), **fields}
    return f"event: {kind}\ndata: {json.dumps(whole)}\n\n"


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(name) for name in shared(request).room.models]})


async def model(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in shared(request).room.models:
        raise Problem(404, f"model {name!r}: this server has {', '.join(shared(request).room.models)}", "model_not_found")
    return JSONResponse(_model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sdruntime"}


ROUTES = [
    Route("/v1/images/generations", generations, methods=["POST"]),
    Route("/v1/images/edits", edits, methods=["POST"]),
    Route("/v1/images/variations", variations, methods=["POST"]),
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{name:path}", model, methods=["GET"]),
]
