"""Files -> Engine, for OpenVINO."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.building import Library
from sdruntime.backends.base.engine import EngineOptions, Shared, closed
from sdruntime.backends.base.feeds import check_feeds, fill_optional_inputs
from sdruntime.backends.base.weights import Weights
from sdruntime.backends.ov.build import DEVICE, TARGETS, has_bf16, library, version_of
from sdruntime.backends.ov.constants import own_constants
from sdruntime.backends.ov.replacing import replace_weights
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.dimensions import size_of
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec
from sdruntime.errors import DeviceMissing, EngineError, LibraryMissing, SdruntimeError, SettingError, quoted


class Network:
    """A model and its compiled profiles. Each profile is compiled when it is first requested.

    `weights`: new ones, in place of those in the files. A profile of fixed sizes is compiled for these sizes only, which runs
    faster than a range: by a fifth, for a UNet.
    """

    def __init__(self, ov: Any, bundle: Bundle, spec: EngineSpec, weights: Weights | None) -> None:
        self._weights = weights
        self._ov, self._core, self._bundle, self._spec = ov, ov.Core(), bundle, spec
        self._text = str(bundle.read(spec.files[0]), "utf-8")
        self._component = bundle.manifest.components[spec.component]
        self._requests: dict[int, Any] = {}
        self._held: list[memoryview] = []  # compiled models refer to these views but do not read them (`own_constants`)

    def request(self, profile: int, settings: Mapping[str, Any]) -> Any:
        """Return the InferRequest of a profile, compiling it on first use. Raises BundleError, and RuntimeError from OpenVINO."""
        if profile not in self._requests:
            sizes = self._spec.profiles[profile]
            with self._bundle.lending(self._spec.files[1:]) as lent:
                (weights,) = lent.values()
                model = self._core.read_model(self._text, self._ov.Tensor(_bytes(weights), shared_memory=True))
                if self._weights is not None:
                    replace_weights(self._ov, model, self._weights)
                own_constants(self._ov, model)
                model.reshape({tensor.name: self._shape(tensor.shape, sizes) for tensor in self._component.engine_inputs})
                compiled = self._core.compile_model(model, DEVICE, dict(settings))
                self._held.append(weights)
            self._requests[profile] = compiled.create_infer_request()
        return self._requests[profile]

    def _shape(self, dims: tuple[int | str, ...], sizes: Mapping[str, tuple[int, int, int]]) -> Any:
        least, most = ({name: limits[end] for name, limits in sizes.items()} for end in (0, 2))
        return self._ov.PartialShape([self._ov.Dimension(size_of(dim, least), size_of(dim, most)) for dim in dims])


class OvEngine:
    """A compiled model. Inputs are read in place; outputs are copied from the library's buffers."""

    def __init__(self, spec: EngineSpec, component: ComponentSpec, network: Network, settings: Mapping[str, Any]) -> None:
        self.spec, self.component = spec, component
        self._network: Network | None = network
        self._settings = settings
        network.request(0, settings)

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._network is None:
            raise closed(self.spec)
        dims = check_feeds(self.component, self.spec, feeds)
        try:
            request = self._network.request(self.spec.admitting(**dims)[0], self._settings)
            inputs = dict(fill_optional_inputs(self.component, dims, feeds))
            outputs = request.infer(inputs, share_inputs=True, share_outputs=False)
            return {tensor.name: outputs[tensor.name] for tensor in self.component.outputs}
        except (RuntimeError, KeyError) as error:
            raise SdruntimeError(f"engine {self.spec.name} failed at {dims}: {error}") from error

    def close(self) -> None:
        self._network = None

    def __enter__(self) -> OvEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def here() -> Library:
    """Return the installed version and its targets, or why OpenVINO is not available."""
    try:
        ov = library()
    except LibraryMissing as error:
        return Library(missing=str(error))
    return Library(version=version_of(ov), targets=TARGETS)


def check_session(settings: Mapping[str, str]) -> None:
    """Check session settings by compiling an empty model with each. Raises SettingError."""
    if not settings:
        return
    ov = library()
    core, parameter = ov.Core(), ov.op.Parameter(ov.Type.f32, ov.Shape([1]))
    empty = ov.Model([ov.op.Result(parameter.output(0))], [parameter], "empty")
    for key, value in settings.items():
        try:
            core.compile_model(empty, DEVICE, {key: value})
        except (RuntimeError, ValueError) as error:
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
            text = f"session setting {key:.60}={value:.60}: OpenVINO {version_of(ov)} does not accept it: {' '.join(lines)}"
            raise SettingError(text) from error


def open_engine(bundle: Bundle, spec: EngineSpec, options: EngineOptions, shared: Shared) -> OvEngine:
    """Open an engine; OpenVINO itself opens no file.

    Raises BundleError, EngineError, and DeviceMissing for a bf16 engine on a CPU that does not support bf16.
    """
    ov = library()
    precision = spec.options.get("inference_precision", "f32")
    if precision == "bf16" and not has_bf16(ov.Core()):
        raise DeviceMissing(
            f"engine {spec.name}: it computes in bf16, which this CPU does not support: "
            f"sdruntime build {quoted(bundle.folder)} --backend openvino"
        )
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    component = bundle.manifest.components[spec.component]
    try:
        return OvEngine(spec, component, Network(ov, bundle, spec, options.weights), settings | dict(options.session))
    except SdruntimeError:
        raise
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"engine {spec.name}: OpenVINO {version_of(ov)} cannot open it: {error}") from error


def _bytes(view: memoryview) -> Array:
    """Return a view of the bytes as an array that NumPy considers writable.

    OpenVINO requires writable arrays for shared memory, but does not write to it; the map is read-only, so a write would crash.
    """
    if not view:
        return np.empty(0, np.uint8)
    address = np.frombuffer(view, np.uint8).ctypes.data
    return np.ctypeslib.as_array((ctypes.c_uint8 * len(view)).from_address(address))
