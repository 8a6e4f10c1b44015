"""`sdexport engines` with the real TensorRT-RTX, which builds for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from sdexport_cli import run

from sdruntime.bundle.bundle import Bundle

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is for Linux")

COMPONENTS = ["text_encoder", "vae_encoder", "vae_decoder", "unet", "step"]
COMMAND = [sys.executable, "-m", "sdexport", "engines", "--json"]


@pytest.fixture
def place(trace_cache: Path, tmp_path: Path) -> Path:
    """Where the bundles go; a recipe without ONNX Runtime lies beside it."""
    shapes = (ROOT / "engines/shapes.toml").read_text(encoding="utf-8")
    rtx, _, _ = shapes.partition('[[engines]]\nbackend = "onnxruntime"')
    (tmp_path / "rtx.toml").write_text(rtx.replace("../examples", str(ROOT / "examples")))
    return tmp_path


@pytest.fixture(scope="session")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter like that of an NGC container or of JetPack: numpy and the library, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("other")
    venv.create(folder / "venv", symlinks=True)
    (folder / "packages").mkdir()
    for name in ("numpy", "tensorrt_rtx"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        for found in Path(spec.origin).parents[1].glob(f"{name}*"):
            (folder / "packages" / found.name).symlink_to(found)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "system.pth").write_text(f"{folder / 'packages'}\n")
    return folder / "venv" / "bin" / "python"


def row(text: str) -> dict[str, Any]:
    (found,) = json.loads(text)["recipes"]
    assert isinstance(found, dict)
    return found


def built(found: dict[str, Any]) -> list[str]:
    return [each["engine"].split("-")[0] for each in found["built"]]


def interrupt(place: Path, *more: str) -> None:
    """Begin a run and end it with Ctrl-C once the first engine is in the bundle: 130, and nothing half-written."""
    command = [*COMMAND, str(place / "rtx.toml"), "-o", str(place / "out"), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean())
    folder = place / "out" / "rtx"
    while process.poll() is None and not (folder.exists() and Bundle.open(folder).manifest.engines):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert json.loads(stdout) == {"schema": 1, "error": "KeyboardInterrupt", "code": 130, "reason": "interrupted"}
    assert stderr.rstrip().endswith("interrupted")
    assert "Traceback" not in stderr
    assert [path.name for path in (place / "out").iterdir()] == ["rtx"]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    bundle = Bundle.open(folder)
    assert 1 <= len(bundle.manifest.engines) < len(COMPONENTS)
    assert {path.name for path in (folder / "engines").iterdir()} == {
        Path(each.files[0]).name for each in bundle.manifest.engines
    }
    assert bundle.changed_files() == []


def clean() -> dict[str, str]:
    """The environment without what shows our packages to another interpreter."""
    runtime = [str(ROOT), str(ROOT / "runtime")]
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": os.pathsep.join(runtime)}


def test_the_shapes_recipe_beside_a_bad_one_then_again(place: Path) -> None:
    bad = place / "bad.toml"
    bad.write_text('model = "x/y"\n[[engines]]\nbackend = "tensorrt-rxt"\n')
    arguments = ("engines", ROOT / "engines/shapes.toml", bad, "-o", place / "out")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "engines[0].backend: unknown backend 'tensorrt-rxt': did you mean tensorrt-rtx" in result.stderr
    table = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert table["shapes"][1:4] == ["9", "0", "0"], "step is TensorRT's alone"
    assert table["bad"][1:4] == ["0", "0", "1"]
    engines = Bundle.open(place / "out" / "shapes").manifest.engines
    rtx = {engine.component: engine for engine in engines if engine.backend == "tensorrt-rtx"}
    assert {engine.target for engine in rtx.values()} == {"ampere+"}
    assert [dict(profile)["batch"] for profile in rtx["unet"].profiles] == [(2, 2, 2), (8, 8, 8)]

    files = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*") if path.is_file()}
    again = run(*arguments)
    assert again.exit_code == 2
    table = {line.split()[0]: line.split() for line in again.stdout.splitlines() if line.strip()}
    assert table["shapes"][1:6] == ["0", "9", "0", "0", "0"]
    assert {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*") if path.is_file()} == files


def test_an_interrupted_run_goes_on_where_it_was(place: Path) -> None:
    interrupt(place)
    result = run("engines", place / "rtx.toml", "-o", place / "out", "--json")
    found = row(result.stdout)
    assert found["exported"] == 0
    assert len(found["present"]) >= 1
    assert len(found["present"]) + len(found["built"]) == len(COMPONENTS)
    assert found["failed"] == []


@pytest.mark.full
def test_another_interpreter_builds_is_interrupted_and_goes_on(place: Path, other_python: Path) -> None:
    lacks = subprocess.run([other_python, "-c", "import torch"], capture_output=True, text=True, check=False, env=os.environ)
    assert "ModuleNotFoundError" in lacks.stderr
    interrupt(place, "--python", str(other_python))
    command = [*COMMAND, str(place / "rtx.toml"), "-o", str(place / "out"), "--python", str(other_python)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean())
    assert done.returncode == 0, done.stderr
    found = row(done.stdout)
    assert len(found["present"]) >= 1
    assert len(found["present"]) + len(built(found)) == len(COMPONENTS)
    result = run("engines", place / "rtx.toml", "-o", place / "out", "--json")
    assert len(row(result.stdout)["present"]) == len(COMPONENTS), "the two interpreters have the same library"


@pytest.mark.full
def test_what_the_other_interpreter_lacks_is_told_and_the_rest_is_built(place: Path, other_python: Path) -> None:
    result = run("engines", ROOT / "engines/shapes.toml", "-o", place / "out", "--python", other_python, "--json")
    assert result.exit_code == 3
    found = row(result.stdout)
    assert built(found) == COMPONENTS
    (failed,) = found["failed"]
    assert failed["engines"] == "onnxruntime"
    assert "ONNX Runtime cannot be imported" in failed["error"]
