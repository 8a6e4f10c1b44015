"""The command line's contract: one JSON document whatever happens, flags in full, and what is refused before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdruntime.__main__ import main
from sdruntime.build import Asked, build_engines
from sdruntime.bundle import Bundle


@pytest.fixture
def ready(bundle: Bundle) -> Path:
    for _ in build_engines(bundle.folder, Asked(backend="fake", size="64x64:512x512")):
        pass
    return bundle.folder


def run(arguments: list[str], places: dict[str, object]) -> int:
    return main([argument.format(**places) for argument in arguments])


FAILURES = [
    (["build", "{bundle}", "--json"], "SettingError", 2),
    (["build", "{bundle}", "--backend", "nothing", "--json"], "UnknownName", 2),
    (["build", "{nowhere}", "--backend", "fake", "--json"], "BundleError", 5),
    (["generate", "{bundle}", "--json", "x"], "UsageError", 2),
    (["--json", "generate", "{nowhere}", "x", "-o", "{out}"], "BundleError", 5),
    (["generate", "{bundle}", "x", "-o", "{out}", "--steps", "many", "--json"], "UsageError", 2),
    (["generate", "{bundle}", "x", "-o", "{out}", "--backend", "onnxruntime", "--json"], "EngineError", 5),
    (["table", "--json"], "SettingError", 2),
    (["table", "--config", "{nowhere}", "--json"], "SettingError", 2),
    (["samplers", "--what", "--json"], "UsageError", 2),
    (["inspect", "{nowhere}", "--json"], "BundleError", 5),
    (["--json", "inspect", "{nowhere}", "--stale"], "BundleError", 5),
    (["verify", "{bundle}", "--json"], "BundleError", 5),
    (["doctor", "{nowhere}", "--json"], "BundleError", 5),
    (["capi", "--json"], "SettingError", 2),
    (["--json"], "UsageError", 2),
    (["--json", "nothing"], "UsageError", 2),
]


@pytest.mark.parametrize(("arguments", "error", "code"), FAILURES, ids=lambda each: " ".join(each) if type(each) is list else "")
def test_a_failure_with_json_is_one_document(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str, code: int
) -> None:
    places = {"bundle": ready, "nowhere": tmp_path / "nowhere", "out": tmp_path / "out.png"}
    assert run(arguments, places) == code
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["schema"], found["error"], found["code"]) == (1, error, code)
    assert found["reason"]
    assert f"error: {found['reason']}" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_every_command_fails_in_the_list_above() -> None:
    from sdruntime.__main__ import parser

    commands = next(action.choices for action in parser()._subparsers._group_actions)  # type: ignore[union-attr]
    assert {each for arguments, _, _ in FAILURES for each in arguments} >= set(commands or ())


def test_json_before_and_after_the_command_is_the_same(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> Any:
        assert main([*arguments]) == 0
        return json.loads(capsys.readouterr().out)

    assert printed("--json", "samplers") == printed("samplers", "--json")
    assert printed("--json", "inspect", str(ready)) == printed("inspect", str(ready), "--json")
    assert main(["samplers", "-q"]) == 0
    assert not capsys.readouterr().out.startswith("{")


def test_what_was_written_before_a_failure_is_in_the_document(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdruntime.result as result

    write, calls = result.write_png, []

    def interrupted(path: Path, *arguments: Any, **more: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, *arguments, **more)

    monkeypatch.setattr(result, "write_png", interrupted)
    out = tmp_path / "out.png"
    code = main(["generate", str(ready), "a", "b", "--seed", "1", "--backend", "fake", "--steps", "1", "-o", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == found["code"] == 130
    assert [Path(each["file"]).name for each in found["pictures"]] == ["out-1.png"]


@pytest.mark.parametrize("arguments", [["generate", "b", "x", "-o", "y.png", "--negativ", "fog"], ["inspect", "b", "--sta"]])
def test_an_abbreviated_flag_is_refused_with_its_full_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    full = {"--negativ": "--negative", "--sta": "--stale"}[next(each for each in arguments if each.startswith("--"))]
    assert f"did you mean {full}" in capsys.readouterr().err


def test_with_quiet_or_json_standard_error_has_no_progress(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(ready), "x", "--backend", "fake", "--steps", "2", "--seed", "1", "-o", str(tmp_path / "out.png")]
    assert main(command) == 0
    assert "denoise: 0/2" in capsys.readouterr().err
    for quiet in ("--json", "--quiet"):
        assert main([*command, quiet]) == 0
        assert [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")] == []
