"""The command `serve`: images over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import json
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdruntime.cli.terminal import pairs
from sdruntime.errors import LibraryMissing, SettingError, plain, quoted

if TYPE_CHECKING:
    from sdruntime.serving.http.settings import Limits

INSTALL = 'pip install "sdruntime[server]"'
_SHORTEST_TOKEN = 16  # letters
_MANIFEST = "manifest.json"


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`, without those of the engines."""
    sub.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="folders that sdexport build wrote")
    sub.add_argument("--models", type=Path, metavar="DIR", help="serve every bundle in this folder too")
    sub.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    sub.add_argument("--port", type=int, default=7860, help="(7860)")
    sub.add_argument("--unix-socket", type=Path, metavar="FILE", help="listen on this socket instead")
    secret = "a file with the token that clients must send; required where others than this machine can connect"
    sub.add_argument("--token", type=Path, metavar="FILE", help=secret)
    sub.add_argument("--queue", type=int, default=64, help="images that may wait (64)")
    sub.add_argument("--patience", type=float, metavar="SECONDS", help="how long an image may wait (any time)")
    sub.add_argument("--running", type=int, metavar="N", help="images that run at a time (as many as one call of the UNet takes)")
    sub.add_argument("--keep", type=int, default=1, metavar="N", help="models that are open at a time (1)")
    sub.add_argument("--watchdog", type=float, default=120.0, metavar="SECONDS", help="silence after which a worker hangs (120)")
    sub.add_argument("--drain", type=float, default=30.0, metavar="SECONDS", help="time to finish images after SIGTERM (30)")
    sub.add_argument("--lora-dir", type=Path, metavar="DIR", help="the folder of the LoRAs that requests name")
    sub.add_argument("--embedding", action="append", default=[], metavar="[NAME=]FILE", help="an embedding for prompts")
    sub.add_argument("--refiner", type=Path, metavar="BUNDLE", help="a bundle that goes on where a request says so")
    sub.add_argument("--max-body", metavar="SIZE", help="the largest request (64M)")
    sub.add_argument("--max-pixels", type=int, metavar="N", help="pixels of an image (4194304)")
    sub.add_argument("--max-steps", type=int, metavar="N", help="steps of an image (150)")
    sub.add_argument("--max-images", type=int, metavar="N", help="images of a request (8)")
    sub.add_argument("--max-jobs", type=int, metavar="N", help="unfinished images of a client (32)")
    sub.add_argument("--log", choices=["plain", "json"], default="plain", help="lines for people or for programs (plain)")


def serve(options: argparse.Namespace) -> None:
    """Run `sdruntime serve`."""
    bundles = _bundles(options)
    token = _token(options)
    for name, least in (("queue", 1), ("keep", 1), ("drain", 0)):
        if getattr(options, name) < least:
            raise SettingError(f"--{name} {getattr(options, name):g}: at least {least}")
    try:
        from sdruntime.serving.http import server
    except ImportError as error:
        raise LibraryMissing(f"serve requires starlette, uvicorn and python-multipart ({error}): {INSTALL}") from error
    from sdruntime.serving.http.settings import Settings
    from sdruntime.serving.room import Room

    write = _writer(options.log)
    warnings.simplefilter("ignore", ResourceWarning)  # of a form whose client leaves: its files are closed without a word
    room = Room(
        bundles,
        options=_open_options(options),
        queue=options.queue,
        keep=options.keep,
        watchdog=options.watchdog,
        log=lambda level, message: write({"event": "worker", "level": level, "message": message}),
    )
    settings = Settings(limits=_limits(options), token=token, lora_dir=options.lora_dir, patience=options.patience, log=write)
    if options.unix_socket is not None:
        end = server.listening_at(options.unix_socket)
    else:
        end = server.listening(options.host, options.port)
    with end:
        write({"event": "start", "address": server.described(end), "models": list(bundles)})
        try:
            server.serve(room, settings, end, drain=options.drain)
        finally:
            if options.unix_socket is not None:
                options.unix_socket.unlink(missing_ok=True)
    write({"event": "end"})


def _bundles(options: argparse.Namespace) -> dict[str, Path]:
    """Return the folders by the names of their models: those of the folders. Raises SettingError."""
    folders = list(options.bundles)
    if options.models is not None:
        if not options.models.is_dir():
            raise SettingError(f"--models {options.models}: no such folder")
        folders += sorted(path.parent for path in options.models.glob(f"*/{_MANIFEST}"))
    if not folders:
        where = f" in {options.models}" if options.models is not None else ": name a BUNDLE, or a folder of them with --models"
        raise SettingError(f"no bundle{where}")
    bundles: dict[str, Path] = {}
    for folder in folders:
        if not (folder / _MANIFEST).is_file():
            raise SettingError(f"{folder}: no bundle: {_MANIFEST} is missing: sdexport build writes one")
        name = folder.resolve().name
        if name in bundles and bundles[name].resolve() != folder.resolve():
            raise SettingError(f"{folder}: {bundles[name]} has the same name, which is that of the model: rename one of them")
        bundles[name] = folder
    return bundles


def _token(options: argparse.Namespace) -> str | None:
    """Return the token, or None for a server of this machine alone. Raises SettingError."""
    if options.token is None:
        if options.unix_socket is None and not _is_loopback(options.host):
            raise SettingError(
                f"--host {options.host}: other machines can connect there: add --token FILE, a file with a secret of "
                f"{_SHORTEST_TOKEN} letters or more, such as: openssl rand -hex 32 > token"
            )
        return None
    try:
        token: str = options.token.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--token {options.token}: cannot be read: {plain(error)}") from error
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise SettingError(
            f"--token {options.token}: expected one line of at least {_SHORTEST_TOKEN} ASCII letters: "
            f"openssl rand -hex 32 > {quoted(options.token)}"
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the service's message "open"."""
    from sdruntime.system.sizes import parse_bytes

    return {
        "backend": options.backend,
        "device": options.device,
        "threads": options.threads,
        "low_memory": options.low_memory,
        "memory": None if options.vram_budget is None else parse_bytes(options.vram_budget),
        "tile": int(options.tile) if options.tile.isdecimal() else options.tile,
        "measure": not options.no_measure,
        "session": dict(pairs(options.session, "key=value", "--session")),
        "running": options.running,
        "refiner": None if options.refiner is None else str(options.refiner.resolve()),
        "embeddings": list(options.embedding),
        "lora_dir": None if options.lora_dir is None else str(options.lora_dir.resolve()),
    }


def _limits(options: argparse.Namespace) -> Limits:
    from sdruntime.serving.http.settings import Limits
    from sdruntime.system.sizes import parse_bytes

    values = {
        "body": None if options.max_body is None else parse_bytes(options.max_body),
        "pixels": options.max_pixels,
        "steps": options.max_steps,
        "images": options.max_images,
        "jobs": options.max_jobs,
    }
    for name, value in values.items():
        if value is not None and value < 1:
            raise SettingError(f"--max-{name} {value}: at least 1")
    return Limits(**{name: value for name, value in values.items() if value is not None})


def _writer(form: str) -> Any:
    """Return the function that writes a log record to standard error: no record has a prompt."""

    def write(record: dict[str, Any]) -> None:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        if form == "json":
            line = json.dumps({"time": f"{moment}Z", **record})
        else:
            line = f"{moment} " + " ".join(f"{key}={value}" for key, value in record.items())
        print(line, file=sys.stderr, flush=True)

    return write
