"""What checks session settings: the names that ONNX Runtime has, as it silently ignores unknown ones, and a model to open."""

from __future__ import annotations

import difflib
import functools
import mmap
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_NAMES = re.compile(rb"(?:session|optimization|ep|mlas|memory)\.[a-zA-Z0-9_.]{3,100}")

# y = Identity(x), float32 [1]: opening it checks settings without the weights of a real model
EMPTY_MODEL = (
    b'\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def warn_of_unknown(ort: Any, names: Iterable[str]) -> None:
    """Issue a RuntimeWarning for each name that does not occur in the library's file: ONNX Runtime has no list of names."""
    known = _known(_library_file()) if names else frozenset()
    for name in names:
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f": did you mean {', '.join(near)}?" if near else ""
            text = (
                f"session setting {name!r}: ONNX Runtime {ort.__version__} does not seem to have it, and ignores unknown settings"
            )
            warnings.warn(f"{text}{hint}", RuntimeWarning, stacklevel=2)


@functools.cache
def _known(path: Path | None) -> frozenset[str]:
    """Return the setting names that occur in the library's file."""
    if path is None:
        return frozenset()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return frozenset(str(name, "ascii") for name in _NAMES.findall(data))


def _library_file() -> Path | None:
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as binding
    except ImportError:
        return None
    return Path(binding.__file__)
