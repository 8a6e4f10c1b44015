"""Ctrl-C at any point of an image: nothing stays on the device, and a pipeline that is kept open generates the next one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt.machine import Machine

from sdruntime.backends.trt import loop
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.stream import Stream

REQUESTS = [
    Request(prompt="a cat", seed=1, steps=3, size=(64, 64), sampler="dpmpp_2m"),
    Request(prompt="a dog", seed=2, steps=5, size=(128, 64), sampler="euler_a"),
]
# A call that makes something is omitted: an interrupt just after it comes before anybody knows what was made.
CALLS = (
    *("cuCtxSetCurrent", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2", "cuStreamSynchronize"),
    *("cuGraphLaunch", "cuEventQuery", "cuEventRecord"),
)


def drawn(stream: Stream, at: int | None = None) -> list[np.ndarray]:
    for state in stream:
        if state.step == at:
            raise KeyboardInterrupt
    return stream.result.pixels


def same(ours: list[np.ndarray], reference: list[np.ndarray]) -> bool:
    return all((one == other).all() for one, other in zip(ours, reference, strict=True))


class Interrupting:
    """A callable that does what it did, and at its call number `at` raises KeyboardInterrupt after that."""

    def __init__(self, function: Callable[..., Any], at: int) -> None:
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *args: Any) -> Any:
        result = self.function(*args)
        self.calls += 1
        if self.calls - 1 == self.at:
            raise KeyboardInterrupt
        return result


@pytest.fixture
def reference(here: Machine, small_folder: Path) -> list[np.ndarray]:
    with Pipeline.open(small_folder) as pipe:
        return drawn(pipe.stream(REQUESTS, on_device=True))


def interrupted(here: Machine, folder: Path, at: int | None = None) -> Stream:
    """Draw until the interrupt comes, and leave the pipeline by it."""
    streams = []

    def block() -> None:
        with Pipeline.open(folder) as pipe:
            streams.append(pipe.stream(REQUESTS, on_device=True))
            drawn(streams[0], at)

    with pytest.raises(KeyboardInterrupt) as caught:
        block()
    assert caught.value.__context__ is None
    assert here.gpus.leaks() == []
    assert here.driver.retained == [0]
    return streams[0]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_between_two_steps(here: Machine, small_folder: Path, step: int) -> None:
    stream = interrupted(here, small_folder, at=step)
    assert [job.run.step for job in stream.jobs] == [min(step, 3), min(step, 5)]
    assert all(np.isfinite(job.run.x).all() for job in stream.jobs)


def test_in_the_wait_for_a_step(
    here: Machine, small_folder: Path, reference: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = Interrupting(time.sleep, -1)
    monkeypatch.setattr(loop.time, "sleep", sleep)
    with Pipeline.open(small_folder) as pipe:
        drawn(pipe.stream(REQUESTS, on_device=True))
    assert sleep.calls >= 4
    for at in range(sleep.calls):
        monkeypatch.setattr(loop.time, "sleep", Interrupting(sleep.function, at))
        stream = interrupted(here, small_folder)
        assert all(np.isfinite(job.run.x).all() for job in stream.jobs)
        monkeypatch.setattr(loop.time, "sleep", Interrupting(sleep.function, at))
        with Pipeline.open(small_folder) as pipe:
            with pytest.raises(KeyboardInterrupt):
                drawn(pipe.stream(REQUESTS, on_device=True))
            assert same(drawn(pipe.stream(REQUESTS, on_device=True)), reference)
        assert here.gpus.leaks() == []


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("on_device", [False, True], ids=["numpy", "device"])
def test_after_any_call(here: Machine, small_folder: Path, reference: list[np.ndarray], name: str, on_device: bool) -> None:
    functions = here.driver._functions
    function = functions[name]
    with Pipeline.open(small_folder) as pipe:
        before = Counter(here.gpus.counts)
        drawn(pipe.stream(REQUESTS, on_device=on_device))
        count = (here.gpus.counts - before)[name]
    assert count or not on_device
    for at in range(0, count, 7 if name == "cuCtxSetCurrent" else 1):
        with Pipeline.open(small_folder) as pipe:
            functions[name] = Interrupting(function, at)  # type: ignore[assignment]
            with pytest.raises(KeyboardInterrupt):
                drawn(pipe.stream(REQUESTS, on_device=on_device))
            functions[name] = function
            assert same(drawn(pipe.stream(REQUESTS, on_device=True)), reference)
        assert here.gpus.leaks() == []
