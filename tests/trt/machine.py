"""A machine with fake GPUs and one version of TensorRT, in place of the real ones for the length of a test.

def test_something(machine):
    here = machine(surface, total=1 << 30)
    engine = open_engine(bundle, spec, EngineOptions())      # finds libcudart and `import tensorrt`
    ...
    assert here.gpus.leaks() == []
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from trt.fake_cudart import Cuda, Cudart, loader
from trt.fake_tensorrt import fake_tensorrt
from trt.streams import Gpus
from trt.surface import Surface

from sdruntime import cuda

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_rtx_bindings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`trt` is None on a machine without TensorRT."""

    gpus: Gpus
    cudart: Cudart
    cuda: Cuda
    trt: Any


@contextmanager
def machine(surface: Surface | None, **gpus: Any) -> Iterator[Machine]:
    """`gpus` are the settings of `streams.Gpus`."""
    made = Gpus(**gpus)
    here = Machine(gpus=made, cudart=Cudart(made), cuda=Cuda(made), trt=surface and fake_tensorrt(surface, made))
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            patch.setitem(sys.modules, name, None)  # an import of it fails
        if surface is not None:
            patch.setitem(sys.modules, surface.module, here.trt)
        patch.setattr(ctypes, "CDLL", loader(here.cudart, here.cuda))
        cuda.devices.cache_clear()
        try:
            yield here
        finally:
            cuda.devices.cache_clear()
