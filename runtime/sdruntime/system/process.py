"""Run a job in a separate process: its memory is released when it ends, and a crash does not end the caller.

The child runs a module (`module_command`) whose main calls `serve`. It receives its job as JSON and writes JSON lines:
{"event": …} for each event, then {"result": …, "peak": …}, or {"error": …} with the class and the text of an error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a job in a separate process, and the peak memory of the process in bytes."""

    result: Message
    peak: int


# Does what `python -P -m` does, also in Python 3.10: "" at the head of the path is the current folder. Keep equal to
# WORKER_SOURCE in runtime/capi/src/python/service_source.hpp.
_RUN_MODULE = """\
import sys
if sys.path and sys.path[0] == "":
    del sys.path[0]
del sys.argv[0]
import runpy
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def module_command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """Return the command that runs `module` as `python -m` does, except that the current folder is never searched for modules.

    A checkpoint or bundle may lie in the current folder, and a file `numpy.py` in it must not run.
    """
    return [python, "-c", _RUN_MODULE, module, *arguments]


def run_apart(
    module: str,
    job: Mapping[str, Any],
    *,
    what: str,
    failed: Callable[[str], Exception],
    killed: Callable[[str], Exception],
    advice: str,
    python: str = sys.executable,
    path: str | None = None,
    patience: float = 0.0,
) -> Generator[Message, None, Outcome]:
    """Run a job in `module`: yield its events, and return its outcome.

    Raises the job's own error; `killed` if a signal ended it (`advice` says what to do if memory is short); `failed` if it ended
    in another way. `what` names the work in those two.

    `python`: the interpreter, which searches the folder `path` for modules first. `patience`: if the caller closes the generator
    early, the job is interrupted and has this many seconds to clean up before it is killed; Ctrl-C in a terminal then reaches it
    only through the caller.
    """
    paths = [folder for folder in (path, os.environ.get("PYTHONPATH")) if folder]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            module_command(module, json.dumps(job), python=python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=os.environ if path is None else os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=patience > 0,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        outcome = None
        try:
            for line in child.stdout:
                if not line.endswith("\n"):  # the job ended in the middle of a message
                    break
                message = json.loads(line)
                if "error" in message:
                    raise _from_message(message["error"])
                if "result" in message:
                    outcome = Outcome(**message)
                else:
                    yield message["event"]
            child.wait()
        finally:
            if patience and child.poll() is None:
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(patience)
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()
        if child.returncode != 0:
            log.seek(0)
            last = next((line.strip() for line in reversed(log.read().splitlines()) if line.strip()), "no output")
            if child.returncode > 0:
                raise failed(f"{what}: its process failed with code {child.returncode}: {last}")
            name = signal.Signals(-child.returncode).name
            hint = f": the system was probably out of memory; {advice}" if name == "SIGKILL" else f": {last}"
            raise killed(f"{what}: its process was ended by {name}{hint}")
        if outcome is None:
            raise failed(f"{what}: its process ended without a result")
        return outcome


def serve(
    work: Callable[[Message, Callable[[Message], None]], Message | None],
    *,
    errors: tuple[type[Exception], ...],
    memory: Exception,
) -> None:
    """Run `work(job, send)` as the main of a child process: it calls `send` for each event and returns its result, if it has one.

    The listed `errors` are sent as messages, and `memory` instead of a MemoryError.
    """
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to standard error
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def write(message: Message) -> None:
        print(json.dumps(message), file=output, flush=True)

    try:
        result = work(json.loads(sys.argv[1]), lambda event: write({"event": event}))
        write({"result": result or {}, "peak": peak_memory()})
    except errors as error:
        write({"error": _to_message(error)})
    except MemoryError:
        write({"error": _to_message(memory)})
    except KeyboardInterrupt:
        os._exit(130)
    os._exit(0)  # large libraries take seconds to shut down


def peak_memory() -> int:
    """Return the peak memory of this process, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # ru_maxrss also counts the parent's memory at the fork
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _to_message(error: Exception) -> Message:
    extra = {"faults": list(error.faults)} if hasattr(error, "faults") else {}
    return {"module": type(error).__module__, "kind": type(error).__name__, "text": str(error), "extra": extra}


def _from_message(message: Message) -> Exception:
    """Return the child's error with its class, text and fields, without calling its constructor."""
    kind = getattr(importlib.import_module(message["module"]), message["kind"])
    error: Exception = kind.__new__(kind)
    error.args = (message["text"],)
    vars(error).update({name: tuple(value) for name, value in message["extra"].items()})
    return error


def _end_with_parent() -> None:
    """End this process when the parent ends, in whatever way: the parent writes nothing to the pipe, which closes then."""
    sys.stdin.read()
    os._exit(1)
