"""The record of OpenVINO."""

from __future__ import annotations

from sdruntime.backends.base.backend import Backend
from sdruntime.backends.ov.build import ENDING, NAME, OPTIONS, build_engine, resolve_target
from sdruntime.backends.ov.engine import check_session, here, open_engine

OPENVINO = Backend(
    name=NAME,
    ending=ENDING,
    options=OPTIONS,
    here=here,
    resolve_target=resolve_target,
    build_engine=build_engine,
    open_engine=open_engine,
    check_session=check_session,
    static=True,
    replaces_weights=lambda engine: True,
)
