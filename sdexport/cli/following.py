"""A build, shown while it goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from sdexport.build.events import EngineProgress, Progress
    from sdruntime.cli.progress import Progress as Shown


End = TypeVar("End")


def followed(events: Iterable[Progress | EngineProgress | End], shown: Shown) -> End:
    """Show a build; returns its end, the first event that is no step."""
    from sdexport.build.events import EngineProgress, Progress

    for event in events:
        if isinstance(event, Progress):
            stage = event.stage
            shown.show(event.component, stage.name, done=stage.done, total=stage.total, unit="B")
        elif isinstance(event, EngineProgress):
            each = event.event
            if each.stage is None:
                shown.show(each.engine, "" if each.state == "begin" else each.state)
            else:
                shown.show(each.engine, each.stage.name, done=each.stage.done, total=each.stage.total)
        else:
            return event
    raise AssertionError("a build tells its end")
