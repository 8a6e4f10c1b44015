"""One component, one process: its memory goes with it, and what kills it does not kill the build.

The child is `python -m sdexport.process`, gets a job as JSON and writes its stages as JSON lines.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sdruntime.errors
from sdexport import errors
from sdexport.errors import EnvironmentFault, ExportError, ProcessKilled, SdexportError
from sdexport.job import Job, Stage, run
from sdruntime.errors import SdruntimeError

_ERRORS = {module.__name__: module for module in (errors, sdruntime.errors)}


def run_apart(job: Job) -> Iterator[Stage | int]:
    """Run a job in its own process: yields its stages, then the peak of its memory in bytes.

    Raises what the job raised; ProcessKilled when a signal ended it; ExportError when it failed in another way.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as notes:
        command = [sys.executable, "-m", "sdexport.process", json.dumps(dataclasses.asdict(job))]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=notes, text=True, encoding="utf-8"
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if not line.endswith("\n"):  # ended in the middle of a message
                    break
                message = json.loads(line)
                if "stage" in message:
                    yield Stage(**message["stage"])
                elif "peak" in message:
                    yield int(message["peak"])
                else:
                    raise _from_message(message["error"])
            child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()
        if child.returncode != 0:
            notes.seek(0)
            raise _death(job.component, child.returncode, notes.read())


def _to_message(error: Exception) -> dict[str, Any]:
    extra = {"faults": list(error.faults)} if isinstance(error, (errors.CheckpointError, errors.PrecisionError)) else {}
    return {"module": type(error).__module__, "kind": type(error).__name__, "text": str(error), "extra": extra}


def _from_message(message: dict[str, Any]) -> Exception:
    """The error of the child: its class, its text and its fields, without making it anew."""
    kind = getattr(_ERRORS[message["module"]], message["kind"])
    error: Exception = kind.__new__(kind)
    error.args = (message["text"],)
    vars(error).update({name: tuple(value) for name, value in message["extra"].items()})
    return error


def _death(component: str, code: int, notes: str) -> SdexportError:
    last = next((line.strip() for line in reversed(notes.splitlines()) if line.strip()), "it said nothing")
    if code >= 0:
        return ExportError(f"{component}: its process failed with code {code}: {last}")
    name = signal.Signals(-code).name
    hint = (
        ": the system was probably out of memory; free some, or export on a larger machine" if name == "SIGKILL" else f": {last}"
    )
    return ProcessKilled(f"{component}: its process was ended by {name}{hint}")


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # ru_maxrss counts what the parent had at the fork too
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _end_with_parent() -> None:
    """The parent writes nothing to its end of the pipe; it closes when the parent ends, however that comes about."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """The child: one job, told on the standard output that the process began with."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=told, flush=True)

    try:
        for stage in run(Job(**json.loads(sys.argv[1]))):
            tell({"stage": dataclasses.asdict(stage)})
    except (SdexportError, SdruntimeError) as error:
        tell({"error": _to_message(error)})
    except MemoryError:
        tell({"error": _to_message(EnvironmentFault("out of memory: free some, or export on a larger machine"))})
    tell({"peak": peak_memory()})
    os._exit(0)  # torch takes seconds to take itself down


if __name__ == "__main__":
    main()
