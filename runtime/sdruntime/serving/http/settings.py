"""What an HTTP server allows, and what its routes share."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from sdruntime.serving.http.problem import Problem
from sdruntime.serving.job import RoomJob
from sdruntime.serving.room import Room


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that a request may ask for. `body`: bytes; `pixels`: of an image; `letters`: of a prompt.

    `jobs`: unfinished ones of one client. `kept`, `kept_bytes`: how many finished jobs, and bytes of their images, are kept.
    """

    body: int = 64 << 20
    pixels: int = 2048 * 2048
    steps: int = 150
    images: int = 8
    letters: int = 20_000
    jobs: int = 32
    kept: int = 256
    kept_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the server is set up. `token`: None for a server of this machine alone; `hosts`: the names that it answers to then."""

    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "[::1]"})
    lora_dir: Path | None = None
    patience: float | None = None
    log: Callable[[dict[str, Any]], object] = lambda record: None


class Jobs:
    """The jobs that clients can fetch: all unfinished ones, and the last finished ones within the limits."""

    def __init__(self, room: Room, limits: Limits) -> None:
        self._room, self._limits = room, limits
        self._jobs: collections.OrderedDict[str, RoomJob] = collections.OrderedDict()
        self._keys: dict[tuple[str, str], tuple[str, list[RoomJob]]] = {}

    def __iter__(self) -> Any:
        return iter(list(self._jobs.values()))

    def submit(self, jobs: list[RoomJob]) -> None:
        """Put jobs into the room's queue. Raises Problem if their client has too many; else as Room.submit."""
        owner = jobs[0].owner
        mine = sum(not job.over and job.owner == owner for job in self._jobs.values())
        if mine + len(jobs) > self._limits.jobs:
            self._room.rejected.add("client", by=len(jobs))
            raise Problem(
                429, f"{mine} jobs of this client are unfinished: {self._limits.jobs} are allowed", "too_many_jobs", retry=5
            )
        self._room.submit(jobs)
        self._jobs |= {job.id: job for job in jobs}
        self._forget()

    def once(self, owner: str, key: str, digest: str) -> list[RoomJob] | None:
        """Return the jobs that this client submitted with an idempotency key. Raises Problem if the request was another."""
        before = self._keys.get((owner, key))
        if before is not None and before[0] != digest:
            raise Problem(409, f"Idempotency-Key {key!r}: it was used with another request", "idempotency_conflict")
        return None if before is None else before[1]

    def remember(self, owner: str, key: str, digest: str, jobs: list[RoomJob]) -> None:
        self._keys[owner, key] = digest, jobs

    def get(self, name: str) -> RoomJob:
        """Return a job. Raises Problem."""
        if name not in self._jobs:
            raise Problem(404, f"job {name!r}: no such job, or it is no longer kept", "no_such_job")
        return self._jobs[name]

    def _forget(self) -> None:
        """Drop the oldest finished jobs over the limits."""
        finished = [job for job in self._jobs.values() if job.over]
        size = sum(job.finished.pixels.nbytes for job in finished if job.finished is not None)
        for count, job in enumerate(finished):
            if len(finished) - count <= self._limits.kept and size <= self._limits.kept_bytes:
                break
            size -= 0 if job.finished is None else job.finished.pixels.nbytes
            del self._jobs[job.id]
        self._keys = {key: value for key, value in self._keys.items() if any(job.id in self._jobs for job in value[1])}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What the routes of an application share."""

    room: Room
    settings: Settings
    jobs: Jobs


def shared(request: Any) -> Shared:
    """Return what the routes share, of a Starlette request."""
    return cast(Shared, request.app.state.shared)
