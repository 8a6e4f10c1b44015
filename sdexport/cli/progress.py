"""Show progress: a row for each task on a terminal (with rich), or the log lines of sdruntime.cli.progress elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from sdruntime.cli.progress import Activity, Log, Reporter, bar, is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress as Bars


def progress_on(stream: TextIO | None = None, *, quiet: bool = False) -> Reporter:
    """Return the reporter for `stream` (standard error if None): rows on a terminal, a log elsewhere, silent if `quiet`."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return Reporter(stream)
    return Rows(stream) if is_terminal(stream) else Log(stream)


class Rows(Reporter):
    """Show a row for each task, as wide as the terminal. The bar moves during stages that have a total, and ends full."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._bars: Bars | None = None
        self._tasks: dict[str, Any] = {}
        self._stage: Activity | None = None

    def show(self, task: str, stage: str = "", *, done: int = 0, total: int = 0, unit: str = "") -> None:
        if self._bars is None:
            self._bars = _bars(self.stream)
            self._bars.start()
        if task not in self._tasks:
            self._finish()
            self._tasks[task] = self._bars.add_task(task, total=1, stage="", numbers="")
        now, previous = self.clock(), self._stage
        same = previous is not None and (previous.task, previous.stage, previous.total) == (task, stage, total)
        begun = previous.begun if previous is not None and same else now
        self._stage = Activity(task=task, stage=stage, done=done, total=total, unit=unit, begun=begun)
        rate, eta = (self._stage.pace(now) or ["", ""]) if total else ["", ""]
        numbers = "  ".join(filter(None, [eta, self._stage.count(), rate])) if total else ""  # the end is cut if room is short
        self._bars.update(self._tasks[task], stage=stage, completed=done if total else 0, total=total or 1, numbers=numbers)

    def clear(self) -> None:
        """Leave the current rows as they are; the next tasks get new rows."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._stage = None, None
        self._tasks.clear()

    def note(self, message: str) -> None:
        if self._bars is None:
            super().note(message)
        else:  # above the rows
            self._bars.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def print(self, text: str) -> None:
        self._finish()
        super().print(text)

    def close(self) -> None:
        self.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        self.close()

    def _finish(self) -> None:
        """Show the current task as done: the next one starts only after it."""
        if self._bars is not None and self._stage is not None:
            self._bars.update(self._tasks[self._stage.task], completed=1, total=1, numbers="", stage="done")


def _bars(stream: TextIO) -> Bars:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class Bar(ProgressColumn):
        """A bar as in sdruntime: the remaining part is another character, not another colour."""

        def render(self, task: Task) -> Any:
            return Cells(task.percentage / 100)

    class Cells:
        def __init__(self, fraction: float) -> None:
            self.fraction = fraction

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            yield Text(bar(self.fraction, options.max_width))

        def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
            return Measurement(1, options.max_width)

    def text(field: str, ratio: int) -> TextColumn:
        return TextColumn(f"{{{field}}}", markup=False, table_column=Column(ratio=ratio, no_wrap=True, overflow="ellipsis"))

    return Bars(
        SpinnerColumn(finished_text=" "),
        text("task.description", 6),
        text("task.fields[stage]", 3),
        Bar(table_column=Column(ratio=4)),
        text("task.fields[numbers]", 5),
        TimeElapsedColumn(),
        console=Console(file=stream),
        expand=True,
    )
