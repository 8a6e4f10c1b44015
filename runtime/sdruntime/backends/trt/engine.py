"""File -> Engine, for TensorRT and TensorRT-RTX with NumPy: buffers allocated once per shape, one stream, no device-wide wait."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from sdruntime.arrays import Array
from sdruntime.backends.base.building import Library
from sdruntime.backends.base.engine import AMPERE_UP, EngineOptions, Shared, closed
from sdruntime.backends.base.feeds import check_feeds
from sdruntime.backends.base.session import Session, session
from sdruntime.backends.ort.weights import lending_onnx
from sdruntime.backends.trt.binding import Binding
from sdruntime.backends.trt.library import FLAVOURS, capabilities, library, messages
from sdruntime.backends.trt.replacing import replace_weights
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
SESSION = ("engine_host_code",)  # session settings
_DTYPES = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64"}
_OUT_OF_MEMORY = ("OutOfMemory", "out of memory", "could not be allocated")  # parts of the library's out-of-memory messages
_MARGIN = 256 << 20  # bytes of device memory that weight streaming reserves for everything else


class TrtEngine:
    """A deserialized plan. `bind` returns its device buffers for a shape; a call copies arrays to and from them."""

    def __init__(self, spec: EngineSpec, component: ComponentSpec, plan: Plan, shared: Session) -> None:
        self.spec, self.component, self.session = spec, component, shared
        self._plan = plan
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._apart: set[Binding] = set()
        self.held = Shared()  # resources that use this engine's bindings, released before them

    def bind(self, dims: Mapping[str, int]) -> Binding:
        """Return the binding for these sizes of the named dimensions, created on first use. Raises EngineError, OutOfSpace."""
        key = tuple(dims[name] for name in self.component.dimensions)
        if key not in self._bindings:
            if len(self._bindings) >= KEPT_BINDINGS:
                self._bindings.pop(next(iter(self._bindings))).close()
            self._bindings[key] = self._binding(dims)
        return self._bindings[key]

    @contextlib.contextmanager
    def bind_apart(self, dims: Mapping[str, int], placed: Mapping[str, int] = MappingProxyType({})) -> Iterator[Binding]:
        """Yield a binding for the caller alone, until the block ends or the engine is closed.

        `placed`: the addresses of tensors that lie in buffers of others. Raises EngineError, OutOfSpace.
        """
        binding = self._binding(dims, placed)
        self._apart.add(binding)
        try:
            yield binding
        finally:
            self._apart.discard(binding)
            binding.close()

    def _binding(self, dims: Mapping[str, int], placed: Mapping[str, int] = MappingProxyType({})) -> Binding:
        if self._plan.engine is None:
            raise closed(self.spec)
        self.session.cuda.use()  # the calling thread may have changed
        profile = self.spec.admitting(**dims)[0]
        return Binding(self.spec, self.component, self._plan, self.session, dims, profile, placed)

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._plan.engine is None:
            raise closed(self.spec)
        dims = check_feeds(self.component, self.spec, feeds)
        with annotate(self.spec.component):
            binding = self.bind(dims)
            try:
                binding.upload(feeds)
                binding.clear(tensor.name for tensor in self.component.optional_inputs if tensor.name not in feeds)
                binding.enqueue()
                return binding.download()
            except BaseException:
                self.session.stream.settle()  # the next call overwrites memory that this one may still read
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
    """The library's objects for one plan. They must be released in order: the engine, then the runtime.

    `cache_name`: name of the cached kernels that TensorRT-RTX compiled for this GPU, which are kept between processes.
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
        """Return a new execution context; the caller provides its activation memory. Raises EngineError."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy if self._config is None else self._config)
        if context is None:
            raise EngineError(f"TensorRT could not create an execution context: {self.reasons()}")
        return context

    def reasons(self) -> str:
        """Return the library's errors since the last call."""
        return str(self._log.reasons())

    def close(self) -> None:
        """Save the kernel cache and release the library's objects."""
        try:
            self._keep_cache()
        finally:
            self.drop()

    def drop(self) -> None:
        """Release the library's objects without saving the kernel cache."""
        self._config = self._cache = self.engine = self._runtime = None

    def _keep_cache(self) -> None:
        data = None if self._cache is None else self._cache.serialize()
        if data is None or self._cache_name is None:
            return
        data = bytes(memoryview(data))
        if data and hashlib.sha256(data).hexdigest() != self._kept:
            write_cached(self._cache_name, data)


def here(name: str) -> Library:
    """Return the installed version and its targets (this machine's GPU and, for TensorRT-RTX, others), or why it is missing."""
    try:
        trt = library(name)
    except LibraryMissing as error:
        return Library(missing=str(error))
    targets = [device.target for device in devices()[:1]]
    if FLAVOURS[name].ahead:
        targets += [target for target in capabilities(trt) if target not in targets]
    return Library(version=trt.__version__, targets=(*targets, AMPERE_UP) if targets else ())


def check_session(name: str, settings: Mapping[str, str]) -> None:
    """Check the session settings of a backend. Raises UnknownName, SettingError."""
    for key, value in settings.items():
        if key not in SESSION:
            raise UnknownName(f"session setting of {name}", key, SESSION)
        if value not in ("true", "false"):
            raise SettingError(f"session setting {key}={value:.60}: expected true or false")


def open_engine(bundle: Bundle, spec: EngineSpec, options: EngineOptions, shared: Shared) -> TrtEngine:
    """Deserialize a plan from its verified file, which is released immediately.

    Raises BundleError for a changed plan, UnknownName or SettingError for a session setting, DeviceMissing, OutOfSpace, and
    EngineError if TensorRT refuses the plan.
    """
    trt, component = library(spec.backend), bundle.manifest.components[spec.component]
    check_session(spec.backend, options.session)
    device = shared.get(("cuda", options.device), lambda: session(options))
    device.cuda.use()
    log = messages(trt)
    runtime = trt.Runtime(log)
    if spec.options.get("version_compatible") == "true":
        if options.session.get("engine_host_code") != "true":
            raise SettingError(
                f"engine {spec.name} carries code of its own (version_compatible): if you trust the bundle, open it with the "
                "session setting engine_host_code=true"
            )
        runtime.engine_host_code_allowed = True
    try:
        with bundle.lending(spec.files[:1], verified=True) as lent:
            engine = runtime.deserialize_cuda_engine(lent[spec.files[0]])
            del lent
    except BaseException:
        engine = None  # the traceback keeps local variables alive, and the engine holds the weights
        raise
    if engine is None:
        size = bundle.manifest.files[spec.files[0]].size
        raise _open_error(bundle, spec, device, size, f"{spec.backend} {trt.__version__}", log.reasons())
    plan = Plan(trt, log, runtime, engine, _cache_name(trt, bundle, spec, device))
    del engine
    try:
        if spec.options.get("strip") == "true":
            _refit(trt, log, plan, bundle, spec)
        if options.weights is not None:
            replace_weights(trt, log, plan.engine, bundle, spec, options.weights)
        if spec.options.get("weight_streaming") == "true":
            _stream_weights(plan, device, options)
        _check_tensors(trt, plan, bundle, spec, component)
    except BaseException:
        plan.drop()
        raise
    return TrtEngine(spec, component, plan, device)


def _open_error(bundle: Bundle, spec: EngineSpec, device: Session, size: int, library: str, reasons: str) -> SdruntimeError:
    """Return the error for a plan of `size` bytes that the library refused for these reasons."""
    gpu = device.cuda.device.name
    if any(words in reasons for words in _OUT_OF_MEMORY):
        return OutOfSpace(
            f"engine {spec.name}: {size:,} bytes and its working memory do not fit on {gpu}, where "
            f"{device.cuda.free_memory():,} are free ({reasons}): close other programs "
            f"that use the GPU, or open it with --low-memory"
        )
    return EngineError(
        f"engine {spec.name}: {library} cannot open it on {gpu}: {reasons}; "
        f"build it again: sdruntime build {quoted(bundle.folder)} --backend {spec.backend} --component {spec.component}"
    )


def _cache_name(trt: Any, bundle: Bundle, spec: EngineSpec, device: Session) -> str | None:
    """Return the name of the plan's kernel cache on this GPU, or None if the backend has no such cache."""
    if not FLAVOURS[spec.backend].ahead:
        return None
    gpu, plan = device.cuda.device, bundle.manifest.files[spec.files[0]].sha256[:16]
    return f"tensorrt-rtx/{trt.__version__}-{gpu.target}-{gpu.uuid or 'gpu'}-{plan}.cache"


def _refit(trt: Any, log: Any, plan: Plan, bundle: Bundle, spec: EngineSpec) -> None:
    """Load the weights of the bundle's ONNX into a plan that was built without weights."""
    component = bundle.manifest.components[spec.component]
    refitter = trt.Refitter(plan.engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    with lending_onnx(bundle, component.files) as onnx:
        if not parser.refit_from_file(onnx) or not refitter.refit_cuda_engine():
            raise EngineError(f"engine {spec.name}: could not load its weights from {component.onnx}: {log.reasons()}")


def _stream_weights(plan: Plan, device: Session, options: EngineOptions) -> None:
    """Keep as many weights on the device as fit `options.memory` and the free memory; the rest is streamed on demand."""
    free = min(options.memory or device.cuda.free_memory(), device.cuda.free_memory())
    budget = free - int(plan.engine.device_memory_size_v2) - _MARGIN
    plan.engine.weight_streaming_budget_v2 = max(0, min(budget, int(plan.engine.streamable_weights_size)))


def _check_tensors(trt: Any, plan: Plan, bundle: Bundle, spec: EngineSpec, component: ComponentSpec) -> None:
    """Raise BundleError with every difference in name, direction or type between the tensors of the plan and the component."""
    names = {plan.engine.get_tensor_name(index) for index in range(plan.engine.num_io_tensors)}
    faults = [f"{spec.name}: tensor {name!r} does not exist in {spec.component}" for name in sorted(names)]
    for tensors, mode in ((component.engine_inputs, trt.TensorIOMode.INPUT), (component.outputs, trt.TensorIOMode.OUTPUT)):
        for tensor in tensors:
            if tensor.name not in names:
                faults.append(f"{spec.name}: tensor {tensor.name!r} of {spec.component} is missing")
                continue
            faults.remove(f"{spec.name}: tensor {tensor.name!r} does not exist in {spec.component}")
            kind = plan.engine.get_tensor_dtype(tensor.name)
            if plan.engine.get_tensor_mode(tensor.name) != mode or kind != getattr(trt.DataType, _DTYPES[tensor.dtype]):
                faults.append(f"{spec.name}: tensor {tensor.name!r} is {kind.name}, expected {tensor.dtype} {mode.name.lower()}")
    if faults:
        raise BundleError(bundle.folder, faults)
