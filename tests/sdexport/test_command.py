"""The contract of sdexport's command line: one JSON document whatever happens, and outputs that are checked before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import make_bundle
from sdexport_cli import run

from sdexport.cli import main

FAILURES = [
    (["build", "{nowhere}", "-o", "{out}", "--json"], "CheckpointError", 2),
    (["--json", "build", "{nowhere}", "-o", "{out}"], "CheckpointError", 2),
    (["build", "--json"], "UsageError", 2),
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
