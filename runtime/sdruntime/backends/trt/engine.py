"""File -> Engine, for TensorRT and TensorRT-RTX, from NumPy: buffers made once a shape, one stream, no device-wide wait."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from sdruntime.annotate import annotate
from sdruntime.backends.trt.binding import Binding
from sdruntime.backends.trt.library import FLAVOURS, capabilities, library, messages
from sdruntime.backends.trt.session import Session, session
from sdruntime.bundle import Bundle
from sdruntime.cache import read_cached, write_cached
from sdruntime.cuda import devices
from sdruntime.engine import AMPERE_UP, Array, EngineOptions, Library, Shared, check_feeds
from sdruntime.errors import BundleError, EngineError, LibraryMissing, SettingError
from sdruntime.manifest import ComponentSpec, EngineSpec

KEPT_BINDINGS = 4  # shapes whose buffers and contexts are kept
_DTYPES = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64"}
_MARGIN = 256 << 20  # bytes of a device that weight streaming leaves for everything else


class TrtEngine:
    """A deserialised plan. `bind` gives its buffers on the device for a shape; calling it copies arrays in and out of them."""

    def __init__(self, spec: EngineSpec, component: ComponentSpec, plan: Plan, shared: Session) -> None:
        self.spec, self.component, self.session = spec, component, shared
        self._plan = plan
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._apart: list[Binding] = []
        self.held = Shared()  # what works with this engine's bindings, and goes before it

    def bind(self, dims: Mapping[str, int]) -> Binding:
        """The binding for a size of each named dimension, made at its first use. Raises EngineError, OutOfSpace."""
        key = tuple(dims[name] for name in self.component.dimensions)
        if key not in self._bindings:
            if len(self._bindings) >= KEPT_BINDINGS:
                self._bindings.pop(next(iter(self._bindings))).close()
            self._bindings[key] = self._binding(dims)
        return self._bindings[key]

    def bind_apart(self, dims: Mapping[str, int]) -> Binding:
        """A binding that only the caller uses, until the engine is closed. Raises EngineError, OutOfSpace."""
        self._apart.append(self._binding(dims))
        return self._apart[-1]

    def _binding(self, dims: Mapping[str, int]) -> Binding:
        self.session.cuda.use()  # the calling thread may be another one than before
        profile = self.spec.admitting(**dims)[0]
        return Binding(self.spec, self.component, self._plan.context(), self.session, dims, profile)

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        dims = check_feeds(self.component, self.spec, feeds)
        with annotate(self.spec.component):
            binding = self.bind(dims)
            binding.upload(feeds)
            binding.enqueue()
            return binding.download()

    def close(self) -> None:
        self.held.close()
        if self._bindings or self._apart:
            self.session.stream.synchronize()
        for binding in (*self._bindings.values(), *self._apart):
            binding.close()
        self._bindings.clear()
        self._apart.clear()
        self._plan.close()

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Plan:
    """The library's own objects for one plan, in the order in which they must be let go: engine, then runtime.

    `cache`: the kernels that TensorRT-RTX compiled for this GPU, kept from one process to the next.
    """

    def __init__(self, trt: Any, runtime: Any, engine: Any, cache_name: str | None) -> None:
        self._trt, self._runtime, self.engine = trt, runtime, engine
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
            raise EngineError("TensorRT could not make an execution context: see what it printed")
        return made

    def close(self) -> None:
        if self._cache is not None and self._cache_name is not None:
            data = bytes(memoryview(self._cache.serialize()))
            if data and hashlib.sha256(data).hexdigest() != self._kept:
                write_cached(self._cache_name, data)
        self._config = self._cache = self.engine = self._runtime = None


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
    """Deserialise a plan from the very memory that was hashed, which is given back at once.

    Raises BundleError for a changed plan, DeviceMissing, OutOfSpace, EngineError for what TensorRT refuses.
    """
    trt, component = library(spec.backend), bundle.manifest.components[spec.component]
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
    view = bundle.read(spec.files[0])
    engine = runtime.deserialize_cuda_engine(view)
    view.release()
    if engine is None:
        reasons = "; ".join(log.errors()) or "no reason was given"
        raise EngineError(
            f"engine {spec.name}: {spec.backend} {trt.__version__} cannot open it on {held.cuda.device.name}: {reasons}; "
            f"build it again: sdruntime build {bundle.folder} --backend {spec.backend} --component {spec.component}"
        )
    if spec.options.get("strip") == "true":
        _refit(trt, log, engine, bundle, spec)
    if spec.options.get("weight_streaming") == "true":
        _stream_weights(engine, held, options)
    _check_tensors(trt, engine, bundle, spec, component)
    return TrtEngine(spec, component, Plan(trt, runtime, engine, _cache_name(trt, bundle, spec, held)), held)


def _cache_name(trt: Any, bundle: Bundle, spec: EngineSpec, held: Session) -> str | None:
    if not FLAVOURS[spec.backend].ahead:
        return None
    device, plan = held.cuda.device, bundle.manifest.files[spec.files[0]].sha256[:16]
    return f"tensorrt-rtx/{trt.__version__}-{device.target}-{device.uuid or 'gpu'}-{plan}.cache"


def _refit(trt: Any, log: Any, engine: Any, bundle: Bundle, spec: EngineSpec) -> None:
    """Put the weights of the bundle's ONNX into a plan that was stripped of them."""
    component = bundle.manifest.components[spec.component]
    for path in component.files:
        bundle.read(path)  # its hash
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(bundle.folder / component.onnx)) or not refitter.refit_cuda_engine():
        raise EngineError(f"engine {spec.name}: its weights could not be put in from {component.onnx}: {'; '.join(log.errors())}")


def _stream_weights(engine: Any, held: Session, options: EngineOptions) -> None:
    """As many weights on the device as the budget, or the free memory, has room for; the rest streams in as it is needed."""
    room = min(options.memory or held.cuda.free_memory(), held.cuda.free_memory())
    wanted = room - int(engine.device_memory_size_v2) - _MARGIN
    engine.weight_streaming_budget_v2 = max(0, min(wanted, int(engine.streamable_weights_size)))


def _check_tensors(trt: Any, engine: Any, bundle: Bundle, spec: EngineSpec, component: ComponentSpec) -> None:
    """The plan's tensors are the component's, by name, direction and type. Raises BundleError with every difference."""
    found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    faults = [f"{spec.name}: has a tensor {name!r} that {spec.component} has not" for name in sorted(found)]
    for tensors, mode in ((component.inputs, trt.TensorIOMode.INPUT), (component.outputs, trt.TensorIOMode.OUTPUT)):
        for tensor in tensors:
            if tensor.name not in found:
                faults.append(f"{spec.name}: {spec.component} has a tensor {tensor.name!r}, which it lacks")
                continue
            faults.remove(f"{spec.name}: has a tensor {tensor.name!r} that {spec.component} has not")
            kind = engine.get_tensor_dtype(tensor.name)
            if engine.get_tensor_mode(tensor.name) != mode or kind != getattr(trt.DataType, _DTYPES[tensor.dtype]):
                faults.append(
                    f"{spec.name}: tensor {tensor.name!r} is {kind.name}, but {tensor.dtype} {mode.name.lower()} belongs"
                )
    if faults:
        raise BundleError(bundle.folder, faults)
