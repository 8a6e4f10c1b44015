"""Serve one bundle to a non-Python host: messages in, events out, over a Batcher. `runtime/capi` embeds this.

A message is a JSON object in UTF-8, some with a blob of bytes. From the host:

    {"op": "open", "bundle": PATH, "options": {...}}            answered by "ready" or "refused"; see `message.OpenOptions`
    {"op": "submit", "job": ID, "request": {...}, ...}          see `message.Submit`; blob: the start image, RGB8 rows,
                                                                and with "mask": true the mask, rows of 8 bits of gray,
                                                                and with "depth": [W, H] the depth map, of these sides,
                                                                and for each of "controls" its image, RGB8 rows,
                                                                and for each [W, H] of "image_prompt" an image
    {"op": "cancel", "job": ID}                                 no effect on a finished job
    {"op": "finish", "job": ID}                                 ends it after its step, with the image so far
    {"op": "close"}                                             cancels all unfinished jobs; answered by "closed", the last event

To the host, each job's events in order and ended by one "done" or "failed":

    {"event": "ready", "describe": {...}}                       `describe.pipeline_document`
    {"event": "refused", "code": N, "message": TEXT}            and "reason", if a host may want to act on it: `REASONS`
    {"event": "started", "job", "steps"}
    {"event": "progress", "job", "step", "steps", "preview": [C, h, w]}     both only with "preview": true;
                                                                blob: float32, the estimate of the finished latents
    {"event": "done", "job", "width", "height", "seed", "sampler", "timings", "warnings", "parameters", "rgb", "png": BYTES}
                                                                blob: RGB8 rows, then the PNG's bytes if requested;
                                                                parameters: the settings, as in the PNG's text
    {"event": "failed", "job", "code", "message"}               and "reason", the same or "closed"
    {"event": "log", "level": "warning" or "error", "message"}
    {"event": "closed"}

Codes are the exit codes of the command line (`errors`), and 130 for a cancelled job. `python -m sdruntime.serving.service FD` is
the same as a separate process, over the Unix socket FD (`channel`); it exits when the socket closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import CPU, EngineOptions
from sdruntime.backends.base.session import session
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.records import json_from_text
from sdruntime.errors import BufferTooSmall, QueueFull, SdruntimeError, SettingError, Unsupported, plain
from sdruntime.pipeline.images.png import png_from_image
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.requests.tags import with_tagged
from sdruntime.serving.batcher import Batcher, ImageFuture, Progress
from sdruntime.serving.blob import bytes_of, images_of
from sdruntime.serving.channel import BadFrame, Channel
from sdruntime.serving.describe import finished, pipeline_document
from sdruntime.serving.message import Cancel, Finish, Open, Submit, message_from_json
from sdruntime.system.cuda import device_index

CANCELLED = 130
REASONS: dict[type[BaseException], str] = {
    QueueFull: "queue_full",
    Unsupported: "unsupported",
    BufferTooSmall: "buffer_too_small",
    MemoryError: "out_of_memory",
}  # keep equal to runtime/capi/src/api/runtime.cpp
_RECORDING = threading.Lock()  # warnings are recorded for the whole process


class Service:
    """The service. `emit(message, blob)` is called with each event, on any thread and concurrently; it may keep its arguments.
    `apart`: the host is another process, whose stream and device memory cannot be used."""

    def __init__(self, emit: Callable[[bytes, memoryview | None], object], *, apart: bool = False) -> None:
        self._emit, self._apart = emit, apart
        self._lock = threading.Lock()  # guards what follows
        self._jobs: dict[int, ImageFuture] = {}
        self._pipe: Pipeline | None = None
        self._batcher: Batcher | None = None
        self._lora_dir: str | None = None
        self._closing = False
        self._opened = contextlib.ExitStack()

    def handle(self, message: bytes, blob: bytes | memoryview | None = None, size: int | None = None) -> None:
        """Handle one message. `blob` is copied; `size` is its length in bytes if it was not read.

        Errors are sent as events, not raised. Only "open" blocks, until the engines are open. May be called from any thread.
        """
        document: Any = None
        try:
            document = _document(message)
            parsed = message_from_json(document)
            if isinstance(parsed, Open):
                self._open(parsed)
            elif isinstance(parsed, Submit):
                self._submit(parsed, blob, memoryview(blob or b"").nbytes if size is None else size)
            elif isinstance(parsed, Cancel | Finish):
                self._end(parsed)
            else:
                self._close()
        except Exception as error:
            self._refuse(document, error)

    # -- messages

    def _open(self, message: Open) -> None:
        options = message.options
        with self._lock:
            if self._batcher is not None or self._closing:
                raise SettingError("open: this service has already opened a bundle: start another service for another bundle")
        if self._apart and options.stream:
            raise Unsupported("stream: a separate process cannot use the caller's CUDA stream: open the bundle in process")
        engine_options = EngineOptions(
            device=device_index(options.device),
            threads=options.threads,
            memory=options.memory,
            lora_memory=options.lora_memory,
            low_memory=options.low_memory,
            tile=options.tile,
            stream=options.stream or 0,
            measure=options.measure,
            session=options.session,
        )
        with contextlib.ExitStack() as stack, _RECORDING, warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("default")
            pipe = Pipeline.open(
                message.bundle,
                backend=options.backend,
                options=engine_options,
                refiner=options.refiner,
                embeddings=options.embeddings,
            )
            unsuitable = {spec.backend for spec in pipe.engines.chosen if not BACKENDS[spec.backend].gpu_only}
            if options.stream and unsuitable:
                raise Unsupported(
                    f"stream: engines of {', '.join(sorted(unsuitable))} cannot use the caller's CUDA stream: build them "
                    "with --backend tensorrt"
                )
            stack.enter_context(pipe)
            batcher = stack.enter_context(Batcher(pipe, queue=options.queue, running=options.running))
            with self._lock:
                if self._closing:
                    raise SdruntimeError("the service was closed meanwhile")
                self._pipe, self._batcher, self._opened = pipe, batcher, stack.pop_all()
                self._lora_dir = options.lora_dir
        for warning in recorded:
            self._log("warning", str(warning.message))
        self._send({"event": "ready", "describe": pipeline_document(pipe) | {"queue": batcher.queue, "running": batcher.running}})

    def _submit(self, message: Submit, blob: bytes | memoryview | None, size: int) -> None:
        request = with_tagged(message.request.request(images_of(message, blob, size), message.controls), self._lora_dir)
        with self._lock:
            if self._batcher is None or self._pipe is None or self._closing:
                raise SdruntimeError("the service is closed" if self._closing else "no bundle is open: open one first")
            if message.job in self._jobs:
                raise SettingError(f"job {message.job} is already running")
            _check_buffer(self._pipe, message, request, apart=self._apart)
            self._jobs[message.job] = self._batcher.submit(
                request,
                progress=lambda progress: self._progress(message, progress),
                preview=message.preview,
                done=lambda future: self._finished(message, future),
            )

    def _end(self, message: Cancel | Finish) -> None:
        with self._lock:
            future = self._jobs.get(message.job)
        if future is not None:
            (future.finish if isinstance(message, Finish) else future.cancel)()

    def _close(self) -> None:
        """Close the pipeline on a separate thread, which waits for the current step."""
        with self._lock:
            if self._closing:
                return
            self._closing = True

        def close() -> None:
            try:
                self._opened.close()
            except Exception as error:
                self._log("error", _traceback(error))
            with self._lock:
                self._pipe = self._batcher = None  # closes the bundle's descriptor: a host may count open files after the event
            self._send({"event": "closed"})

        threading.Thread(target=close, name="sdruntime-close", daemon=True).start()

    def _refuse(self, document: Any, error: Exception) -> None:
        fields = document if isinstance(document, dict) else {}
        op, job = fields.get("op"), fields.get("job")
        with self._lock:
            known = type(job) is int and job not in self._jobs
        if op == "open":
            self._send({"event": "refused", **self._fault(error)})
        elif op == "submit" and type(job) is int and known:
            self._failed(job, error)
        else:
            self._log("error", f"a message was refused: {plain(error)}")

    # -- events

    def _progress(self, message: Submit, progress: Progress) -> None:
        event = {"event": "progress", "job": message.job, "step": progress.step, "steps": progress.steps}
        if progress.step == 0:
            self._send({"event": "started", "job": message.job, "steps": progress.steps})
        elif progress.clean is None:
            self._send(event)
        else:
            self._send(event | {"preview": list(progress.clean.shape)}, progress.clean)

    def _finished(self, message: Submit, future: ImageFuture) -> None:
        with self._lock:
            self._jobs.pop(message.job, None)
            pipe = self._pipe
        try:
            image = future.result()
            if message.device_buffer is not None and pipe is not None:
                _copy_to_device(pipe, image.pixels, message.device_buffer)
            text = image.text()
            png = png_from_image(image.pixels, text) if message.png else b""
        except BaseException as error:
            self._failed(message.job, error)
            return
        done = {
            "event": "done",
            "job": message.job,
            **finished(future, text),
            "rgb": image.pixels.nbytes,
            "png": len(png),
        }
        self._send(done, image.pixels if not png else np.frombuffer(image.pixels.tobytes() + png, np.uint8))

    def _failed(self, job: int, error: BaseException) -> None:
        self._send({"event": "failed", "job": job, **self._fault(error)})

    def _fault(self, error: BaseException) -> dict[str, Any]:
        """Return the exit code and message of the command line for an error. Logs the traceback of an unexpected one."""
        known = next((reason for kind, reason in REASONS.items() if isinstance(error, kind)), "closed" if self._closing else "")
        reason = {"reason": known} if known else {}
        if isinstance(error, CancelledError):
            return {"code": CANCELLED, "message": "cancelled", **reason}
        if isinstance(error, MemoryError):
            return {"code": 3, "message": "out of memory: request a smaller size, or run fewer images at a time", **reason}
        if isinstance(error, SdruntimeError):
            return {"code": error.exit_code, "message": str(error), **reason}
        self._log("error", _traceback(error))
        return {"code": 1, "message": f"{type(error).__name__}: {error}"}

    def _log(self, level: str, message: str) -> None:
        self._send({"event": "log", "level": level, "message": message})

    def _send(self, event: dict[str, Any], blob: Array | None = None) -> None:
        data = None if blob is None else np.ascontiguousarray(blob).data.cast("B")
        self._emit(json.dumps(event, allow_nan=False).encode(), data)


def _document(message: bytes) -> Any:
    try:
        return json_from_text(bytes(message).decode(), infinity=False)
    except ValueError as error:
        raise SettingError(f"not JSON in UTF-8: {plain(error)}") from error


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def blob_bytes(message: bytes) -> int:
    """Return how many bytes a message's blob may have: those of its images, or 0, so that no other blob is read."""
    try:
        parsed = message_from_json(_document(message))
    except SettingError:
        return 0
    return bytes_of(parsed) if isinstance(parsed, Submit) else 0


def _check_buffer(pipe: Pipeline, message: Submit, request: Request, *, apart: bool) -> None:
    """Check that the image can be copied into the device buffer. Raises Unsupported, BufferTooSmall."""
    if message.device_buffer is None:
        return
    where = f"device_buffer of job {message.job}"
    if apart:
        raise Unsupported(f"{where}: a separate process cannot use the caller's device memory: open the bundle in process")
    if all(spec.target == CPU for spec in pipe.engines.chosen):
        raise Unsupported(f"{where}: the engines run on the CPU: omit it and read the image's bytes")
    width, height = pipe.image_size(request)
    needed, available = 3 * height * width, message.device_buffer_size or 0
    if message.device_buffer < 1 or available < needed:
        raise BufferTooSmall(f"{where}: {available:,} bytes at {message.device_buffer:#x}, but the image has {needed:,}")


def _copy_to_device(pipe: Pipeline, image: Array, pointer: int) -> None:
    """Copy the image on the engines' stream and wait for it. Called on the generating thread."""
    cuda_session = pipe.engines.shared.get(("cuda", pipe.engines.options.device), lambda: session(pipe.engines.options))
    cuda_session.staging.upload(pointer, image)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one host over the Unix socket whose descriptor is the argument, until the host closes it. Return the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        [descriptor] = words
        channel = Channel(socket.socket(fileno=int(descriptor)))
    except (ValueError, OSError):
        print(
            f"sdruntime.serving.service: expected the number of an open socket's descriptor, got {' '.join(words) or 'nothing'}: "
            "a host starts this worker with one end of a socketpair",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host handles Ctrl-C in a terminal

    def emit(message: bytes, blob: memoryview | None) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the host is gone: the loop below ends too
            channel.send(message, blob)

    service = Service(emit, apart=True)
    code = 0
    try:
        while received := channel.receive(blob_bytes):
            service.handle(*received)
    except BadFrame as error:
        print(f"sdruntime.serving.service: {error}", file=sys.stderr, flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)  # nobody waits for the images, and large libraries take seconds to shut down


if __name__ == "__main__":
    sys.exit(main())
