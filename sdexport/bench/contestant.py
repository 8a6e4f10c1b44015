"""One contestant of a benchmark, in a process of its own: what it holds in memory is its own, and so is its cold start.

The child runs this module with the job. It opens, generates a first image and reports how long each part took; then it serves
the parent's requests, one JSON line for one JSON line, until its standard input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdexport.bench.drawers import BundleDrawer, TorchDrawer
from sdexport.errors import BenchError
from sdruntime.system.process import module_command, peak_memory

Message = dict[str, Any]
SHORT = 0.02  # seconds: calls below it are made three in a row, the first of them uncounted


class Contestant:
    """The parent's end. Making it starts the child, `opened` waits for its first image; leaving the context ends it.

    `job`: kind ("bundle", or one of `TORCH`), bundle, backend, checkpoint, request (the fields of a Request), batch, pictures (a
    file for the first ones). `deadline`, on time.monotonic's clock: what has not answered by then is killed.
    """

    def __init__(self, name: str, job: Mapping[str, Any], *, deadline: float) -> None:
        self._deadline, self._late = deadline, False
        self.name, self._notes = name, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._begun = time.monotonic()
        command = module_command(__name__, json.dumps({**job, "begun": self._begun}))
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._notes, text=True, encoding="utf-8"
        )

    def opened(self) -> Message:
        """`cold`: seconds of its `import_s`, `load_s`, `warmup_s` (the first image) and of the `whole_s`, from the start of the
        process to that image, as this side saw it; `peak_memory`, `device_memory`, `versions`. Raises BenchError."""
        told = self._read()
        told["cold"]["whole_s"] = time.monotonic() - self._begun
        return told

    def ask(self, do: str, **arguments: Any) -> Sequence[float]:
        """Return the seconds of the requested work. Raises BenchError."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what ended it is told below
            print(json.dumps({"do": do, **arguments}), file=self._child.stdin, flush=True)
        taken: Sequence[float] = self._read()["taken"]
        return taken

    def _read(self) -> Message:
        assert self._child.stdout is not None
        watchdog = threading.Timer(max(self._deadline - time.monotonic(), 0.0), self._expire)
        watchdog.start()
        try:
            line = self._child.stdout.readline()
        finally:
            watchdog.cancel()
        if self._late:
            raise BenchError(f"{self.name}: no result within the time limit of the benchmark: increase --seconds")
        if not line.endswith("\n"):
            code = self._child.wait()
            self._notes.seek(0)
            said = next((each.strip() for each in reversed(self._notes.read().splitlines()) if each.strip()), "no output")
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}: {said}"
            raise BenchError(f"{self.name}: its process {how}")
        told: Message = json.loads(line)
        if "error" in told:
            raise BenchError(f"{self.name}: {told['error']}")
        return told

    def _expire(self) -> None:
        self._late = True
        self._child.kill()

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()
        self._notes.close()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Drawer(Protocol):
    """What the child holds."""

    def draw(self) -> list[Any]: ...

    def call(self, component: str, dims: Mapping[str, int]) -> object: ...

    def outside(self) -> float:
        """Seconds a UNet call that the host spends outside it, between the first call and the last."""
        ...

    def about(self) -> Message: ...


def open_drawer(job: Message, arrived: list[float]) -> Drawer:
    """`arrived` gets the time at which the imports are done."""
    if job["kind"] == "bundle":
        return BundleDrawer(job, arrived)
    return TorchDrawer(job, arrived)


def _obey(drawer: Drawer, message: Message) -> list[float]:
    if message["do"] == "outside":
        return [drawer.outside()]
    arguments = (message["component"], message["dims"]) if message["do"] == "call" else ()
    call = drawer.call if arguments else drawer.draw
    taken: list[float] = []
    while len(taken) < (3 if taken and taken[0] < SHORT else 1):
        begun = time.perf_counter()
        call(*arguments)
        taken.append(time.perf_counter() - begun)
    return taken[1:] or taken


def _listen(asked: queue.SimpleQueue[str]) -> None:
    """Pass on the parent's requests. The pipe ends when the parent does, and this process with it."""
    for line in sys.stdin:
        asked.put(line)
    os._exit(1)


def _main(job: Message) -> None:
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C strikes the parent too, which ends this process

    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()

    def tell(message: Message) -> None:
        print(json.dumps(message), file=told, flush=True)

    try:
        arrived: list[float] = []
        drawer = open_drawer(job, arrived)
        loaded = time.monotonic()
        pictures = drawer.draw()
        drawn = time.monotonic()
        np.save(job["pictures"], np.stack(pictures))
        cold = {"import_s": arrived[0] - job["begun"], "load_s": loaded - arrived[0], "warmup_s": drawn - loaded}
        tell({"cold": cold, "peak_memory": peak_memory(), **drawer.about()})
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}"})
        return
    while True:
        line = asked.get()
        try:
            tell({"taken": _obey(drawer, json.loads(line))})
        except Exception as error:  # told, and the next is done
            tell({"error": f"{type(error).__name__}: {error}"})


def pictures_of(path: Path) -> list[Any]:
    """The first ones, uint8 [H, W, 3] each."""
    return list(np.load(path))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
    os._exit(0)  # large libraries take seconds to take themselves down
