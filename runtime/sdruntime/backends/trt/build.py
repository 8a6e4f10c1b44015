"""ONNX -> file, for TensorRT and TensorRT-RTX: check a request, then build in a separate process (`worker`)."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdruntime.backends.base.building import BackendOptions, Built, EngineRequest, Stage, unknown_option
from sdruntime.backends.base.engine import AMPERE_UP, PLATFORM
from sdruntime.backends.base.weights import MERGE
from sdruntime.backends.onnx_file.stored import weight_tensors
from sdruntime.backends.ort.weights import lending_onnx
from sdruntime.backends.trt.library import CURRENT, FLAVOURS, capabilities, library
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec, Precision
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.errors import DeviceMissing, EngineError, OutOfSpace, SettingError, UnknownName
from sdruntime.system.cuda import Cuda, Device, devices
from sdruntime.system.events import mapped
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


_STRIPPED = "with strip=true, only equal weights can be put in: omit one of them"
OPTIONS: BackendOptions = {
    "optimization_level": (_level, "0 (fastest build) to 5; TensorRT's own default is 3"),
    "workspace": (_size, "bytes that a layer may use for scratch, such as 512M or 4G"),
    "version_compatible": (_flag, "true or false"),
    "same_compute_capability": (_flag, "true (any GPU of this compute capability, not this model alone) or false"),
    "weight_streaming": (_flag, "true or false"),
    "strip": (_flag, "true (weights stay in the ONNX and are put in when the engine is opened) or false"),
    "lora": (_flag, "true (weights can be replaced when the engine is opened, for LoRAs) or false"),
    "tiling": (_tiling, "none, fast, moderate or full"),
    "timing_cache": (_flag, "true or false"),
}


def resolve_target(name: str, target: str | None, precision: Precision, options: Mapping[str, str]) -> str:
    """Return the full name of a target, such as "sm89" for "current"; None means the best one for this machine.

    Raises LibraryMissing; DeviceMissing if the target needs a GPU that is not present; UnknownName; SettingError for a precision
    that the target cannot run, or an option that this version does not support.
    """
    trt, gpus = library(name), devices()
    read_options(name, trt, options, gpus)
    resolved = _ahead(trt, target, gpus) if FLAVOURS[name].ahead else _of_this_gpu(target, gpus)
    oldest = 80 if resolved == AMPERE_UP else int(resolved[2:])
    if precision == "bf16" and oldest < 80:
        raise SettingError(
            f"target {resolved}: bf16 needs compute capability 8.0 (Ampere) or later: export with --precision fp16"
        )
    if precision == "fp32" and oldest < 80 and FLAVOURS[name].ahead:
        raise SettingError(f"target {resolved}: TensorRT-RTX has no fp32 matrix product for Turing: export with --precision fp16")
    return resolved


def _ahead(trt: Any, target: str | None, gpus: Sequence[Device]) -> str:
    """Return the target of an engine that is built ahead of time, for any supported GPU."""
    known = [*capabilities(trt), AMPERE_UP]
    if target == CURRENT and not gpus:
        raise DeviceMissing(f"target 'current': no NVIDIA GPU found; name a target to build for: {', '.join(known)}")
    if target in (None, CURRENT):
        return gpus[0].target if gpus and gpus[0].target in known else AMPERE_UP
    if target not in known:
        raise UnknownName("target", target or "", [*known, CURRENT])
    return target or ""


def _of_this_gpu(target: str | None, gpus: Sequence[Device]) -> str:
    """Return the target of an engine that this machine's first GPU must build."""
    if not gpus:
        raise DeviceMissing(
            "TensorRT builds on the GPU that the engine is for, and this machine has no GPU: copy the bundle to the "
            "device and build there, or build ahead with --backend tensorrt-rtx --target sm86"
        )
    gpu = gpus[0]
    if target == AMPERE_UP and gpu.capability < (8, 0):
        raise DeviceMissing(f"target {AMPERE_UP}: {gpu.name} is {gpu.target}, and an Ampere GPU or later must build it")
    if target not in (None, CURRENT, AMPERE_UP, gpu.target):
        if not re.fullmatch(r"sm\d{2,3}", target or ""):
            raise UnknownName("target", target or "", [gpu.target, CURRENT, AMPERE_UP])
        raise DeviceMissing(f"target {target}: TensorRT builds for this machine's GPU, {gpu.name} ({gpu.target})")
    return AMPERE_UP if target == AMPERE_UP else gpu.target


def read_options(name: str, trt: Any, options: Mapping[str, str], gpus: Sequence[Device]) -> dict[str, Any]:
    """Return the parsed options. Raises UnknownName, and SettingError for a bad value or an option this version lacks."""
    parsed = {}
    for key, text in options.items():
        if key not in OPTIONS:
            raise unknown_option(name, key, OPTIONS)
        parse, form = OPTIONS[key]
        parsed[key] = parse(text)
        if parsed[key] is None:
            raise SettingError(f"option {key}={text}: expected {form}")
    rtx = FLAVOURS[name].ahead
    unsupported = {
        "version_compatible": "it ships no lean runtime" if rtx else None,
        "same_compute_capability": "its engines fit a whole compute capability anyway"
        if rtx
        else None
        if hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY")
        else "this version cannot (10.16 can)",
        "tiling": None if hasattr(trt, "TilingOptimizationLevel") else "this version cannot (10.16 can)",
        "strip": "building with it needs an RTX GPU" if rtx and not gpus else None,
        "lora": MERGE if rtx else _STRIPPED if parsed.get("strip") else None,
        "timing_cache": "not supported: it does not use a timing cache" if rtx else None,
    }
    for key, reason in unsupported.items():
        if reason is not None and parsed.get(key) not in (None, False, "none"):
            raise SettingError(f"option {key}: not with {name} {trt.__version__}: {reason}")
    return parsed


def _check_memory(request: EngineRequest, weights: int) -> None:
    """Raise OutOfSpace if there is too little memory for a build.

    The host holds the weights at least twice, or three times if it builds ahead of time (3.2 to 3.4 times was measured with
    TensorRT-RTX 1.7). A GPU that builds holds them once.
    """
    free, needed = available_memory(), (3 if FLAVOURS[request.backend].ahead else 2) * weights
    if needed > free > 0:
        raise OutOfSpace(
            f"{request.stem}: building takes at least {needed:,} bytes of memory, and {free:,} are available: free some, or "
            "build on a larger machine and copy the bundle"
        )
    if not FLAVOURS[request.backend].ahead:
        with Cuda.open() as cuda:
            free, gpu = cuda.free_memory(), cuda.device.name
        if weights > free:
            raise OutOfSpace(
                f"{request.stem}: building takes at least {weights:,} bytes on {gpu}, and {free:,} are free: "
                "close other programs that use the GPU"
            )


def build_job(bundle: Bundle, request: EngineRequest | EngineSpec) -> Message:
    """Return the `worker` job that builds `request` or rebuilds an engine of the bundle. The caller adds "onnx" and "plan"."""
    component = bundle.manifest.components[request.component]
    return {
        "backend": request.backend,
        "component": request.component,
        "target": request.target,
        "precision": "fp32" if request.component == STEP else bundle.manifest.precision,
        "inputs": {tensor.name: list(tensor.shape) for tensor in component.engine_inputs},
        "optional_inputs": [tensor.name for tensor in component.optional_inputs],
        "profiles": [dict(profile) for profile in request.profiles],
        "options": read_options(request.backend, library(request.backend), request.options, devices()),
        "refittable": sorted(weight_tensors(bundle, request.component)) if request.options.get("lora") == "true" else [],
    }


def build_engine(bundle: Bundle, request: EngineRequest, folder: Path) -> Generator[Stage, None, Built]:
    """Write `stem`.plan into `folder`. Raises EngineError with the library's own reason, OutOfSpace, LibraryMissing."""
    trt = library(request.backend)
    component = bundle.manifest.components[request.component]
    _check_memory(request, sum(bundle.manifest.files[path].size for path in component.files))
    plan = folder / f"{request.stem}{ENDING}"
    job = build_job(bundle, request)
    begun = time.monotonic()
    with lending_onnx(bundle, component.files) as onnx:
        stages = run_apart(
            WORKER,
            job | {"onnx": onnx, "plan": str(plan)},
            what=request.stem,
            failed=EngineError,
            killed=OutOfSpace,
            advice="free some, or build on a larger machine",
        )
        outcome = yield from mapped(stages, lambda stage: Stage(**stage))
    return Built(
        files=(plan,),
        version=trt.__version__,
        precision=job["precision"],
        memory=outcome.result.get("memory"),
        platform=PLATFORM,
        seconds=time.monotonic() - begun,
        peak=outcome.peak,
        notes=tuple(outcome.result.get("notes", ())),
    )
