"""What `make dist` makes: both packages as their users get them, in an environment that has never seen the tree."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from environments import INSTALL, run
from places import ROOT, SHAPES

from sdruntime.pipeline.images.imagefile import read_image

PROMPT = "a large green square on the right on a white background"


@pytest.mark.full
def test_both_wheels_make_a_bundle_and_an_image_in_a_new_environment(tmp_path: Path) -> None:
    dist, place, venv = tmp_path / "dist", tmp_path / "place", tmp_path / "venv"
    place.mkdir()
    variables = os.environ | {"VENV": str(Path(sys.prefix)), "DIST": str(dist)}
    made = subprocess.run(["make", "dist"], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.count("PASSED") == 4
    kinds = sorted((path.name.split("-")[0], path.suffix) for path in dist.iterdir())
    assert kinds == [("sdexport", ".gz"), ("sdexport", ".whl"), ("sdruntime", ".gz"), ("sdruntime", ".whl")]
    wheels = sorted(dist.glob("*.whl"))
    for wheel in wheels:
        names = zipfile.ZipFile(wheel).namelist()
        assert f"{wheel.name.split('-')[0]}/py.typed" in names
        assert [name for name in names if name.startswith(("tests", "examples", "benchmarks"))] == []

    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    run(python, *INSTALL, "--constraint", ROOT / "constraints.txt", f"{wheels[1]}[onnxruntime]", wheels[0])
    run(venv / "bin" / "sdexport", "build", SHAPES / "checkpoint", "--output", "bundle", "--backend", "onnxruntime", cwd=place)
    run(venv / "bin" / "sdruntime", "generate", "bundle", PROMPT, "--guidance", "2", "-o", "image.png", cwd=place)
    assert read_image(place / "image.png").std() >= 10
    assert str(venv) in run(python, "-c", "import sdexport, sdruntime; print(sdexport.__file__, sdruntime.__file__)", cwd=place)
