"""A job of the engine room: one image, from its submission to its end."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sdruntime.pipeline.images.pixels import Pixels

State = Literal["waiting", "running", "done", "failed", "cancelled"]
CANCELLED = 130  # exit code


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The image of a job. `parameters`: its settings as text; `seconds`: those of each stage, as Timings."""

    pixels: Pixels
    parameters: str
    seed: int
    sampler: str
    seconds: Mapping[str, float]
    warnings: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job has no image: the exit code of the command line, a message, and a reason for programs, such as "worker_lost"."""

    code: int
    message: str
    reason: str = ""


@dataclass(slots=True, kw_only=True, eq=False)
class RoomJob:
    """One image to generate. Used in the event loop only.

    `fields`, `blob`: what the service's message "submit" takes besides its number. `steps` is 0 until it runs. `clean`: with a
    preview, the estimate of the finished latents, float32 [C, h, w]. `owner`: whose it is, to limit how many a client has.
    """

    model: str
    fields: Mapping[str, Any]
    blob: bytes | None = None
    owner: str = ""
    patience: float | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: State = "waiting"
    step: int = 0
    steps: int = 0
    clean: np.ndarray | None = None
    finished: Finished | None = None
    failure: Failure | None = None
    overtaken: int = 0  # how many later jobs, of other models, have started before it
    created: float = field(default_factory=time.time)  # seconds since 1970, like the next two
    started: float | None = None
    ended: float | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def over(self) -> bool:
        return self.state not in ("waiting", "running")

    def change(self, **values: Any) -> None:
        """Set attributes, and wake those who watch."""
        for name, value in values.items():
            setattr(self, name, value)
        if self.over and self.ended is None:
            self.ended, self.blob, self.clean = time.time(), None, None
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def fail(self, code: int, message: str, reason: str = "") -> None:
        state: State = "cancelled" if code == CANCELLED else "failed"
        self.change(state=state, failure=Failure(code=code, message=message, reason=reason))

    async def watch(self) -> AsyncIterator[RoomJob]:
        """Yield now, and after each change, until it is over; changes that come quickly one after the other are one."""
        while True:
            changed = self._changed
            yield self
            if self.over:
                return
            await changed.wait()

    async def wait(self) -> None:
        """Wait until it is over."""
        async for _ in self.watch():
            pass
