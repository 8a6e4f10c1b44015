"""File -> Engine, for TensorRT and TensorRT-RTX, from NumPy: buffers made once a shape, one stream, no device-wide wait."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from sdruntime.arrays import Array
from sdruntime.backends.base.building import Library
from sdruntime.backends.base.engine import AMPERE_UP, EngineOptions, Shared, closed
from sdruntime.backends.base.feeds import check_feeds, fill_optional_inputs
from sdruntime.backends.base.session import Session, session
from sdruntime.backends.ort.weights import lending_onnx
from sdruntime.backends.trt.binding import Binding
from sdruntime.backends.trt.library import FLAVOURS, capabilities, library, messages
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec
from sdruntime.errors import (
    BundleError,
    EngineError,
    LibraryMissing,
    OutOfSpace,
    SdruntimeError,
    SettingError,
    UnknownName,
    quoted,
)
from sdruntime.system.cache import read_cached, write_cached
from sdruntime.system.cuda import devices
from sdruntime.system.nvtx import annotate

KEPT_BINDINGS = 4  # shapes whose buffers and contexts are kept
SESSION = ("engine_host_code",)  # settings of a session
_DTYPES = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64"}
_OUT_OF_MEMORY = ("OutOfMemory", "out of memory", "could not be allocated")  # how the library says that memory ran out
_MARGIN = 256 << 20  # bytes of a device that weight streaming leaves for everything else


class TrtEngine:
    """A deserialised plan. `bind` gives its buffers on the device for a shape; calling it copies arrays in and out of them."""

    def __init__(self, spec: EngineSpec, component: ComponentSpec, plan: Plan, shared: Session) -> None:
        self.spec, self.component, self.session = spec, component, shared
        self._plan = plan
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._apart: set[Binding] = set()
        self.held = Shared()  # what works with this engine's bindings, and goes before it

    def bind(self, dims: Mapping[str, int]) -> Binding:
        """The binding for a size of each named dimension, made at its first use. Raises EngineError, OutOfSpace."""
        key = tuple(dims[name] for name in self.component.dimensions)
        if key not in self._bindings:
            if len(self._bindings) >= KEPT_BINDINGS:
                self._bindings.pop(next(iter(self._bindings))).close()
            self._bindings[key] = self._binding(dims)
        return self._bindings[key]

    @contextlib.contextmanager
    def bind_apart(self, dims: Mapping[str, int]) -> Iterator[Binding]:
        """A binding that only the caller uses, for a block or until the engine is closed. Raises EngineError, OutOfSpace."""
        binding = self._binding(dims)
        self._apart.add(binding)
        try:
            yield binding
        finally:
            self._apart.discard(binding)
            binding.close()

    def _binding(self, dims: Mapping[str, int]) -> Binding:
        if self._plan.engine is None:
            raise closed(self.spec)
        self.session.cuda.use()  # the calling thread may be another one than before
        profile = self.spec.admitting(**dims)[0]
        return Binding(self.spec, self.component, self._plan, self.session, dims, profile)

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._plan.engine is None:
            raise closed(self.spec)
        dims = check_feeds(self.component, self.spec, feeds)
        with annotate(self.spec.component):
            binding = self.bind(dims)
            try:
                binding.upload(fill_optional_inputs(self.component, dims, feeds))
                binding.enqueue()
                return binding.download()
            except BaseException:
                self.session.stream.settle()  # the next call writes to what this one still reads
                raise

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._plan.close)
            for binding in (*self._bindings.values(), *self._apart):
                stack.callback(binding.close)
            if self._bindings or self._apart:
                stack.callback(self.session.stream.settle)
            stack.callback(self.held.close)
            self._bindings.clear()
            self._apart.clear()

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Plan:
    """The library's own objects for one plan, in the order in which they must be let go: engine, then runtime.

    `cache`: the kernels that TensorRT-RTX compiled for this GPU, kept from one process to the next.
    """

    def __init__(self, trt: Any, log: Any, runtime: Any, engine: Any, cache_name: str | None) -> None:
        self._trt, self._log, self._runtime, self.engine = trt, log, runtime, engine
        self._cache_name, self._config, self._cache, self._kept = cache_name, None, None, ""
        if cache_name is not None:
            self._config = engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            self._cache = self._config.create_runtime_cache()
            kept = read_cached(cache_name)
            if kept is not None and self._cache.deserialize(kept):
                self._kept = hashlib.sha256(kept).hexdigest()
            self._config.set_runtime_cache(self._cache)

    def context(self) -> Any:
        """A new execution context, whose activations the caller gives a place. Raises EngineError."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self.engine.create_execution_context(strategy if self._config is None else self._config)
        if made is None:
            raise EngineError(f"TensorRT could not make an execution context: {self.reasons()}")
        return made

    def reasons(self) -> str:
        """What the library said since the last question."""
        return str(self._log.reasons())

    def close(self) -> None:
        try:
            self._keep_cache()
        finally:
            self.drop()

    def drop(self) -> None:
        """Let the library's objects go, and keep nothing."""
        self._config = self._cache = self.engine = self._runtime = None

    def _keep_cache(self) -> None:
        data = None if self._cache is None else self._cache.serialize()
        if data is None or self._cache_name is None:
            return
        data = bytes(memoryview(data))
        if data and hashlib.sha256(data).hexdigest() != self._kept:
            write_cached(self._cache_name, data)


def here(name: str) -> Library:
    """The library, and what it builds for: the GPU that is here, and, for TensorRT-RTX, others."""
    try:
        trt = library(name)
    except LibraryMissing as error:
        return Library(missing=str(error))
    found = [device.target for device in devices()[:1]]
    if FLAVOURS[name].ahead:
        found += [target for target in capabilities(trt) if target not in found]
    return Library(version=trt.__version__, targets=(*found, AMPERE_UP) if found else ())


def open_engine(bundle: Bundle, spec: EngineSpec, options: EngineOptions, shared: Shared) -> TrtEngine:
    """Deserialise a plan from the file that was hashed, which is released at once.

    Raises BundleError for a changed plan, DeviceMissing, OutOfSpace, EngineError for what TensorRT refuses.
    """
    trt, component = library(spec.backend), bundle.manifest.components[spec.component]
    for key in options.session:
        if key not in SESSION:
            raise UnknownName(f"session setting of {spec.backend}", key, SESSION)
    held = shared.get(("cuda", options.device), lambda: session(options))
    held.cuda.use()
    log = messages(trt)
    runtime = trt.Runtime(log)
    if spec.options.get("version_compatible") == "true":
        if options.session.get("engine_host_code") != "true":
            raise SettingError(
                f"engine {spec.name} carries code of its own (version_compatible): if you trust the bundle, open it with the "
                "session option engine_host_code=true"
            )
        runtime.engine_host_code_allowed = True
    try:
        with bundle.lending(spec.files[:1], verified=True) as lent:
            engine = runtime.deserialize_cuda_engine(lent[spec.files[0]])
            del lent
    except BaseException:
        engine = None  # an error's traceback keeps what it sees alive, and with this the weights
        raise
    if engine is None:
        size = bundle.manifest.files[spec.files[0]].size
        raise _refusal(bundle, spec, held, size, f"{spec.backend} {trt.__version__}", log.reasons())
    plan = Plan(trt, log, runtime, engine, _cache_name(trt, bundle, spec, held))
    del engine
    try:
        if spec.options.get("strip") == "true":
            _refit(trt, log, plan, bundle, spec)
        if spec.options.get("weight_streaming") == "true":
            _stream_weights(plan, held, options)
        _check_tensors(trt, plan, bundle, spec, component)
    except BaseException:
        plan.drop()
        raise
    return TrtEngine(spec, component, plan, held)


def _refusal(bundle: Bundle, spec: EngineSpec, held: Session, size: int, library: str, reasons: str) -> SdruntimeError:
    """What to raise where a plan of `size` bytes was refused for these reasons."""
    device = held.cuda.device.name
    if any(words in reasons for words in _OUT_OF_MEMORY):
        return OutOfSpace(
            f"engine {spec.name}: {size:,} bytes and what it needs beside them do not fit on {device}, where "
            f"{held.cuda.free_memory():,} are free ({reasons}): close other programs "
            f"that use the GPU, or open it with --low-memory"
        )
    return EngineError(
        f"engine {spec.name}: {library} cannot open it on {device}: {reasons}; "
        f"build it again: sdruntime build {quoted(bundle.folder)} --backend {spec.backend} --component {spec.component}"
    )


def _cache_name(trt: Any, bundle: Bundle, spec: EngineSpec, held: Session) -> str | None:
    if not FLAVOURS[spec.backend].ahead:
        return None
    device, plan = held.cuda.device, bundle.manifest.files[spec.files[0]].sha256[:16]
    return f"tensorrt-rtx/{trt.__version__}-{device.target}-{device.uuid or 'gpu'}-{plan}.cache"


def _refit(trt: Any, log: Any, plan: Plan, bundle: Bundle, spec: EngineSpec) -> None:
    """Put the weights of the bundle's ONNX into a plan that was stripped of them."""
    component = bundle.manifest.components[spec.component]
    refitter = trt.Refitter(plan.engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    with lending_onnx(bundle, component.files) as onnx:
        if not parser.refit_from_file(onnx) or not refitter.refit_cuda_engine():
            raise EngineError(f"engine {spec.name}: its weights could not be put in from {component.onnx}: {log.reasons()}")


def _stream_weights(plan: Plan, held: Session, options: EngineOptions) -> None:
    """As many weights on the device as the budget, or the free memory, has room for; the rest streams in as it is needed."""
    room = min(options.memory or held.cuda.free_memory(), held.cuda.free_memory())
    wanted = room - int(plan.engine.device_memory_size_v2) - _MARGIN
    plan.engine.weight_streaming_budget_v2 = max(0, min(wanted, int(plan.engine.streamable_weights_size)))


def _check_tensors(trt: Any, plan: Plan, bundle: Bundle, spec: EngineSpec, component: ComponentSpec) -> None:
    """The plan's tensors are the component's, by name, direction and type. Raises BundleError with every difference."""
    found = {plan.engine.get_tensor_name(index) for index in range(plan.engine.num_io_tensors)}
    faults = [f"{spec.name}: has a tensor {name!r} that {spec.component} has not" for name in sorted(found)]
    for tensors, mode in ((component.engine_inputs, trt.TensorIOMode.INPUT), (component.outputs, trt.TensorIOMode.OUTPUT)):
        for tensor in tensors:
            if tensor.name not in found:
                faults.append(f"{spec.name}: {spec.component} has a tensor {tensor.name!r}, which it lacks")
                continue
            faults.remove(f"{spec.name}: has a tensor {tensor.name!r} that {spec.component} has not")
            kind = plan.engine.get_tensor_dtype(tensor.name)
            if plan.engine.get_tensor_mode(tensor.name) != mode or kind != getattr(trt.DataType, _DTYPES[tensor.dtype]):
                faults.append(f"{spec.name}: tensor {tensor.name!r} is {kind.name}, expected {tensor.dtype} {mode.name.lower()}")
    if faults:
        raise BundleError(bundle.folder, faults)
