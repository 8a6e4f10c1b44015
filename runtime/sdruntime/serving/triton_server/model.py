"""The model that runs inside Triton's Python backend: each instance is one pipeline with a Batcher.

Triton calls `execute` with requests as they come, and does not wait for their images: the model is decoupled. Responses are sent
by one thread, in order, so that neither PNGs nor clients delay the next step. Another one asks Triton twenty times a second which
requests were cancelled, also those that wait, and updates the metrics.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import EngineOptions
from sdruntime.bundle.records import json_from_text
from sdruntime.engines.choose import AUTO
from sdruntime.errors import QueueFull, QueueTimeout, SdruntimeError, SettingError, Unsupported, plain
from sdruntime.pipeline.images.png import png_from_image
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.tags import with_tagged
from sdruntime.pipeline.vae.preview import check_preview, linear_colours
from sdruntime.serving.batcher import QUEUE, Batcher, ImageFuture, Progress
from sdruntime.serving.describe import finished
from sdruntime.serving.triton_server.metrics import Metrics
from sdruntime.serving.triton_server.tensors import INPUTS, Order, order_of, text_array

_TICK = 0.05  # seconds
_NUMPY_1_ONLY = b"numpy.core.multiarray"  # in a server built with pybind11 before 2.12, which NumPy 2 crashes


@dataclass(slots=True, kw_only=True, eq=False)
class _Call:
    """A request of a client that is not done."""

    sender: Any
    order: Order
    future: ImageFuture | None = None


class TritonPythonModel:
    """The class that Triton looks for."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle. An error is that of the model in Triton's log and status."""
        try:
            check_numpy(np.__version__, Path("/proc/self/exe"))
            self._open(args)
        except SdruntimeError as error:
            raise pb.TritonModelException(str(error)) from error

    def _open(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        if "BUNDLE" not in parameters:
            raise SettingError("config.pbtxt: the parameter BUNDLE is missing: name the folder of a bundle")
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
        options = EngineOptions(device=device, threads=_number(parameters, "THREADS", 0), session=_session(parameters))
        running = _number(parameters, "RUNNING", None)
        self._lora_dir = parameters.get("LORA_DIR")
        self._calls: dict[int, _Call] = {}
        self._lock = threading.Lock()  # guards self._calls
        self._closing = threading.Event()
        with contextlib.ExitStack() as stack, warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("default")
            pipe = Pipeline.open(parameters["BUNDLE"], backend=parameters.get("BACKEND", AUTO), options=options)
            self._pipe = stack.enter_context(pipe)
            self._sending = stack.enter_context(ThreadPoolExecutor(1, "sdruntime-send"))
            self._batcher = stack.enter_context(Batcher(pipe, queue=_number(parameters, "QUEUE", QUEUE), running=running))
            self._metrics = Metrics({"model": args["model_name"], "instance": args["model_instance_name"]})
            self._opened = stack.pop_all()
        for warning in recorded:
            pb.Logger.log_warn(str(warning.message))
        self._watcher = threading.Thread(target=self._watch, name="sdruntime-watch", daemon=True)
        self._watcher.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Put requests into the queue. Their responses are sent later."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except Exception as error:
                self._metrics.rejected(error)
                sender.send(pb.InferenceResponse(error=_fault(error)), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Cancel what is left, and close the bundle."""
        self._closing.set()
        self._watcher.join()
        self._opened.close()  # the batcher, then the sending thread, which sends what is left, then the pipeline

    def _submit(self, request: Any, sender: Any) -> None:
        tensors = {row.name: pb.get_input_tensor_by_name(request, row.name) for row in INPUTS}
        order = order_of({name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None})
        if order.progress == "preview":
            check_preview("linear", self._pipe.bundle.manifest)
        call = _Call(sender=sender, order=order)
        with self._lock:
            self._calls[id(call)] = call
        try:
            call.future = self._batcher.submit(
                with_tagged(order.request, self._lora_dir),
                progress=None if order.progress == "off" else lambda progress: self._send_soon(self._progress, call, progress),
                preview=order.progress == "preview",
                done=lambda future: self._send_soon(self._end, call, future),
            )
        except BaseException:
            with self._lock:
                del self._calls[id(call)]
            raise

    # -- the sending thread

    def _send_soon(self, send: Any, call: _Call, what: Progress | ImageFuture) -> None:
        self._sending.submit(self._safely, send, call, what)

    def _safely(self, send: Any, call: _Call, what: Any) -> None:
        """Send; a response that cannot be sent, as to a client that has gone, is logged."""
        try:
            send(call, what)
        except Exception as error:
            pb.Logger.log_error(_traceback(error))

    def _progress(self, call: _Call, progress: Progress) -> None:
        outputs = [pb.Tensor("STEP", np.array([progress.step, progress.steps], np.int32))]
        if progress.clean is not None:
            outputs.append(pb.Tensor("PREVIEW", linear_colours(progress.clean, self._pipe.model)))
        call.sender.send(pb.InferenceResponse(outputs))

    def _end(self, call: _Call, future: ImageFuture) -> None:
        with self._lock:
            del self._calls[id(call)]
        try:
            response = pb.InferenceResponse(_outputs(call.order, future))
        except (Exception, CancelledError) as error:
            self._metrics.failed(error)
            response = pb.InferenceResponse(error=_fault(error))
        else:
            self._metrics.done(dataclasses.asdict(future.timings))
        call.sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    # -- the watching thread

    def _watch(self) -> None:
        while not self._closing.wait(_TICK):
            with self._lock:
                calls = [call for call in self._calls.values() if call.future is not None]
            for call in calls:
                if call.sender.is_cancelled() and call.future is not None:
                    call.future.cancel()
            self._metrics.update(self._batcher)


def _outputs(order: Order, future: ImageFuture) -> list[Any]:
    """Return the tensors of a finished image."""
    image = future.result()
    text = image.text()
    pixels: Array = np.ascontiguousarray(image.pixels)
    if order.output == "raw":
        shown = pb.Tensor("IMAGE", pixels)
    else:
        png = png_from_image(pixels, text)
        shown = pb.Tensor("PNG", text_array(base64.b64encode(png) if order.output == "base64" else png))
    return [shown, pb.Tensor("INFO", text_array(json.dumps(finished(future, text))))]


def check_numpy(version: str, program: Path) -> None:
    """Raise SettingError if the server's Python backend, whose process runs `program`, would crash with this NumPy."""
    if int(version.split(".")[0]) >= 2 and _NUMPY_1_ONLY in program.read_bytes():
        raise SettingError(
            f"NumPy {version} is installed, but the Python backend of this server is built for NumPy 1 (before Triton 24.11) and "
            'would crash at the first request: pip install "numpy<2" into the Python that the server uses, or use a newer server'
        )


def _number(parameters: Mapping[str, str], name: str, default: Any) -> Any:
    """Return a whole number of config.pbtxt. Raises SettingError."""
    text = parameters.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise SettingError(f"config.pbtxt: parameter {name} {text!r}: expected a whole number")
    return int(text)


def _session(parameters: Mapping[str, str]) -> Any:
    """Return the settings of the engine library, which EngineOptions checks. Raises SettingError."""
    text = parameters.get("SESSION", "{}")
    try:
        return json_from_text(text, infinity=False)
    except ValueError as error:
        raise SettingError(f"config.pbtxt: parameter SESSION {text!r}: not JSON: {plain(error)}") from error


def _fault(error: BaseException) -> Any:
    """Return Triton's error for one of ours. Logs the traceback of an unexpected one."""
    codes = pb.TritonError
    if isinstance(error, CancelledError):
        return codes("cancelled", codes.CANCELLED)
    if isinstance(error, QueueFull | QueueTimeout):
        return codes(str(error), codes.UNAVAILABLE)
    if isinstance(error, Unsupported):
        return codes(str(error), codes.UNSUPPORTED)
    if isinstance(error, SettingError):
        return codes(str(error), codes.INVALID_ARG)
    if isinstance(error, SdruntimeError):
        return codes(str(error), codes.INTERNAL)
    pb.Logger.log_error(_traceback(error))
    return codes(f"{type(error).__name__}: {error}", codes.INTERNAL)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
