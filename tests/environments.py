"""Environments with nothing but ./runtime[onnxruntime], on the oldest and on newer Pythons, beside the main environment."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from once import SESSION, alone
from places import ROOT

INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


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


@functools.cache
def made(environment: Environment) -> Path | None:
    """Return the environment's python, made once and kept, with the tree's runtime; None if no such Python is installed."""
    base = interpreter(environment.python)
    if base is None:
        return None
    folder = ROOT / f".venv-{environment.name}"
    python = folder / "bin" / "python"
    install, current = (python, *INSTALL), folder / ".session"
    with alone(ROOT / ".cache" / "locks" / folder.name):
        if not (folder / ".ready").exists():
            run(base, "-m", "venv", "--clear", folder)
            run(*install, *environment.pins, f"{ROOT / 'runtime'}[onnxruntime]", "pytest", "hypothesis")
            (folder / ".ready").touch()
        if not current.exists() or current.read_text() != SESSION:
            run(*install, "--no-deps", "--force-reinstall", ROOT / "runtime")
            current.write_text(SESSION)
    return python


def python_of(environment: Environment) -> Path:
    """The same; the test is skipped by name where there is none."""
    python = made(environment)
    if python is None:
        pytest.skip(f"no Python {environment.python} on this machine")
    return python
