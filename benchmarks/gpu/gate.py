"""Gate of every GPU target: check that a GPU is present, and that the required backends ran.

    python benchmarks/gpu/gate.py COMMAND...     run COMMAND if the driver lists a GPU

Without a GPU it fails with exit code 3; with ALLOW_NO_GPU=1 it exits with 0 and prints that nothing was tested. With
REQUIRE=tensorrt, or a list separated by commas, the target fails if one of these backends did not run. Uses only the standard
library, because it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from ctypes import byref, c_int

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")  # those that run on an NVIDIA GPU, in order of preference
DRIVERS = ("libcuda.so.1", "nvcuda.dll")  # keep equal to sdruntime.system.cuda
OK, FAILED, USAGE, NO_GPU = 0, 1, 2, 3


def gpus() -> int:
    """Return the number of GPUs that the driver lists; 0 without a driver."""
    for name in DRIVERS:
        with contextlib.suppress(OSError):
            driver, count = ctypes.CDLL(name), c_int()
            if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(byref(count)) == 0:
                return count.value
    return 0


def closed() -> tuple[int, str] | None:
    """Return (exit code, reason) if there is no GPU, else None."""
    if gpus():
        return None
    reason = f"no NVIDIA GPU: no driver ({' or '.join(DRIVERS)}) starts and lists a device; `nvidia-smi` must list it"
    if os.environ.get("ALLOW_NO_GPU") == "1":
        return OK, f"{reason}. ALLOW_NO_GPU=1: skipped, NOTHING WAS TESTED"
    return NO_GPU, f"{reason}. To skip it, testing nothing: ALLOW_NO_GPU=1"


def required() -> list[str]:
    """Return the backends in REQUIRE. Raises ValueError for an unknown one."""
    names = [name.strip() for name in os.environ.get("REQUIRE", "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in BACKENDS]:
        raise ValueError(f"REQUIRE={','.join(unknown)}: known are {', '.join(BACKENDS)}")
    return names


def not_run(ran: Collection[str]) -> list[str]:
    """Return the backends in REQUIRE that are not in `ran`."""
    return [name for name in required() if name not in ran]


def passed(run: Callable[[], int]) -> int:
    """Return the exit code of `run`, or that of the gate if it does not run."""
    try:
        required()
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    if refusal := closed():
        code, reason = refusal
        print(reason, file=sys.stderr)
        return code
    return run()


def main(command: Sequence[str]) -> int:
    return passed(lambda: subprocess.run(command, check=False).returncode if command else OK)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
