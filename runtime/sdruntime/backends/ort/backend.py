"""The record of ONNX Runtime."""

from __future__ import annotations

from sdruntime.backends.base.backend import Backend
from sdruntime.backends.base.engine import CPU
from sdruntime.backends.ort.build import ENDING, NAME, OPTIONS, build_engine, resolve_target
from sdruntime.backends.ort.engine import check_session, here, keeps_half, open_engine

ONNXRUNTIME = Backend(
    name=NAME,
    ending=ENDING,
    options=OPTIONS,
    here=here,
    resolve_target=resolve_target,
    build_engine=build_engine,
    open_engine=open_engine,
    check_session=check_session,
    replaces_weights=lambda engine: True,
    saves_memory=keeps_half,
    lacking={(CPU, "bf16"): "ONNX Runtime computes no bf16 on the CPU"},
)
