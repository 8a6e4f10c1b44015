"""The runtime alone: environments with nothing but ./runtime[onnxruntime], on the oldest and on newer Pythons.

The runtime's own tests pass there, and they generate one image from the same bundle. In the full run the exporter's tests pass
too with the lowest versions that pyproject.toml promises. An interpreter that is not on the machine is skipped by name.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from api_page import EXAMPLES
from environments import ENVIRONMENTS, INSTALL, ROOT, Environment, interpreter, python_of, run
from integration.reference import psnr

from sdruntime.pipeline.images.imagefile import read_image

OLDEST, BETWEEN, NEWEST = ENVIRONMENTS


@pytest.fixture(scope="module", params=ENVIRONMENTS, ids=lambda each: each.name)
def python(request: pytest.FixtureRequest) -> Path:
    return python_of(request.param)


def test_only_the_runtime_is_there(python: Path) -> None:
    packages = {row["name"].lower() for row in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
    assert {"sdruntime", "numpy", "onnxruntime"} <= packages
    assert not packages & {"torch", "diffusers", "transformers", "onnx", "sdexport", "pillow"}


@pytest.mark.parametrize(
    "environment",
    [OLDEST, *(pytest.param(newer, marks=pytest.mark.full) for newer in (BETWEEN, NEWEST))],
    ids=lambda each: each.name,
)
def test_the_runtimes_own_tests_pass(environment: Environment) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-m", "not full and not slow")
    printed = run(python_of(environment), "-m", "pytest", *options, "tests/runtime", cwd=ROOT)
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
        pictures.append(read_image(path))
    assert pictures[1].std() >= 10
    assert psnr(*pictures) >= 50


WRONG = """
from sdruntime import Pipeline, Request

Request(prompt="a red fox", steps="20")
Request(prompt="a red fox", step=20)
with Pipeline.open("sd15") as pipe:
    pipe("a red fox").pictures
    name: int = pipe("a red fox").images[0].sampler
"""


def test_a_type_checker_knows_the_installed_package(tmp_path: Path) -> None:
    """The examples of docs/api.md are free of faults for mypy --strict, and what is wrong is found."""
    pytest.importorskip("mypy")
    python = python_of(NEWEST)
    programs = {"wrong.py": WRONG} | {f"example{number}.py": text for number, text in enumerate(EXAMPLES.values())}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
    options = ("--strict", "--python-executable", str(python), "--cache-dir", str(tmp_path / "cache"), "--no-error-summary")
    done = subprocess.run(
        (sys.executable, "-m", "mypy", *options, *programs), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    faults = re.findall(r"^(\S+):(\d+): error: .*\[([a-z-]+)\]$", done.stdout, flags=re.MULTILINE)
    wrong = [("4", "arg-type"), ("5", "call-arg"), ("7", "attr-defined"), ("8", "assignment")]
    assert faults == [("wrong.py", *each) for each in wrong]


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
