"""The ranges that a profiler shows: of components and of steps, opened and closed in order, in the package's own domain."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from trt.machine import Machine

from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.system import nvtx as annotate
from sdruntime.system.cuda import CudaError


class Profiler(types.ModuleType):
    """A stand-in for the package nvtx: `told` has each range's name when it is opened, and "/" and the name when it is closed."""

    def __init__(self) -> None:
        super().__init__("nvtx")
        self.told: list[str] = []

    @contextlib.contextmanager
    def annotate(self, message: str, *, domain: str) -> Iterator[None]:
        assert domain == "sdruntime"
        self.told.append(message)
        try:
            yield
        finally:
            self.told.append(f"/{message}")


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Profiler]:
    made = Profiler()
    monkeypatch.setitem(sys.modules, "nvtx", made)
    annotate._nvtx.cache_clear()
    yield made
    annotate._nvtx.cache_clear()


def step(number: int, *within: str, group: int = 0) -> list[str]:
    name = f"step {number}, group {group}"
    return [name, *(word for each in within for word in (each, f"/{each}")), f"/{name}"]


def drawn(pipe: Pipeline, *, on_device: bool) -> None:
    stream = pipe.stream("a cat", steps=3, size=(64, 64), seed=1, on_device=on_device)
    for _ in stream:
        pass
    assert stream.result.pixels[0].shape == (64, 64, 3)


def test_ranges_of_the_numpy_loop(here: Machine, small_folder: Path, profiler: Profiler) -> None:
    with Pipeline.open(small_folder) as pipe:
        drawn(pipe, on_device=False)
    steps = [word for number in range(3) for word in step(number, "unet")]
    assert profiler.told == ["text_encoder", "/text_encoder", *steps, "vae_decoder", "/vae_decoder"]


def test_ranges_of_the_loop_on_the_device(here: Machine, small_folder: Path, profiler: Profiler) -> None:
    """The host only queues: a range is what it took to queue a step."""
    with Pipeline.open(small_folder) as pipe:
        drawn(pipe, on_device=True)
    steps = [word for number in range(3) for word in step(number)]
    assert profiler.told == ["text_encoder", "/text_encoder", *steps, "vae_decoder", "/vae_decoder"]


def test_jobs_of_two_shapes_are_two_groups_of_a_step(here: Machine, small_folder: Path, profiler: Profiler) -> None:
    with Pipeline.open(small_folder) as pipe:
        pipe([Request(prompt="a cat", steps=1, size=size) for size in ((64, 64), (128, 64))])
    assert profiler.told[2:6] == step(0) + step(0, group=1)


def test_an_error_closes_its_ranges(here: Machine, small_folder: Path, profiler: Profiler) -> None:
    with Pipeline.open(small_folder) as pipe:
        stream = pipe.stream("a cat", steps=3, size=(64, 64), on_device=False)
        here.driver.fail_next("cuMemcpyDtoHAsync_v2", 1)
        with pytest.raises(CudaError):
            next(iter(stream))
    assert profiler.told[2:] == step(0, "unet")


def test_without_the_package_nothing_is_told(here: Machine, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    annotate._nvtx.cache_clear()
    try:
        assert isinstance(annotate.annotate("a"), contextlib.nullcontext)
    finally:
        annotate._nvtx.cache_clear()
