"""Messages: hints that name the right thing, and nothing of Python or of our own tests in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bundles import SCHEDULER

from sdruntime.__main__ import main
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines

LEAKS = re.compile(r"\[Errno|Traceback|\bb'|codec can't|\(\d+, \d+|<class|Error\(|BUNDLE|\bfake\b|NOT_IMPLEMENTED")


@pytest.fixture
def places(bundle: Bundle, tmp_path: Path) -> dict[str, Path]:
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake", size="64x64:512x512")):
        pass
    found = {"bundle": bundle.folder, "out": tmp_path / "out.png", "text": tmp_path / "text.json", "bytes": tmp_path / "bytes"}
    found["checkpoint"] = tmp_path / "a model"
    found["checkpoint"].mkdir()
    (found["checkpoint"] / "model_index.json").write_text("{}")
    found["text"].write_text(json.dumps(SCHEDULER))
    found["bytes"].write_bytes(b"\xff\xfe\x00")
    (tmp_path / "locked").mkdir()
    return found | {"here": tmp_path}


CASES = [
    (["generate", "{checkpoint}", "x", "-o", "{out}"], "sdexport build '{checkpoint}' -o '{checkpoint}-bundle'"),
    (["inspect", "{bytes}"], "not a bundle"),
    (["inspect", "{here}/none"], "No such file or directory"),
    (
        ["generate", "{bundle}", "x", "-o", "{out}", "--backend", "nothing"],
        "known: onnxruntime, openvino, tensorrt",
    ),
    (["generate", "{bundle}", "x", "-o", "{out}", "--backend", "fast"], "unknown backend 'fast'"),
    (["generate", "{bundle}", "x", "-o", "{out}", "--backend", "tensorrt"], "tensorrt cannot be used"),
    (["generate", "{bundle}", "x", "-o", "{out}", "--image", "{here}/none.png"], "none.png: cannot be read: no such file"),
    (["generate", "{bundle}", "x", "-o", "{out}", "--image", "{bytes}"], "bytes: "),
    (
        ["generate", "{bundle}", "x", "-o", "{out}", "--backend", "fake", "--sampler", "euler", "--option", "eta=1"],
        "samplers with it: ddim",
    ),
    (["generate", "{bundle}", "x", "-o", "{out}", "--option", "etta=1"], "did you mean eta"),
    (["table", "{bundle}", "--sampler", "euler", "--option", "eta=1"], "samplers with it: ddim"),
    (["table", "--config", "{bytes}"], "not text in UTF-8: byte 0xff at position 0"),
    (["table", "--config", "{here}/none.json"], "none.json: no such file or directory"),
    (["table", "--config", "{here}"], "{here}: "),
    (["build", "{bundle}", "--backend", "onnxruntime", "--option", "foo=1"], "unknown option of onnxruntime 1.32"),
    (["build", "{bundle}", "--backend", "onnxruntime", "--size", "512x512:64x64"], "MIN, OPT and MAX must rise from 1"),
    (
        ["build", "{bundle}", "--backend", "openvino", "--option", "foo=1"],
        "- inference_precision: f32, or bf16",
    ),
    (
        ["build", "{bundle}", "--backend", "onnxruntime", "--component", "x"],
        "known: text_encoder, unet, vae_decoder",
    ),
    (["verify", "{bundle}", "--html", "{here}/no/report.html"], "the folder {here}/no does not exist: mkdir -p {here}/no"),
]


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=lambda each: " ".join(each) if type(each) is list else "")
def test_a_message_names_what_mends_it_and_leaks_nothing(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for library in ("onnxruntime", "openvino"):
        if library in arguments:
            pytest.importorskip(library)
    assert main([argument.format(**places) for argument in arguments]) in (2, 5)
    error = capsys.readouterr().err
    assert message.format(**places).replace("1.32", "") in error.replace("1.32", "")
    assert LEAKS.findall(error.replace("--backend fake", "")) == []


def test_bf16_on_onnxruntimes_cpu_is_refused_before_a_build(bundle: Bundle) -> None:
    pytest.importorskip("onnxruntime")
    from sdruntime.errors import SettingError

    with pytest.raises(SettingError, match=r"does not compute bf16 on a CPU: use --backend openvino, or export with --precision"):
        BuildRequest(backend="onnxruntime", target="cpu").resolve_library("bf16")


def test_a_warning_names_the_bundle(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(places["bundle"]), "x", "--backend", "fake", "--steps", "1", "-o", str(places["out"])]
    assert main(command) == 0
    assert f"`sdruntime verify {places['bundle']}`" in capsys.readouterr().err
