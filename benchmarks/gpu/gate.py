"""The door of every GPU target: is there a GPU, and did what had to run on it run?

    python benchmarks/gpu/gate.py COMMAND...     runs COMMAND where the driver shows a GPU

Without one it exits 3 and says so; with ALLOW_NO_GPU=1 it exits 0 and says that nothing was shown. REQUIRE=tensorrt, or a list
with commas, makes it a failure that one of these backends did not run. The standard library alone: it comes before any install.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from ctypes import byref, c_int

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")  # those that run on an NVIDIA GPU, the preferred one first
DRIVERS = ("libcuda.so.1", "nvcuda.dll")  # as sdruntime.system.cuda
OK, FAILED, USAGE, NO_GPU = 0, 1, 2, 3


def gpus() -> int:
    """How many GPUs the driver shows; 0 without a driver too."""
    for name in DRIVERS:
        with contextlib.suppress(OSError):
            driver, count = ctypes.CDLL(name), c_int()
            if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(byref(count)) == 0:
                return count.value
    return 0


def closed() -> tuple[int, str] | None:
    """(exit code, why) where there is no GPU to run on; None where there is one."""
    if gpus():
        return None
    reason = f"no NVIDIA GPU: no driver ({' or '.join(DRIVERS)}) starts here and shows a device; `nvidia-smi` must list it"
    if os.environ.get("ALLOW_NO_GPU") == "1":
        return OK, f"{reason}. ALLOW_NO_GPU=1: passed over, and NOTHING WAS SHOWN"
    return NO_GPU, f"{reason}. To pass over this, showing nothing: ALLOW_NO_GPU=1"


def required() -> list[str]:
    """The backends of REQUIRE. Raises ValueError for one that does not exist."""
    names = [name.strip() for name in os.environ.get("REQUIRE", "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in BACKENDS]:
        raise ValueError(f"REQUIRE={','.join(unknown)}: known are {', '.join(BACKENDS)}")
    return names


def not_run(ran: Collection[str]) -> list[str]:
    """The backends of REQUIRE that are not among those that `ran`."""
    return [name for name in required() if name not in ran]


def passed(run: Callable[[], int]) -> int:
    """What `run` returns, behind the door: its exit code, or the door's own."""
    try:
        required()
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    if shut := closed():
        code, why = shut
        print(why, file=sys.stderr)
        return code
    return run()


def main(command: Sequence[str]) -> int:
    return passed(lambda: subprocess.run(command, check=False).returncode if command else OK)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
