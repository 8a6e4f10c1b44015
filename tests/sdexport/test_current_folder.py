"""Files of the current folder are data: a checkpoint that holds a `numpy.py` never has it run, by no command and by no child."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from sdruntime.system.process import module_command

HOSTILE = ("numpy", "json", "torch", "onnx_ir", "onnxruntime", "click", "runpy", "subprocess", "sdruntime", "sdexport")
SCRIPT = "import sys\nfrom {module} import main\nsys.exit(main())\n"  # what pip writes for a console script


def plant(folder: Path, mark: Path) -> None:
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write('{name} ')\nraise SystemExit('{name}.py ran')\n")


@pytest.fixture
def scripts(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "bin").mkdir()
    paths = {"sdexport": tmp_path / "bin" / "sdexport", "sdruntime": tmp_path / "bin" / "sdruntime"}
    for name, module in (("sdexport", "sdexport.cli.main"), ("sdruntime", "sdruntime.__main__")):
        paths[name].write_text(SCRIPT.format(module=module))
    return paths


def run(folder: Path, *command: object) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "runtime"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_command_runs_a_file_of_the_checkpoint(
    sd1_checkpoint: Path, sd1_bundle: Path, scripts: dict[str, Path], tmp_path: Path
) -> None:
    """In the order of a first day: export with reference outputs, engines, their checks, one image, the race."""
    model, out, mark = Path(shutil.copytree(sd1_checkpoint, tmp_path / "model")), tmp_path / "out", tmp_path / "mark"
    plant(model, mark)
    sdexport, sdruntime = scripts["sdexport"], scripts["sdruntime"]
    run(model, sdexport, "build", ".", "-o", out)
    recipe = tmp_path / "engines" / "small.toml"
    recipe.parent.mkdir()
    recipe.write_text(
        f'name = "small"\ndescription = "d"\nmodel = "{model}"\nprecision = "fp32"\nverify = false\n'
        '[[engines]]\nbackend = "fake"\nsize = "64x64"\n'
    )
    commands = [
        (sdexport, "engines", recipe, "-o", tmp_path / "built", "--python", sys.executable),
        (sdexport, "inspect", out, "--precision"),
        (
            sdruntime,
            "build",
            out,
            "--backend",
            "onnxruntime",
        ),
        (sdruntime, "verify", out),
        (sdexport, "verify", out),
        (sdexport, "bench", out, "--seconds", "60", "--steps", "1"),
        (sdruntime, "generate", out, "a cat", "--steps", "2", "-o", tmp_path / "cat.png"),
    ]
    for command in commands:
        run(model, *command)
    assert not mark.exists(), f"ran: {mark.read_text()}"


def test_a_module_is_found_by_the_path_and_not_in_the_current_folder(tmp_path: Path) -> None:
    plant(tmp_path, tmp_path / "mark")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "shown.py").write_text(
        "import json, sys\nif __name__ == '__main__': print(json.dumps([sys.argv[1:], sys.path[0]]))\n"
    )
    command = module_command("shown", "-c", "two words")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "elsewhere")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f'[["-c", "two words"], "{tmp_path / "elsewhere"}"]\n'
    assert not (tmp_path / "mark").exists()


def test_no_child_is_started_with_m() -> None:
    """`python -m` searches the current folder: what starts a module takes its command from `module_command`."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("sdexport", "runtime", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == "-m"
    ]
    assert found == []
