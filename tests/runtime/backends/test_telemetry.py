"""ONNX Runtime's telemetry stays off in every process that loads it: no device id is written, and no socket is opened."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cplusplus import require_compiler
from places import FIXTURE, ROOT

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime")

MODEL = FIXTURE / "text_encoder" / "model.onnx"
WAIT = 20  # seconds: telemetry looks for a network about 10 seconds after a session was opened
COUNTING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
int socket(int domain, int type, int protocol) {
    int file = open(getenv("SOCKETS"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (write(file, ".", 1) != 1) abort();
    close(file);
    return ((int (*)(int, int, int))dlsym(RTLD_NEXT, "socket"))(domain, type, protocol);
}
"""
SESSION = "ort.InferenceSession({model!r}, providers=['CPUExecutionProvider'])"
LOADERS = {
    "sdruntime": "from sdruntime.backends.ort.build import library; ort = library(); s = {session}",
    "sdexport": "import pathlib; from sdexport.precision import activations as a; s = a.session_of(pathlib.Path({model!r}))",
    "a library of sdexport's": "import sdexport; import onnxruntime as ort; s = {session}",
}
PLAIN = "import onnxruntime as ort; s = {session}"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that counts the calls of socket() in the file $SOCKETS."""
    require_compiler()
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(COUNTING)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True)
    return folder / "shim.so"


def traces(shim: Path, home: Path, code: str, wait: float) -> tuple[int, int]:
    """(files below the home folder, sockets opened) by a process that opens a session and stays for `wait` seconds."""
    home.mkdir()
    sockets = home.with_suffix(".sockets")
    sockets.touch()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "XDG_"))}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "runtime"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = clean | {"HOME": str(home), "LD_PRELOAD": str(shim), "SOCKETS": str(sockets), "PYTHONPATH": paths}
    code = code.format(session=SESSION.format(model=str(MODEL)), model=str(MODEL)) + f"; import time; time.sleep({wait})"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return sum(path.is_file() for path in home.rglob("*")), sockets.stat().st_size


def telemetry(shim: Path, home: Path, wait: float) -> tuple[int, int]:
    """What the library does by itself; the test is skipped for a version without telemetry."""
    found = traces(shim, home, PLAIN, wait)
    if found == (0, 0):
        pytest.skip("this ONNX Runtime has no telemetry: nothing would be seen of it")
    return found


@pytest.mark.parametrize("loader", LOADERS)
def test_no_device_id_and_no_socket(shim: Path, tmp_path: Path, loader: str) -> None:
    if loader != "sdruntime":
        pytest.importorskip("torch")
    assert traces(shim, tmp_path / "home", LOADERS[loader], 0) == (0, 0)


def test_the_device_id_would_be_seen(shim: Path, tmp_path: Path) -> None:
    assert telemetry(shim, tmp_path / "plain", 0)[0] > 0


@pytest.mark.full
def test_sockets_would_be_seen_and_are_not_opened(shim: Path, tmp_path: Path) -> None:
    assert telemetry(shim, tmp_path / "plain", WAIT)[1] > 0
    assert traces(shim, tmp_path / "ours", LOADERS["sdruntime"], WAIT) == (0, 0)


def test_one_place_loads_it() -> None:
    """`import onnxruntime` without what turns telemetry off stands nowhere else."""
    found = set()
    for folder in ("sdexport", "runtime", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] == "onnxruntime" for name in names):
                    found.add(path.relative_to(ROOT).as_posix())
    assert found == {
        "runtime/sdruntime/backends/ort/build.py",
        "runtime/sdruntime/backends/ort/session.py",
        "sdexport/precision/activations.py",
    }
