"""Report progress on standard error: one changing line on a terminal, time-stamped lines in a log, nothing if disabled.

    with progress_on(sys.stderr) as reporter:
        reporter.show("generate", "step", done=3, total=20)

During a long stage a thread repeats the report: the elapsed time on a terminal, a line every few seconds in a log.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from sdruntime.errors import printable

REDRAW = 0.5  # seconds between two updates of the line on a terminal
LOG_EVERY = 15.0  # seconds between two lines of one stage in a log
NARROWEST_BAR, WIDEST_BAR = 8, 40
_FULL, _EMPTY = "━", "─"
_ASCII = {_FULL: "#", _EMPTY: "-", "…": "~"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """A stage of a task, since `begun`: `done` of `total` in `unit` ("B" for bytes). `total` is 0 if it is not known."""

    task: str
    stage: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    begun: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.task}: {self.stage}" if self.stage else self.task

    def count(self) -> str:
        """Return the done and the total amount."""
        if self.unit == "B":
            return f"{_bytes(self.done)}/{_bytes(self.total)}"
        return f"{self.done}/{self.total}"

    def pace(self, now: float) -> list[str]:
        """Return the rate and the remaining time, if they are known."""
        elapsed = now - self.begun
        if not 0 < self.done < self.total or elapsed <= 0:
            return []
        rate = self.done / elapsed
        speed = f"{_bytes(rate)}/s" if self.unit == "B" else f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
        return [speed, f"ETA {duration((self.total - self.done) / rate)}"]


def terminal_line(stage: Activity, now: float, columns: int) -> str:
    """Return `stage` in at most `columns` characters.

    The bar fills the rest of the line. If room is short, the rate is omitted first, then the bar, the elapsed time, the count.
    """
    words = [duration(now - stage.begun)]
    barred = stage.total > 0
    if barred:
        words = [stage.count(), *stage.pace(now), *words]
    title, tail = stage.title, "  ".join(words)
    while (room := columns - len(tail) - 2) < len(title) + (NARROWEST_BAR + 2 if barred else 0) and (barred or len(words) > 1):
        if len(words) == 4:
            del words[1]
        elif barred:
            barred = False
        else:
            del words[-1 if len(words) == 3 else 0]
        tail = "  ".join(words)
    if room < len(title) or room < 1:
        title = title[: max(room - 1, 0)] + "…"
    if not barred:
        return f"{title}  {tail}"[:columns]
    width = min(WIDEST_BAR, room - len(title) - 2)
    return f"{title}  {bar(stage.done / stage.total, width)}  {tail}"


def bar(fraction: float, width: int) -> str:
    """Return a bar of `width` characters. It is full only if everything is done."""
    full = int(width * min(max(fraction, 0.0), 1.0))
    return _FULL * full + _EMPTY * (width - full)


def log_line(stage: Activity, now: float, when: float) -> str:
    """Return `stage` as a line of a log. `when`: the wall clock time, in seconds since the epoch."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
    parts = [f"{stage.count()}", *stage.pace(now)] if stage.total else []
    if now >= stage.begun + 1:
        parts.append(f"after {duration(now - stage.begun)}")
    return f"{stamp} {stage.title}" + (f": {', '.join(parts)}" if parts else "")


def duration(seconds: float) -> str:
    """Return M:SS, or H:MM:SS from an hour on."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


class Reporter:
    """A reporter that shows no progress, for `--quiet` and `--json`, and the base class of the others. It still prints notes."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock

    def show(self, task: str, stage: str = "", *, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Show what is being done now. A call with the same task, stage and total advances it."""

    def clear(self) -> None:
        """Remove the progress from the line."""

    def note(self, message: str) -> None:
        """Print a message on standard error."""
        self.clear()
        print(printable(message), file=self.stream, flush=True)

    def print(self, text: str) -> None:
        """Print a line of the command's result on standard output."""
        self.clear()
        print(printable(text), flush=True)

    def close(self) -> None: ...

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Shown(Reporter):
    """A reporter that keeps the current stage, and a thread that shows it again."""

    every: float

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._lock, self._done = threading.RLock(), threading.Event()
        self._stage: Activity | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Shown:
        self._thread = threading.Thread(target=self._run, name="sdruntime-progress", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self.clear()
            self._stage = None

    def show(self, task: str, stage: str = "", *, done: int = 0, total: int = 0, unit: str = "") -> None:
        with self._lock:
            now, last = self.clock(), self._stage
            same = last is not None and (last.task, last.stage, last.total) == (task, stage, total)
            begun = last.begun if last is not None and same else now
            self._stage = Activity(task=task, stage=stage, done=done, total=total, unit=unit, begun=begun)
            self.draw(self._stage, now, new=not same)

    def tick(self) -> None:
        with self._lock:
            if self._stage is not None:
                self.draw(self._stage, self.clock(), new=False)

    def draw(self, stage: Activity, now: float, *, new: bool) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        while not self._done.wait(self.every):
            self.tick()


class Line(_Shown):
    """One changing line, as wide as the terminal."""

    every = REDRAW

    def draw(self, stage: Activity, now: float, *, new: bool) -> None:
        text = terminal_line(stage, now, max(columns_of(self.stream) - 1, 1))
        if not _can_write(self.stream):
            text = "".join(_ASCII.get(letter, letter) for letter in text)
        print(f"\r\x1b[2K{text}", end="", file=self.stream, flush=True)

    def clear(self) -> None:
        with self._lock:
            if self._stage is not None:
                print("\r\x1b[2K", end="", file=self.stream, flush=True)


class Log(_Shown):
    """Lines with time stamps: one when a stage begins, and one every `LOG_EVERY` seconds while it lasts."""

    every = LOG_EVERY / 5

    def __init__(
        self, stream: TextIO, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        super().__init__(stream, clock)
        self._wall, self._last = wall, 0.0

    def draw(self, stage: Activity, now: float, *, new: bool) -> None:
        if new or now - self._last >= LOG_EVERY:
            self._last = now
            print(log_line(stage, now, self._wall()), file=self.stream, flush=True)


def progress_on(stream: TextIO | None = None, *, quiet: bool = False) -> Reporter:
    """Return the reporter for `stream` (None: standard error): a line on a terminal, a log elsewhere, none if `quiet`."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return Reporter(stream)
    return Line(stream) if is_terminal(stream) else Log(stream)


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def columns_of(stream: TextIO) -> int:
    """Return the terminal's current width in columns, or 80 if `stream` is not a terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _can_write(stream: TextIO) -> bool:
    try:
        (_FULL + _EMPTY + "…").encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
