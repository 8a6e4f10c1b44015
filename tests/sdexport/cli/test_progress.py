"""The rows of sdexport's progress, rendered by rich: their bars begin empty, move, end full, and are as wide as the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sdexport.cli.progress import Rows, progress_on
from sdruntime.cli.progress import Log, Reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "30")


def drawn(rows: Rows) -> list[str]:
    """The rows as they are now."""
    bars = rows._bars
    assert bars is not None
    paper = Console(file=io.StringIO(), width=bars.console.width, color_system=None)
    with paper.capture() as captured:
        paper.print(bars.make_tasks_table(bars.tasks))
    return captured.get().splitlines()


@pytest.mark.parametrize("columns", [80, 120])
def test_bars_begin_empty_move_and_end_full_in_the_terminals_width(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with Rows(Terminal()) as rows:
        rows.show("unet", "trace")
        (first,) = drawn(rows)
        assert "━" not in first
        assert "─" in first
        rows.show("unet", "weights", done=50_000_000, total=100_000_000, unit="B")
        (half,) = drawn(rows)
        assert "━─" in half
        assert "50 MB/100 MB" in half
        rows.show("text_encoder-tensorrt-rtx1.7.0.11-ampere+-fp16-64x64-512x512-2048x2048-b1-8", "begin")
        lines = drawn(rows)
        assert "─" not in lines[0]
        assert "done" in lines[0]
        assert "…" in lines[1]
        assert {len(line) for line in (first, half, *lines)} == {columns}


def test_a_narrow_terminal_still_shows_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    times = iter([100.0, 110.0])
    with Rows(Terminal(), clock=lambda: next(times)) as rows:
        rows.show("unet", "weights", total=3_438_000_000, unit="B")
        rows.show("unet", "weights", done=1_200_000_000, total=3_438_000_000, unit="B")
        (row,) = drawn(rows)
        assert "ETA 0:18" in row
        assert len(row) == 60


def test_elsewhere_it_is_the_log_of_sdruntime() -> None:
    assert type(progress_on(Terminal())) is Rows
    assert type(progress_on(io.StringIO())) is Log
    assert type(progress_on(Terminal(), quiet=True)) is Reporter
