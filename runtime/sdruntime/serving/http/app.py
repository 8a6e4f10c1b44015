"""The ASGI application of a room: plain ASGI, so any server or framework can mount it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from sdruntime.errors import SdruntimeError
from sdruntime.serving.http import a1111, jobs, openai, operations
from sdruntime.serving.http.guard import Guard
from sdruntime.serving.http.page import capabilities, files
from sdruntime.serving.http.problem import Problem, problem_of
from sdruntime.serving.http.settings import Jobs, Settings, Shared
from sdruntime.serving.room import Room


def application(room: Room, settings: Settings) -> Guard:
    """Return the application. Its lifespan opens the room, with its first model, and closes it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with room:
            room.open(next(iter(room.models)))
            yield

    app = Starlette(
        routes=[*jobs.ROUTES, *openai.ROUTES, *a1111.ROUTES, *capabilities.ROUTES, *operations.ROUTES, *files.ROUTES],
        lifespan=lifespan,
        exception_handlers={
            Problem: _refused,
            SdruntimeError: _refused,
            HTTPException: _no_route,
            ClientDisconnect: _left,
            Exception: _refused,
        },
    )
    app.router.redirect_slashes = False  # no answer repeats the Host of its request
    app.state.shared = Shared(room=room, settings=settings, jobs=Jobs(room, settings.limits))
    guard = Guard(app, settings)
    app.state.guard = guard
    return guard


async def _refused(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    return JSONResponse(problem.document, status_code=problem.status, headers=problem.headers)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # to nobody, and for the log


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    problem = Problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code)
    return JSONResponse(problem.document, status_code=problem.status, headers={**problem.headers, **(error.headers or {})})
