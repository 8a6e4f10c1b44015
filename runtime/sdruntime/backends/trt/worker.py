"""Build a TensorRT engine in a separate process: `python -m sdruntime.backends.trt.worker`.

Networks are strongly typed: the types in the ONNX determine the precision. Calls that are not in every version from TensorRT 10.3
to 11.x and in TensorRT-RTX 1.x are guarded.
"""

from __future__ import annotations

import dataclasses
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdruntime.backends.base.building import Stage
from sdruntime.backends.base.engine import AMPERE_UP
from sdruntime.backends.onnx_file.inputs import with_required_inputs
from sdruntime.backends.trt.inspection import inspection_from_json
from sdruntime.backends.trt.library import FLAVOURS, capabilities_of, library, messages
from sdruntime.bundle.bundle import disk_full_as_error
from sdruntime.bundle.dimensions import size_of
from sdruntime.errors import EngineError, OutOfSpace, SdruntimeError
from sdruntime.system.cache import read_cached, write_cached
from sdruntime.system.cuda import Cuda, devices
from sdruntime.system.memory import available_memory
from sdruntime.system.process import Message, serve

_INDIVIDUAL = "REFIT_INDIVIDUAL"  # the builder flag for weights that are marked one by one; older versions have REFIT for all
_SHARE = 0.8  # of the free memory, for the scratch memory of a layer
_INTERVAL = 0.1  # seconds between progress reports
_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|could not be allocated|Device memory is insufficient", re.I)
_NEEDED = (
    re.compile(r"requested size of (\d+)"),
    re.compile(r"GPU memory \((\d+) bytes\)"),
    re.compile(r"request: *(\d+) *MB"),
)

Progress = Callable[[Stage], bool]


def plan_from_onnx(job: Mapping[str, Any], trt: Any, progress: Progress) -> tuple[Any, int]:
    """Build the engine of a job (see `build.build_job`); return it serialized (an IHostMemory), and its number of attentions.

    `progress` is called with each stage; if it returns False, the build is cancelled (KeyboardInterrupt). Raises EngineError with
    the parser's or builder's reason, OutOfSpace.
    """
    log = messages(trt)
    progress(Stage(name="parse"))
    builder, network, _parser = network_from_onnx(job, trt, log)  # the parser owns the weights
    plan = plan_from_network(job, trt, log, builder, network, progress)
    attentions = sum(network.get_layer(index).type == trt.LayerType.SOFTMAX for index in range(network.num_layers))
    return plan, attentions


def network_from_onnx(job: Mapping[str, Any], trt: Any, log: Any) -> tuple[Any, Any, Any]:
    """Return a builder, the network of a job's ONNX file, and the parser, which must outlive the network. Raises EngineError."""
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    optional = {name: job["inputs"][name] for name in job["optional_inputs"]}
    if optional:
        parsed = parser.parse(with_required_inputs(memoryview(Path(job["onnx"]).read_bytes()), optional), job["onnx"])
    else:
        parsed = parser.parse_from_file(job["onnx"])
    if not parsed:
        raise EngineError(f"{job['component']}: {_parser_error(trt, parser, log)}")
    _decompose_attentions(trt, network)
    for name in job.get("refittable", ()):
        if hasattr(trt.BuilderFlag, _INDIVIDUAL) and not network.mark_weights_refittable(name):
            raise EngineError(f"{job['component']}: TensorRT {trt.__version__} cannot make the weight {name} refittable")
    return builder, network, parser


def plan_from_network(job: Mapping[str, Any], trt: Any, log: Any, builder: Any, network: Any, progress: Progress) -> Any:
    """Build a network with a job's settings and return the serialized engine. Raises as `plan_from_onnx` does."""
    config = builder.create_builder_config()
    _set_target(trt, config, job)
    _set_options(trt, config, job["options"])
    if _is_inspected(job):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in job["profiles"]:
        if config.add_optimization_profile(_profile(builder, job["inputs"], profile)) < 0:
            raise EngineError(f"{job['component']}: TensorRT does not accept the profile {profile}: {'; '.join(log.errors())}")
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    timing = _timing_cache(trt, config, job)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        if monitor.failure is not None:
            raise monitor.failure
        if monitor.cancelled:
            raise KeyboardInterrupt
        raise _build_error(f"{job['component']} for {job['target']}", trt, log)
    if timing is not None:
        write_cached(_timing_name(trt), memoryview(timing.serialize()))
    return plan


def _network_flags(trt: Any) -> int:
    """Return the flag for strongly typed networks, which TensorRT 11 no longer has: all its networks are strongly typed."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_error(trt: Any, parser: Any, log: Any) -> str:
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node_name()} ({error.node_operator()})" if error.node() >= 0 else "the model"
        errors.append(f"{where}: {error.desc()}")
    reasons = "; ".join(errors) or "; ".join(log.errors()) or "no reason was given"
    return f"TensorRT {trt.__version__} cannot parse its ONNX: {reasons}"


def _decompose_attentions(trt: Any, network: Any) -> None:
    """Allow TensorRT to decompose attentions that have no fused kernel (fp32, heads of 512); by default the build fails."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is not None:
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == kind:
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True


def _set_target(trt: Any, config: Any, job: Mapping[str, Any]) -> None:
    if FLAVOURS[job["backend"]].ahead:
        capabilities = capabilities_of(trt, job["target"])
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            if not config.set_compute_capability(capability, index):
                raise SdruntimeError(f"TensorRT-RTX {trt.__version__} did not accept the compute capability {capability}")
    elif job["target"] == AMPERE_UP:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif job["options"].get("same_compute_capability"):
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def _set_options(trt: Any, config: Any, options: Mapping[str, Any]) -> None:
    """Apply the options, which `build.read_options` has checked for this version."""
    # TensorRT-RTX can capture only engines built with this flag in a CUDA graph, but cannot stream their weights
    user_allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if user_allocation is not None and not options.get("weight_streaming"):
        config.set_flag(user_allocation)
    limit = options.get("workspace") or _workspace()
    if limit:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    if "optimization_level" in options:
        config.builder_optimization_level = options["optimization_level"]
    if options.get("version_compatible"):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.get("weight_streaming"):
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.get("strip"):
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if options.get("lora"):  # never REFIT_IDENTICAL, which is for the same weights only
        config.set_flag(getattr(trt.BuilderFlag, _INDIVIDUAL, trt.BuilderFlag.REFIT))
    if options.get("tiling", "none") != "none":
        config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options["tiling"].upper())


def _workspace() -> int:
    """Return the workspace limit in bytes: most of the free GPU memory, or 0 (the library's default) without a GPU."""
    if not devices():
        return 0
    with Cuda.open() as cuda:
        return int(cuda.free_memory() * _SHARE)


def _profile(builder: Any, inputs: Mapping[str, Sequence[int | str]], ranges: Mapping[str, Sequence[int]]) -> Any:
    """Return the optimization profile for the (min, opt, max) sizes of each named dimension."""
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        if any(isinstance(dim, str) for dim in shape):
            sizes = [{dim: limits[k] for dim, limits in ranges.items()} for k in range(3)]
            low, opt, high = (tuple(size_of(dim, dims) for dim in shape) for dims in sizes)
            profile.set_shape(name, low, opt, high)
    return profile


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the current phase a few times a second. Nested phases are reported under the inner one's name."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled, self._totals, self._reported = False, dict[str, int](), 0.0
            self.failure: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self._reported >= _INTERVAL and not self.cancelled:
                self._reported = now
                try:
                    self.cancelled = not progress(Stage(name=phase_name, done=step + 1, total=self._totals.get(phase_name, 0)))
                except BaseException as error:  # the library would swallow it, even KeyboardInterrupt
                    self.cancelled, self.failure = True, error
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._totals.pop(phase_name, None)

    return Monitor()


def _timing_name(trt: Any) -> str:
    """Return the name of the timing cache, one for each version and GPU."""
    device = devices()[0]
    return f"tensorrt/timing-{trt.__version__}-{device.target}-{device.uuid or 'gpu'}.cache"


def _timing_cache(trt: Any, config: Any, job: Mapping[str, Any]) -> Any:
    """Load the timing cache into `config` and return it, or None if the build does not use one."""
    if FLAVOURS[job["backend"]].ahead or job["options"].get("timing_cache") is False or not devices():
        return None
    cache = config.create_timing_cache(read_cached(_timing_name(trt)) or b"")
    if not config.set_timing_cache(cache, False):  # written by another build of the library: start with an empty one
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _build_error(what: str, trt: Any, log: Any) -> SdruntimeError:
    """Return the error for a failed build, with the message that names the cause, which is not the last one."""
    texts = [text for _, text in log.kept]
    shortage = next((text for text in texts if _MEMORY.search(text)), None)
    if shortage is not None:
        sizes = [int(match[1]) << 20 if "MB" in pattern.pattern else int(match[1])
                 for text in texts for pattern in _NEEDED if (match := pattern.search(text))]  # fmt: skip
        needed = f"needs {max(sizes):,} bytes" if sizes else "needs more than is available"
        return OutOfSpace(
            f"{what}: out of memory while building: {needed}, {_free():,} are free ({shortage.strip()}); "
            "close other programs that use the memory, build for a smaller size or batch, or add --option workspace=1G"
        )
    errors = log.errors()
    reason = next((text for text in errors if "could not find any implementation" not in text.lower()), None)
    return EngineError(
        f"{what}: TensorRT {trt.__version__} cannot build it: {reason or '; '.join(errors) or 'no reason was given'}"
    )


def _free() -> int:
    if not devices():
        return available_memory()
    with Cuda.open() as cuda:
        return cuda.free_memory()


def _runs_here(job: Mapping[str, Any]) -> bool:
    gpus = devices()
    return bool(gpus) and job["target"] in (AMPERE_UP, gpus[0].target)


def _is_inspected(job: Mapping[str, Any]) -> bool:
    """Return whether the engine's layers are inspected: those of half-precision engines for this machine's GPU."""
    return job["precision"] != "fp32" and _runs_here(job)


def opened_plan(job: Mapping[str, Any], trt: Any, log: Any, plan: Any) -> Any:
    """Open a plan that this process has built. Raises EngineError."""
    runtime = trt.Runtime(log)
    if job["options"].get("version_compatible"):  # TensorRT's own code, from the build that just ended
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"the engine that was just built cannot be opened here: {'; '.join(log.errors())}")
    return engine


def _properties(job: Mapping[str, Any], trt: Any, plan: Any, attentions: int) -> Message:
    """Open the engine on its GPU and return the bytes of its activations ("memory") and the inspection's "notes"."""
    engine = opened_plan(job, trt, messages(trt), plan)
    properties: Message = {"memory": int(engine.device_memory_size_v2)}
    if _is_inspected(job):
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        properties["notes"] = list(inspection_from_json(text, attentions=attentions).notes(job["component"]))
    return properties


def work(job: Message, send: Callable[[Message], None]) -> Message | None:
    """Build the engine of a job and write its plan; send the stages, and return the engine's properties if it runs here."""
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))

    def progress(stage: Stage) -> bool:
        send(dataclasses.asdict(stage))
        return not stopped

    trt = library(job["backend"])
    plan, attentions = plan_from_onnx(job, trt, progress)
    path = Path(job["plan"])
    with disk_full_as_error(path.parent), path.open("wb") as file:
        file.write(memoryview(plan))
    return _properties(job, trt, plan, attentions) if _runs_here(job) else None


if __name__ == "__main__":
    serve(work, errors=(SdruntimeError,), memory=OutOfSpace("out of memory while building: free some, or build elsewhere"))
