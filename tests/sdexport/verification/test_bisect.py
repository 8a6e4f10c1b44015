"""Which failures of a report are looked into."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

import sdexport.verification.bisect
from sdexport.verification.verify import first_nodes
from sdexport.verification.walk import Finding
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.system.events import finish
from sdruntime.verification.report import Check, Report
from sdruntime.verification.verify import ITS_ONNX


@pytest.fixture
def bundle() -> Bundle:
    """Its engines, which are all that is looked at."""
    engines = tuple(
        EngineSpec(
            component="unet",
            backend=backend,
            version="1.0",
            target="sm86",
            precision="fp32",
            files=(f"engines/unet-{backend}.plan",),
            profiles=({"batch": (1, 1, 1)},),
        )
        for backend in ("tensorrt", "tensorrt-rtx", "openvino")
    )
    return SimpleNamespace(manifest=SimpleNamespace(engines=engines))  # type: ignore[return-value]


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was walked: component, case, engine."""
    seen: list[tuple[str, str, str]] = []

    def bisect(
        bundle: Bundle, checkpoint: Any, component: str, case: str, *, engine: EngineSpec | None, allow_pickle: bool
    ) -> Generator[Stage, None, Finding]:
        name = engine.name if engine else ""
        seen.append((component, case, name))
        yield Stage(name=component)
        return Finding(component=component, case=case, engine=name, count=3)

    monkeypatch.setattr(sdexport.verification.bisect, "bisect", bisect)
    return seen


def notes(bundle: Bundle, *failing: tuple[str, str, str]) -> tuple[str, ...]:
    """Of a report in which these (engine, case, output) of the UNet fail, and another one passes."""
    checks = [
        Check(
            component="unet",
            engine=engine,
            precision="fp32",
            tolerance="fp32",
            status="fail" if engine else "pass",
            case=case,
            output=output,
        )
        for engine, case, output in (("", "small", "out_sample"), *failing)
    ]
    report = Report(
        bundle="b", model="m", precision="fp32", reference="r", checks=tuple(checks), pictures=(), limits={}, date="", machine={}
    )
    return finish(first_nodes(bundle, None, report)).notes  # type: ignore[arg-type]


TRT, RTX, OV = "unet-tensorrt", "unet-tensorrt-rtx", "unet-openvino"
ONNX_HOLDS = "no component's ONNX fails: the fault is in an engine whose layers cannot be compared, or in the pipeline"


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ([], []),
        (
            [(TRT, "own", "out_sample"), (TRT, "small", "out_sample"), (RTX, "small", "out_sample")],
            [("own", TRT), ("small", RTX)],
        ),
        ([(ITS_ONNX, "small", "out_sample"), (TRT, "small", "out_sample")], [("small", "")]),  # the engine has it from its ONNX
        ([(OV, "small", "out_sample")], []),
        ([(TRT, "", "")], []),  # could not be opened
    ],
)
def test_an_onnx_is_walked_before_its_tensorrt_engines(
    bundle: Bundle, walked: list[tuple[str, str, str]], failing: list[tuple[str, str, str]], expected: list[tuple[str, str]]
) -> None:
    found = notes(bundle, *failing)
    assert walked == [("unet", case, engine) for case, engine in expected]
    assert len(found) == max(len(expected), bool(failing))
    assert (found == (ONNX_HOLDS,)) is bool(failing and not expected)
