"""ctypes bindings of sdruntime.h, for tests of a host that is written in Python. Only what the tests need."""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from capi.building import INCLUDE

HEADER = INCLUDE / "sdruntime" / "sdruntime.h"
TYPES = {
    "uint32_t": c_uint32,
    "int32_t": c_int32,
    "uint64_t": c_uint64,
    "double": c_double,
    "size_t": c_size_t,
    "const char *": c_char_p,
    "void *": c_void_p,
    "const uint8_t *": c_void_p,
    "const sdr_control *const *": c_void_p,
    "const float *": POINTER(c_float),
    "sdr_log_callback ": c_void_p,
    "sdr_progress_callback ": c_void_p,
}
PROGRESS = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p)


def text() -> str:
    """Return the header without its comments."""
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)


def functions() -> list[str]:
    """Return the names of all functions in the header."""
    return sorted(re.findall(r"^SDR_API [^;(]*?(sdr_\w+)\(", text(), flags=re.MULTILINE))


def fields(struct: str) -> list[tuple[str, str]]:
    """Return (type, name) of each field of a struct."""
    [body] = re.findall(rf"typedef struct {struct} \{{(.*?)\}} {struct};", text(), flags=re.DOTALL)
    return re.findall(r"^\s*(.+?[ *])(\w+);", body, flags=re.MULTILINE)


STRUCTS = ("sdr_open_params", "sdr_control", "sdr_job_params", "sdr_progress", "sdr_result")


def struct(name: str) -> Any:
    """Return the ctypes structure of a struct in the header."""
    members = [(field, TYPES[kind] if kind in TYPES else TYPES[kind.strip()]) for kind, field in fields(name)]
    return type(name, (ctypes.Structure,), {"_fields_": members})


OpenParams, Control, JobParams, Progress, Result = (struct(name) for name in STRUCTS)


class Failed(Exception):
    """The code, reason and message of a status."""

    def __init__(self, code: int, reason: int, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class Library:
    """The loaded library. With `gil`, the host holds the GIL during each call, as an extension module may."""

    def __init__(self, path: Path, *, gil: bool = False) -> None:
        self.c: Any = (ctypes.PyDLL if gil else ctypes.CDLL)(str(path))
        self.c.sdr_status_message.restype = c_char_p
        for name in functions():
            if name.startswith(("sdr_runtime", "sdr_job")) and not name.endswith(("free", "init")):
                getattr(self.c, name).restype = c_void_p

    def check(self, status: int | None) -> None:
        """Raise Failed for a status and free it."""
        if status is None:
            return
        handle = c_void_p(status)
        message = self.c.sdr_status_message(handle).decode()
        error = Failed(self.c.sdr_status_code(handle), self.c.sdr_status_reason(handle), message)
        self.c.sdr_status_free(handle)
        raise error

    def open(self, **settings: Any) -> c_void_p:
        params, runtime = OpenParams(), c_void_p()
        self.c.sdr_open_params_init(ctypes.byref(params), c_size_t(ctypes.sizeof(params)))
        _set(params, settings)
        self.check(self.c.sdr_runtime_open(ctypes.byref(params), ctypes.byref(runtime)))
        return runtime

    def submit(self, runtime: c_void_p, **settings: Any) -> c_void_p:
        params, job = JobParams(), c_void_p()
        self.c.sdr_job_params_init(ctypes.byref(params), c_size_t(ctypes.sizeof(params)))
        _set(params, settings)
        self.check(self.c.sdr_job_submit(runtime, ctypes.byref(params), ctypes.byref(job)))
        return job

    def wait(self, job: c_void_p, timeout_ms: int = -1) -> None:
        self.check(self.c.sdr_job_wait(job, c_int64(timeout_ms)))

    def result(self, job: c_void_p) -> Any:
        result = Result()
        self.c.sdr_result_init(ctypes.byref(result), c_size_t(ctypes.sizeof(result)))
        self.check(self.c.sdr_job_result(job, ctypes.byref(result)))
        return result

    def rgb(self, job: c_void_p) -> bytes:
        result, rows, stride = self.result(job), POINTER(c_uint8)(), c_size_t()
        self.check(self.c.sdr_job_rgb(job, ctypes.byref(rows), ctypes.byref(stride)))
        return ctypes.string_at(rows, stride.value * result.height)

    def png(self, job: c_void_p) -> bytes:
        data, size = POINTER(c_uint8)(), c_size_t()
        self.check(self.c.sdr_job_png(job, ctypes.byref(data), ctypes.byref(size)))
        return ctypes.string_at(data, size.value)

    def close(self, runtime: c_void_p) -> None:
        self.check(self.c.sdr_runtime_close(runtime))
        self.c.sdr_runtime_free(runtime)


def _set(params: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        plain = value.encode() if isinstance(value, str) else str(value).encode() if isinstance(value, Path) else value
        setattr(params, name, plain)
