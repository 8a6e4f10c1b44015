"""File -> Engine, for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.building import Library
from sdruntime.backends.base.engine import CPU, EngineOptions, Shared, closed
from sdruntime.backends.base.feeds import check_feeds, check_tensors, fill_optional_inputs
from sdruntime.backends.base.weights import Weights
from sdruntime.backends.onnx_file.initializers import initializers, with_values
from sdruntime.backends.onnx_file.inputs import with_required_inputs
from sdruntime.backends.onnx_file.stored import stored_as
from sdruntime.backends.ort.build import PROVIDERS, library, targets
from sdruntime.backends.ort.replacing import places_of
from sdruntime.backends.ort.session import EMPTY_MODEL, warn_of_unknown
from sdruntime.backends.ort.weights import DIRECTLY, open_session
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.dimensions import named_in, size_of
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec
from sdruntime.bundle.roles import role
from sdruntime.errors import DeviceMissing, EngineError, LibraryMissing, SdruntimeError, SettingError

# In float32 these stages run the graph as saved. On a CPU, the highest level adds convolutions in a layout of its own: a UNet
# becomes slower and its weights are copied, while a VAE gains a tenth (benchmarks/README.md). In fp16 it folds weight casts.
_AS_SAVED = ("text", "denoise")  # stages


class OrtEngine:
    """An InferenceSession. Inputs are read in place. Outputs whose shape follows from the inputs are written to their arrays."""

    def __init__(self, spec: EngineSpec, component: ComponentSpec, session: Any) -> None:
        self.spec, self.component, self._session = spec, component, session

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._session is None:
            raise closed(self.spec)
        dims = check_feeds(self.component, self.spec, feeds)
        outputs: dict[str, Array] = {}
        try:
            binding = self._session.io_binding()
            for name, array in fill_optional_inputs(self.component, dims, feeds).items():
                binding.bind_cpu_input(name, array)
            for tensor in self.component.outputs:
                if any(isinstance(dim, str) and named_in(dim) not in dims for dim in tensor.shape):
                    binding.bind_output(tensor.name)  # ONNX Runtime allocates it
                    continue
                out = outputs[tensor.name] = np.empty([size_of(dim, dims) for dim in tensor.shape], tensor.dtype)
                binding.bind_output(tensor.name, "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors have no common base but Exception
            raise SdruntimeError(f"engine {self.spec.name} failed at {dims}: {error}") from error
        for tensor, value in zip(self.component.outputs, binding.get_outputs(), strict=True):
            if tensor.name not in outputs:
                outputs[tensor.name] = value.numpy()
        return outputs

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def here() -> Library:
    """Return the installed version and its targets, or why ONNX Runtime is not available."""
    try:
        ort = library()
    except LibraryMissing as error:
        return Library(missing=str(error))
    return Library(version=ort.__version__, targets=targets(ort))


def check_session(settings: Mapping[str, str]) -> None:
    """Check session settings by opening an empty model with them. Issue a RuntimeWarning for unknown names.

    ONNX Runtime checks few values: most of those that it does not know count as "0". Raises SettingError.
    """
    if not settings:
        return
    ort = library()
    if settings.get(DIRECTLY, "0") != "0":
        raise SettingError(
            f"session setting {DIRECTLY}: must be 0: weights are copied, so that no later change of a file is seen"
        )
    warn_of_unknown(ort, settings)
    for key, value in settings.items():
        session_options = ort.SessionOptions()
        session_options.log_severity_level = 4
        try:
            session_options.add_session_config_entry(key, value)
            ort.InferenceSession(EMPTY_MODEL, session_options, providers=[PROVIDERS["cpu"]], enable_fallback=0)
        except Exception as error:  # onnxruntime's errors have no common base but Exception
            text = f"session setting {key:.60}={value:.60}: ONNX Runtime {ort.__version__} does not accept it: {error}"
            raise SettingError(text) from error


def open_engine(bundle: Bundle, spec: EngineSpec, options: EngineOptions, shared: Shared) -> OrtEngine:
    """Open an engine from verified memory; ONNX Runtime itself opens no file.

    Raises BundleError, EngineError, DeviceMissing, and SettingError for a session setting, or for new weights that do not fit.
    """
    ort = library()
    component = bundle.manifest.components[spec.component]
    optional = {tensor.name: tensor.shape for tensor in component.optional_inputs}
    model = with_required_inputs(bundle.read(spec.files[0]), optional)
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session_options.intra_op_num_threads = options.threads
    if spec.target == CPU:
        if role(spec.component).stage in _AS_SAVED and spec.precision == "fp32":
            session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session_options.enable_mem_pattern = False  # preallocating one block per call takes more memory and is no faster
        if options.low_memory and keeps_half(spec):
            # the weights stay as they are stored, and each is converted to float32 right before the node that reads it
            session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            session_options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            session_options.enable_cpu_mem_arena = False
    check_session(options.session)
    for key, value in options.session.items():
        session_options.add_session_config_entry(key, value)
    providers: list[Any] = [PROVIDERS["cpu"]]
    if spec.target == "cuda":
        providers.insert(0, (PROVIDERS["cuda"], {"device_id": str(options.device)}))
    replaced: dict[str, Array] = {}
    if options.weights is not None:
        replaced = _replaced(bundle, spec, memoryview(model), options.weights)
        embedded = [name for name, known in initializers(memoryview(model)).items() if name in replaced and not known.external]
        model = with_values(memoryview(model), {name: replaced.pop(name) for name in embedded})
    try:
        session = open_session(ort, bundle, model, spec.files, session_options, providers, replaced)
    except SdruntimeError:
        raise
    except Exception as error:  # onnxruntime's errors have no common base but Exception
        raise EngineError(f"engine {spec.name}: ONNX Runtime {ort.__version__} cannot open it: {error}") from error
    if spec.target == "cuda" and PROVIDERS["cuda"] not in session.get_providers():
        raise DeviceMissing(
            f"engine {spec.name}: ONNX Runtime could not use CUDA device {options.device} (see `sdruntime doctor`)"
        )
    inputs, outputs = ({tensor.name for tensor in tensors} for tensors in (session.get_inputs(), session.get_outputs()))
    check_tensors(component, spec, inputs, outputs)
    return OrtEngine(spec, component, session)


def keeps_half(engine: EngineSpec) -> bool:
    """Return whether the weights of an engine can stay in half precision, which is slower: ONNX Runtime computes in float32."""
    return engine.target == CPU and engine.precision != "fp32"


def _replaced(bundle: Bundle, spec: EngineSpec, model: memoryview, weights: Weights) -> dict[str, Array]:
    """Return new values for the engine's initializers, as they are stored, that follow from new weights of the component."""
    known = initializers(model)
    onnx = bundle.read(bundle.manifest.components[spec.component].onnx)
    values: dict[str, Array] = {}
    try:
        places = places_of(onnx, weights.names, {name: array.shape for name, array in known.items()})
        with weights.lending() as lent:
            last, new = "", np.empty(0)
            for name, (weight, place) in places.items():
                last, new = weight, new if weight == last else lent[weight]
                array, dtype = place(new), known[name].dtype
                if array.shape != known[name].shape or dtype is None:
                    raise ValueError(f"{name} is {list(known[name].shape)}, and {weight} gives {list(array.shape)}")
                values[name] = stored_as(array, known[name].kind, dtype)
    except ValueError as error:
        if isinstance(error, SdruntimeError):
            raise
        raise EngineError(f"engine {spec.name}: its weights cannot be replaced: {error}") from error
    return values
