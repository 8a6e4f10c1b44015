"""ONNX -> file, for ONNX Runtime: the optimized graph is saved once, so that opening it is fast.

The graph is optimized at the "extended" level. The highest level depends on the processor, so it is applied when an engine that
benefits from it is opened.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from sdruntime.backends.base.building import BackendOptions, Built, EngineRequest, Stage, check_names
from sdruntime.backends.onnx_file.inputs import with_required_inputs
from sdruntime.backends.ort.attention import fuse_attention
from sdruntime.backends.ort.subpixel import split_upsampling
from sdruntime.backends.ort.weights import DIRECTLY, open_session
from sdruntime.bundle.bundle import Bundle, disk_full
from sdruntime.bundle.manifest import Precision
from sdruntime.errors import BundleError, DeviceMissing, LibraryMissing, SdruntimeError, SettingError
from sdruntime.system.cuda import devices

NAME, ENDING = "onnxruntime", ".onnx"
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}  # in order of preference
INSTALL = 'pip install "sdruntime[onnxruntime]"'
OPTIONS: BackendOptions = {}
_ROOM = 1 << 20  # bytes: a disk with less free space counts as full
_EMBEDDED = 1024  # bytes: smaller tensors stay in the model file


def library() -> Any:
    """Return the module onnxruntime. Raises LibraryMissing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise LibraryMissing(f"ONNX Runtime cannot be imported ({error}): {INSTALL}, or [onnxruntime-gpu] for CUDA") from error
    return onnxruntime


def targets(ort: Any) -> tuple[str, ...]:
    """Return the available targets: "cuda" if ONNX Runtime supports it and a GPU is present, and "cpu"."""
    available = ort.get_available_providers()
    return tuple(target for target, provider in PROVIDERS.items() if provider in available and (target == "cpu" or devices()))


def resolve_target(target: str | None, precision: Precision, options: Mapping[str, str]) -> str:
    """Return the target to build for, the best one for None.

    Raises LibraryMissing, UnknownName, DeviceMissing for a target that is not available, and SettingError for bf16 on a CPU.
    """
    ort = library()
    try:
        resolved = check_names(f"{NAME} {ort.__version__}", target, targets(ort), options, known=OPTIONS)
    except DeviceMissing as error:
        hint = 'pip install "sdruntime[onnxruntime-gpu]" for cuda' if devices() else "no NVIDIA GPU found"
        raise DeviceMissing(f"{error}: {hint}") from None
    if precision == "bf16" and resolved == "cpu":
        raise SettingError(
            f"{NAME} {ort.__version__} does not compute bf16 on a CPU: use --backend openvino, or export with --precision fp32"
        )
    return resolved


def build_engine(bundle: Bundle, request: EngineRequest, folder: Path) -> Generator[Stage, None, Built]:
    """Write `stem`.onnx and, for tensors of 1 KiB and more, `stem`.onnx.data into `folder`.

    Raises BundleError, OutOfSpace, DeviceMissing, SettingError for a path that is not UTF-8, and SdruntimeError if the build
    fails.
    """
    ort, begun = library(), time.monotonic()
    if not _is_utf8(folder):
        raise SettingError(f"{bundle.folder}: ONNX Runtime writes only to paths in UTF-8: rename the folder")
    yield Stage(name="optimise")
    component = bundle.manifest.components[request.component]
    model, data = folder / f"{request.stem}{ENDING}", folder / f"{request.stem}{ENDING}.data"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(model)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data.name)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(_EMBEDDED))
    # the session only saves the model and never runs, so it does not need copies of its weights
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(DIRECTLY, "1")
    rewrite = request.target == "cpu" and bundle.manifest.precision == "fp32"  # attention and upsampling
    onnx = bundle.read(component.onnx)
    try:
        graph = with_required_inputs(onnx, {tensor.name: tensor.shape for tensor in component.optional_inputs})
        graph = split_upsampling(memoryview(graph)) if rewrite else graph
    except ValueError as error:
        raise BundleError(bundle.folder, [f"{component.onnx}: {error}"]) from error
    try:
        session = open_session(ort, bundle, graph, component.files, options, _providers(request.target))
    except SdruntimeError:
        raise
    except Exception as error:  # onnxruntime's errors have no common base but Exception
        if shutil.disk_usage(folder).free < _ROOM:
            raise disk_full(bundle.folder) from error
        raise SdruntimeError(f"{component.onnx}: ONNX Runtime {ort.__version__} cannot build it: {error}") from error
    if PROVIDERS[request.target] not in session.get_providers():  # a provider that fails to load is skipped silently
        raise DeviceMissing(
            f"target {request.target}: ONNX Runtime {ort.__version__} could not load its {PROVIDERS[request.target]}, and "
            "printed why: it needs the CUDA and cuDNN that it was built for"
        )
    if rewrite:
        model.write_bytes(fuse_attention(memoryview(model.read_bytes())))
    files = (model, data) if data.exists() else (model,)
    seconds = time.monotonic() - begun
    return Built(files=files, version=ort.__version__, precision=bundle.manifest.precision, seconds=seconds)


def _is_utf8(path: Path) -> bool:
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:  # bytes that are not UTF-8 are surrogates in Python
        return False
    return True


def _providers(target: str) -> list[str]:
    return [PROVIDERS[target]] if target == "cpu" else [PROVIDERS[target], PROVIDERS["cpu"]]
