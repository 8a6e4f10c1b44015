"""The commands: results on standard output, everything else on standard error, and the exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sdexport_cli import run

COMMAND = [sys.executable, "-m", "sdexport"]


@pytest.fixture
def copy(sd1_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd1_bundle, tmp_path / "bundle"))


def test_build_tells_bytes_and_peak_memory(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    result = run("build", sd1_checkpoint, "-o", tmp_path / "out", "--no-verify")
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert result.exit_code == 0
    assert re.search(rf"{written:,} bytes written, peak memory \d\.\d\d GB\n", result.stdout)
    again = run("build", sd1_checkpoint, "-o", tmp_path / "out", "--no-verify", "--json")
    document = json.loads(again.stdout)
    assert document.pop("peak_memory") > 10e6
    assert document == {
        "schema": 1,
        "bundle": str(tmp_path / "out"),
        "up_to_date": True,
        "written": 0,
        "checks": 0,
        "changes": [],
    }
    assert "up to date" in run("build", sd1_checkpoint, "-o", tmp_path / "out", "--no-verify").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["build", "no-such-model", "-o", "{out}"], 2, "no such folder, and not a hub id"),
        (["build", "{empty}", "-o", "{out}"], 2, "model_index.json is missing"),
        (["build", "{checkpoint}"], 2, "Missing option '-o'"),
        (["build", "{checkpoint}", "-o", "{out}", "--precision", "int3"], 2, "'int3' is not one of"),
        (["build", "{checkpoint}", "-o", "{out}", "--size", "64x64"], 2, "add a --backend"),
        (["build", "{checkpoint}", "-o", "{out}", "--backend", "tensorflow"], 2, "unknown backend 'tensorflow'"),
        (["build", "{checkpoint}", "-o", "{checkpoint}"], 5, "choose another place"),
        (["build", "{checkpoint}", "-o", "{checkpoint}/README.md"], 5, "choose another place"),
        (["inspect", "{empty}"], 5, "not a bundle"),
    ],
)
def test_bad_input_gets_one_message_and_its_code(
    sd1_checkpoint: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"out": tmp_path / "out", "empty": tmp_path / "empty", "checkpoint": sd1_checkpoint}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_inspect_shows_tensors_and_refuses_a_changed_byte(copy: Path) -> None:
    text = run("inspect", copy).stdout
    assert "tiny-sd1: sd1, epsilon, fp32, license cc0-1.0" in text
    assert "<- sample float32 [batch, 4, height, width]" in text
    assert "every hash is right" in text
    assert json.loads(run("inspect", copy, "--json").stdout)["manifest"]["model"]["family"] == "sd1"
    path = copy / "unet" / "model.onnx.data"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    result = run("inspect", copy)
    assert (result.exit_code, result.stdout) == (5, "")
    assert "unet/model.onnx.data: changed" in result.stderr


def test_doctor_tells_versions_and_what_installs_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    import sdexport.trace.versions

    document = json.loads(run("doctor", "--json").stdout)
    assert document["libraries"].keys() >= {"torch", "diffusers", "onnx"}
    assert document["engines"].keys() >= {"onnxruntime"}
    monkeypatch.setattr(sdexport.trace.versions, "versions", lambda: {"torch": "2.9", "diffusers": "missing"})
    assert "missing: diffusers: pip install diffusers" in run("doctor").stdout


def test_interrupted_it_exits_130_and_leaves_nothing(sd1_checkpoint: Path, tmp_path: Path) -> None:
    environment = os.environ | {"SDEXPORT_CACHE": str(tmp_path / "cache")}
    (tmp_path / "place").mkdir()
    command = [*COMMAND, "build", str(sd1_checkpoint), "-o", str(tmp_path / "place" / "bundle")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not list((tmp_path / "place").glob("*/text_encoder")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list((tmp_path / "place").iterdir()) == []


def test_a_reader_that_goes_away_is_no_failure_to_tell_of(sd1_bundle: Path) -> None:
    process = subprocess.Popen([*COMMAND, "inspect", str(sd1_bundle)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
