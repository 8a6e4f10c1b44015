"""Files -> Engine, for OpenVINO."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from sdruntime.backends.ov.build import DEVICE, TARGETS, has_bf16, library, version_of
from sdruntime.bundle import Bundle
from sdruntime.engine import Array, EngineOptions, Library, Shared, check_feeds
from sdruntime.errors import DeviceMissing, EngineError, LibraryMissing, SdruntimeError, quoted
from sdruntime.lending import giving_back
from sdruntime.manifest import ComponentSpec, EngineSpec


class Network:
    """A representation in memory, and its profiles compiled: the first at once, another when a call is the first to need it.

    A profile of single sizes is compiled for these alone, which is quicker to run (a fifth, for a UNet) than a range.
    """

    def __init__(self, ov: Any, text: str, weights: memoryview, component: ComponentSpec, spec: EngineSpec) -> None:
        self._ov, self._core, self._text, self._component, self._spec = ov, ov.Core(), text, component, spec
        self._held = weights
        self._weights = ov.Tensor(_bytes(weights), shared_memory=True)
        self._requests: dict[int, Any] = {}

    def request(self, profile: int, settings: Mapping[str, Any]) -> Any:
        if profile not in self._requests:
            with giving_back(self._held):
                self.compile(profile, settings)
        return self._requests[profile]

    def compile(self, profile: int, settings: Mapping[str, Any]) -> None:
        sizes = self._spec.profiles[profile]
        model = self._core.read_model(self._text, self._weights)
        model.reshape({tensor.name: self._shape(tensor.shape, sizes) for tensor in self._component.inputs})
        self._requests[profile] = self._core.compile_model(model, DEVICE, dict(settings)).create_infer_request()

    def _shape(self, dims: tuple[int | str, ...], sizes: Mapping[str, tuple[int, int, int]]) -> Any:
        limits = [(sizes[dim][0], sizes[dim][2]) if isinstance(dim, str) else (dim, dim) for dim in dims]
        return self._ov.PartialShape([self._ov.Dimension(low, high) for low, high in limits])


class OvEngine:
    """Inputs are read where they lie; outputs are copied out of the library's buffers."""

    def __init__(self, spec: EngineSpec, component: ComponentSpec, network: Network, settings: Mapping[str, Any]) -> None:
        self.spec, self.component = spec, component
        self._network: Network | None = network
        self._settings = settings
        network.compile(0, settings)  # from weights that are lent, and given back meanwhile

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        dims = check_feeds(self.component, self.spec, feeds)
        if self._network is None:
            raise SdruntimeError(f"engine {self.spec.name} is closed")
        try:
            request = self._network.request(self.spec.admitting(**dims)[0], self._settings)
            outputs = request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise SdruntimeError(f"engine {self.spec.name} failed at {dims}: {error}") from error
        return {tensor.name: outputs[tensor.name] for tensor in self.component.outputs}

    def close(self) -> None:
        self._network = None

    def __enter__(self) -> OvEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def here(name: str = "openvino") -> Library:
    try:
        ov = library()
    except LibraryMissing as error:
        return Library(missing=str(error))
    return Library(version=version_of(ov), targets=TARGETS)


def open_engine(bundle: Bundle, spec: EngineSpec, options: EngineOptions, shared: Shared) -> OvEngine:
    """Open the engine from memory that was hashed; OpenVINO itself opens no file.

    Raises BundleError, EngineError, and DeviceMissing for a bf16 engine on a CPU without it.
    """
    ov = library()
    model = bundle.read(spec.files[0])
    precision = spec.options.get("inference_precision", "f32")
    if precision == "bf16" and not has_bf16(ov.Core()):
        raise DeviceMissing(
            f"engine {spec.name}: it computes in bf16, which this CPU does not: "
            f"sdruntime build {quoted(bundle.folder)} --backend openvino"
        )
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    component = bundle.manifest.components[spec.component]
    try:
        with bundle.lending(spec.files[1:]) as lent:
            (weights,) = lent.values()
            network = Network(ov, str(model, "utf-8"), weights, component, spec)
            return OvEngine(spec, component, network, settings | dict(options.session))
    except (RuntimeError, UnicodeDecodeError) as error:
        raise EngineError(f"engine {spec.name}: OpenVINO {version_of(ov)} cannot open it: {error}") from error


def _bytes(view: memoryview) -> Array:
    """The same bytes as an array that numpy takes for writable, which OpenVINO asks of memory that it shares; a write would meet
    the map's protection."""
    if not view:
        return np.empty(0, np.uint8)
    address = np.frombuffer(view, np.uint8).ctypes.data
    return np.ctypeslib.as_array((ctypes.c_uint8 * len(view)).from_address(address))
