"""One component of an export, in a process of its own (`sdruntime.system.process`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator

from sdexport.errors import EnvironmentFault, ExportError, ProcessKilled, SdexportError
from sdexport.trace.component import ComponentJob, run
from sdruntime.backends.base.building import Stage
from sdruntime.errors import SdruntimeError
from sdruntime.system.process import Message, run_apart, serve

_ADVICE = "free some, or export on a larger machine"


def run_job(job: ComponentJob) -> Generator[Stage, None, int]:
    """Run a job in its own process: yields its stages, and returns the peak of its memory in bytes.

    Raises what the job raised; ProcessKilled when a signal ended it; ExportError when it failed in another way.
    """
    messages = run_apart(
        __name__, dataclasses.asdict(job), what=job.component, failed=ExportError, killed=ProcessKilled, advice=_ADVICE
    )
    peak = 0
    with contextlib.closing(messages):
        for message in messages:
            if "stage" in message:
                yield Stage(**message["stage"])
            peak = message.get("peak", peak)
    return peak


def _work(job: Message, tell: Callable[[Message], None]) -> None:
    for stage in run(ComponentJob(**job)):
        tell({"stage": dataclasses.asdict(stage)})


if __name__ == "__main__":
    serve(_work, errors=(SdexportError, SdruntimeError), memory=EnvironmentFault(f"out of memory: {_ADVICE}"))
