"""One component of an export, in a process of its own (`sdruntime.system.process`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator

from sdexport.errors import EnvironmentFault, ExportError, ProcessKilled, SdexportError
from sdexport.trace.component import Job, Stage, run
from sdruntime.errors import SdruntimeError
from sdruntime.system.process import Message, serve
from sdruntime.system.process import run_apart as messages_of

_ADVICE = "free some, or export on a larger machine"


def run_apart(job: Job) -> Generator[Stage | int, None, None]:
    """Run a job in its own process: yields its stages, then the peak of its memory in bytes.

    Raises what the job raised; ProcessKilled when a signal ended it; ExportError when it failed in another way.
    """
    messages = messages_of(
        __name__, dataclasses.asdict(job), what=job.component, failed=ExportError, killed=ProcessKilled, advice=_ADVICE
    )
    with contextlib.closing(messages):
        for message in messages:
            yield Stage(**message["stage"]) if "stage" in message else int(message["peak"])


def _work(job: Message, tell: Callable[[Message], None]) -> None:
    for stage in run(Job(**job)):
        tell({"stage": dataclasses.asdict(stage)})


if __name__ == "__main__":
    serve(_work, errors=(SdexportError, SdruntimeError), memory=EnvironmentFault(f"out of memory: {_ADVICE}"))
