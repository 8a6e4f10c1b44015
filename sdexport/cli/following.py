"""Show the progress of a build."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from sdexport.build.events import EngineProgress, ExportProgress
    from sdruntime.cli.progress import Reporter

Result = TypeVar("Result")


def run_with_progress(events: Generator[ExportProgress | EngineProgress, None, Result], reporter: Reporter) -> Result:
    """Run a build with its progress shown; return its result."""
    from sdexport.build.events import EngineProgress
    from sdexport.trace.component import PROBE
    from sdruntime.system.events import finish

    def show(event: ExportProgress | EngineProgress) -> None:
        if isinstance(event, EngineProgress):
            engine, stage, state = event.event.engine, event.event.stage, event.event.state
            if stage is None:
                reporter.show(engine, "" if state == "begin" else state)
            else:
                reporter.show(engine, stage.name, done=stage.done, total=stage.total)
        else:
            stage, unit = event.stage, "" if event.component == PROBE else "B"
            reporter.show(event.component, stage.name, done=stage.done, total=stage.total, unit=unit)

    return finish(events, show)
