"""What the strict TensorRT's classes do from a network to a serialised engine: profiles, configuration, builder."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

from trt.fake_network import Network, called_back, dims, report
from trt.fake_plan import Plan, Shape, plan_to_bytes
from trt.fake_refit import digest, stripped, weights_of
from trt.strict import Strictness

_PHASES = (("Cloning network graph", 2), ("Preparing graph for optimization", 3), ("Computing profile costs", 2))


class HostMemory:
    """Beside the bytes themselves, which the object is."""

    def __init__(self, trt: Any, data: bytes) -> None:
        self.nbytes, self.dtype = len(data), trt.enum("DataType", "INT8")


class OptimizationProfile:
    """Shapes are only compared with each other when the profile is used, as in the real one."""

    def __init__(self, trt: Any) -> None:
        self._trt, self.extra_memory_target = trt, 1.0
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = (tuple(map(int, min)), tuple(map(int, opt)), tuple(map(int, max)))

    def get_shape(self, input: str) -> Any:
        return [dims(self._trt, shape) for shape in self.shapes.get(input, ())]

    def faults(self) -> list[str]:
        return [
            name
            for name, (low, best, high) in self.shapes.items()
            if not len(low) == len(best) == len(high) or not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))
        ]

    def __bool__(self) -> bool:
        return not self.faults()

    __nonzero__ = __bool__


class TimingCache:
    """What was timed: one entry for each network. Its bytes hold for one version on one GPU."""

    def __init__(self, trt: Any, where: str, entries: set[str]) -> None:
        self._trt, self.where, self.entries = trt, where, entries

    def serialize(self) -> Any:
        no_timing_cache(self._trt)
        return host_memory(self._trt, "\n".join([f"FAKE-TIMING {self.where}", *sorted(self.entries)]).encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        no_timing_cache(self._trt)
        if input_cache._behaviour is self:
            raise Strictness("a timing cache combined with itself: the real one waits forever")
        if input_cache._behaviour.where != self.where and not ignore_mismatch:
            return False
        self.entries |= input_cache._behaviour.entries
        return True

    def reset(self) -> bool:
        self.entries.clear()
        return True


def host_memory(trt: Any, data: bytes) -> Any:
    made = trt.make("IHostMemory", data)
    made._behaviour = HostMemory(trt, data)
    return made


def no_timing_cache(trt: Any) -> None:
    if trt.rtx:
        text = "Use Deprecated in TensorRT-RTX 1.2. Timing cache operations are no-ops in TensorRT-RTX. instead."
        warnings.warn(text, DeprecationWarning, stacklevel=5)


class BuilderConfig:
    def __init__(self, trt: Any, logger: Any) -> None:
        self._trt, self._logger = trt, logger
        self.flags = 1 << int(trt.enum("BuilderFlag", "TF32"))
        self.profiles: list[OptimizationProfile] = []
        self.profiling_verbosity = trt.enum("ProfilingVerbosity", "LAYER_NAMES_ONLY")
        self.hardware_compatibility_level = trt.enum("HardwareCompatibilityLevel", "NONE")
        self.runtime_platform = trt.enum("RuntimePlatform", "SAME_AS_BUILD")
        self.progress_monitor: Any = None
        self.max_aux_streams = -1
        self._level, self._cache = 3, None
        self._pools: dict[int, int] = {}
        self._previews: set[str] = set()
        self.capabilities: list[Any] = []
        if "TilingOptimizationLevel" in trt.surface_.classes:
            self.tiling_optimization_level = trt.enum("TilingOptimizationLevel", "NONE")

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        (self._previews.add if enable else self._previews.discard)(feature.name)

    def get_preview_feature(self, feature: Any) -> bool:
        return feature.name in self._previews

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[int(pool)] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(int(pool), self._trt.gpus_.memory.total)

    @property
    def builder_optimization_level(self) -> int:
        return self._level

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        self._level = min(max(int(level), 0), 5)

    num_optimization_profiles = property(lambda self: len(self.profiles))

    def add_optimization_profile(self, profile: Any) -> int:
        """Its index, or -1."""
        if faults := profile._behaviour.faults():
            names = ", ".join(faults)
            report(self._trt, self._logger, "ERROR", f"Invalid optimization profiles for {names}: MIN<=OPT<=MAX is not so")
            return -1
        self.profiles.append(profile._behaviour)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        first, *entries = bytes(serialized_timing_cache).decode(errors="replace").split("\n")
        kind, _, where = first.partition(" ")
        if first and kind != "FAKE-TIMING":
            text = "Failed to deserialize timing cache. Returning an empty timing cache."
            report(self._trt, self._logger, "WARNING", text)
            where, entries = "", []
        return self._trt.make("ITimingCache", TimingCache(self._trt, where or gpu_id(self._trt), set(entries)))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        no_timing_cache(self._trt)
        if cache._behaviour.where != gpu_id(self._trt) and not ignore_mismatch:
            report(self._trt, self._logger, "ERROR", f"The timing cache is of {cache._behaviour.where}")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        no_timing_cache(self._trt)
        return self._cache

    # -- TensorRT-RTX

    @property
    def num_compute_capabilities(self) -> int:
        return len(self.capabilities)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self.capabilities = [self._trt.enum("ComputeCapability", "NONE")] * int(count)

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        if not 0 <= index < len(self.capabilities):
            report(self._trt, self._logger, "ERROR", "Index of compute capability is not in a valid range.")
            return False
        self.capabilities[index] = compute_capability
        return True

    def get_compute_capability(self, index: int) -> Any:
        return self.capabilities[index]


class Builder:
    def __init__(self, trt: Any, logger: Any) -> None:
        if not trt.rtx and not trt.gpus_.devices:
            report(trt, logger, "ERROR", "CUDA initialization failure with error: 100. Please check your CUDA installation")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._trt, self.logger = trt, logger

    def create_network(self, flags: int = 0) -> Any:
        """Weak typing is refused: FP16 is in the ONNX, and TensorRT 11 knows nothing else."""
        known = {name: 1 << value for name, value in self._trt.surface_.classes["NetworkDefinitionCreationFlag"].values.items()}
        if flags & ~sum(known.values()):
            report(self._trt, self.logger, "ERROR", "Parameter check failed, condition: flagSet.toU32() is in range")
            return None
        if not self._trt.rtx and self._trt.surface_.release < (11,) and not flags & known["STRONGLY_TYPED"]:
            raise Strictness("a weakly typed network: set STRONGLY_TYPED, which TensorRT 10 needs")
        typed = known["STRONGLY_TYPED"] if self._trt.rtx else 0  # always on
        return self._trt.make("INetworkDefinition", Network(self._trt, self.logger, flags | typed))

    def create_builder_config(self) -> Any:
        return self._trt.make("IBuilderConfig", BuilderConfig(self._trt, self.logger))

    def create_optimization_profile(self) -> Any:
        return self._trt.make("IOptimizationProfile", OptimizationProfile(self._trt))

    def build_serialized_network(self, network: Any, config: Any, kernel_text: Any = None) -> Any:
        """The engine's bytes, or None after an error was logged."""
        net, settings = network._behaviour, config._behaviour
        fault = self._fault(net, settings)
        if fault:
            report(self._trt, self.logger, "ERROR", f"IBuilder::buildSerializedNetwork: Error Code 4: {fault}")
            return None
        if settings.progress_monitor is not None and not _progress(self._trt, settings.progress_monitor):
            report(self._trt, self.logger, "ERROR", "IBuilder::buildSerializedNetwork: Error Code 7: BuildCanceled")
            return None
        if settings._cache is not None:
            settings._cache._behaviour.entries.add(hashlib.sha256(net.onnx).hexdigest())
        bits = self._trt.surface_.classes["BuilderFlag"].values
        flags = tuple(sorted(name for name, bit in bits.items() if settings.flags >> bit & 1))
        plan = Plan(
            library=self._trt.__name__,
            version=self._trt.__version__,
            capabilities=self._capabilities(settings),
            hardware=settings.hardware_compatibility_level.name,
            flags=flags,
            verbosity=settings.profiling_verbosity.name,
            inputs=tuple(net.inputs),
            outputs=tuple(net.outputs),
            layers=tuple(layer.name for layer in net.layers),
            profiles=tuple(profile.shapes for profile in settings.profiles),
            weights=digest(weights_of(net.onnx)),
            refittable=tuple(sorted(net.refittable)),
            onnx=stripped(net.onnx) if "STRIP_PLAN" in flags else net.onnx,
        )
        return host_memory(self._trt, plan_to_bytes(plan))

    def _capabilities(self, config: BuilderConfig) -> tuple[int, ...]:
        major, minor = self._trt.gpus_.capability
        if not self._trt.rtx:
            return (10 * major + minor,)
        return tuple(10 * major + minor if one.name == "CURRENT" else int(one) for one in config.capabilities)

    def _fault(self, network: Network, config: BuilderConfig) -> str | None:
        if not network.outputs:
            return "Network must have at least one output."
        names = [one.name for one in config.capabilities]
        if "NONE" in names or ("CURRENT" in names and not self._trt.gpus_.devices):
            return f"compute capabilities {', '.join(names)}"
        if self._trt.rtx and (fault := self._fault_of_rtx(config)):
            return fault
        if not all(attention._behaviour.decomposable for attention in network.attentions):
            return "Attention operation was not supported by a dedicated kernel. is_decomposable()"
        dynamic = [tensor for tensor in network.inputs if -1 in tensor.dims]
        if dynamic and not config.profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined."
        for index, profile in enumerate(config.profiles):
            for tensor in network.inputs:
                if tensor.name not in profile.shapes:
                    if -1 in tensor.dims:
                        return f"Dynamic input tensor {tensor.name} is missing dimensions in profile {index}"
                    profile.shapes[tensor.name] = (tensor.dims,) * 3
                fits = all(len(shape) == len(tensor.dims) for shape in profile.shapes[tensor.name])
                for dim, *sizes in zip(tensor.dims, *profile.shapes[tensor.name], strict=False):
                    fits = fits and dim in (-1, *sizes) and (dim == -1 or len(set(sizes)) == 1)
                if not fits:
                    return f"profile {index} of {tensor.name} does not fit {tensor.dims}"
            if unknown := profile.shapes.keys() - {tensor.name for tensor in network.inputs}:
                raise Strictness(f"profile {index} names {', '.join(sorted(unknown))}, which the network does not take")
            _agree(network, profile.shapes)
        return None

    def _fault_of_rtx(self, config: BuilderConfig) -> str | None:
        """Flags that TensorRT-RTX 1.7.1 refuses, found by trying each flag and each pair of flags on a machine without a GPU."""
        flags = {name for name, bit in self._trt.surface_.classes["BuilderFlag"].values.items() if config.flags >> bit & 1}
        if "VERSION_COMPATIBLE" in flags:
            return "Unable to load library: libnvinfer_lean.so.1"
        if flags & {"STRIP_PLAN", "REFIT", "REFIT_IDENTICAL"} and not self._trt.gpus_.devices:
            return "MyelinCheckException: graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed."
        if flags >= {"REQUIRE_USER_ALLOCATION", "WEIGHT_STREAMING"}:
            return "BuilderFlag::kREQUIRE_USER_ALLOCATION is not compatible with BuilderFlag::kWEIGHT_STREAMING."
        return None


def _agree(network: Network, shapes: dict[str, tuple[Shape, Shape, Shape]]) -> None:
    """Dimensions of one name must be equal: the real builder accepts some that are not, and refuses or misbehaves for others."""
    sizes: dict[str, tuple[int, ...]] = {}
    for tensor in network.inputs:
        for k, dim in enumerate(tensor.shape):
            here = tuple(shape[k] for shape in shapes[tensor.name])
            if isinstance(dim, str) and sizes.setdefault(dim, here) != here:
                raise Strictness(f"dimension {dim} is {here} in {tensor.name} and {sizes[dim]} elsewhere")


def _progress(trt: Any, monitor: Any) -> bool:
    """Tell a monitor of some nested phases; whether it let them all run."""

    def tell(method: str, *args: Any) -> Any:
        return called_back(trt, "IProgressMonitor", method, monitor, *args)

    def step(phase: str, k: int) -> bool:
        answer = tell("step_complete", phase, k)
        if not isinstance(answer, bool):
            raise Strictness(f"step_complete returned {answer!r}, not a bool")
        return answer

    root, going = "Building engine", True
    tell("phase_start", root, None, len(_PHASES))
    for k, (phase, steps) in enumerate(_PHASES):
        if going:
            tell("phase_start", phase, root, steps)
            going = all(step(phase, j) for j in range(steps))
            tell("phase_finish", phase)
            going = going and step(root, k)
    tell("phase_finish", root)
    return going


def gpu_id(trt: Any) -> str:
    return f"{trt.__version__} {trt.gpus_.name} {trt.gpus_.capability[0]}.{trt.gpus_.capability[1]}"


BUILD: dict[str, type] = {"Builder": Builder}
