"""Run the application with uvicorn: sockets, signals, and the notification of systemd."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from sdruntime.errors import SettingError, plain
from sdruntime.serving.http.app import application
from sdruntime.serving.http.guard import MOST_HEAD
from sdruntime.serving.http.protocol import IDLE, Deadlines
from sdruntime.serving.http.settings import Settings
from sdruntime.serving.room import Room

_BACKLOG = 512
_POLL = 0.05


class Server(uvicorn.Server):
    """uvicorn's server that drains: at the first SIGTERM or Ctrl-C it takes no more jobs and ends when those that it has are done
    or `drain` seconds are over; at the second it ends at once."""

    def __init__(self, config: uvicorn.Config, room: Room, drain: float) -> None:
        super().__init__(config)
        self._room, self._drain, self._signals = room, drain, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            self._room.stop_taking()
            _notify("STOPPING=1")
        else:
            self._room.close_at_once()  # a worker that opens a bundle, or hangs, would not leave by itself
            self.should_exit = self.force_exit = True

    async def main_loop(self) -> None:
        _notify("READY=1")
        counter = 0
        until: float | None = None
        loop = asyncio.get_running_loop()
        while not await self.on_tick(counter):
            counter = (counter + 1) % 864000
            await asyncio.sleep(_POLL)
            if self._signals and until is None:
                until = loop.time() + self._drain
            if until is not None and (loop.time() > until or not (self._room.waiting or self._room.running)):
                self.should_exit = True


def serve(room: Room, settings: Settings, end: socket.socket, *, drain: float) -> None:
    """Serve until a signal. `end` is a listening socket."""
    config = uvicorn.Config(
        application(room, settings),
        http=Deadlines,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MOST_HEAD * 2,
    )
    _raise_file_limit()
    for library in ("uvicorn.error", "python_multipart", "asyncio"):
        logger = logging.getLogger(library)
        logger.handlers, logger.propagate = [_Records(settings.log)], False
    Server(config, room, drain).run(sockets=[end])


class _Records(logging.Handler):
    """What the libraries log, as records of ours: warnings and errors, the latter with their tracebacks."""

    def __init__(self, write: Callable[[dict[str, Any]], object]) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write({"event": "http", "level": record.levelname.lower(), "message": self.format(record)})


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Raises SettingError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    end = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, so that asyncio sets TCP_NODELAY
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind((host, port))
        end.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        end.close()
        raise SettingError(f"--host {host} --port {port}: cannot listen there: {plain(error)}") from error
    return end


def listening_at(path: Path) -> socket.socket:
    """Return a Unix socket that listens at a path, where a socket that nobody listens to is replaced. Raises SettingError."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            try:
                other.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            except FileNotFoundError:
                pass
            else:
                raise SettingError(f"--unix-socket {path}: another server listens there")
        end.bind(str(path))
        end.listen(_BACKLOG)
    except OSError as error:
        end.close()
        raise SettingError(f"--unix-socket {path}: cannot listen there: {plain(error)}") from error
    except SettingError:
        end.close()
        raise
    return end


def _notify(state: str) -> None:
    """Tell systemd (sd_notify), if it started this process with Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.connect("\0" + address[1:] if address.startswith("@") else address)
        end.send(state.encode())


def _raise_file_limit() -> None:
    """Allow as many open files as the system does: slow clients hold connections until their deadline."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def described(end: socket.socket) -> str:
    """Return where a socket listens, for people."""
    name: Any = end.getsockname()
    if isinstance(name, tuple):
        return f"http://[{name[0]}]:{name[1]}" if ":" in name[0] else f"http://{name[0]}:{name[1]}"
    return f"unix:{name}"
