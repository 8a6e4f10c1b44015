"""metadata/read.py: the settings in a file, ours and those of other programs, as a Request's."""

from __future__ import annotations

import json
import random
import shlex
import struct
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SCHEDULER
from infotext import read_infotext

from sdruntime.__main__ import main
from sdruntime.cli.commands.png_info import command
from sdruntime.cli.parser import parser
from sdruntime.errors import SettingError
from sdruntime.pipeline.images.imagefile import text_of_image
from sdruntime.pipeline.images.png import png_from_image, text_from_png, write_png
from sdruntime.pipeline.metadata.read import MOST_LETTERS, infotext, settings_of
from sdruntime.pipeline.metadata.write import Origin, parameters
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.samplers import SAMPLERS

PIXELS = np.zeros((64, 64, 3), np.uint8)
WEB_UI = """a (castle:1.2), <lora:stone:0.7>
at night
Negative prompt: blurry,
Steps: 6
Steps: 25, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 6.5, Seed: 123, Size: 640x448, Model hash: 6ce0161689, \
Model: v1-5, VAE: "a, b", Denoising strength: 0.4, Clip skip: 2, Hires upscale: 2, Hires steps: 12, Hires upscaler: Latent, \
ADetailer model: face.pt, Version: v1.10.1"""


def of(request: Request) -> str:
    return parameters(request, request.size or (512, 768), Origin.of(request, SCHEDULER, "v1-5", None))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negative": "b, c\nd: e", "seed": 2**64 - 1, "guidance": 7.1234567891, "rescale": 0.7},
        {"sampler": "dpmpp_2m", "schedule": "karras", "options": {"solver_order": 3, "eta": 0.25}},
        {"sampler": "euler", "schedule": "lu"},
        {"sampler": "euler", "sigmas": (14.6, 2.0, 0.125)},
        {"guidance": (7.5, 3.0, 1.0), "guidance_interval": (0.25, 0.75), "sampler": "euler"},
        {"cfg_pp": True, "guidance": 0.5, "sampler": "euler_a"},
        {"prompt_syntax": "a1111", "emphasis": "no-norm", "clip_skip": 1, "prompt_2": "a, b: c", "negative_2": "d"},
        {"rng": "cuda", "variation_seed": 9, "variation_strength": 0.25, "seed_resize": (512, 384)},
        {"image": PIXELS, "strength": 0.55, "fit": "crop", "size": (512, 512), "sampler": "euler_a"},
        {"image": PIXELS, "mask": PIXELS[..., 0], "mask_blur": 4.0, "mask_padding": 32, "mask_fill": "noise", "overlay": True},
        {"image": PIXELS, "extend": (64, 0, 0, 128), "strength": 1.0},
        {"hires": 1.5, "hires_steps": 7, "hires_strength": 0.6, "hires_resize": "lanczos"},
        {"hires": 2.0, "hires_strength": 0.6, "image": PIXELS, "strength": 0.3},
        {"original_size": (1024, 512), "crop": (8, 16), "target_size": (640, 768)},
    ],
    ids=lambda settings: ",".join(settings) or "none",
)
def test_a_request_is_read_back(settings: dict[str, Any]) -> None:
    request = Request(**{"prompt": "a cat: one, two\nin 'snow' \"now\"", "steps": 7, "guidance": 5.0, **settings})
    if request.sigmas is not None:
        request = Request(**({"prompt": request.prompt, "guidance": 5.0} | settings))
    text = of(request)
    read = settings_of(infotext(text))
    assert read.unused == ()
    parts = {name: getattr(request, name) for name in ("image", "mask") if name in settings}
    assert set(read.missing) == set(parts)
    again = Request(**read.request, **parts)
    assert of(again) == text
    for name in settings.keys() - {"image", "mask", "sampler", "options"}:
        assert getattr(again, name) == settings[name], name
    assert again.sampler is not None
    assert again.options == request.options


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith(("flow", "edm"))])
def test_every_sampler_is_read_back(name: str) -> None:
    text = of(Request(prompt="x", sampler=name))
    assert of(Request(**settings_of(infotext(text)).request)) == text


def test_the_web_ui_s_text_is_read_with_its_defaults() -> None:
    settings = settings_of(infotext(WEB_UI))
    assert settings.request == {
        "prompt": "a (castle:1.2), <lora:stone:0.7>\nat night",
        "negative": "blurry,\nSteps: 6",
        "prompt_syntax": "a1111",
        "rng": "cuda",
        "steps": 25,
        "sampler": "DPM++ 2M",
        "guidance": 6.5,
        "seed": 123,
        "size": (640, 448),
        "clip_skip": 1,
        "hires": 2.0,
        "hires_steps": 12,
        "hires_resize": "latent",
        "schedule": "karras",
        "hires_strength": 0.4,
    }
    assert settings.missing == ()
    assert settings.unused == ("ADetailer model: 'face.pt': no such setting here",)


@pytest.mark.parametrize(
    ("pair", "unused"),
    [
        ("Steps: many", "Steps: 'many': not a value of this setting"),
        ("Steps: 1000000", "Steps: '1000000': steps 1000000 is outside"),
        ("Size: 0x4", "Size: '0x4': size: width 0 is outside"),
        ("Sampler: DPM adaptive", "Sampler: 'DPM adaptive': unknown sampler"),
        ("Hires upscaler: R-ESRGAN 4x+", "Hires upscaler: 'R-ESRGAN 4x+': not a value of this setting"),
        ("CFG scale: nan", "CFG scale: 'nan': guidance nan"),
        ("Sampler options: [1]", "Sampler options: '[1]': not a JSON object"),
        ("Eta: x", "Eta: 'x': expected a number"),
        ("Schedule type: Odd", "Schedule type: unknown schedule 'Odd'"),
        ("Denoising strength: 7", "strength 7"),
    ],
)
def test_a_value_that_is_not_valid_is_named_and_left_out(pair: str, unused: str) -> None:
    settings = settings_of(infotext(f"x\nSeed: 5, RNG: CPU, Model: m, {pair}"))
    [line] = settings.unused
    assert line.startswith(unused)
    assert {"prompt", "seed", "rng", "prompt_syntax"} == settings.request.keys()


def test_parts_outside_the_text_are_named() -> None:
    text = 'x\nSteps: 5, Init image hash: 1, Mask hash: 2, ControlNet 0: "Module: canny", Refiner: r, Image prompt: p'
    assert settings_of(infotext(text)).missing == ("image", "mask", "image_prompt", "refiner", "control")


def test_a_text_without_pairs_is_a_prompt() -> None:
    assert settings_of(infotext("a: b, c: d")).request == {"prompt": "a: b, c: d"}
    assert settings_of(infotext("")).request == {"prompt": ""}
    with pytest.raises(SettingError, match="letters: at most"):
        infotext("x" * (MOST_LETTERS + 1))


@pytest.mark.parametrize("unit", ["a", "a:", 'a:"', "a,", "\\", 'k: "\\"', "-/ ", "a: b, ", "\n"])
def test_any_text_is_read_in_time_that_grows_with_its_length(unit: str) -> None:
    settings_of(infotext("Seed: 1, " + unit * (300_000 // len(unit))))


def test_any_text_is_read() -> None:
    rng, whole = random.Random(0), of(Request(prompt="x", negative="y", rescale=0.5, hires=2.0, options={"eta": 0.5}))
    for _ in range(500):
        letters = list(whole)
        for _ in range(rng.randint(1, 6)):
            letters[rng.randrange(len(letters))] = rng.choice(',:"\\\n0x-{é ')
        read = settings_of(infotext("".join(letters)))
        assert set(read.request) <= {field.name for field in fields(Request)}


def test_pairs_are_those_that_the_web_ui_reads() -> None:
    for text in (of(Request(prompt="x", prompt_2='a "b", c: d\ne', rescale=0.5)), WEB_UI):
        theirs = read_infotext(text)
        ours = infotext(text)
        assert (ours.prompt, ours.negative) == (theirs["Prompt"], theirs["Negative prompt"])
        for key, value in ours.pairs.items():
            sides = value.split("x") if key == "Size" else None
            assert [theirs[f"{key}-1"], theirs[f"{key}-2"]] == sides if sides else theirs[key] == value


# ---- files


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_all_kinds_of_text_in_a_png_are_read() -> None:
    whole = png_from_image(PIXELS, {"parameters": "a fox", "other": "é日"})
    end = whole.index(b"IEND") - 4
    packed = chunk(b"zTXt", b"packed\0\0" + zlib.compress(b"x" * 5000))
    both = chunk(b"iTXt", b"both\0\1\0en\0name\0" + zlib.compress("日".encode()))
    texts = text_from_png(whole[:end] + packed + both + whole[end:])
    assert texts == {"parameters": "a fox", "other": "é日", "packed": "x" * 5000, "both": "日"}
    bomb = chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(1 << 24)))
    with pytest.raises(SettingError, match="texts of over 4,194,304 bytes"):
        text_from_png(whole[:end] + bomb + whole[end:])
    with pytest.raises(SettingError, match="undamaged"):
        text_from_png(whole[: end - 3])


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_the_settings_of_a_jpeg_and_a_webp_are_read(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason="Pillow reads and writes these")
    from sdruntime.pipeline.images.imagefile import write_image
    from sdruntime.pipeline.metadata.write import png_text

    text = of(Request(prompt="é日 a: b", negative="c"))
    write_image(tmp_path / f"a.{ending}", PIXELS, png_text(text))
    assert text_of_image(tmp_path / f"a.{ending}") == {"parameters": text}


def test_the_command_prints_a_command_for_the_same_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request(
        prompt="a 'fox': b",
        negative="--c",
        sampler="dpmpp_2m",
        size=(512, 384),
        guidance_interval=(0.25, 1.0),
        options={"eta": 0.5, "lower_order_final": False},
        hires=1.5,
        crop=(8, 16),
        seed_resize=(64, 32),
        overlay=True,
    )
    path = tmp_path / "a.png"
    write_png(path, PIXELS, {"parameters": of(request), "other": "y" * 500})
    assert main(["png-info", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"parameters:\n  {request.prompt}\n  Negative prompt: --c\n" in out
    assert f"other:\n  {'y' * 400}…\n" in out
    line = out.partition("the same with sdruntime:\n")[2].splitlines()[0]
    settings = settings_of(infotext(of(request))).request
    assert line.strip() == command(settings)
    words = shlex.split(line)
    options = vars(parser().parse_args(words[1:]))
    for name, value in settings.items():
        if name in ("size", "seed_resize"):
            assert options[name] == "x".join(map(str, value))
        elif name == "prompt":
            assert options[name] == [value]
        elif isinstance(value, tuple):
            assert tuple(options[name]) == value
        elif name != "options":
            assert options[name] == value, name
    assert sorted(options["option"]) == ["eta=0.5", "lower_order_final=false"]
    dashed = parser().parse_args(shlex.split(command({"prompt": "--a fox"}))[1:])
    assert (dashed.prompt, str(dashed.bundle), dashed.prompt_syntax) == (["--a fox"], "BUNDLE", "plain")
    assert main(["png-info", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["request"]["size"] == [512, 384]
    assert told["texts"]["parameters"] == of(request)
    assert told["settings"]["Negative prompt"] == "--c"


def test_files_without_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.png"
    write_png(path, PIXELS)
    assert main(["png-info", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no settings in this file\n"
    assert main(["png-info", str(tmp_path / "none.png")]) == 2
    (tmp_path / "b.txt").write_text("x")
    assert main(["png-info", str(tmp_path / "b.txt")]) == 2
    assert "not an image in PNG" in capsys.readouterr().err
