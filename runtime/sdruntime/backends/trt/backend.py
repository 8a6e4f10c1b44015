"""The records of TensorRT and TensorRT-RTX."""

from __future__ import annotations

import functools

from sdruntime.backends.base.backend import Backend
from sdruntime.backends.base.weights import MERGE
from sdruntime.backends.trt.build import ENDING, OPTIONS, build_engine, resolve_target
from sdruntime.backends.trt.engine import check_session, here, open_engine
from sdruntime.backends.trt.loop import device_calls
from sdruntime.bundle.manifest import EngineSpec


def reads(engine: EngineSpec, installed: str) -> bool:
    """Return whether the `installed` version can open `engine`.

    It must be the version that built the engine or, for a version-compatible engine, a later one of the same major version.
    """
    if engine.options.get("version_compatible") != "true":
        return installed == engine.version
    return _numbers(installed)[:1] == _numbers(engine.version)[:1] and _numbers(installed) >= _numbers(engine.version)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _backend(name: str, *, in_jetpack: bool = False, rtx: bool = False) -> Backend:
    return Backend(
        name=name,
        ending=ENDING,
        options=OPTIONS,
        here=functools.partial(here, name),
        resolve_target=functools.partial(resolve_target, name),
        build_engine=build_engine,
        open_engine=open_engine,
        check_session=functools.partial(check_session, name),
        reads=reads,
        static=True,
        gpu_only=True,
        in_jetpack=in_jetpack,
        loop=device_calls,
        replaces_weights=lambda engine: engine.options.get("lora") == "true",
        for_adapters=MERGE if rtx else f"build it with --option lora=true, or {MERGE}",
    )


TENSORRT = _backend("tensorrt", in_jetpack=True)
TENSORRT_RTX = _backend("tensorrt-rtx", rtx=True)
