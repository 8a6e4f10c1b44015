"""A machine with fake GPUs and one version of TensorRT, in place of the real ones for the length of a test.

def test_something(machine):
    here = machine(surface, total=1 << 30)
    engine = open_engine(bundle, spec, EngineOptions(), Shared())      # finds libcuda and `import tensorrt`
    ...
    assert here.gpus.leaks() == []
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from trt.fake_driver import Driver, loader
from trt.fake_tensorrt import fake_tensorrt
from trt.streams import Gpus
from trt.surface import Surface

from sdruntime.backends.trt import build, worker
from sdruntime.system import cuda
from sdruntime.system.process import Outcome

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_rtx_bindings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`trt` is None on a machine without TensorRT."""

    gpus: Gpus
    driver: Driver
    trt: Any

    @property
    def backend(self) -> str:
        """The name under which sdruntime knows the library."""
        return str(self.trt.__name__).replace("_", "-")


@contextmanager
def machine(surface: Surface | None, **gpus: Any) -> Iterator[Machine]:
    """`gpus` are the settings of `streams.Gpus`. Builds run in this process, which alone sees the fakes."""
    made = Gpus(**gpus)
    here = Machine(gpus=made, driver=Driver(made), trt=surface and fake_tensorrt(surface, made))
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            patch.setitem(sys.modules, name, None)  # an import of it fails
        if surface is not None:
            patch.setitem(sys.modules, surface.module, here.trt)
        patch.setattr(ctypes, "CDLL", loader(here.driver))
        patch.setattr(build, "run_apart", _run_here)
        _forget()
        try:
            yield here
        finally:
            _forget()


def _run_here(module: str, job: dict[str, Any], **_: Any) -> Generator[dict[str, Any], None, Outcome]:
    stages: list[dict[str, Any]] = []
    properties = worker.work(json.loads(json.dumps(job)), stages.append)
    yield from stages
    return Outcome(properties or {}, peak=0)


def _forget() -> None:
    cuda.load_driver.cache_clear()
    cuda.devices.cache_clear()
