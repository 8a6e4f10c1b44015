"""tests/integration/test_gpu.py, which only a GPU runs, called on the fakes: what passes, what is skipped, and the summary."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu.conftest import PROMPT
from integration import conftest as summary
from integration import test_gpu
from trt.machine import Machine

from benchmarks.gpu import check, tasks


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "run", functools.partial(tasks.run, apart=False))
    monkeypatch.setattr(test_gpu, "PROMPT", PROMPT)
    monkeypatch.setattr(check, "CYCLES", 1)


def told_by(backend: str, bundle: Path, reference: Path, kept: list[dict[str, Any]]) -> None:
    test_gpu.test_a_backend_draws_the_cpus_pictures(
        backend, "fp32", {"fp32": bundle}, reference, "", lambda name, value: kept.append(value)
    )


def test_a_backend_that_draws_passes_and_one_that_is_missing_is_skipped(
    here: Machine, sd1_bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[dict[str, Any]] = []
    told_by(here.backend, sd1_bundle, reference, kept)
    with pytest.raises(pytest.skip.Exception, match="onnxruntime-gpu"):
        told_by("onnxruntime", sd1_bundle, reference, kept)
    monkeypatch.setenv("REQUIRE", "onnxruntime")
    with pytest.raises(AssertionError, match="onnxruntime-gpu"):
        told_by("onnxruntime", sd1_bundle, reference, kept)

    written: list[str] = []
    reports = [SimpleNamespace(when="call", user_properties=[("gpu", each)]) for each in kept[:2]]
    reporter = SimpleNamespace(
        stats={"passed": reports[:1], "skipped": reports[1:]}, section=written.append, write_line=written.append
    )
    monkeypatch.setenv("GPU_TEST_JSON", str(tmp_path / "told" / "gpu.json"))
    summary.pytest_terminal_summary(reporter)
    assert written[0] == "on the GPU"
    assert written[1].startswith(f"{here.backend} {here.trt.__version__} fp32: ran, PSNR ")
    assert written[2].startswith("onnxruntime ")
    assert "DID NOT RUN AS IT MUST: target 'cuda': " in written[2]
    document = json.loads((tmp_path / "told" / "gpu.json").read_text(encoding="utf-8"))
    assert [each["stage"] for each in document["checks"]] == ["drawn", "missing"]


def test_a_gpu_that_the_library_does_not_list_is_an_expected_failure(
    h100: Callable[[str], Machine], sd1_bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h100("tensorrt_rtx")
    with pytest.raises(pytest.xfail.Exception, match=r"does not list this GPU; it was tried: .*incompatible device"):
        told_by("tensorrt-rtx", sd1_bundle, reference, [])
    monkeypatch.setenv("REQUIRE", "tensorrt-rtx")
    with pytest.raises(AssertionError, match="incompatible device"):
        told_by("tensorrt-rtx", sd1_bundle, reference, [])
