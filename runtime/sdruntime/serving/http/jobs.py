"""The native API: jobs that are submitted, watched and fetched.

POST   /v1/jobs               submit; 202 with {"jobs": [...]}; Idempotency-Key repeats no work
GET    /v1/jobs               the jobs that are kept, newest first
GET    /v1/jobs/ID            one of them
GET    /v1/jobs/ID/events     its changes as server-sent events: "job", and "preview" with a PNG
GET    /v1/jobs/ID/image      the image: ?format=png|jpeg|webp
POST   /v1/jobs/ID/finish     end it after its step, with the image so far
DELETE /v1/jobs/ID            cancel it
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sdruntime.bundle.model import LinearPreview
from sdruntime.serving.http.images import KINDS, encoded, preview_png
from sdruntime.serving.http.problem import Problem, problem_of_failure
from sdruntime.serving.http.settings import Shared, shared
from sdruntime.serving.http.submission import jobs_of
from sdruntime.serving.job import RoomJob

_KEEP_ALIVE = 15.0  # seconds without a change, after which an event stream sends a comment
_KEY = 256  # letters of an idempotency key


def owner_of(request: Request) -> str:
    """Return whose a request is: the address of the client."""
    return request.client.host if request.client is not None else ""


async def document_of(request: Request) -> Any:
    """Return the JSON of a request, or the fields of its form, with files as bytes. Raises Problem."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form_of(request)
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON", "invalid_json") from None


async def _form_of(request: Request) -> dict[str, Any]:
    """Return the fields of a form. A name that ends in [] has a list; several files of one name are a list too."""
    from starlette.exceptions import HTTPException

    fields: dict[str, Any] = {}
    try:
        async with request.form(max_files=32, max_fields=256, max_part_size=1 << 20) as form:
            for name, value in form.multi_items():
                content = value if isinstance(value, str) else await value.read()
                key = name.removesuffix("[]")
                if name.endswith("[]") or key in fields:
                    before = fields.get(key, [])
                    fields[key] = [*(before if isinstance(before, list) else [before]), content]
                else:
                    fields[key] = content
    except HTTPException as error:
        raise Problem(400, f"the form cannot be read: {error.detail}", "invalid_form") from error
    return fields


def document(job: RoomJob, shared: Shared) -> dict[str, Any]:
    """Return the description of a job."""
    finished, failure = job.finished, job.failure
    return {
        "id": job.id,
        "model": job.model,
        "state": job.state,
        "position": shared.room.position(job),
        "step": job.step,
        "steps": job.steps,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "image": f"/v1/jobs/{job.id}/image" if finished else None,
        "width": finished.pixels.shape[1] if finished else None,
        "height": finished.pixels.shape[0] if finished else None,
        "seed": finished.seed if finished else job.fields["request"]["seed"],
        "sampler": finished.sampler if finished else None,
        "parameters": finished.parameters if finished else None,
        "seconds": dict(finished.seconds) if finished else None,
        "warnings": list(finished.warnings) if finished else [],
        "error": {"code": failure.reason or str(failure.code), "message": failure.message} if failure else None,
    }


async def submit(request: Request) -> Response:
    parts, owner = shared(request), owner_of(request)
    key = request.headers.get("idempotency-key", "")
    if len(key) > _KEY:
        raise Problem(422, f"Idempotency-Key: at most {_KEY} letters", "invalid_request")
    body = await document_of(request)
    digest = hashlib.sha256(repr(sorted(body.items()) if isinstance(body, dict) else body).encode()).hexdigest()
    jobs = parts.jobs.once(owner, key, digest) if key else None
    if jobs is None:
        jobs = await asyncio.to_thread(jobs_of, parts, body, owner)
        parts.jobs.submit(jobs)
        if key:
            parts.jobs.remember(owner, key, digest, jobs)
    return JSONResponse({"jobs": [document(job, parts) for job in jobs]}, status_code=202)


async def listing(request: Request) -> Response:
    parts = shared(request)
    return JSONResponse({"jobs": [document(job, parts) for job in reversed(list(parts.jobs))]})


async def one(request: Request) -> Response:
    parts = shared(request)
    return JSONResponse(document(parts.jobs.get(request.path_params["id"]), parts))


async def cancel(request: Request) -> Response:
    parts = shared(request)
    job = parts.jobs.get(request.path_params["id"])
    parts.room.cancel(job)
    return JSONResponse(document(job, parts))


async def finish(request: Request) -> Response:
    parts = shared(request)
    job = parts.jobs.get(request.path_params["id"])
    parts.room.finish(job)
    return JSONResponse(document(job, parts))


async def image(request: Request) -> Response:
    parts = shared(request)
    job = parts.jobs.get(request.path_params["id"])
    if job.failure is not None:
        raise problem_of_failure(job.failure)
    if job.finished is None:
        raise Problem(409, f"job {job.id}: it is {job.state}: there is no image yet", "not_finished")
    kind = request.query_params.get("format", "png")
    if kind not in KINDS:
        raise Problem(422, f"format {kind!r}: expected one of {', '.join(KINDS)}", "invalid_setting")
    data = await asyncio.to_thread(encoded, job.finished, kind)
    headers = {"Cache-Control": "private, max-age=31536000, immutable", "ETag": f'"{job.id}-{kind}"'}
    return Response(data, media_type=f"image/{kind}", headers=headers)


async def events(request: Request) -> Response:
    parts = shared(request)
    job = parts.jobs.get(request.path_params["id"])
    return StreamingResponse(_events(job, parts), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(job: RoomJob, parts: Shared) -> AsyncIterator[str]:
    """Yield the changes of a job: what it is now, then each change, and its end. While it waits, also its place each second."""
    changes = job.watch()
    following = asyncio.ensure_future(anext(changes))
    shown = None
    try:
        while True:
            await asyncio.wait({following}, timeout=_KEEP_ALIVE if job.state == "running" else 1.0)
            if following.done():
                try:
                    following.result()
                except StopAsyncIteration:
                    return
                if job.clean is not None and job.clean is not shown:
                    shown = job.clean
                    data = await asyncio.to_thread(preview_png, shown, preview_of(parts, job))
                    if data is not None:
                        yield event("preview", {"step": job.step, "png": base64.b64encode(data).decode()})
                following = asyncio.ensure_future(anext(changes))
                yield event("job", document(job, parts))
            elif job.state == "waiting":
                yield event("job", document(job, parts))
            else:
                yield ": still running\n\n"
    finally:
        following.cancel()


def event(name: str, fields: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(fields)}\n\n"


def preview_of(parts: Shared, job: RoomJob) -> LinearPreview | None:
    """Return the weights with which the latents of a job are shown, None if its model has none."""
    described = (parts.room.models[job.model].document or {}).get("model", {}).get("preview")
    return None if described is None else LinearPreview(**described)


ROUTES = [
    Route("/v1/jobs", submit, methods=["POST"]),
    Route("/v1/jobs", listing, methods=["GET"]),
    Route("/v1/jobs/{id}", one, methods=["GET"]),
    Route("/v1/jobs/{id}", cancel, methods=["DELETE"]),
    Route("/v1/jobs/{id}/events", events, methods=["GET"]),
    Route("/v1/jobs/{id}/image", image, methods=["GET"]),
    Route("/v1/jobs/{id}/finish", finish, methods=["POST"]),
]
