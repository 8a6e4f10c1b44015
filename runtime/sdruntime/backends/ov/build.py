"""ONNX -> files, for OpenVINO: the ONNX is converted once to OpenVINO's intermediate representation (IR).

Weights keep their type or, for an engine that computes in bf16, become float16: half as many bytes to read, hash and convert when
the engine is opened. The IR accepts every shape; the engine's profiles decide which are compiled when it is opened.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from sdruntime.backends.base.building import BackendOptions, Built, EngineRequest, Stage, check_names
from sdruntime.backends.ort.weights import lending_onnx
from sdruntime.backends.ov.inputs import open_inputs
from sdruntime.backends.ov.subpixel import split_upsampling
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import Precision
from sdruntime.errors import LibraryMissing, SdruntimeError, SettingError

NAME, ENDING = "openvino", ".xml"
DEVICE = "CPU"
TARGETS = ("cpu",)
_TELEMETRY = "openvino_telemetry"
INSTALL = 'pip install "sdruntime[openvino]"'


def _computed_in(text: str) -> str | None:
    return text if text in ("f32", "bf16") else None


OPTIONS: BackendOptions = {
    "inference_precision": (_computed_in, "f32, or bf16 if the CPU supports it; default: f32"),
}


def library() -> Any:
    """Return the module openvino with telemetry disabled: otherwise importing it sends an event. Raises LibraryMissing."""
    silenced = "openvino" not in sys.modules and _TELEMETRY not in sys.modules
    if silenced:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # makes its import fail; openvino then uses a stub
    try:
        import openvino
    except ImportError as error:
        raise LibraryMissing(f"OpenVINO cannot be imported ({error}): {INSTALL}") from error
    finally:
        if silenced:
            del sys.modules[_TELEMETRY]
    return openvino


def version_of(ov: Any) -> str:
    """Return the release number, without the build that `ov.__version__` includes."""
    return str(ov.__version__).split("-")[0]


def resolve_target(target: str | None, precision: Precision, options: Mapping[str, str]) -> str:
    """Return "cpu". Raises LibraryMissing, DeviceMissing, UnknownName, and SettingError for an option's value or missing bf16."""
    ov = library()
    resolved = check_names(f"{NAME} {version_of(ov)}", target, TARGETS, options, known=OPTIONS)
    read_options(options)
    if options.get("inference_precision") == "bf16" and not has_bf16(ov.Core()):
        raise SettingError("option inference_precision=bf16: this CPU does not support bf16: omit the option")
    return resolved


def read_options(options: Mapping[str, str]) -> dict[str, Any]:
    """Return the parsed options. Raises SettingError."""
    parsed = {key: OPTIONS[key][0](text) for key, text in options.items()}
    for key, value in parsed.items():
        if value is None:
            raise SettingError(f"option {key}={options[key]}: expected {OPTIONS[key][1]}")
    return parsed


def has_bf16(core: Any) -> bool:
    """Return whether the CPU supports bf16."""
    return "BF16" in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def build_engine(bundle: Bundle, request: EngineRequest, folder: Path) -> Generator[Stage, None, Built]:
    """Write `stem`.xml and `stem`.bin into `folder`. Raises BundleError, and SdruntimeError if OpenVINO cannot build it."""
    ov, begun = library(), time.monotonic()
    yield Stage(name="convert")
    component = bundle.manifest.components[request.component]
    files = folder / f"{request.stem}{ENDING}", folder / f"{request.stem}.bin"
    bf16 = read_options(request.options).get("inference_precision") == "bf16"
    try:
        with lending_onnx(bundle, component.files) as onnx:
            model = ov.Core().read_model(onnx)
            open_inputs(ov, model, component.optional_inputs)
            split_upsampling(ov, model)
            ov.save_model(model, str(files[0]), compress_to_fp16=bf16)
    except RuntimeError as error:
        raise SdruntimeError(f"{component.onnx}: OpenVINO {version_of(ov)} cannot build it: {error}") from error
    return Built(
        files=files,
        version=version_of(ov),
        precision="bf16" if bf16 else bundle.manifest.precision,
        seconds=time.monotonic() - begun,
    )
