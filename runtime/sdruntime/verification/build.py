"""Build engines in a separate process, which `sdexport` runs with another Python.

A job with "request" and "precision" checks whether the interpreter can build; a job with "request", "bundle" and "verify" builds,
and sends each event of the build. Events and requests are records of `bundle.records` in JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdruntime.bundle.records import json_from_record, record_from_json
from sdruntime.engines.building import BuildEvent, BuildRequest, build_engines
from sdruntime.errors import OutOfSpace, SdruntimeError, SettingError
from sdruntime.system.events import finish
from sdruntime.system.process import Message, serve
from sdruntime.verification.verify import check_engine


def check_job(request: BuildRequest, precision: str) -> Message:
    """Return the job that checks whether an interpreter can build."""
    return {"request": json_from_record(request), "precision": precision}


def build_job(bundle: str, request: BuildRequest, *, verify: bool) -> Message:
    """Return the job that builds."""
    return {"request": json_from_record(request), "bundle": bundle, "verify": verify}


def event_of(message: Message) -> BuildEvent:
    """Return the event of a message. Raises SettingError if it is damaged."""
    event: BuildEvent = _record(BuildEvent, message)
    return event


def work(job: Message, send: Callable[[Message], None]) -> None:
    """Run one job. Raises the errors of `BuildRequest.resolve_library` and `build_engines`."""
    request: BuildRequest = _record(BuildRequest, job["request"])
    if "bundle" not in job:
        request.resolve_library(job["precision"])
        return
    events = build_engines(job["bundle"], request, check=check_engine if job["verify"] else None)
    finish(events, lambda event: send(json_from_record(event)))


def _record(kind: type, value: object) -> Any:
    faults: list[str] = []
    record = record_from_json(kind, value, where="", faults=faults)
    if faults:
        raise SettingError(f"{kind.__name__}: {'; '.join(faults)}")
    return record


if __name__ == "__main__":
    serve(
        work, errors=(SdruntimeError, OSError), memory=OutOfSpace("out of memory: free some, or build fewer components at once")
    )
