"""Export one component in its own process (`sdruntime.system.process`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator

from sdexport.checkpoint.overrides import Overrides
from sdexport.errors import EnvironmentFault, ExportError, ProcessKilled, SdexportError
from sdexport.trace.component import ComponentJob, run
from sdruntime.backends.base.building import Stage
from sdruntime.errors import SdruntimeError
from sdruntime.system.events import mapped
from sdruntime.system.process import Message, run_apart, serve

_ADVICE = "free some, or export on a larger machine"


def run_job(job: ComponentJob) -> Generator[Stage, None, int]:
    """Run a job in its own process, yielding its stages; return its peak memory in bytes.

    Raises the job's error, ProcessKilled if a signal ended it, and ExportError if it failed in another way.
    """
    stages = run_apart(
        __name__, dataclasses.asdict(job), what=job.component, failed=ExportError, killed=ProcessKilled, advice=_ADVICE
    )
    outcome = yield from mapped(stages, lambda stage: Stage(**stage))
    return outcome.peak


def _work(job: Message, send: Callable[[Message], None]) -> None:
    for stage in run(ComponentJob(**job | {"overrides": Overrides(**job["overrides"])})):
        send(dataclasses.asdict(stage))


if __name__ == "__main__":
    serve(_work, errors=(SdexportError, SdruntimeError), memory=EnvironmentFault(f"out of memory: {_ADVICE}"))
