"""Replace the GPUs and TensorRT of every interpreter that starts with this folder in PYTHONPATH with the strict fakes.

STRICT_MACHINE names a pickle of (surface, GPUs without free memory, settings of Gpus). If the host has a variable `fake`
(device.c), the functions that it uses on the GPU are stored there.
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

_stack = contextlib.ExitStack()  # open until the process ends
_surface, _full, _settings = pickle.loads(Path(os.environ["STRICT_MACHINE"]).read_bytes())
strict_machine: Machine = _stack.enter_context(machine(_surface, **_settings))
for _device in _full:
    strict_machine.gpus.memory.taken[_device] = strict_machine.gpus.memory.total
worked_on: set[int] = set()  # the handles of the streams that were used


def _recorded(stream: Callable[[int], Stream]) -> Callable[[int], Stream]:
    def recorded(handle: int) -> Stream:
        worked_on.add(handle)
        return stream(handle)

    return recorded


strict_machine.gpus.stream = _recorded(strict_machine.gpus.stream)  # type: ignore[method-assign]


class Host:
    """The functions of the host on the first GPU, in the order of `fake` in device.c."""

    def __init__(self) -> None:
        self._own = contextlib.ExitStack()
        kinds = {
            self.stream: ctypes.CFUNCTYPE(ctypes.c_void_p),
            self.allocate: ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t),
            self.read: ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
            self.report: ctypes.CFUNCTYPE(None),
            self.release: ctypes.CFUNCTYPE(None),
        }
        self.functions: list[Any] = [kind(function) for function, kind in kinds.items()]

    def _cuda(self) -> Cuda:
        return self._own.enter_context(Cuda.open())

    def stream(self) -> int:
        return self._own.enter_context(self._cuda().stream()).handle

    def allocate(self, size: int) -> int:
        return self._own.enter_context(contextlib.closing(self._cuda().allocate(size, "the host's image"))).pointer

    def read(self, source: int, target: int, size: int) -> None:
        """Copy the current content, without waiting for queued work, then clear it."""
        allocation = strict_machine.gpus.memory.at(source)
        assert allocation is not None
        ctypes.memmove(target, allocation.data[:size].tobytes(), size)
        allocation.data[:] = 0

    def report(self) -> None:
        gpus = strict_machine.gpus
        document = {
            "left": gpus.leaks(),
            "retained": strict_machine.driver.retained,
            "devices": sorted({item.device for item in gpus.memory.live() if item.device is not None}),
            "streams": sorted(worked_on),
            "queued": len(gpus.queued()),
            "counts": gpus.counts,
        }
        os.write(1, f"report {json.dumps(document)}\n".encode())

    def release(self) -> None:
        self._own.close()


_host = Host()
with contextlib.suppress(ValueError):  # a worker process has no variable `fake`
    _table = (ctypes.c_void_p * len(_host.functions)).in_dll(ctypes.PyDLL(None), "fake")
    for _number, _function in enumerate(_host.functions):
        _table[_number] = ctypes.cast(_function, ctypes.c_void_p)
