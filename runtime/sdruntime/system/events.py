"""Generators that yield events and return a result: map their events, or run them to the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

Event = TypeVar("Event")
Other = TypeVar("Other")
Result = TypeVar("Result")


class _Run(Generic[Event, Result]):
    """The events of a generator; `result` once they are exhausted."""

    result: Result

    def __init__(self, events: Generator[Event, None, Result]) -> None:
        self._events = events

    def __iter__(self) -> Iterator[Event]:
        self.result = yield from self._events


def mapped(events: Generator[Event, None, Result], change: Callable[[Event], Other]) -> Generator[Other, None, Result]:
    """Yield `change(event)` for each event and return the result of `events`. Closing this generator closes `events`."""
    with contextlib.closing(events):
        run = _Run(events)
        for event in run:
            yield change(event)
        return run.result


def finish(events: Generator[Event, None, Result], handle: Callable[[Event], object] = lambda event: None) -> Result:
    """Run a generator to its end, call `handle` for each event, and return its result. The generator is always closed."""
    with contextlib.closing(events):
        run = _Run(events)
        for event in run:
            handle(event)
        return run.result
