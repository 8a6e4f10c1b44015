"""The runtime alone: environments with nothing but ./runtime[onnxruntime], on the oldest and on newer Pythons.

The runtime's own tests pass there, and it draws the same picture from the same bundle. In the wide run the exporter's tests pass
too with the lowest versions that pyproject.toml promises. An interpreter that is not on the machine is skipped by name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from integration.reference import psnr

from sdruntime.image import read_png

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    python: str
    pins: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join((f"python{self.python}", *(pin.replace("==", "") for pin in self.pins)))


ENVIRONMENTS = (
    Environment(python="3.10", pins=("numpy==1.26.4", "onnxruntime==1.23.2")),
    Environment(python="3.12", pins=("numpy==2.2.6",)),
    Environment(python="3.13", pins=("numpy==2.5.5", "onnxruntime==1.32.0")),
)


INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def interpreter(version: str) -> str | None:
    """A CPython of this version that starts: on the path, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *(str(each / "bin" / "python") for each in sorted(pyenv.glob(f"{version}.*")))]
    for candidate in found:
        if candidate and subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def run(*command: str | Path, cwd: Path | None = None) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd, env=clean)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module", params=ENVIRONMENTS, ids=lambda each: each.name)
def python(request: pytest.FixtureRequest) -> Path:
    """The environment's python: made once, and kept beside the main environment; the runtime in it is always the tree's."""
    environment: Environment = request.param
    base = interpreter(environment.python)
    if base is None:
        pytest.skip(f"no Python {environment.python} on this machine")
    folder = ROOT / f".venv-{environment.name}"
    python = folder / "bin" / "python"
    install = (python, *INSTALL)
    if not (folder / ".ready").exists():
        run(base, "-m", "venv", "--clear", folder)
        run(*install, *environment.pins, f"{ROOT / 'runtime'}[onnxruntime]", "pytest", "hypothesis")
        (folder / ".ready").touch()
    run(*install, "--no-deps", "--force-reinstall", ROOT / "runtime")
    return python


def test_only_the_runtime_is_there(python: Path) -> None:
    packages = {row["name"].lower() for row in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
    assert {"sdruntime", "numpy", "onnxruntime"} <= packages
    assert not packages & {"torch", "diffusers", "transformers", "onnx", "sdexport", "pillow"}


def test_the_runtimes_own_tests_pass(python: Path) -> None:
    printed = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full", "tests/runtime", cwd=ROOT)
    assert " passed" in printed
    assert "failed" not in printed


def test_it_draws_the_same_picture(python: Path, shapes_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(shapes_bundle, tmp_path / "bundle"))
    prompt = "a large green square on the right on a white background"
    run(python, "-m", "sdruntime", "build", bundle, "--backend", "onnxruntime")
    pictures = []
    for each, folder in ((python, bundle), (Path(sys.executable), shapes_bundle)):
        path = tmp_path / f"{len(pictures)}.png"
        run(each, "-m", "sdruntime", "generate", folder, prompt, "--seed", "7", "-o", path)
        pictures.append(read_png(path))
    assert pictures[1].std() >= 10
    assert psnr(*pictures) >= 50


@pytest.mark.full
def test_the_exporters_own_tests_pass_with_the_lowest_versions_that_are_promised() -> None:
    base = interpreter("3.11")
    if base is None:
        pytest.skip("no Python 3.11 on this machine")
    folder, constraints = ROOT / ".venv-oldest", ROOT / "constraints-oldest.txt"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists() or ready.read_text() != constraints.read_text():
        run(base, "-m", "venv", "--clear", folder)
        run(python, *INSTALL, "--constraint", constraints, f"{ROOT / 'runtime'}[onnxruntime]", f"{ROOT}[test]")
        ready.write_text(constraints.read_text())
    run(python, *INSTALL, "--no-deps", "--force-reinstall", ROOT / "runtime", ROOT)
    tests = ("tests/sdexport", "tests/integration/test_fidelity.py")
    printed = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full and not gpu", *tests, cwd=ROOT)
    assert " passed" in printed
    assert "failed" not in printed
