"""The command line's contract: one JSON document whatever happens, flags in full, and what is refused before the work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import FIXTURE

from sdruntime.__main__ import main
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import SettingError


@pytest.fixture
def ready(bundle: Bundle) -> Path:
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake", size="64x64:512x512")):
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
    (["lora", "inspect", "{nowhere}", "--json"], "SettingError", 2),
    (["png-info", "{nowhere}", "--json"], "SettingError", 2),
    (["serve", "{nowhere}", "--json"], "SettingError", 2),
    (["triton", "{bundle}", "-o", "{nowhere}", "--queue", "0", "--json"], "SettingError", 2),
    (["triton", "{nowhere}", "-o", "{out}", "--json"], "BundleError", 5),
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


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")


@needs_full
@pytest.mark.parametrize("arguments", [["inspect", "{bundle}", "--json"], ["table", "{bundle}", "--json"], ["samplers"], ["-h"]])
def test_a_full_disk_under_standard_output_is_an_error(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as full:  # closing it fails too
        monkeypatch.setattr("sys.stdout", full)
        code = run(arguments, {"bundle": ready})
        monkeypatch.undo()
    assert code == 1
    assert capsys.readouterr().err == "error: standard output: no space left on device\n"


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_process_with_a_full_standard_output_fails_without_a_traceback(unbuffered: str) -> None:
    """At its end the interpreter writes what is still buffered: an error there would be another message and exit code."""
    with Path("/dev/full").open("w") as full:
        for arguments in (["samplers", "--json"], ["--version"]):
            command = [sys.executable, "-m", "sdruntime", *arguments]
            environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
            assert (done.returncode, done.stderr) == (1, "error: standard output: no space left on device\n")


def test_a_closed_standard_output_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout", None)
    code = main(["samplers"])
    monkeypatch.undo()
    assert code == 1
    assert capsys.readouterr().err == "error: standard output: it is closed\n"


def test_every_command_fails_in_the_list_above() -> None:
    from sdruntime.cli.parser import parser

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
    import sdruntime.pipeline.result as result

    write, calls = result.write_image, []

    def interrupted(path: Path, *arguments: Any, **more: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, *arguments, **more)

    monkeypatch.setattr(result, "write_image", interrupted)
    out = tmp_path / "out.png"
    code = main(["generate", str(ready), "a", "b", "--seed", "1", "--backend", "fake", "--steps", "1", "-o", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == found["code"] == 130
    assert [Path(each["file"]).name for each in found["pictures"]] == ["out-1.png"]


def test_a_table_shows_every_coefficient_in_its_place(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that are zero between others."""
    command = ["table", str(bundle.folder), "--sampler", "heun", "--steps", "4"]
    assert main([*command, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    assert main(command) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "coefficients of x | model outputs | noises" in head
    holes = 0
    for row, line in enumerate(lines):
        for name, text in zip("XMN", line[27:].split(" | "), strict=True):
            shown = [float(word) for word in text.split()]
            whole = table[name][row] + [0.0]
            assert shown == pytest.approx(whole[: len(shown)], rel=1e-5)
            assert not any(whole[len(shown) :])
            holes += shown.count(0.0)
    assert holes, "or the sampler shows nothing here"


@pytest.mark.parametrize("arguments", [["generate", "b", "x", "-o", "y.png", "--negativ", "fog"], ["inspect", "b", "--sta"]])
def test_an_abbreviated_flag_is_refused_with_its_full_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    full = {"--negativ": "--negative", "--sta": "--stale"}[next(each for each in arguments if each.startswith("--"))]
    assert f"did you mean {full}" in capsys.readouterr().err


def test_with_quiet_or_json_standard_error_has_no_progress(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "generate",
        str(ready),
        "x",
        "--backend",
        "fake",
        "--steps",
        "2",
        "--seed",
        "1",
        "-o",
        str(tmp_path / "out.png"),
        "--overwrite",
    ]
    assert main(command) == 0
    assert "denoise: 0/2" in capsys.readouterr().err
    for quiet in ("--json", "--quiet"):
        assert main([*command, quiet]) == 0
        assert [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0.5"], "--strength 0.5 has no effect without --image"),
        (["--threads", "-1"], "threads -1: expected a whole number, 0 or more"),
        (["--device", "-1"], "device -1: expected a whole number, 0 or more"),
        (["--guidance", "-5"], "guidance -5.0 is outside 0 to 100"),
        (["--guidance", "1e9"], "guidance 1000000000.0 is outside 0 to 100"),
        (["--count", "1000000000"], "count 1000000000 of 1 prompt: from 1 to 10,000 images in one call"),
        (["--session", "x"], "--session 'x': expected KEY=VALUE"),
        (["--tile", "100"], "tile 100: the side must be a multiple of 8 pixels, and at least 64"),
        (["--tile", "512x512"], 'tile \'512x512\': expected "auto", "off" or the side of a tile in pixels'),
    ],
)
def test_what_would_be_ignored_or_never_ends_is_refused(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out.png"
    assert main(["generate", str(ready), "x", "--backend", "fake", "--seed", "1", "-o", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vram-budget", "1K"], "--vram-budget: no effect, since no chosen engine runs on a GPU"),
        (["--low-memory", "--vram-budget", "1K"], "--vram-budget and --low-memory: no effect, since no chosen engine"),
        (["--negative", "fog", "--guidance", "1"], "the negative prompt has no effect at guidance 1: set guidance above 1"),
        (["--rescale", "0.5", "--guidance", "0"], "rescale 0.5 has no effect at guidance 0"),
    ],
)
def test_what_has_no_effect_is_told_in_a_line(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = [
        "generate",
        str(ready),
        "x",
        "--backend",
        "fake",
        "--steps",
        "1",
        "-q",
        "--overwrite",
        "-o",
        str(tmp_path / "out.png"),
    ]
    assert main([*command, *arguments]) == 0
    assert capsys.readouterr().err.count(f"warning: {message}") == 1
    assert main(command) == 0
    assert message not in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--size", "64x64"], ["--option", "a=1"], ["--component", "unet"], ["--target", "cpu"]])
def test_what_stale_would_ignore_is_refused(ready: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert main(["build", str(ready), "--stale", *more]) == 2
    assert f"{more[0]} cannot be used with --stale" in capsys.readouterr().err
    assert main(["build", str(ready), "--backend", "fake", "--component", "unet", "--without", "unet"]) == 2


def test_a_session_setting_that_onnxruntime_does_not_know_is_told(bundle: Bundle) -> None:
    ort = pytest.importorskip("onnxruntime")
    import warnings

    from sdruntime.backends.ort.session import warn_of_unknown

    with pytest.warns(RuntimeWarning, match="does not seem to have it.*did you mean session.disable_prepacking"):
        warn_of_unknown(ort, ["session.disable_prepakcing"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unknown(ort, ["session.disable_prepacking", "session.intra_op.allow_spinning"])


def test_session_settings_are_checked_before_an_engine_opens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also by the libraries: an empty model is opened with them first. Nothing but the document is on standard output."""
    pytest.importorskip("onnxruntime")
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend="onnxruntime")):
        pass
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdruntime.backends.ort.engine.open_session", lambda *_: opened.append(1))
        arguments = ["generate", str(folder), "a", "-o", str(tmp_path / "a.png"), "--json", "--session"]
        assert main([*arguments, "session.dynamic_block_base=abc"]) == 2
        failed = json.loads(capfd.readouterr().out)
        assert main([*arguments, "session.use_external_initializer_file_buffers_directly=1"]) == 2
    assert failed["error"] == "SettingError"
    assert failed["reason"].startswith("session setting session.dynamic_block_base=abc: ONNX Runtime ")
    assert not opened


def test_openvino_checks_session_settings(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from sdruntime.backends.registry import BACKENDS

    check = BACKENDS["openvino"].check_session
    check({"NUM_STREAMS": "2"})
    with pytest.raises(SettingError, match=r"^session setting NUM_STREAMS=abc: OpenVINO \S+ does not accept it: Could not read"):
        check({"NUM_STREAMS": "abc"})
    with pytest.raises(SettingError, match="NotFound: Unsupported property NUMSTREAMS"):
        check({"NUMSTREAMS": "2"})


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_checks_session_settings(name: str) -> None:
    from sdruntime.backends.registry import BACKENDS

    BACKENDS[name].check_session({"engine_host_code": "true"})
    with pytest.raises(SettingError, match="session setting engine_host_code=yes: expected true or false"):
        BACKENDS[name].check_session({"engine_host_code": "yes"})
    with pytest.raises(SettingError, match=f"unknown session setting of {name} 'host_code': did you mean engine_host_code?"):
        BACKENDS[name].check_session({"host_code": "true"})


def test_a_large_count_is_generated_in_groups_of_one_call(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdruntime.pipeline.pipeline import Pipeline

    sizes, stream = [], Pipeline.stream

    def watched(self: Pipeline, requests: Any, **settings: Any) -> Any:
        sizes.append(len(requests))
        return stream(self, requests, **settings)

    monkeypatch.setattr(Pipeline, "stream", watched)
    command = ["generate", str(ready), "x", "--backend", "fake", "--steps", "1", "--size", "64x64", "--count", "20"]
    assert main([*command, "--seed", "3", "-q", "-o", str(tmp_path / "out.png")]) == 0
    assert sizes == [8, 8, 4]
    assert len(list(tmp_path.glob("out-*.png"))) == 20
