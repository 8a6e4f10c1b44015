"""A TensorRT build, in a process of its own: parse, configure, build, write. Run as `python -m sdruntime.backends.trt.worker`.

Networks are strongly typed: the types in the ONNX are the precision. Only calls that TensorRT 10.3 to 11.x and TensorRT-RTX 1.x
share are made unguarded.
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
from sdruntime.backends.trt.inspection import inspection_from_json
from sdruntime.backends.trt.library import FLAVOURS, capabilities_of, library, messages
from sdruntime.bundle.bundle import disk_full_as_error
from sdruntime.bundle.dimensions import size_of
from sdruntime.errors import EngineError, OutOfSpace, SdruntimeError
from sdruntime.system.cache import read_cached, write_cached
from sdruntime.system.cuda import Cuda, devices
from sdruntime.system.memory import available_memory
from sdruntime.system.process import Message, serve

_SHARE = 0.8  # of the free memory that a layer's scratch may take
_TELLING = 0.1  # seconds between two stages that are told
_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|could not be allocated|Device memory is insufficient", re.I)
_NEEDED = (
    re.compile(r"requested size of (\d+)"),
    re.compile(r"GPU memory \((\d+) bytes\)"),
    re.compile(r"request: *(\d+) *MB"),
)

Progress = Callable[[Stage], bool]


def plan_from_onnx(job: Mapping[str, Any], trt: Any, progress: Progress) -> tuple[Any, int]:
    """The serialised engine (an IHostMemory) of the ONNX file of a job, as `build.build_engine` writes jobs, and how many
    attentions its network has.

    `progress` is told each stage; where it answers False the build is cancelled (KeyboardInterrupt). Raises EngineError with
    what the parser or the builder named as the cause, OutOfSpace.
    """
    log = messages(trt)
    progress(Stage(name="parse"))
    builder, network, _parser = network_from_onnx(job, trt, log)  # the parser holds the weights
    plan = plan_from_network(job, trt, log, builder, network, progress)
    attentions = sum(network.get_layer(index).type == trt.LayerType.SOFTMAX for index in range(network.num_layers))
    return plan, attentions


def network_from_onnx(job: Mapping[str, Any], trt: Any, log: Any) -> tuple[Any, Any, Any]:
    """A builder, the network of a job's ONNX file, and the parser, which the network needs alive. Raises EngineError."""
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        raise EngineError(f"{job['component']}: {_parser_error(trt, parser, log)}")
    _decompose_attentions(trt, network)
    return builder, network, parser


def plan_from_network(job: Mapping[str, Any], trt: Any, log: Any, builder: Any, network: Any, progress: Progress) -> Any:
    """The serialised engine of a network under a job's settings. Raises as `plan_from_onnx` does."""
    config = builder.create_builder_config()
    _set_target(trt, config, job)
    _set_options(trt, config, job["options"])
    if _looks_into(job):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in job["profiles"]:
        if config.add_optimization_profile(_profile(builder, job["inputs"], profile)) < 0:
            raise EngineError(f"{job['component']}: TensorRT does not take the profile {profile}: {'; '.join(log.errors())}")
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    timing = _timing_cache(trt, config, job)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        if monitor.failure is not None:
            raise monitor.failure
        if monitor.cancelled:
            raise KeyboardInterrupt
        raise _cause(f"{job['component']} for {job['target']}", trt, log)
    if timing is not None:
        write_cached(_timing_name(trt), memoryview(timing.serialize()))
    return plan


def _network_flags(trt: Any) -> int:
    """Strongly typed: requested in 10.x, always so in 11.x."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_error(trt: Any, parser: Any, log: Any) -> str:
    told = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node_name()} ({error.node_operator()})" if error.node() >= 0 else "the model"
        told.append(f"{where}: {error.desc()}")
    reasons = "; ".join(told) or "; ".join(log.errors()) or "no reason was given"
    return f"TensorRT {trt.__version__} cannot parse its ONNX: {reasons}"


def _decompose_attentions(trt: Any, network: Any) -> None:
    """Let an attention without a kernel of its own (fp32, heads of 512) be taken apart; the default is to fail."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is not None:
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == kind:
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True


def _set_target(trt: Any, config: Any, job: Mapping[str, Any]) -> None:
    if FLAVOURS[job["backend"]].ahead:
        wanted = capabilities_of(trt, job["target"])
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            if not config.set_compute_capability(capability, index):
                raise SdruntimeError(f"TensorRT-RTX {trt.__version__} did not take the compute capability {capability}")
    elif job["target"] == AMPERE_UP:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif job["options"].get("same_compute_capability"):
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def _set_options(trt: Any, config: Any, options: Mapping[str, Any]) -> None:
    """`options` are those that `build.read_options` let pass for this version."""
    own_memory = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if own_memory is not None and not options.get(
        "weight_streaming"
    ):  # TensorRT-RTX captures nothing else, and streams nothing so
        config.set_flag(own_memory)
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
    if options.get("tiling", "none") != "none":
        config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options["tiling"].upper())


def _workspace() -> int:
    """Bytes: most of what is free on the GPU; 0, the library's own choice, where no GPU is."""
    if not devices():
        return 0
    with Cuda.open() as cuda:
        return int(cuda.free_memory() * _SHARE)


def _profile(builder: Any, inputs: Mapping[str, Sequence[int | str]], ranges: Mapping[str, Sequence[int]]) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        if any(isinstance(dim, str) for dim in shape):
            sizes = [{dim: limits[k] for dim, limits in ranges.items()} for k in range(3)]
            low, best, high = (tuple(size_of(dim, each) for dim in shape) for each in sizes)
            profile.set_shape(name, low, best, high)
    return profile


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells the phases, a few times a second; phases within phases are told by the inner one's name."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled, self._totals, self._told = False, dict[str, int](), 0.0
            self.failure: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self._told >= _TELLING and not self.cancelled:
                self._told = now
                try:
                    self.cancelled = not progress(Stage(name=phase_name, done=step + 1, total=self._totals.get(phase_name, 0)))
                except BaseException as error:  # the library would swallow it, Ctrl-C too
                    self.cancelled, self.failure = True, error
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._totals.pop(phase_name, None)

    return Monitor()


def _timing_name(trt: Any) -> str:
    """A timing cache belongs to a version and a GPU."""
    device = devices()[0]
    return f"tensorrt/timing-{trt.__version__}-{device.target}-{device.uuid or 'gpu'}.cache"


def _timing_cache(trt: Any, config: Any, job: Mapping[str, Any]) -> Any:
    if FLAVOURS[job["backend"]].ahead or job["options"].get("timing_cache") is False or not devices():
        return None
    cache = config.create_timing_cache(read_cached(_timing_name(trt)) or b"")
    if not config.set_timing_cache(cache, False):  # of another build of the library: start again
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _cause(what: str, trt: Any, log: Any) -> SdruntimeError:
    """The error for a build that gave nothing: the message that names the cause, not the last one."""
    texts = [text for _, text in log.kept]
    short = next((text for text in texts if _MEMORY.search(text)), None)
    if short is not None:
        sizes = [int(found[1]) << 20 if "MB" in pattern.pattern else int(found[1])
                 for text in texts for pattern in _NEEDED if (found := pattern.search(text))]  # fmt: skip
        needed = f"needs {max(sizes):,} bytes" if sizes else "needs more than is available"
        return OutOfSpace(
            f"{what}: out of memory while building: {needed}, {_free():,} are free ({short.strip()}); close what else uses the "
            "memory, build for a smaller size or batch, or add --option workspace=1G"
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
    here = devices()
    return bool(here) and job["target"] in (AMPERE_UP, here[0].target)


def _looks_into(job: Mapping[str, Any]) -> bool:
    """Whether the layers of the engine are looked at: in half precision, on the GPU that it is for."""
    return job["precision"] != "fp32" and _runs_here(job)


def opened_plan(job: Mapping[str, Any], trt: Any, log: Any, plan: Any) -> Any:
    """The engine of a plan that this process has built. Raises EngineError."""
    runtime = trt.Runtime(log)
    if job["options"].get("version_compatible"):  # code of TensorRT's own, put there a moment ago
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"the engine that was just built cannot be opened here: {'; '.join(log.errors())}")
    return engine


def _told(job: Mapping[str, Any], trt: Any, plan: Any, attentions: int) -> Message:
    """What the engine itself tells, opened on its GPU: the bytes of activations that it asks for, and what its layers became."""
    engine = opened_plan(job, trt, messages(trt), plan)
    told: Message = {"memory": int(engine.device_memory_size_v2)}
    if _looks_into(job):
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        told["notes"] = list(inspection_from_json(text, attentions=attentions).notes(job["component"]))
    return told


def work(job: Message, tell: Callable[[Message], None]) -> None:
    """Tell the stages of a build, write the plan, and tell what its engine tells."""
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))

    def progress(stage: Stage) -> bool:
        tell({"stage": dataclasses.asdict(stage)})
        return not stopped

    trt = library(job["backend"])
    plan, attentions = plan_from_onnx(job, trt, progress)
    path = Path(job["plan"])
    with disk_full_as_error(path.parent), path.open("wb") as file:
        file.write(memoryview(plan))
    if _runs_here(job):
        tell(_told(job, trt, plan, attentions))


if __name__ == "__main__":
    serve(work, errors=(SdruntimeError,), memory=OutOfSpace("out of memory while building: free some, or build elsewhere"))
