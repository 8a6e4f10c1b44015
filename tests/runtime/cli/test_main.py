"""The command line: what it prints, what it writes, and the exit code for each kind of bad input, never with a traceback."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SCHEDULER, make_bundle

from sdruntime.__main__ import main
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import NAME
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.images.imagefile import read_image
from sdruntime.pipeline.images.png import write_png
from sdruntime.sampling.samplers import SAMPLERS

ORT = importlib.util.find_spec("onnxruntime") is not None


@pytest.fixture
def ready(bundle: Bundle) -> Path:
    """A bundle with fake engines."""
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake", size="64x64:512x512")):
        pass
    return bundle.folder


def generate(ready: Path, *more: object, prompt: str = "a prompt") -> int:
    return main(["generate", str(ready), prompt, "--backend", "fake", "--steps", "2", *map(str, more)])


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found = json.loads(capsys.readouterr().out)
    assert found.pop("schema") == 1
    return found


def test_generate_writes_a_png_that_says_how_it_was_made(ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    code = generate(
        ready, "-o", out, "--seed", 7, "--negative", "fog", "--sampler", "DPM++ 2M Karras", "--guidance", 5, "--size", "128x64"
    )
    printed = capsys.readouterr()
    assert (code, printed.out) == (0, f"{out}\n")
    assert "\nwarning: image 0 (seed 7) is one colour all over" in printed.err, "as the fake's are"
    assert read_image(out).shape == (64, 128, 3)
    data = out.read_bytes()
    assert b"parameters\0a prompt\nNegative prompt: fog\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5" in data
    assert b"Seed: 7, Size: 128x64" in data
    assert b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia" in data


def test_a_picture_names_the_checkpoints_own_sampler(ready: Path, tmp_path: Path) -> None:
    assert generate(ready, "-o", tmp_path / "out.png") == 0
    assert b"Sampler: DDIM, Schedule type: Automatic," in (tmp_path / "out.png").read_bytes()


def test_a_random_seed_is_printed(ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(ready, "-o", tmp_path / "out.png") == 0
    seed = re.search(rb"Seed: (\d+)", (tmp_path / "out.png").read_bytes())
    assert seed is not None
    assert f"--seed {seed[1].decode()} " in capsys.readouterr().err
    assert generate(ready, "-o", tmp_path / "out-7.png", "--seed", 7) == 0
    assert "seed 7 (random)" not in capsys.readouterr().err


def test_several_pictures_are_named_by_their_seeds(ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    assert (
        main(
            [
                "generate",
                str(ready),
                "one",
                "two",
                "--count",
                "2",
                "--seed",
                "5",
                "--backend",
                "fake",
                "--steps",
                "1",
                "-o",
                str(out),
                "--json",
            ]
        )
        == 0
    )
    pictures = document(capsys)["pictures"]
    assert [(Path(each["file"]).name, each["seed"], each["prompt"]) for each in pictures] == [
        ("out-5.png", 5, "one"),
        ("out-6.png", 6, "one"),
        ("out-7.png", 7, "two"),
        ("out-8.png", 8, "two"),
    ]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"out-{seed}.png" for seed in (5, 6, 7, 8)]


def test_image_to_image_takes_the_size_of_the_picture(ready: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "in.png", np.zeros((64, 128, 3), np.uint8), text={})
    assert generate(ready, "-o", tmp_path / "out.png", "--image", tmp_path / "in.png", "--strength", 0.5) == 0
    assert read_image(tmp_path / "out.png").shape == (64, 128, 3)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "100x64"], 2, "size 100x64: both sides must be multiples of 64, such as 128x64"),
        (["--size", "0x0"], 2, "size: width 0 is outside 1 to 16,384"),
        (["--size", "big"], 2, "WIDTHxHEIGHT"),
        (["--size", "1024x1024"], 5, "built for 64x64 to 512x512, batch 1 to 16, sequence 77 to 2464; requested is 1024x1024"),
        (["--steps", "0"], 2, "steps 0"),
        (["--steps", "1000000000"], 2, "steps 1000000000"),
        (["--sampler", "dpmp_2m"], 2, "did you mean dpmpp_2m"),
        (["--sampler", "euler", "--schedule", "karas"], 2, "karras"),
        (["--option", "eta"], 2, "KEY=VALUE"),
        (["--option", "etta=1"], 2, "etta"),
        (["--option", "eta=0.5", "--option", "eta=0.7"], 2, "--option eta was given twice, as 0.5 and 0.7"),
        (["--session", "a=1", "--session", "a=2"], 2, "--session a was given twice, as 1 and 2"),
        (
            ["--sampler", "DPM++ 2M Karras", "--schedule", "beta"],
            2,
            "sampler 'DPM++ 2M Karras' already names the schedule karras",
        ),
        (["--schedule", "Automatic"], 2, "omit the schedule for the checkpoint's own timesteps"),
        (["--threads", "1000000"], 2, "threads 1000000: expected 1024 at most, or 0"),
        (["--cfg-scale", "3"], 2, "unknown option of sdruntime generate '--cfg-scale': write --guidance"),
        (["--width", "64"], 2, "'--width': write --size WxH"),
        (["--eta=1"], 2, "'--eta': write --option eta=0.5"),
        (["--guidance", "nan"], 2, "guidance nan is outside 0 to 100"),
        (["--strength", "0"], 2, "strength"),
        (["--seed", "-1"], 2, "seed -1 is outside 0 to"),
        (["--count", "0"], 2, "count 0"),
        (["--backend", "onnxrt"], 2, "did you mean onnxruntime"),
        (["--backend", "onnxruntime"], 5, "bundle --backend onnxruntime" if ORT else "ONNX Runtime cannot be imported"),
        (["--image", "nowhere.png"], 2, "nowhere.png"),
        (["-o", "out.gif"], 2, "the name of an image ends in .png, .jpg"),
        (["-o", "no/where/out.png"], 2, "the folder no/where does not exist: mkdir -p no/where"),
    ],
)
def test_bad_settings_are_named_with_their_exit_code(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    out = tmp_path / "out.png"
    assert generate(ready, "-o", out, *arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_prompt_over_64_kib_is_refused_with_the_limit(ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(ready, "-o", tmp_path / "out.png", prompt="x" * 65537) == 2
    assert "64 KiB" in capsys.readouterr().err


def test_what_the_text_encoder_does_not_take_is_reported(ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(ready, "-o", tmp_path / "out.png", "--json", "--prompt-syntax", "plain", prompt="x " * 75 + "lost words") == 0
    printed = capsys.readouterr()
    (picture,) = json.loads(printed.out)["pictures"]
    assert picture["cut"] == "lost words"
    assert "this was cut: 'lost words'" in printed.err


def test_a_damaged_bundle_exits_with_5_and_names_the_file(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = next(path for path in (ready / "engines").iterdir() if path.name.startswith("unet"))
    engine.write_text('{"fill": 1.0}\n')
    assert generate(ready, "-o", tmp_path / "out.png") == 5
    assert f"engines/{engine.name}: changed since it was written" in capsys.readouterr().err
    assert main(["inspect", str(ready), "--check"]) == 5
    assert main(["inspect", str(tmp_path / "nowhere")]) == 5
    assert "not a bundle" in capsys.readouterr().err


def test_build_inspect_samplers_and_doctor_speak_json_and_prose(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(bundle.folder)
    assert main(["build", folder, "--backend", "fake", "--json"]) == 0
    assert [each["state"] for each in document(capsys)["engines"]] == ["done"] * 4
    assert main(["build", folder, "--backend", "fake"]) == 0
    assert capsys.readouterr().out.count("already present") == 4

    assert main(["inspect", folder, "--json"]) == 0
    found = document(capsys)
    assert found["manifest"]["model"]["name"] == "by-hand"
    assert set(found["misfits"].values()) == {None}
    assert main(["inspect", folder]) == 0
    assert capsys.readouterr().out.count("fits this machine") == 4

    assert main(["samplers", "--json"]) == 0
    rows = {row["name"]: row for row in document(capsys)["samplers"]}
    assert rows["dpmpp_2m"]["diffusers"] == "DPMSolverMultistepScheduler"
    assert main(["samplers"]) == 0
    assert "DPM++ 2M" in capsys.readouterr().out

    assert main(["doctor", "--json"]) == 0
    assert document(capsys)["numpy"] == np.__version__
    assert main(["doctor"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_table_prints_the_numbers_of_a_bundle_or_of_a_file(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "scheduler_config.json"
    config.write_text(json.dumps(SCHEDULER))
    tables = []
    for where in ([str(bundle.folder)], ["--config", str(config)]):
        assert main(["table", *where, "--steps", "5", "--sampler", "dpmpp_2m", "--schedule", "karras", "--json"]) == 0
        tables.append(document(capsys)["table"])
    assert tables[0] == tables[1]
    assert len(tables[0]["t"]) == len(tables[0]["X"]) == 5
    assert main(["table", *where, "--sampler", "euler", "--sigmas", "14.6,6.5, 1,0", "--json"]) == 0
    assert len(document(capsys)["table"]["t"]) == 3
    for wrong in ("14.6;0", "1,2"):
        assert main(["table", *where, "--sampler", "euler", "--sigmas", wrong]) == 2
        assert "sigmas" in capsys.readouterr().err
    assert main(["table", str(bundle.folder), "--steps", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["table"]) == 2
    config.write_text('{"a": 1, "a": 2}')
    assert main(["table", "--config", str(config)]) == 2
    assert "appears twice" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("thresholding", True), ("clip_sample", True), ("beta_schedule", "new")])
def test_a_scheduler_that_no_table_expresses_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    config = tmp_path / "scheduler_config.json"
    config.write_text(json.dumps(SCHEDULER | {key: value}))
    assert main(["table", "--config", str(config)]) == 2
    assert key in capsys.readouterr().err


@pytest.mark.parametrize("option", ["schedule=karras", "sampler=euler", "steps=5", "strength=0.5", "config=1", "beta_start=0.1"])
def test_a_table_takes_the_options_of_a_request_alone(bundle: Bundle, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["table", str(bundle.folder), "--option", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_a_class_that_samplers_share_says_which_is_meant(ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["table", str(ready)], ["generate", str(ready), "x", "-o", str(tmp_path / "out.png"), "--backend", "fake"]):
        assert main([*arguments, "--steps", "3", "--sampler", "DPMSolverMultistep"]) == 0
        assert "DPMSolverMultistepScheduler with these settings is dpmpp_2m\n" in capsys.readouterr().err
    assert main(["table", str(ready), "--sampler", "EulerDiscreteScheduler"]) == 0
    assert capsys.readouterr().err == ""


def test_the_names_of_samplers_stand_apart_from_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[: line.index("  ")] for line in lines if not line.startswith(" ")} == set(SAMPLERS)


def test_characters_that_standard_output_lacks_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_bundle(tmp_path / "bundle").folder
    document = json.loads((folder / NAME).read_text("utf-8"))
    document["model"]["name"] = "café \ud800"
    (folder / NAME).write_text(json.dumps(document), "utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["inspect", str(folder)]) == 0
    assert written.getvalue().startswith(rb"caf\xe9 \ud800: sd1")


def test_a_closed_pipe_and_ctrl_c_end_without_a_traceback(ready: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sdruntime"]
    pipe = subprocess.run(f"{' '.join(command)} samplers | head -1", shell=True, capture_output=True, text=True, check=False)
    assert pipe.stderr == ""

    interrupted = (
        "import os, signal, sys, sdruntime.__main__ as line, sdruntime.cli.progress as progress\n"
        "progress.Reporter.show = progress._Shown.show = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(line.main(sys.argv[1:]))"
    )
    arguments = ["generate", str(ready), "x", "--seed", "1", "--backend", "fake", "-o", str(tmp_path / "out.png")]
    done = subprocess.run([sys.executable, "-c", interrupted, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert not list(tmp_path.glob("*.png"))


def test_control_characters_of_a_bundle_do_not_reach_the_terminal(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle.folder / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["model"]["name"] = "a\x1b[2Jb\rc\u202ed"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert main(["inspect", str(bundle.folder)]) == 0
    assert capsys.readouterr().out.startswith(r"a\x1b[2Jb\rc\u202ed: sd1")
    assert main(["generate", str(bundle.folder), "a cat", "-o", "\x1b[31mout.gif"]) == 2
    assert r"\x1b[31mout.gif" in capsys.readouterr().err


def test_an_unknown_sampler_like_no_other_names_the_command_that_lists_them(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(bundle.folder), "--sampler", "Quux"]) == 2
    assert capsys.readouterr().err == "error: unknown sampler 'Quux': `sdruntime samplers` lists them\n"
