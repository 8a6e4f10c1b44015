"""outputs.py and what writes images: names checked before the work, nothing overwritten unasked, every format read back."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import with_fake_engines
from infotext import read_infotext

from sdruntime.__main__ import main
from sdruntime.bundle.bundle import Bundle
from sdruntime.cli import outputs
from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.images.imagefile import read_image
from sdruntime.pipeline.images.png import write_file
from sdruntime.pipeline.metadata.write import Origin
from sdruntime.pipeline.requests.request import requests_from
from sdruntime.pipeline.result import Image

pytest.importorskip("PIL.Image", reason="Pillow reads and writes the other formats")
import PIL.Image

MARK = b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.fixture
def ready(bundle: Bundle) -> Path:
    return with_fake_engines(bundle).folder


def generate(ready: Path, *more: object) -> int:
    fixed = ["generate", str(ready), "--backend", "fake", "--steps", "1", "--size", "64x64", "--seed", "7"]
    return main([*fixed, *map(str, more)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "bundle")


def image(prompt: str = "a cat, 猫", side: int = 64) -> Image:
    y, x = np.mgrid[:side, :side]
    pixels = np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)
    [request] = requests_from(prompt, seed=7)
    return Image(pixels=pixels, request=request, sampler="ddim", origin=Origin(model="shapes", sampler="DDIM"))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("out.png", ["out-7.png", "out-8.png"]),
        ("OUT.JPG", ["OUT-7.JPG", "OUT-8.JPG"]),
        (".", ["7.png", "8.png"]),
        ("{index:03}-{seed}.webp", ["000-7.webp", "001-8.webp"]),
        ("{prompt}.png", ["two-dogs-2.png", "one-cat-on-a-mat-in-a-very-long-sentence-that-goes-on-and-on.png"]),
        ("a{{b}}-{seed}.jpeg", ["a{b}-7.jpeg", "a{b}-8.jpeg"]),
    ],
)
def test_names_say_which_image_is_which(output: str, expected: list[str], tmp_path: Path) -> None:
    requests = requests_from(["../two dogs: 2!", "one cat on a mat, in a very long sentence that goes on and on and on"], seed=7)
    found = outputs.paths(str(tmp_path / output), requests, overwrite=False)
    assert [path.name for path in found] == expected
    assert {path.parent for path in found} == {tmp_path}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.gif", r"out-7\.gif: the name of an image ends in \.png, \.jpg, \.jpeg, \.webp, that of a folder in /"),
        ("out", "the name of an image ends in"),
        ("absent/out.png", "the folder .*absent does not exist: mkdir -p"),
        ("absent/", "the folder .*absent does not exist: mkdir -p"),
        ("{prompt}.png", r"2 images would be .*x\.png: add \{seed\} or \{index\}"),
        ("{sed}.png", "unknown field of --output .*'sed': did you mean seed"),
        ("{seed.__class__}.png", "unknown field"),
        ("{}.png", "unknown field"),
        ("{seed.png", "expected '}'"),
        ("{seed:%Y}.png", "fields are written as"),
        ("-", "one image goes to standard output, not 2: add --grid"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused(output: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((SettingError, UnknownName), match=message):
        outputs.paths(output if output == "-" else f"{tmp_path}/{output}", requests_from("x", count=2, seed=7), overwrite=False)


def test_an_existing_file_is_not_overwritten_and_is_told_of_before_the_work(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.png"
    assert generate(ready, "a", "-o", out) == 0
    before = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("sdruntime.pipeline.pipeline.Pipeline.open", lambda *_, **__: pytest.fail("the bundle was opened"))
        assert generate(ready, "b", "-o", out) == 2
        assert generate(ready, "b", "-o", tmp_path / "out-{seed}.png", "--grid", "-o", out) == 2
    assert "this file exists: add --overwrite to replace it" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert generate(ready, "b", "-o", out, "--overwrite") == 0
    assert out.read_bytes() != before


def test_a_file_that_appears_during_the_work_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"another's")
    with pytest.raises(SettingError, match=r"out\.png: this file exists"):
        image().save(out, overwrite=False)

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    with pytest.raises(SettingError, match=r"out\.png: this file exists"):
        write_file(out, b"ours", overwrite=False)
    assert out.read_bytes() == b"another's"
    write_file(tmp_path / "new", b"ours", overwrite=False)
    assert (tmp_path / "new").read_bytes() == b"ours"
    image().save(out)
    assert names(tmp_path) == ["new", "out.png"], "nothing temporary is left"


def test_a_long_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 251}.png"
    image().save(path, overwrite=False)
    assert read_image(path).shape == (64, 64, 3)


def test_several_prompts_into_a_folder_a_sheet_and_standard_output(
    ready: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "images").mkdir()
    assert generate(ready, "a", "b", "--count", 2, "-o", f"{tmp_path}/images/") == 0
    assert names(tmp_path / "images") == ["10.png", "7.png", "8.png", "9.png"]
    assert generate(ready, "a", "b", "c", "-o", tmp_path / "sheet.png", "--grid") == 0
    assert read_image(tmp_path / "sheet.png").shape == (128, 128, 3)
    capfdbinary.readouterr()
    assert generate(ready, "a", "-o", "-") == 0
    printed = capfdbinary.readouterr()
    with PIL.Image.open(io.BytesIO(printed.out)) as seen:
        assert read_infotext(str(seen.info["parameters"]))["Seed"] == "7"
    assert generate(ready, "a", "-o", "-", "--json") == 2
    assert names(tmp_path) == ["images", "sheet.png"]


def test_a_terminal_gets_no_image(ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert generate(ready, "a", "-o", "-") == 2
    assert "--output - with a terminal: redirect it" in capsys.readouterr().err


def test_a_sheet_is_filled_row_by_row_and_keeps_the_first_settings() -> None:
    parts = [image(f"prompt {number}", side=2) for number in range(5)]
    for number, part in enumerate(parts):
        part.pixels[:] = number + 1
    found = outputs.sheet(parts)
    assert found.pixels[::2, ::2, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert found.request.prompt == "prompt 0"
    assert "Size: 2x2," in found.text()["parameters"], "that of an image, which is what to generate again"
    with pytest.raises(SettingError, match="--grid of 401 images: at most 400"):
        outputs.check_sheet(401)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_every_format_says_how_the_image_was_made(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"image{ending}"
    image().save(path)
    assert np.abs(read_image(path).astype(int) - image().pixels).mean() < 2
    assert MARK in path.read_bytes()
    with PIL.Image.open(path) as seen:
        assert seen.format == {".png": "PNG", ".webp": "WEBP"}.get(ending.lower(), "JPEG")
        if seen.format == "PNG":
            text = str(seen.info["parameters"])
        else:  # as piexif reads a UserComment: eight bytes say how it is encoded
            comment = seen.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0"
            text = comment[8:].decode("utf-16-be")
    found = read_infotext(text)
    assert (found["Prompt"], found["Seed"], found["Model"]) == ("a cat, 猫", "7", "shapes")


def test_settings_that_a_jpeg_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"image\.jpg: cannot be written as JPEG .*: write a \.png"):
        image("x" * 40_000).save(tmp_path / "image.jpg")
    assert names(tmp_path) == []


def test_without_pillow_another_format_is_refused_before_the_work(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert generate(ready, "a", "-o", tmp_path / "out.jpg") == 3
    assert 'pip install "sdruntime[images]"' in capsys.readouterr().err
    assert generate(ready, "a", "-o", tmp_path / "out.png") == 0
