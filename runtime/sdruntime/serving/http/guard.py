"""What every request passes first: limits, origin, token; and what is kept of it: a log record and figures."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from sdruntime.serving.http.problem import Problem
from sdruntime.serving.http.settings import Settings
from sdruntime.serving.metrics import Histogram, Metric

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
MOST_HEAD = 16 << 10  # bytes of all headers and the path
OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # without a token, for probes
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TYPES = ("application/json", "multipart/form-data")


class Guard:
    """ASGI middleware. Every answer has X-Request-ID; every refusal is a Problem."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], settings: Settings) -> None:
        self._app, self._settings = app, settings
        self.requests = Metric("sdruntime_http_requests_total", "HTTP requests.", "counter", labels=("route", "method", "status"))
        self.seconds = Histogram("sdruntime_http_request_seconds", "Seconds of HTTP requests, by route.", labels=("route",))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        sent = headers.get("x-request-id", "")
        number = sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(8)

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_HEADERS, (b"x-request-id", number.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive, headers), answer)
        except Problem as problem:
            if not status:  # else the answer has begun, and all that can be done is to break it off
                await _send_problem(problem, answer)
        finally:
            route = scope["route"].path if "route" in scope else "other"
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
            seconds = time.perf_counter() - begun
            self.requests.add(route, method, str(status or 499))
            self.seconds.observe(seconds, route)
            record = {"method": method, "path": scope["path"], "status": status or 499, "ms": round(1000 * seconds, 1)}
            self._settings.log(
                {"event": "request", "request_id": number, **record, "client": (scope.get("client") or ("", 0))[0]}
            )

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises Problem for a request that may not be answered."""
        size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["path"]) + len(scope["query_string"])
        if size > MOST_HEAD:
            raise Problem(431, f"headers of {size:,} bytes: at most {MOST_HEAD:,}", "headers_too_large")
        names = [name for name, _ in scope["headers"]]
        if b"transfer-encoding" in names and b"content-length" in names:
            raise Problem(400, "Content-Length and Transfer-Encoding together: send one of them", "ambiguous_length")
        for name in (b"host", b"authorization", b"content-type", b"content-length", b"origin"):
            if names.count(name) > 1:
                raise Problem(400, f"the header {name.decode()} occurs more than once", "repeated_header")
        self._check_origin(headers)
        if scope["path"] not in OPEN_PATHS:
            self._check_token(headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        most = self._settings.limits.body
        if length.isdecimal() and int(length) > most:
            raise Problem(413, f"a body of {int(length):,} bytes: at most {most:,}", "body_too_large")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT", "PATCH") and kind not in _TYPES and not (length == "0" and not kind):
            raise Problem(415, f"Content-Type {kind or 'missing'}: expected {' or '.join(_TYPES)}", "content_type")

    def _check_origin(self, headers: dict[str, str]) -> None:
        """A page of another site may not use a server of this machine: neither by its name nor by a name of its own."""
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._settings.token is None and name not in self._settings.hosts:
            raise Problem(403, f"Host {host!r}: this server answers to {', '.join(sorted(self._settings.hosts))}", "host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host:
            raise Problem(403, f"Origin {origin!r}: only pages of this server may use it", "origin")

    def _check_token(self, authorization: str) -> None:
        """Accept the token as Bearer, and as the password of Basic."""
        token = self._settings.token
        if token is None:
            return
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                value = ""
        elif scheme.lower() != "bearer":
            value = ""
        if not hmac.compare_digest(value.strip().encode(), token.encode()):
            raise Problem(401, "a token is required: Authorization: Bearer TOKEN, or Basic with it as the password", "token")

    def _limited(self, receive: Receive, headers: dict[str, str]) -> Receive:
        """Return `receive`, which raises Problem when the body is too large."""
        most, size = self._settings.limits.body, 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise Problem(413, f"a body of over {most:,} bytes", "body_too_large")
            return message

        return limited


_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


async def _send_problem(problem: Problem, send: Send) -> None:
    import json

    body = json.dumps(problem.document).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
