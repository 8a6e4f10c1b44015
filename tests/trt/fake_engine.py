"""What the strict TensorRT's classes do from a serialised engine to a context: runtime, engine, inspector, runtime cache."""

from __future__ import annotations

import json
import weakref
from typing import Any

from trt.fake_build import gpu_id, host_memory
from trt.fake_context import ExecutionContext
from trt.fake_network import dims, report
from trt.fake_plan import HEADER, BadPlan, Model, Plan, Tensor, plan_from_bytes, plan_to_bytes
from trt.strict import Strictness

_VERSION_MISMATCH, _UNSUPPORTED_CC, _MALFORMED, _CUDA = 1, 2, 32, 64  # EngineInvalidityDiagnostics


def why_not(trt: Any, plan: Plan) -> str | None:
    """Why this GPU cannot run a plan."""
    here = 10 * trt.gpus_.capability[0] + trt.gpus_.capability[1]
    if trt.rtx and not plan.capabilities:
        return None if here >= 80 else f"The engine cannot run on this GPU, which has compute capability {here}"
    if plan.hardware == "AMPERE_PLUS" and here >= 80:
        return None
    if here not in plan.capabilities:
        made_for = ", ".join(map(str, plan.capabilities))
        return f"The engine plan file is generated on an incompatible device, expecting compute {here} got compute {made_for}"
    return None


class Runtime:
    engine_header_size = HEADER.size

    def __init__(self, trt: Any, logger: Any) -> None:
        if not trt.rtx and not trt.gpus_.devices:
            report(trt, logger, "ERROR", "CUDA initialization failure with error: 100. Please check your CUDA installation")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._trt, self.logger = trt, logger
        self.defer_weights_loading = self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        """The engine, or None after an error was logged."""
        plan, fault = self._plan(serialized_engine)
        if plan is None:
            report(self._trt, self.logger, "ERROR", f"IRuntime::deserializeCudaEngine: Error Code 1: {fault}")
            return None
        engine = Engine(self._trt, self.logger, plan, deferred=self.defer_weights_loading)
        if not self.defer_weights_loading and not engine.reserve(len(plan.onnx)):
            report(self._trt, self.logger, "ERROR", "IRuntime::deserializeCudaEngine: Error Code 2: OutOfMemory")
            return None
        return self._trt.make("ICudaEngine", engine)

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        """For the first `engine_header_size` bytes; the capabilities are in the rest, and looked at where that is given."""
        data = bytes(buffer)
        valid, invalid = (self._trt.enum("EngineValidity", name) for name in ("VALID", "INVALID"))
        if not self._trt.gpus_.devices:
            return invalid, _CUDA
        if len(data) < HEADER.size or not data.startswith(b"FAKE-RTX"):
            return invalid, _MALFORMED
        if HEADER.unpack_from(data)[1].rstrip(b"\0").decode() != self._trt.__version__:
            return invalid, _VERSION_MISMATCH
        if len(data) > HEADER.size and why_not(self._trt, plan_from_bytes(data, self._trt.__name__, self._trt.__version__)):
            return invalid, _UNSUPPORTED_CC
        return valid, 0

    def _plan(self, data: Any) -> tuple[Plan | None, str]:
        if not self._trt.gpus_.devices:
            return None, "Cuda Runtime (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)"
        try:
            plan = plan_from_bytes(
                bytes(data), self._trt.__name__, self._trt.__version__, host_code=self.engine_host_code_allowed
            )
        except BadPlan as error:
            return None, f"Serialization (Serialization assertion failed. {error})"
        if self.engine_host_code_allowed and "VERSION_COMPATIBLE" not in plan.flags:
            raise Strictness("engine_host_code_allowed runs code from the file, and this plan needs none")
        fault = why_not(self._trt, plan)
        return (None, fault) if fault else (plan, "")


class Engine:
    """Its weights take memory of the device that was current when it was made."""

    def __init__(self, trt: Any, logger: Any, plan: Plan, *, deferred: bool) -> None:
        self._trt, self._logger, self.plan, self.model = trt, logger, plan, Model(plan.onnx)
        self.device = trt.gpus_.device
        self.deferred, self.weights_loaded = deferred, not deferred
        self.complete = "STRIP_PLAN" not in plan.flags  # else it has to be refitted
        self.contexts: weakref.WeakSet[ExecutionContext] = weakref.WeakSet()
        self.contexts_made = 0
        self._budget = self.streamable_weights_size
        self._release: Any = None
        self.name = "Unnamed Network 0"
        self.num_layers, self.num_aux_streams = len(plan.layers), 0
        self.num_io_tensors = len(plan.inputs) + len(plan.outputs)
        self.num_optimization_profiles = max(1, len(plan.profiles))
        self.refittable = any(flag == "STRIP_PLAN" or flag.startswith("REFIT") for flag in plan.flags)
        self.hardware_compatibility_level = trt.enum("HardwareCompatibilityLevel", plan.hardware)
        self.profiling_verbosity = trt.enum("ProfilingVerbosity", plan.verbosity)

    def reserve(self, size: int) -> bool:
        """Take `size` bytes for the weights in place of what they have; False, and none, where there are not so many."""
        memory = self._trt.gpus_.memory
        if self._release is not None:
            self._release()
            self._release = None
        allocation = memory.allocate(size, self.device, "engine weights")
        if allocation is not None:
            self._release = weakref.finalize(self, memory.release, allocation)
        return allocation is not None

    # -- tensors

    def tensor(self, name: str) -> Tensor:
        found = [tensor for tensor in self.plan.inputs + self.plan.outputs if tensor.name == name]
        if not found:
            raise Strictness(f"the engine has no tensor {name!r}")
        return found[0]

    def get_tensor_name(self, index: int) -> str:
        return (self.plan.inputs + self.plan.outputs)[index].name

    def get_tensor_mode(self, name: str) -> Any:
        for mode, tensors in (("INPUT", self.plan.inputs), ("OUTPUT", self.plan.outputs)):
            if name in [tensor.name for tensor in tensors]:
                return self._trt.enum("TensorIOMode", mode)
        report(self._trt, self._logger, "ERROR", f"Given invalid tensor name: {name}")
        return self._trt.enum("TensorIOMode", "NONE")

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.enum("DataType", self.tensor(name).dtype)

    def get_tensor_shape(self, name: str) -> Any:
        return dims(self._trt, self.tensor(name).dims)

    def get_tensor_location(self, name: str) -> Any:
        self.tensor(name)
        return self._trt.enum("TensorLocation", "DEVICE")

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        self.tensor(name)
        return self._trt.enum("TensorFormat", "LINEAR")

    def get_tensor_bytes_per_component(self, name: str) -> int:
        return self.tensor(name).bytes_of(())

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return None

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        if name not in [tensor.name for tensor in self.plan.inputs]:
            raise Strictness(f"{name!r} is no input: only inputs have ranges")
        if not self.plan.profiles:
            return [dims(self._trt, self.tensor(name).dims)] * 3
        return [dims(self._trt, shape) for shape in self.plan.profiles[profile_index][name]]

    # -- memory

    @property
    def device_memory_size_v2(self) -> int:
        return max(self.get_device_memory_size_for_profile_v2(k) for k in range(self.num_optimization_profiles))

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self.plan.activation_of_profile(profile_index) + self.weight_streaming_scratch_memory_size

    @property
    def streamable_weights_size(self) -> int:
        return len(self.plan.onnx) if "WEIGHT_STREAMING" in self.plan.flags else 0

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return 1024 if self._budget < self.streamable_weights_size else 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self.contexts or "WEIGHT_STREAMING" not in self.plan.flags or budget < 0:
            report(self._trt, self._logger, "ERROR", "ICudaEngine::setWeightStreamingBudgetV2: Error Code 3: API Usage Error")
            return
        self._budget = min(budget, self.streamable_weights_size)
        self.reserve(self._budget)

    def load_weights(self, blob: Any) -> bool:
        if not self.deferred or self.weights_loaded or bytes(blob) != plan_to_bytes(self.plan):
            return False
        self.weights_loaded = self.reserve(len(self.plan.onnx))
        return self.weights_loaded

    def unload_weights(self) -> bool:
        if not self.deferred or not self.weights_loaded:
            return False
        if any(context.pending() for context in self.contexts):
            raise Strictness("the weights are unloaded while the engine is running")
        self._release()
        self._release, self.weights_loaded = None, False
        return True

    # -- what it makes

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Any:
        """The context, or None after an error was logged."""
        config = None if runtime_config is None else runtime_config._behaviour
        chosen = strategy.name if strategy is not None else config.strategy.name if config is not None else "STATIC"
        context = ExecutionContext(self._trt, self._logger, self, chosen, config)
        if chosen == "STATIC" and not context.allocate(self.device_memory_size_v2):
            report(self._trt, self._logger, "ERROR", "IExecutionContext::IExecutionContext: Error Code 2: OutOfMemory")
            return None
        self.contexts.add(context)
        self.contexts_made += 1
        return self._trt.make("IExecutionContext", context)

    def create_runtime_config(self) -> Any:
        return self._trt.make("IRuntimeConfig", RuntimeConfig(self._trt))

    def create_engine_inspector(self) -> Any:
        return self._trt.make("EngineInspector", EngineInspector(self._trt, self))

    def serialize(self) -> Any:
        return host_memory(self._trt, plan_to_bytes(self.plan))


class RuntimeConfig:
    def __init__(self, trt: Any) -> None:
        self._trt, self.strategy = trt, trt.enum("ExecutionContextAllocationStrategy", "STATIC")
        self.cache: weakref.ref[Any] | None = None  # the library holds no reference either
        if trt.rtx:
            self.cuda_graph_strategy = trt.enum("CudaGraphStrategy", "DISABLED")
            self.dynamic_shapes_kernel_specialization_strategy = trt.enum("DynamicShapesKernelSpecializationStrategy", "LAZY")

    def set_execution_context_allocation_strategy(self, strategy: Any = None) -> None:
        self.strategy = strategy or self._trt.enum("ExecutionContextAllocationStrategy", "STATIC")

    def get_execution_context_allocation_strategy(self) -> Any:
        return self.strategy

    def create_runtime_cache(self) -> Any:
        return self._trt.make("IRuntimeCache", RuntimeCache(self._trt))

    def set_runtime_cache(self, cache: Any = None) -> bool:
        self.cache = None if cache is None else weakref.ref(cache)
        return True

    def get_runtime_cache(self) -> Any:
        return None if self.cache is None else self.cache()


class RuntimeCache:
    """Compiled kernels: an entry for each engine and shape that was run. Its bytes hold for one version on one GPU."""

    def __init__(self, trt: Any) -> None:
        self._trt = trt
        self.entries: set[str] = set()

    def serialize(self) -> Any:
        return host_memory(self._trt, "\n".join([f"FAKE-CACHE {gpu_id(self._trt)}", *sorted(self.entries)]).encode())

    def deserialize(self, blob: Any) -> bool:
        first, *entries = bytes(blob).decode(errors="replace").split("\n")
        if first != f"FAKE-CACHE {gpu_id(self._trt)}":
            return False
        self.entries |= set(entries)
        return True

    def reset(self) -> bool:
        self.entries.clear()
        return True


class EngineInspector:
    def __init__(self, trt: Any, engine: Engine) -> None:
        self._trt, self._engine = trt, engine
        self.execution_context: Any = None

    def get_engine_information(self, format: Any) -> str:
        plan = self._engine.plan
        if format.name != "JSON":
            return "\n".join(plan.layers)
        layers = [{"Name": name} for name in plan.layers] if plan.verbosity == "DETAILED" else list(plan.layers)
        names = [tensor.name for tensor in plan.inputs + plan.outputs]
        key = "Bindings" if not self._trt.rtx and self._trt.surface_.release < (11,) else "I/O Tensors"
        return json.dumps({"Layers": layers, key: names})

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        return self._engine.plan.layers[layer_index]


ENGINE: dict[str, type] = {"Runtime": Runtime}
