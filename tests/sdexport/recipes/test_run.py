"""`sdexport engines` and `sdexport build --recipe`, on a bundle that is there already and engines of the fake backend."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from sdexport_cli import run

from sdexport.recipes.interpreter import Interpreter
from sdruntime.backends.base.building import Stage
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.bundle.records import json_from_record
from sdruntime.engines.building import BuildEvent, BuildRequest
from sdruntime.errors import EngineError, EnvironmentFault, LibraryMissing, VerificationFailed
from sdruntime.verification.build import _record, build_job, check_job, event_of

ENGINES = '[[engines]]\nbackend = "fake"\nsize = "{size}"\n'


@pytest.fixture
def place(sd1_checkpoint: Path, sd1_proved_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: engines/good.toml, bad.toml and gpu.toml, and the bundle of good.toml exported already."""
    (tmp_path / "engines").mkdir()
    monkeypatch.chdir(tmp_path)
    write("good", sd1_checkpoint, ENGINES.format(size="64x64"))
    write("bad", sd1_checkpoint, ENGINES.format(size="64") + 'targets = "cpu"\n')
    write("gpu", sd1_checkpoint, '[[engines]]\nbackend = "tensorrt"\ntarget = "current"\n')
    shutil.copytree(sd1_proved_bundle, tmp_path / "engines" / "built" / "good")
    return tmp_path


def write(name: str, model: Path, engines: str) -> None:
    Path(f"engines/{name}.toml").write_text(f'model = "{model}"\n{engines}')


def rows(*arguments: object, code: int = 0) -> dict[str, dict[str, Any]]:
    """What `sdexport engines --json` says of each recipe."""
    result = run("engines", *arguments, "--json")
    assert result.exit_code == code, result.stderr
    document = json.loads(result.stdout)
    assert document.pop("schema") == 1
    return {row["recipe"]: row for row in document["recipes"]}


def built(row: dict[str, Any]) -> list[str]:
    return [each["engine"].split("-")[0] for each in row["built"]]


def test_a_bundle_that_is_exported_gets_the_engines_and_a_second_run_builds_nothing(place: Path) -> None:
    before = (place / "engines/built/good/unet/model.onnx").stat().st_mtime_ns
    first = rows("good")["good"]
    assert (first["bundle"], first["exported"], first["failed"]) == ("engines/built/good", 0, [])
    assert built(first) == ["text_encoder", "vae_encoder", "vae_decoder", "unet"]
    assert all(each["bytes"] > 0 for each in first["built"])
    second = rows("good")["good"]
    assert (second["built"], second["failed"], len(second["present"])) == ([], [], 4)
    assert (place / "engines/built/good/unet/model.onnx").stat().st_mtime_ns == before
    assert Bundle.open(place / "engines/built/good").changed_files() == []


def test_bad_recipes_do_not_stop_the_good_ones_and_a_table_tells_of_all(place: Path) -> None:
    result = run("engines")  # all of engines/: bad, good, gpu
    assert result.exit_code == 3, "what this machine lacks is worse than a recipe's fault"
    assert "engines/bad.toml: 2 faults" in result.stderr
    assert "engines[0].size: size '64': expected WIDTHxHEIGHT" in result.stderr
    assert "engines[0].targets: unknown key; did you mean target?" in result.stderr
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert table["recipe"] == "built up to date failed engine bytes ONNX bytes seconds".split()
    assert table["bad"][:3] == ["0", "0", "1"]
    assert table["good"][:3] == ["4", "0", "0"]
    assert table["gpu"][:3] == ["0", "0", "1"]
    assert table["bad:"] == "engines/bad.toml: 2 faults".split()
    assert " ".join(table["gpu:"]).startswith("tensorrt current: tensorrt cannot be imported")
    assert not (place / "engines/built/gpu").exists(), "nothing is exported for engines that cannot be built"


def test_the_code_is_that_of_the_worst(place: Path) -> None:
    assert run("engines", "good").exit_code == 0
    assert run("engines", "good", "bad").exit_code == 2
    assert run("engines", "nope", "good").exit_code == 2
    assert run("engines", "gpu", "bad", "good").exit_code == 3


def test_engines_that_fail_do_not_stop_the_others_of_the_recipe(
    place: Path, sd1_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("good", sd1_checkpoint, ENGINES.format(size="64x64") + ENGINES.format(size="128x128"))
    fake = BACKENDS["fake"]

    def failing(bundle: Bundle, request: Any, folder: Path) -> Iterator[Any]:
        if request.component == "vae_decoder" and "64x64" in request.stem:
            raise EngineError("no tactic for this layer\nbeware")
        return fake.build_engine(bundle, request, folder)

    with monkeypatch.context() as patch:
        patch.setitem(BACKENDS, "fake", dataclasses.replace(fake, build_engine=failing))
        row = rows("good", code=5)["good"]
        assert row["failed"] == [{"engines": "fake", "error": "no tactic for this layer\nbeware", "exit_code": 5}]
        assert built(row) == ["text_encoder", "vae_encoder", "vae_encoder", "vae_decoder", "unet"], "texts have no size"
    again = rows("good")["good"]
    assert built(again) == ["vae_decoder", "unet"]
    assert len(again["present"]) == 6


def test_a_size_that_the_model_cannot_have_is_told_before_the_export(
    place: Path, sd1_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdexport.build.export

    monkeypatch.setattr(sdexport.build.export, "run_job", None)
    write("odd", sd1_checkpoint, ENGINES.format(size="63x64"))
    assert "63 is not a multiple of" in rows("odd", code=2)["odd"]["failed"][0]["error"]
    write("gone", Path("/nowhere"), ENGINES.format(size="64x64"))
    assert "no such folder" in rows("gone", code=2)["gone"]["failed"][0]["error"]


def test_another_model_and_another_place(place: Path, sd1_checkpoint: Path, sd1_proved_bundle: Path) -> None:
    write("other", Path("/nowhere"), ENGINES.format(size="64x64"))
    shutil.copytree(sd1_proved_bundle, place / "out" / "other")
    row = rows(place / "engines/other.toml", "--model", sd1_checkpoint, "-o", place / "out")["other"]
    assert (row["bundle"], len(row["built"])) == (str(place / "out" / "other"), 4)
    for names in ((), ("good", "other")):
        result = run("engines", *names, "--model", sd1_checkpoint)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "give a single RECIPE" in result.stderr


def test_two_recipes_do_not_share_a_bundle(place: Path, sd1_checkpoint: Path) -> None:
    write("twin", sd1_checkpoint, ENGINES.format(size="64x64"))
    text = Path("engines/twin.toml").read_text()
    Path("engines/twin.toml").write_text('name = "good"\n' + text)
    result = run("engines", "good", "twin")
    assert result.exit_code == 2
    assert "engines/twin.toml: engines/built/good is another recipe's bundle" in result.stderr


def test_where_there_is_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("engines")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no recipe in engines/" in result.stderr


def test_build_takes_a_recipe_and_a_model_beside_it_but_no_other_option(place: Path, sd1_checkpoint: Path) -> None:
    result = run("build", "--recipe", "engines/good.toml", "-o", "engines/built/good")
    assert result.exit_code == 0, result.stderr
    assert len(Bundle.open(place / "engines/built/good").manifest.engines) == 4
    write("other", Path("/nowhere"), ENGINES.format(size="64x64"))
    result = run("build", sd1_checkpoint, "--recipe", "engines/other.toml", "-o", "engines/built/good", "--json")
    assert json.loads(result.stdout)["up_to_date"]
    for more in (("--precision", "fp32"), ("--size", "64x64"), ("--backend", "fake"), ("--allow-pickle",)):
        result = run("build", "--recipe", "engines/good.toml", "-o", "out", *more)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{more[0]} cannot be used with --recipe: change it in engines/good.toml" in result.stderr
    assert "give a MODEL, or a --recipe" in run("build", "-o", "out").stderr
    result = run("build", "--recipe", "engines/bad.toml", "-o", "out")
    assert result.exit_code == 2
    assert "engines/bad.toml: 2 faults" in result.stderr


ASKED = BuildRequest(
    backend="fake",
    target="cpu",
    size="64x64,128x64:128x128",
    batch="1,2:4",
    guidance="off",
    components=("unet", "vae_decoder"),
    without=("vae_encoder",),
    options={"workspace": "2G", "strip": "true"},
)


@pytest.mark.parametrize("asked", [ASKED, BuildRequest(backend="tensorrt")])
def test_the_other_interpreter_gets_the_same_request_and_its_events_arrive_whole(asked: BuildRequest) -> None:
    for job in (check_job(asked, "fp16"), build_job("b", asked, verify=True)):
        assert _record(BuildRequest, json.loads(json.dumps(job))["request"]) == asked
    for event in (
        BuildEvent(component="unet", engine="e", state="stage", stage=Stage(name="fill", done=1, total=3)),
        BuildEvent(component="unet", engine="e", state="done", size=7, seconds=0.5, peak=9, notes=("slow", "large")),
    ):
        assert event_of(json.loads(json.dumps(json_from_record(event)))) == event


def test_engines_by_another_interpreter(place: Path, sd1_checkpoint: Path) -> None:
    text = ENGINES.format(size="64x64") + "[engines.components]\nvae_encoder = false\nunet = { batch = 2 }\n"
    write("good", sd1_checkpoint, text)
    row = rows("good", "--python", sys.executable)["good"]
    assert built(row) == ["text_encoder", "vae_decoder", "unet"]
    assert all(each["bytes"] > 0 for each in row["built"])
    engines = {engine.component: engine for engine in Bundle.open(place / "engines/built/good").manifest.engines}
    assert set(engines) == {"text_encoder", "vae_decoder", "unet"}
    assert engines["unet"].profiles[0]["batch"] == (2, 4, 4)
    assert len(rows("good", "--python", sys.executable)["good"]["present"]) == 3


def script(place: Path, text: str) -> str:
    path = place / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


FAILS = """
import dataclasses
from sdruntime.backends.registry import BACKENDS
from sdruntime.errors import EngineError
real = BACKENDS["fake"]
def failing(bundle, request, folder):
    if request.component == "vae_decoder":
        %s
    return real.build_engine(bundle, request, folder)
BACKENDS["fake"] = dataclasses.replace(real, build_engine=failing)
"""


def customize(place: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Interpreters that are started from now on run this first."""
    (place / "patch").mkdir()
    (place / "patch" / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (place / "patch", ROOT / "runtime"))))


def test_what_the_other_interpreter_built_before_it_failed_is_reported(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    customize(place, monkeypatch, FAILS % "raise EngineError('error: no tactic\\n  - for this layer')")
    row = rows("good", "--python", sys.executable, code=5)["good"]
    assert built(row) == ["text_encoder", "vae_encoder"]
    assert all(each["bytes"] > 0 for each in row["built"])
    assert row["failed"][0]["error"] == "error: no tactic\n  - for this layer", "whatever the text, it is the error's own"
    monkeypatch.delenv("PYTHONPATH")
    assert built(rows("good", "--python", sys.executable)["good"]) == ["vae_decoder", "unet"]


def test_an_interpreter_that_is_killed_during_a_build(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    customize(place, monkeypatch, FAILS % "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    row = rows("good", "--python", sys.executable, code=3)["good"]
    assert built(row) == ["text_encoder", "vae_encoder"]
    assert "was ended by SIGKILL: the system was probably out of memory" in row["failed"][0]["error"]


def test_a_build_that_is_left_early_is_interrupted_and_cleans_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    customize(place, monkeypatch, FAILS % "import time; time.sleep(600)")
    folder = place / "engines/built/good"
    events = Interpreter(python=sys.executable).build(folder, BuildRequest(backend="fake"), verify=False)
    states = [(event.component, event.state) for event in itertools.islice(events, 7)]
    assert states[-1] == ("vae_decoder", "begin")
    events.close()  # type: ignore[attr-defined]
    assert [engine.component for engine in Bundle.open(folder).manifest.engines] == ["text_encoder", "vae_encoder"]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "echo Traceback >&2; echo 'ModuleNotFoundError: no numpy' >&2; exit 1",
            EnvironmentFault,
            "failed with code 1: ModuleNotFoundError: no numpy; Python 3.10 or later with numpy is needed: .*pip install 'numpy",
        ),
        ("kill -9 $$", EnvironmentFault, "was ended by SIGKILL"),
        (f'exec "{sys.executable}" "$@"', LibraryMissing, "^--python .*/python: tensorrt cannot be imported"),
    ],
)
def test_an_interpreter_that_cannot_is_reported_before_the_work(tmp_path: Path, text: str, kind: type, message: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{text}\n")
    python.chmod(0o755)
    with pytest.raises(kind, match=message):
        Interpreter(python=str(python)).check(BuildRequest(backend="tensorrt"), "fp16")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        (["RECIPE=sd15", "MODEL=my path", "PYTHON=/bin/python3"], ["sd15", "--model", "my path", "--python", "/bin/python3"]),
        (["RECIPE=sd15 a/b.toml"], ["sd15", "a/b.toml"]),
    ],
)
def test_make_engines_is_this_command(given: list[str], expected: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PYTHON", "MODEL", "RECIPE"))}
    command = ["make", "-C", str(ROOT), "-n", "engines", *given]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    line = shown[shown.index("/sdexport engines") :].partition("\nmake: ")[0]
    assert shlex.split(line.replace("\\\n", " ")) == ["/sdexport", "engines", *expected]


def test_no_interpreter(place: Path) -> None:
    assert "--python /nowhere: cannot be started: no such program" in run("engines", "good", "--python", "/nowhere").stderr


def test_a_recipe_that_verifies_adds_no_engine_that_fails(
    place: Path, sd1_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(bundle: Bundle, engine: EngineSpec) -> str:
        raise VerificationFailed(f"engine {engine.name} is not added", ["PSNR 12 dB, under 40"])

    monkeypatch.setattr("sdexport.recipes.run.check_engine", failing)
    failed = rows("good", code=4)["good"]
    assert (failed["built"], failed["failed"][0]["exit_code"]) == ([], 4)
    assert "PSNR 12 dB" in failed["failed"][0]["error"]
    write("good", sd1_checkpoint, "verify = false\n" + ENGINES.format(size="64x64"))
    assert built(rows("good")["good"]) == ["text_encoder", "vae_encoder", "vae_decoder", "unet"]


def test_another_interpreter_verifies_unless_it_shall_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    customize(
        place,
        monkeypatch,
        "import sdruntime.verification.verify as verify\n"
        "from sdruntime.errors import VerificationFailed\n"
        "def failing(bundle, engine):\n"
        "    raise VerificationFailed('engine e is not added', ['unet e: PSNR 12 dB'])\n"
        "verify.check_engine = failing\n",
    )
    other, asked = Interpreter(python=sys.executable), BuildRequest(backend="fake", components=("unet",))
    with pytest.raises(VerificationFailed, match="engine e is not added: 1 check failed") as raised:
        list(other.build(place / "engines/built/good", asked, verify=True))
    assert raised.value.faults == ("unet e: PSNR 12 dB",)
    assert [event.state for event in other.build(place / "engines/built/good", asked, verify=False)][-1] == "done"
