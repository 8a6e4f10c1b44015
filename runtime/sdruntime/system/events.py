"""Generators that yield events and return a result: how one is passed on, and how one is run to its end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Event = TypeVar("Event")
Other = TypeVar("Other")
Result = TypeVar("Result")


def mapped(events: Generator[Event, None, Result], change: Callable[[Event], Other]) -> Generator[Other, None, Result]:
    """Yield `change(event)` for each event; return what `events` returns. Closing it closes `events`."""
    try:
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                result: Result = end.value
                return result
            yield change(event)
    finally:
        events.close()


def finish(events: Generator[Event, None, Result], handle: Callable[[Event], object] = lambda event: None) -> Result:
    """Run a generator to its end, with `handle` called for each event; return what it returns. It is closed in any case."""
    try:
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                result: Result = end.value
                return result
            handle(event)
    finally:
        events.close()
