"""Reporter: widths that follow the terminal, a log that is never silent, and nothing left of it on the line."""

from __future__ import annotations

import io
import re

import pytest

from sdruntime.cli.progress import LOG_EVERY, Activity, Line, Log, Reporter, bar, log_line, progress_on, terminal_line

STEPS = Activity(task="denoise", stage="images 1 to 8 of 10", done=5, total=20, unit="steps", begun=100.0)
BYTES = Activity(task="load", stage="unet, text_encoder", done=1_200_000_000, total=3_438_000_000, unit="B", begun=100.0)
LONG = Activity(task="build unet-tensorrt-rtx1.7.0.11-ampere+-fp16-64x64-512x512-2048x2048-b1-8", stage="optimise", begun=0.0)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_line_has_the_count_the_rate_and_the_time_that_is_left() -> None:
    line = terminal_line(STEPS, 110.0, 100)
    assert line.startswith("denoise: images 1 to 8 of 10  ━━━━━━━━━─────────────────────────────  ")
    assert line.endswith("5/20  2 s each  ETA 0:30  0:10")
    assert "1.2 GB/3.44 GB  120 MB/s  ETA 0:18  0:10" in terminal_line(BYTES, 110.0, 100)
    assert terminal_line(LONG, 3700.0, 120).endswith("optimise  1:01:40")


@pytest.mark.parametrize("stage", [STEPS, BYTES, LONG])
def test_no_line_is_wider_than_the_terminal(stage: Activity) -> None:
    for columns in range(1, 200):
        line = terminal_line(stage, stage.begun + 61, columns)
        assert len(line) <= columns
    assert "━" in terminal_line(STEPS, 110.0, 80)
    assert "ETA" in terminal_line(STEPS, 110.0, 79)
    assert "━" in terminal_line(STEPS, 110.0, 60)
    for columns in (60, 50, 45):  # the time that is left outlasts the rate, the bar and the time so far
        assert "ETA 0:30" in terminal_line(STEPS, 110.0, columns)
        assert "ETA 0:18" in terminal_line(BYTES, 110.0, columns)
    for columns in (20, 30, 40):  # what is being done outlasts the numbers
        assert terminal_line(STEPS, 110.0, columns).startswith("denoise: ")


def test_a_bar_begins_empty_and_is_full_only_at_the_end() -> None:
    assert bar(0, 10) == "──────────"
    assert bar(0.5, 10) == "━━━━━─────"
    assert bar(0.9999, 10) == "━━━━━━━━━─"
    assert bar(1, 10) == bar(7, 10) == "━━━━━━━━━━"


def test_a_log_has_a_line_for_each_stage_and_one_every_few_seconds_of_a_long_one() -> None:
    stream, clock = io.StringIO(), Clock()
    log = Log(stream, clock, wall=lambda: 0.0)
    log.show("unet", "trace")
    for _ in range(120):  # a minute in which the work has nothing to say
        clock.now += 0.5
        log.tick()
    log.show("unet", "weights", total=4, unit="B")
    for done in range(5):
        log.show("unet", "weights", done=done, total=4, unit="B")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + 60 / LOG_EVERY + 1
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d unet: ", line) for line in lines)
    assert [line.partition(": ")[2] for line in lines[:3]] == ["trace", "trace: after 0:15", "trace: after 0:30"]
    assert lines[-1].endswith("unet: weights: 0 B/4 B")
    assert "\x1b" not in stream.getvalue()
    assert log_line(STEPS, 110.0, 0.0).endswith("denoise: images 1 to 8 of 10: 5/20, 2 s each, ETA 0:30, after 0:10")


def test_a_terminal_has_one_line_that_results_and_notes_take_away(capsys: pytest.CaptureFixture[str]) -> None:
    stream, clock = Terminal(), Clock()
    with progress_on(stream) as line:
        assert isinstance(line, Line)
        line.clock = clock
        line.show("load")
        clock.now += 2
        line.tick()
        line.note("warning: look")
        line.print("out.png")
    written = stream.getvalue()
    assert "\n" not in written.replace("warning: look\n", "")
    assert "\x1b[2Kload  0:02" in written
    assert "\x1b[2Kwarning: look\n" in written
    assert written.endswith("\x1b[2K")
    assert capsys.readouterr().out == "out.png\n"


def test_where_the_terminal_cannot_write_the_bar_it_is_ascii() -> None:
    stream = Terminal()
    stream.encoding = "latin-1"  # type: ignore[misc]
    Line(stream, Clock()).show("denoise", done=1, total=2)
    assert "####" in stream.getvalue()
    stream.getvalue().encode("ascii")


def test_what_shows_progress_is_chosen_by_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert type(progress_on(Terminal())) is Line
    assert type(progress_on(io.StringIO())) is Log
    assert type(progress_on(Terminal(), quiet=True)) is Reporter
    monkeypatch.setenv("TERM", "dumb")
    assert type(progress_on(Terminal())) is Log
