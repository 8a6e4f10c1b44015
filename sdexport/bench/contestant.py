"""Run one contestant of a benchmark in its own process, so that its memory and its cold start are measured alone.

The child process runs this module with the job. It loads, generates the first images and reports how long each part took. Then
it answers the parent's requests, one JSON line each, until its standard input ends.
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

from sdexport.bench.runners import BundleRunner, TorchRunner
from sdexport.errors import BenchError
from sdruntime.system.process import module_command, peak_memory

Message = dict[str, Any]
SHORT = 0.02  # seconds: shorter calls are made three times in a row, and the first is not counted


class Contestant:
    """The parent's side. The constructor starts the child, `opened` waits for its first images, `close` kills it.

    `job` has the keys kind ("bundle", or one of `TORCH`), bundle, backend, checkpoint, request (the fields of a Request), batch,
    and `pictures` (the file for the first images). A child that has not answered by `deadline` (time.monotonic) is killed.
    """

    def __init__(self, name: str, job: Mapping[str, Any], *, deadline: float) -> None:
        self._deadline, self._late = deadline, False
        self.name, self._stderr = name, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._begun = time.monotonic()
        command = module_command(__name__, json.dumps({**job, "begun": self._begun}))
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, encoding="utf-8"
        )

    def opened(self) -> Message:
        """Wait for the child's first message and return it: `cold`, `peak_memory`, `device_memory`, `versions`.

        `cold` has the seconds of `import_s`, `load_s`, `warmup_s` (the first images) and `whole_s`, which the parent measures
        from the start of the process. Raises BenchError.
        """
        message = self._read()
        message["cold"]["whole_s"] = time.monotonic() - self._begun
        return message

    def measure(self, action: str, **arguments: Any) -> Sequence[float]:
        """Have the child run `action` ("generate", "call" or "outside"); return the seconds of each run. Raises BenchError."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_read` reports why the child ended
            print(json.dumps({"do": action, **arguments}), file=self._child.stdin, flush=True)
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
            self._stderr.seek(0)
            last = next((text.strip() for text in reversed(self._stderr.read().splitlines()) if text.strip()), "no output")
            reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}: {last}"
            raise BenchError(f"{self.name}: its process {reason}")
        message: Message = json.loads(line)
        if "error" in message:
            raise BenchError(f"{self.name}: {message['error']}")
        return message

    def _expire(self) -> None:
        self._late = True
        self._child.kill()

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()
        self._stderr.close()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Runner(Protocol):
    """What the child process runs."""

    def generate(self) -> list[Any]:
        """Return the images of the job, uint8 [H, W, 3]."""
        ...

    def call(self, component: str, dims: Mapping[str, int]) -> object:
        """Call one component at `dims`."""
        ...

    def outside(self) -> float:
        """Return the seconds per UNet call that the host spends outside the UNet, between the first call and the last."""
        ...

    def about(self) -> Message:
        """Return `device_memory` (bytes) and `versions`, as far as they are known."""
        ...


def open_runner(job: Message, arrived: list[float]) -> Runner:
    """Open the runner of the job's kind; append to `arrived` the time (time.monotonic) at which its imports are done."""
    if job["kind"] == "bundle":
        return BundleRunner(job, arrived)
    return TorchRunner(job, arrived)


def _run(runner: Runner, message: Message) -> list[float]:
    """Return the seconds of each run of the requested action."""
    if message["do"] == "outside":
        return [runner.outside()]
    arguments = (message["component"], message["dims"]) if message["do"] == "call" else ()
    call = runner.call if arguments else runner.generate
    taken: list[float] = []
    while len(taken) < (3 if taken and taken[0] < SHORT else 1):
        begun = time.perf_counter()
        call(*arguments)
        taken.append(time.perf_counter() - begun)
    return taken[1:] or taken


def _listen(requests: queue.SimpleQueue[str]) -> None:
    """Queue the parent's requests. The pipe closes when the parent ends, and then this process exits."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(1)


def _main(job: Message) -> None:
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print to stdout, which carries the messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process

    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()

    def send(message: Message) -> None:
        print(json.dumps(message), file=output, flush=True)

    try:
        arrived: list[float] = []
        runner = open_runner(job, arrived)
        loaded = time.monotonic()
        images = runner.generate()
        generated = time.monotonic()
        np.save(job["pictures"], np.stack(images))
        cold = {"import_s": arrived[0] - job["begun"], "load_s": loaded - arrived[0], "warmup_s": generated - loaded}
        send({"cold": cold, "peak_memory": peak_memory(), **runner.about()})
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
        return
    while True:
        line = requests.get()
        try:
            send({"taken": _run(runner, json.loads(line))})
        except Exception as error:  # reported to the parent, and the next request is served
            send({"error": f"{type(error).__name__}: {error}"})


def load_images(path: Path) -> list[Any]:
    """Return the first images that a contestant saved, uint8 [H, W, 3] each."""
    return list(np.load(path))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
    os._exit(0)  # large libraries take seconds to shut down
