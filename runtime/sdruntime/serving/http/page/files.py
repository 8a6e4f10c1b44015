"""The files of the web page. Nothing but them is loaded: the Content-Security-Policy allows this server alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "web"
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file of the page. `tag`: its ETag, a hash of its bytes."""

    data: bytes
    kind: str
    tag: str


def _read(path: Path) -> File:
    data = path.read_bytes()
    return File(data, _TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')


FILES: Mapping[str, File] = MappingProxyType(
    {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in _TYPES}
)


def _route(path: str, file: File) -> Route:
    headers = {"ETag": file.tag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}

    async def page(request: Request) -> Response:
        sent = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if file.tag in sent:
            return Response(status_code=304, headers=headers)
        return Response(file.data, media_type=file.kind, headers=headers)

    return Route(path, page, methods=["GET"], name=path)


ROUTES = [
    _route("/", FILES["index.html"]),
    _route("/favicon.ico", FILES["icon.svg"]),
    *(_route(f"/page/{name}", file) for name, file in FILES.items()),
]
