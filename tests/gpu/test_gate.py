"""The door: exit 3 without a GPU, 0 where that is allowed, and what had to run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trt.machine import Machine

from benchmarks.gpu import bench, gate, report

GATE = Path(gate.__file__)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("REQUIRE", "ALLOW_NO_GPU")}
    return subprocess.run(
        [sys.executable, str(GATE), *command], env=clean | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(gate.gpus() > 0, reason="a GPU is here")
def test_without_a_gpu_nothing_is_run() -> None:
    done = run("echo", "ran")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("no NVIDIA GPU: ")
    assert "ALLOW_NO_GPU=1" in done.stderr


@pytest.mark.skipif(gate.gpus() > 0, reason="a GPU is here")
def test_where_that_is_allowed_it_says_that_nothing_was_shown() -> None:
    done = run("echo", "ran", ALLOW_NO_GPU="1")
    assert (done.returncode, done.stdout) == (0, "")
    assert "NOTHING WAS TESTED" in done.stderr


def test_an_unknown_backend_cannot_be_required() -> None:
    done = run("echo", "ran", REQUIRE="tensorrt,openvino")
    assert (done.returncode, done.stdout) == (2, "")
    assert "REQUIRE=openvino: known are tensorrt, tensorrt-rtx, onnxruntime" in done.stderr


@pytest.mark.parametrize("main", [bench.main, report.main], ids=["bench", "report"])
def test_every_script_has_the_door(
    main: Callable[..., int], machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(None, devices=0)
    assert main([]) == 3
    monkeypatch.setenv("ALLOW_NO_GPU", "1")
    assert main([]) == 0
    assert capsys.readouterr().err.count("no NVIDIA GPU") == 2


def test_a_gpu_opens_it(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(None)
    assert gate.gpus() == 1
    assert gate.passed(lambda: 7) == 7
    monkeypatch.setenv("REQUIRE", "tensorrt, onnxruntime")
    assert gate.not_run(["onnxruntime"]) == ["tensorrt"]
