"""Generators that yield events and return a result: map their events, or run them to the end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Event = TypeVar("Event")
Other = TypeVar("Other")
Result = TypeVar("Result")


def mapped(events: Generator[Event, None, Result], change: Callable[[Event], Other]) -> Generator[Other, None, Result]:
    """Yield `change(event)` for each event and return the result of `events`. Closing this generator closes `events`."""
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
    """Run a generator to its end, call `handle` for each event, and return its result. The generator is always closed."""
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
