"""A build of engines in a process of its own, which `sdexport` runs with another Python.

A job with "asked" and "precision" checks whether the interpreter can build; one with "asked", "bundle" and "verify" builds. Its
messages are {"event": ...}, one for each event of the build. Events and requests have the form that `bundle.records` reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from sdruntime.bundle.records import json_from_record, record_from_json
from sdruntime.engines.building import BuildEvent, BuildRequest, build_engines
from sdruntime.errors import OutOfSpace, SdruntimeError, SettingError
from sdruntime.system.process import Message, serve
from sdruntime.verification.verify import held


def check_job(asked: BuildRequest, precision: str) -> Message:
    return {"asked": json_from_record(asked), "precision": precision}


def build_job(bundle: str, asked: BuildRequest, *, verify: bool) -> Message:
    return {"asked": json_from_record(asked), "bundle": bundle, "verify": verify}


def event_of(message: Message) -> BuildEvent:
    event: BuildEvent = _record(BuildEvent, message["event"])
    return event


def work(job: Message, tell: Callable[[Message], None]) -> None:
    asked: BuildRequest = _record(BuildRequest, job["asked"])
    if "bundle" not in job:
        asked.resolve_library(job["precision"])
        return
    events = build_engines(job["bundle"], asked, check=held if job["verify"] else None)
    with contextlib.closing(events):
        for event in events:
            tell({"event": json_from_record(event)})


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
