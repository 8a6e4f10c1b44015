"""ONNX -> file, for TensorRT and TensorRT-RTX: what is asked, checked; the build itself is `worker`'s, in its own process."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdruntime.backends.base.building import BackendOptions, Built, EngineRequest, Stage, unknown_option
from sdruntime.backends.base.engine import AMPERE_UP, PLATFORM
from sdruntime.backends.ort.weights import lending_onnx
from sdruntime.backends.trt.library import CURRENT, FLAVOURS, capabilities, library
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec, Precision
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.errors import DeviceMissing, EngineError, OutOfSpace, SettingError, UnknownName
from sdruntime.system.cuda import Cuda, Device, devices
from sdruntime.system.memory import available_memory
from sdruntime.system.process import Message, run_apart
from sdruntime.system.sizes import parse_bytes

ENDING = ".plan"
WORKER = "sdruntime.backends.trt.worker"


def _level(text: str) -> int | None:
    return int(text) if text in "012345" and len(text) == 1 else None


def _size(text: str) -> int | None:
    try:
        return parse_bytes(text)
    except SettingError:
        return None


def _flag(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text)


def _tiling(text: str) -> str | None:
    return text if text in ("none", "fast", "moderate", "full") else None


OPTIONS: BackendOptions = {
    "optimization_level": (_level, "0 (quickest build) to 5; TensorRT's own default is 3"),
    "workspace": (_size, "bytes that a layer may use for scratch, such as 512M or 4G"),
    "version_compatible": (_flag, "true or false"),
    "same_compute_capability": (_flag, "true (any GPU of this compute capability, not this model alone) or false"),
    "weight_streaming": (_flag, "true or false"),
    "strip": (_flag, "true (weights stay in the ONNX and are put in when the engine is opened) or false"),
    "tiling": (_tiling, "none, fast, moderate or full"),
    "timing_cache": (_flag, "true or false"),
}


def resolve_target(name: str, target: str | None, precision: Precision, options: Mapping[str, str]) -> str:
    """The full name of a target: "sm89" for "current"; the best for this machine where it is None.

    Raises LibraryMissing; DeviceMissing where the target needs a GPU that is not here; UnknownName; SettingError for a precision
    that the target cannot run, and for an option that this version does not have.
    """
    trt, here = library(name), devices()
    read_options(name, trt, options, here)
    found = _ahead(trt, target, here) if FLAVOURS[name].ahead else _of_this_gpu(target, here)
    oldest = 80 if found == AMPERE_UP else int(found[2:])
    if precision == "bf16" and oldest < 80:
        raise SettingError(f"target {found}: bf16 needs compute capability 8.0 (Ampere) or later: export with --precision fp16")
    if precision == "fp32" and oldest < 80 and FLAVOURS[name].ahead:
        raise SettingError(f"target {found}: TensorRT-RTX has no fp32 matrix product for Turing: export with --precision fp16")
    return found


def _ahead(trt: Any, target: str | None, here: Sequence[Device]) -> str:
    known = [*capabilities(trt), AMPERE_UP]
    if target == CURRENT and not here:
        raise DeviceMissing(f"target 'current': no NVIDIA GPU found; name a target to build for: {', '.join(known)}")
    if target in (None, CURRENT):
        return here[0].target if here and here[0].target in known else AMPERE_UP
    if target not in known:
        raise UnknownName("target", target or "", [*known, CURRENT])
    return target or ""


def _of_this_gpu(target: str | None, here: Sequence[Device]) -> str:
    if not here:
        raise DeviceMissing(
            "TensorRT builds on the GPU that the engine is for, and this machine has no GPU: copy the bundle to the "
            "device and build there, or build ahead with --backend tensorrt-rtx --target sm86"
        )
    if target == AMPERE_UP and here[0].capability < (8, 0):
        raise DeviceMissing(f"target {AMPERE_UP}: {here[0].name} is {here[0].target}, and an Ampere GPU or later must build it")
    if target not in (None, CURRENT, AMPERE_UP, here[0].target):
        if not re.fullmatch(r"sm\d{2,3}", target or ""):
            raise UnknownName("target", target or "", [here[0].target, CURRENT, AMPERE_UP])
        raise DeviceMissing(f"target {target}: TensorRT builds for this machine's GPU, {here[0].name} ({here[0].target})")
    return AMPERE_UP if target == AMPERE_UP else here[0].target


def read_options(name: str, trt: Any, options: Mapping[str, str], here: Sequence[Device]) -> dict[str, Any]:
    """The options as values. Raises UnknownName, and SettingError for a value, or for what this version does not have."""
    read = {}
    for key, text in options.items():
        if key not in OPTIONS:
            raise unknown_option(name, key, OPTIONS)
        parse, form = OPTIONS[key]
        read[key] = parse(text)
        if read[key] is None:
            raise SettingError(f"option {key}={text}: expected {form}")
    rtx = FLAVOURS[name].ahead
    lacking = {
        "version_compatible": "it ships no lean runtime" if rtx else None,
        "same_compute_capability": "its engines fit a whole compute capability anyway"
        if rtx
        else None
        if hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY")
        else "this version cannot (10.16 can)",
        "tiling": None if hasattr(trt, "TilingOptimizationLevel") else "this version cannot (10.16 can)",
        "strip": "building with it needs an RTX GPU" if rtx and not here else None,
        "timing_cache": "not supported: it does not use a timing cache" if rtx else None,
    }
    for key, reason in lacking.items():
        if reason is not None and read.get(key) not in (None, False, "none"):
            raise SettingError(f"option {key}: not with {name} {trt.__version__}: {reason}")
    return read


def _check_memory(request: EngineRequest, weights: int) -> None:
    """Raises OutOfSpace where a build cannot end well: the host holds the weights twice at least, three times where it builds
    ahead (3.2 to 3.4 times was measured with TensorRT-RTX 1.7), and a GPU that builds holds them once."""
    free, needed = available_memory(), (3 if FLAVOURS[request.backend].ahead else 2) * weights
    if needed > free > 0:
        raise OutOfSpace(
            f"{request.stem}: building takes at least {needed:,} bytes of memory, and {free:,} are available: free some, or "
            "build on a larger machine and copy the bundle"
        )
    if not FLAVOURS[request.backend].ahead:
        with Cuda.open() as cuda:
            free, where = cuda.free_memory(), cuda.device.name
        if weights > free:
            raise OutOfSpace(
                f"{request.stem}: building takes at least {weights:,} bytes on {where}, and {free:,} are free: "
                "close other programs that use the GPU"
            )


def build_job(bundle: Bundle, request: EngineRequest | EngineSpec) -> Message:
    """What `worker` builds: `request`, or an engine of the bundle again. The ONNX file and the plan are for the caller to add."""
    component = bundle.manifest.components[request.component]
    return {
        "backend": request.backend,
        "component": request.component,
        "target": request.target,
        "precision": "fp32" if request.component == STEP else bundle.manifest.precision,
        "inputs": {tensor.name: list(tensor.shape) for tensor in component.engine_inputs},
        "profiles": [dict(profile) for profile in request.profiles],
        "options": read_options(request.backend, library(request.backend), request.options, devices()),
    }


def build_engine(bundle: Bundle, request: EngineRequest, folder: Path) -> Generator[Stage, None, Built]:
    """Write `stem`.plan into `folder`. Raises EngineError with the cause that the library gave, OutOfSpace, LibraryMissing."""
    trt = library(request.backend)
    component = bundle.manifest.components[request.component]
    _check_memory(request, sum(bundle.manifest.files[path].size for path in component.files))
    plan = folder / f"{request.stem}{ENDING}"
    job = build_job(bundle, request)
    notes: tuple[str, ...]
    begun, memory, peak, notes = time.monotonic(), None, 0, ()
    with lending_onnx(bundle, component.files) as onnx:
        messages = run_apart(
            WORKER,
            job | {"onnx": onnx, "plan": str(plan)},
            what=request.stem,
            failed=EngineError,
            killed=OutOfSpace,
            advice="free some, or build on a larger machine",
        )
        with contextlib.closing(messages):
            for message in messages:
                if "stage" in message:
                    yield Stage(**message["stage"])
                memory, peak = message.get("memory", memory), message.get("peak", peak)
                notes = tuple(message.get("notes", notes))
    return Built(
        files=(plan,),
        version=trt.__version__,
        precision=job["precision"],
        memory=memory,
        platform=PLATFORM,
        seconds=time.monotonic() - begun,
        peak=peak,
        notes=notes,
    )
