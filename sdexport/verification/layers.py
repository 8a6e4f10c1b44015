"""Run a component with inner tensors as outputs, in Polygraphy's runners: its ONNX, or an engine that is rebuilt for it.

Polygraphy chooses between TensorRT and TensorRT-RTX when it is imported, so a process uses one of the two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnx import modify_outputs
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.backend.trt import TrtRunner, modify_network_outputs

from sdruntime.backends.base.building import Stage
from sdruntime.backends.ort.build import library as onnxruntime
from sdruntime.backends.trt.build import build_job
from sdruntime.backends.trt.library import library as tensorrt
from sdruntime.backends.trt.library import messages
from sdruntime.backends.trt.worker import network_from_onnx, opened_plan, plan_from_network
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec


class OnnxLayers:
    """An ONNX file in ONNX Runtime without graph optimization. `nodes` has its nodes by their first output."""

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        self._model = onnx.load(str(path), load_external_data=False)
        self.nodes = {node.output[0]: node for node in self._model.graph.node}

    def runner(self, names: Sequence[str]) -> BaseRunner:
        return OnnxrtRunner(functools.partial(self._session, names))

    def _session(self, names: Sequence[str]) -> Any:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        marked = modify_outputs(self._model, outputs=names, copy=True)
        return ort.InferenceSession(marked.SerializeToString(), options, providers=["CPUExecutionProvider"])


class EngineLayers:
    """A TensorRT or TensorRT-RTX engine, rebuilt from the ONNX in `path` with other outputs and otherwise the same options.

    `nodes` has the names of the floating-point tensors of its network: for an ONNX node, that of the node's output.
    """

    def __init__(self, bundle: Bundle, engine: EngineSpec, path: str, *, profile: int = 0) -> None:
        whole = {name: value for name, value in engine.options.items() if name != "strip"}  # with its weights
        self._trt, self._profile = tensorrt(engine.backend), profile
        self._job = build_job(bundle, dataclasses.replace(engine, options=whole)) | {"onnx": path}
        _, network, _parser = network_from_onnx(self._job, self._trt, messages(self._trt))
        self.nodes = {tensor.name for tensor in _computed(network) if tensor.dtype in self._floats}

    @property
    def _floats(self) -> tuple[Any, ...]:
        return self._trt.float32, self._trt.float16, self._trt.bfloat16

    def runner(self, names: Sequence[str]) -> BaseRunner:
        # the runner allocates the memory, as TensorRT-RTX requires
        engine = functools.partial(self._engine, names)
        return _EngineRunner(engine, optimization_profile=self._profile, allocation_strategy="runtime")

    def plan(self, names: Sequence[str]) -> Any:
        """Return the serialised engine (an IHostMemory) with these outputs. Raises EngineError and OutOfSpace."""
        log = messages(self._trt)
        builder, network, _parser = network_from_onnx(self._job, self._trt, log)
        for tensor in list(_computed(network)):
            if tensor.name in names and tensor.dtype == self._trt.bfloat16:  # NumPy has no bfloat16
                self._widen(network, tensor)
        modify_network_outputs((builder, network), outputs=names)
        return plan_from_network(self._job, self._trt, log, builder, network, _go_on)

    def _engine(self, names: Sequence[str]) -> Any:
        return opened_plan(self._job, self._trt, messages(self._trt), self.plan(names))

    def _widen(self, network: Any, tensor: Any) -> None:
        """Give the name of a tensor to a float32 copy of it."""
        name = tensor.name
        tensor.name = f"{name} as it is"
        network.add_cast(tensor, self._trt.float32).get_output(0).name = name


class _EngineRunner(TrtRunner):  # type: ignore[misc]
    """A TrtRunner that also frees its outputs, which Polygraphy leaves on the GPU."""

    def deactivate(self) -> None:
        buffers = self.output_allocator.buffers
        super().deactivate()
        for buffer in buffers.values():
            buffer.free()


def _computed(network: Any) -> Iterator[Any]:
    """Yield the output tensors of a network's layers."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        yield from filter(None, (layer.get_output(k) for k in range(layer.num_outputs)))


def _go_on(stage: Stage) -> bool:
    return True
