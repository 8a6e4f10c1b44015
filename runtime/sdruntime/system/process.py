"""Work in a process of its own: its memory goes with it, and what kills it does not kill the caller.

The child runs a module (`module_command`) whose main calls `serve`. It gets its job as JSON and writes its messages as JSON
lines; an error travels back as its class and its text.
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
from pathlib import Path
from typing import Any

Message = dict[str, Any]

# What `python -P -m` does, for Python 3.10 too: "" at the head of the path is the current folder. Keep equal to WORKER_SOURCE in
# runtime/capi/src/service_source.hpp.
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
) -> Generator[Message, None, None]:
    """Run a job in `module`: yields its messages, then {"peak": the most bytes of memory that it had}.

    Raises what the job raised; `killed` when a signal ended it (`advice` says what to do about too little memory); `failed` when
    it ended in another way. `what` names the work in those two.

    `python`: the interpreter, which finds modules in the folder `path` first. `patience`: a job that the caller leaves early is
    interrupted and has so many seconds to clean up before it is killed. A terminal's Ctrl-C reaches it through the caller alone.
    """
    paths = [each for each in (path, os.environ.get("PYTHONPATH")) if each]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as notes:
        child = subprocess.Popen(
            module_command(module, json.dumps(job), python=python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=notes,
            text=True,
            encoding="utf-8",
            env=os.environ if path is None else os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=patience > 0,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if not line.endswith("\n"):  # ended in the middle of a message
                    break
                message = json.loads(line)
                if "error" in message:
                    raise _from_message(message["error"])
                yield message
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
            notes.seek(0)
            last = next((line.strip() for line in reversed(notes.read().splitlines()) if line.strip()), "no output")
            if child.returncode > 0:
                raise failed(f"{what}: its process failed with code {child.returncode}: {last}")
            name = signal.Signals(-child.returncode).name
            hint = f": the system was probably out of memory; {advice}" if name == "SIGKILL" else f": {last}"
            raise killed(f"{what}: its process was ended by {name}{hint}")


def serve(
    work: Callable[[Message, Callable[[Message], None]], None], *, errors: tuple[type[Exception], ...], memory: Exception
) -> None:
    """The main of a child: `work(job, tell)` once, its messages told on the standard output that the process began with.

    Those `errors` are told as messages; `memory` in place of a MemoryError.
    """
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(message: Message) -> None:
        print(json.dumps(message), file=told, flush=True)

    try:
        work(json.loads(sys.argv[1]), tell)
    except errors as error:
        tell({"error": _to_message(error)})
    except MemoryError:
        tell({"error": _to_message(memory)})
    except KeyboardInterrupt:
        os._exit(130)
    tell({"peak": peak_memory()})
    os._exit(0)  # large libraries take seconds to take themselves down


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


def _to_message(error: Exception) -> Message:
    extra = {"faults": list(error.faults)} if hasattr(error, "faults") else {}
    return {"module": type(error).__module__, "kind": type(error).__name__, "text": str(error), "extra": extra}


def _from_message(message: Message) -> Exception:
    """The error of the child: its class, its text and its fields, without making it anew."""
    kind = getattr(importlib.import_module(message["module"]), message["kind"])
    error: Exception = kind.__new__(kind)
    error.args = (message["text"],)
    vars(error).update({name: tuple(value) for name, value in message["extra"].items()})
    return error


def _end_with_parent() -> None:
    """The parent writes nothing to its end of the pipe; it closes when the parent ends, however that comes about."""
    sys.stdin.read()
    os._exit(1)
