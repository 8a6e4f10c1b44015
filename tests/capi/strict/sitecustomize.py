"""Imported by every interpreter that starts with this folder in PYTHONPATH: its GPUs and its TensorRT are the strict fakes.

STRICT_MACHINE names a pickle of (surface, GPUs that have no memory left, settings of Gpus). A host that has a variable `fake`
(device.c) gets what it does with the GPU put there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trt.machine import Machine, machine
from trt.streams import Stream

from sdruntime.system.cuda import Cuda

_stack = contextlib.ExitStack()  # of the process: never closed
_surface, _full, _settings = pickle.loads(Path(os.environ["STRICT_MACHINE"]).read_bytes())
here: Machine = _stack.enter_context(machine(_surface, **_settings))
for _device in _full:
    here.gpus.memory.taken[_device] = here.gpus.memory.total
worked_on: set[int] = set()  # the streams that anything was done with


def _noted(stream: Callable[[int], Stream]) -> Callable[[int], Stream]:
    def noted(handle: int) -> Stream:
        worked_on.add(handle)
        return stream(handle)

    return noted


here.gpus.stream = _noted(here.gpus.stream)  # type: ignore[method-assign]


class Host:
    """What the program does with the first GPU, in the order of `fake` in device.c."""

    def __init__(self) -> None:
        self._own = contextlib.ExitStack()
        kinds = {
            self.stream: ctypes.CFUNCTYPE(ctypes.c_void_p),
            self.allocate: ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t),
            self.read: ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
            self.tell: ctypes.CFUNCTYPE(None),
            self.leave: ctypes.CFUNCTYPE(None),
        }
        self.functions: list[Any] = [kind(function) for function, kind in kinds.items()]

    def _cuda(self) -> Cuda:
        return self._own.enter_context(Cuda.open())

    def stream(self) -> int:
        return self._own.enter_context(self._cuda().stream()).handle

    def allocate(self, size: int) -> int:
        return self._own.enter_context(contextlib.closing(self._cuda().allocate(size, "the host's picture"))).pointer

    def read(self, source: int, target: int, size: int) -> None:
        """What is there now, whatever is queued; then nothing is."""
        found = here.gpus.memory.at(source)
        assert found is not None
        ctypes.memmove(target, found.data[:size].tobytes(), size)
        found.data[:] = 0

    def tell(self) -> None:
        gpus = here.gpus
        document = {
            "left": gpus.leaks(),
            "retained": here.driver.retained,
            "devices": sorted({each.device for each in gpus.memory.live() if each.device is not None}),
            "streams": sorted(worked_on),
            "queued": len(gpus.queued()),
            "counts": gpus.counts,
        }
        os.write(1, f"tell {json.dumps(document)}\n".encode())

    def leave(self) -> None:
        self._own.close()


_host = Host()
with contextlib.suppress(ValueError):  # a worker process is no such host
    _table = (ctypes.c_void_p * len(_host.functions)).in_dll(ctypes.PyDLL(None), "fake")
    for _number, _function in enumerate(_host.functions):
        _table[_number] = ctypes.cast(_function, ctypes.c_void_p)
