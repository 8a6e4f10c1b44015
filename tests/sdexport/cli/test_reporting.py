"""The contract of sdexport's command line: one JSON document whatever happens, and outputs that are checked before the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import make_bundle
from sdexport_cli import run

from sdexport.cli.main import main

FAILURES = [
    (["build", "{nowhere}", "-o", "{out}", "--json"], "CheckpointError", 2),
    (["--json", "build", "{nowhere}", "-o", "{out}"], "CheckpointError", 2),
    (["build", "--json"], "UsageError", 2),
    (["merge", "{nowhere}", "{nowhere}", "-o", "{out}", "--json"], "CheckpointError", 2),
    (["build", "{nowhere}", "-o", "{out}", "--backend", "nothing", "--json"], "UnknownName", 2),
    (["engines", "{nowhere}", "-o", "{out}", "--json"], "UnknownName", 2),
    (["inspect", "{nowhere}", "--json"], "BundleError", 5),
    (["inspect", "--precison", "{nowhere}", "--json"], "UsageError", 2),
    (["verify", "{nowhere}", "--json"], "BundleError", 5),
    (["verify", "{nowhere}", "--bisect", "--json"], "UsageError", 2),
    (["bench", "{nowhere}", "--json"], "BundleError", 5),
    (["doctor", "--what", "--json"], "UsageError", 2),
    (["--json", "nothing"], "UsageError", 2),
]


@pytest.mark.parametrize(("arguments", "error", "code"), FAILURES, ids=lambda each: " ".join(each) if type(each) is list else "")
def test_a_failure_with_json_is_one_document(tmp_path: Path, arguments: list[str], error: str, code: int) -> None:
    result = run(*(argument.format(nowhere=tmp_path / "nowhere", out=tmp_path / "out") for argument in arguments))
    found = json.loads(result.stdout)
    assert (found["schema"], found["error"], found["code"], result.exit_code) == (1, error, code, code)
    assert found["reason"]
    assert found["reason"].splitlines()[0] in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "{bundle}", "--json"], ["nothing", "--json"]])
def test_a_process_with_a_full_standard_output_fails_without_a_traceback(
    tmp_path: Path, arguments: list[str], unbuffered: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle").folder
    command = [sys.executable, "-m", "sdexport", *(argument.format(bundle=bundle) for argument in arguments)]
    with Path("/dev/full").open("w") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    if arguments[0] == "nothing":
        assert (done.returncode, done.stderr.count("Error")) == (2, 1)
    else:
        assert (done.returncode, done.stderr) == (1, "error: standard output: no space left on device\n")


def test_every_command_fails_in_the_list_above() -> None:
    assert {each for arguments, _, _ in FAILURES for each in arguments} >= set(main.commands)


def test_json_before_and_after_the_command_is_the_same(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").folder
    assert json.loads(run("--json", "inspect", bundle).stdout) == json.loads(run("inspect", bundle, "--json").stdout)
    assert not run("inspect", bundle).stdout.startswith("{")


@pytest.mark.parametrize(("command", "option"), [("verify", "--html"), ("bench", "--markdown"), ("bench", "--picture")])
def test_an_output_that_cannot_be_written_is_refused_before_the_bundle_is_read(tmp_path: Path, command: str, option: str) -> None:
    result = run(command, tmp_path / "nowhere", option, tmp_path / "no" / "where" / "file")
    assert result.exit_code == 2
    assert f"{option} {tmp_path}/no/where/file: the folder {tmp_path}/no/where does not exist" in result.stderr


def test_a_bundle_given_as_a_checkpoint_is_told_as_one(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "a bundle").folder
    (folder / "model_index.json").write_text("{}")
    result = run("build", folder, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert f"a bundle already, not a checkpoint: sdruntime build '{folder}' --backend onnxruntime" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_checkpoint_given_as_a_bundle_is_told_as_one(tmp_path: Path, command: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    result = run(command, tmp_path / "model")
    assert result.exit_code == 5
    assert f"is a checkpoint, not a bundle: sdexport build {tmp_path}/model -o {tmp_path}/model-bundle" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "{here}/none", "-o", "{here}/out", "--no-audit"], "--no-audit has no effect: fp32 is not audited"),
        (["build", "{here}/none", "-o", "{here}/out", "--backend", "nothing"], "known: onnxruntime, openvino, tensorrt"),
        (["verify", "{here}", "--allow-pickle"], "--allow-pickle is for the weights of a checkpoint"),
        (
            ["build", "{here}/none", "-o", "{here}/out", "--precision", "bf16", "--backend", "onnxruntime"],
            "does not compute bf16",
        ),
    ],
)
def test_what_is_ignored_or_cannot_work_is_told_before_the_work(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(*(argument.format(here=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "fake" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_interpreter_tells_its_progress(tmp_path: Path) -> None:
    """The command that builds there prints one document, and its log all the same: no silent minutes here."""
    from sdexport.recipes.interpreter import Interpreter
    from sdruntime.engines.building import BuildRequest

    folder = make_bundle(tmp_path / "bundle").folder
    events = list(
        Interpreter(python=sys.executable).build(folder, BuildRequest(backend="fake", components=("unet",)), verify=False)
    )
    names = {event.engine for event in events}
    assert [(event.state, event.stage and event.stage.name) for event in events] == [
        ("begin", None),
        ("stage", "fill"),
        ("done", None),
    ]
    assert len(names) == 1
    assert {event.component for event in events} == {"unet"}


def test_the_list_of_commands_has_whole_sentences() -> None:
    shortened = {name: command.get_short_help_str(limit=67) for name, command in main.commands.items()}  # 80 columns
    assert {name: text for name, text in shortened.items() if text.endswith("...")} == {}
