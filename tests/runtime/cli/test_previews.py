"""Previews: their colours, the files of --preview-dir, and the control sequences of terminals that show images."""

from __future__ import annotations

import base64
import io
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import with_fake_engines
from computed import Parts

from sdruntime.__main__ import main
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.changes.change import change_manifest
from sdruntime.bundle.model import LinearPreview
from sdruntime.cli.terminal_images import (
    CELL,
    ROWS,
    Protocol,
    TerminalImages,
    cell_of,
    encoded,
    enlarged,
    protocol_of,
    sixels,
)
from sdruntime.errors import UnknownName, Unsupported
from sdruntime.pipeline.images.imagefile import read_image
from sdruntime.pipeline.images.png import image_from_png
from sdruntime.pipeline.pipeline import Pipeline

WEIGHTS = ((0.1, 0.2, 0.0, 0.0), (0.0, -0.1, 0.3, 0.0), (0.0, 0.0, 0.1, -0.2))
BIAS = (0.1, 0.0, -0.1)


@pytest.fixture
def plain(bundle: Bundle) -> Path:
    return with_fake_engines(bundle).folder


@pytest.fixture
def ready(plain: Path) -> Path:
    """A bundle with weights for linear previews."""
    preview = LinearPreview(weights=WEIGHTS, bias=BIAS, psnr=20.0)
    change_manifest(plain, lambda now: replace(now, model=replace(now.model, preview=preview)))
    return plain


def generate(bundle: Path, *more: object, steps: int = 3) -> int:
    fixed = ["generate", str(bundle), "a cat", "-o", "out.png", "--backend", "fake", "--steps", str(steps), "--size", "64x64"]
    return main([*fixed, "--seed", "7", "--sampler", "euler", *map(str, more)])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_colours_of_a_cell_are_the_weighted_sum_of_its_latents(ready: Path) -> None:
    with Pipeline.open(ready, backend="fake") as pipe:
        stream = pipe.stream("a cat", seed=7, steps=2, size=(64, 64))
        [noise] = pipe.preview(stream.jobs)
        next(iter(stream))
        [pixels] = pipe.preview(stream.jobs, "linear")
        clean = stream.jobs[0].run.clean
        assert clean is not None
        expected = [
            sum(weight * channel for weight, channel in zip(row, clean, strict=True)) + bias
            for row, bias in zip(WEIGHTS, BIAS, strict=True)
        ]
        wanted = np.rint(255 * np.clip(np.stack(expected, -1) / 2 + 0.5, 0, 1))
        assert pixels.shape == noise.shape == (8, 8, 3)
        assert np.abs(pixels - wanted).max() <= 1
        assert not np.array_equal(noise, pixels)


def test_a_preview_in_full_is_the_decoded_estimate_and_at_last_the_image(tmp_path: Path) -> None:
    with Parts(tmp_path / "computed").pipeline() as pipe:
        stream = pipe.stream("a cat", seed=7, steps=3, size=(64, 64), sampler="euler")
        shown = [pipe.preview(state.jobs, "full")[0] for state in stream]
        assert np.abs(shown[-1].astype(int) - stream.result.images[0].pixels).max() <= 1
        assert not np.array_equal(shown[0], shown[-1])
        with pytest.raises(UnknownName, match="linera"):
            pipe.preview(stream.jobs, "linera")  # type: ignore[arg-type]


@pytest.mark.parametrize(("more", "steps"), [((), [1, 2, 3, 4]), (("--preview-every", 2), [2, 4])])
def test_previews_are_files_of_the_image_s_size(ready: Path, more: tuple[object, ...], steps: list[int]) -> None:
    assert generate(ready, "--count", 2, "--preview-dir", "shown", *more, steps=4) == 0
    assert sorted(path.name for path in Path("shown").iterdir()) == [f"{seed}-{k:03}.png" for seed in (7, 8) for k in steps]
    pixels = read_image(Path("shown", "7-004.png"))
    assert pixels.shape == (64, 64, 3)
    assert np.array_equal(pixels[::8, ::8].repeat(8, 0).repeat(8, 1), pixels)  # one colour per cell


def test_a_bundle_without_weights_shows_decoded_images(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(plain, "--preview-dir", "shown", "--preview-every", 3) == 0
    assert [path.name for path in Path("shown").iterdir()] == ["7-003.png"]
    Path("out.png").unlink()
    assert generate(plain, "--preview", "linear", "--preview-dir", "again") == Unsupported.exit_code
    assert "exported with --no-verify" in capsys.readouterr().err
    assert generate(plain, "--preview", "tiny", "--preview-dir", "again") == Unsupported.exit_code
    assert 'preview "tiny": the bundle has no decoder for it' in capsys.readouterr().err
    assert not Path("again").exists()
    assert not Path("out.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preview", "linear"], "this terminal shows no images (kitty, iTerm2 or sixel): add --preview-dir previews"),
        (["--preview", "full", "--json"], "nothing is shown with --json or --quiet: add --preview-dir previews"),
        (["--preview-every", 2], "--preview-every 2 has no effect without --preview or --preview-dir"),
        (["--preview-dir", "shown", "--preview-every", 0], "--preview-every 0: expected a number of steps, at least 1"),
        (["--preview-dir", "full"], "--preview-dir full: the folder is not empty: name another one, or add --overwrite"),
        (["--preview-dir", "file"], "--preview-dir file: this is a file: name a folder"),
        (["--preview-dir", "no/where"], "the folder no does not exist: mkdir -p no"),
    ],
)
def test_what_cannot_be_shown(ready: Path, capsys: pytest.CaptureFixture[str], more: list[object], message: str) -> None:
    Path("full").mkdir()
    Path("full", "7-001.png").write_bytes(b"")
    Path("file").write_bytes(b"")
    assert generate(ready, *more) == 2
    output = capsys.readouterr()
    assert message in output.err + output.out
    assert not Path("out.png").exists()


def test_existing_previews_are_replaced_with_overwrite(ready: Path) -> None:
    Path("full").mkdir()
    Path("full", "7-001.png").write_bytes(b"")
    assert generate(ready, "--preview-dir", "full", "--overwrite") == 0
    assert Path("full", "7-001.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "mlterm-256color"}, "sixel"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
    ],
)
def test_the_environment_names_the_terminal(environment: dict[str, str], protocol: Protocol | None) -> None:
    assert protocol_of(environment) == protocol


def noise_image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8)


def test_kitty_gets_a_png_in_pieces() -> None:
    pieces = [re.fullmatch(r"\x1b_G(.*);(.*)\x1b\\", part) for part in encoded(noise_image(), "kitty")]
    assert len(pieces) > 2
    assert all(len(piece[2]) <= 4096 for piece in pieces if piece)
    controls = [dict(pair.split("=") for pair in piece[1].split(",")) for piece in pieces if piece]
    assert [control.pop("m") for control in controls] == [*["1"] * (len(pieces) - 1), "0"]
    assert controls[0] == {
        "a": "T",
        "f": "100",
        "i": "1",
        "q": "2",
        "C": "1",
        "r": str(ROWS),
        "c": str(round(ROWS * 2 * 50 / 70)),
    }
    assert controls[1:] == [{}] * (len(pieces) - 1)
    assert np.array_equal(image_from_png(base64.b64decode("".join(piece[2] for piece in pieces if piece))), noise_image())


def test_an_image_keeps_its_proportions_whatever_the_letters_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a terminal of 80x24 letters that reports its pixels, and of one that does not."""
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    sizes = {"reported": (24, 80, 80 * 9, 24 * 18), "not reported": (24, 80, 0, 0)}
    monkeypatch.setattr(fcntl, "ioctl", lambda place, what, room: struct.pack("4H", *sizes[place]))
    assert termios.TIOCGWINSZ
    for place, cell in (("reported", (9, 18)), ("not reported", CELL)):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "fileno", lambda place=place: place)
        assert cell_of(stream) == cell
    square = np.zeros((8, 8, 3), np.uint8)
    for cell in ((9, 18), (10, 16), (1, 1)):
        [control, *_] = encoded(square, "kitty", cell)
        columns = int(re.search(r"c=(\d+)", control)[1])  # type: ignore[index]
        assert columns * cell[0] == ROWS * cell[1] or abs(columns * cell[0] - ROWS * cell[1]) <= cell[0] / 2
        assert "".join(encoded(square, "sixel", cell)).startswith(f'\x1bPq"1;1;{ROWS * cell[1]};{ROWS * cell[1]}')
    assert cell_of(io.StringIO()) == CELL


def test_iterm2_gets_a_png() -> None:
    whole = re.fullmatch(
        r"\x1b\]1337;File=inline=1;height=(\d+);preserveAspectRatio=1:(.*)\x07", "".join(encoded(noise_image(), "iterm2"))
    )
    assert whole
    assert int(whole[1]) == ROWS
    assert np.array_equal(image_from_png(base64.b64decode(whole[2])), noise_image())


def from_sixels(text: str) -> np.ndarray:
    """Read sixels with a colour map in percent, by the rules of the VT330/VT340 manual."""
    head = re.match(r'\x1bPq"1;1;(\d+);(\d+)', text)
    assert head
    assert text.endswith("\x1b\\")
    width, height = int(head[1]), int(head[2])
    pixels, colours = np.zeros((height + 6, width, 3)), {}
    x = y = colour = 0
    for token in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)(.)|([?-~])|(\$)|(-)", text[head.end() : -2]):
        if token[1]:
            colours[int(token[1])] = np.array([int(token[k]) for k in (2, 3, 4)]) * 2.55
        elif token[5]:
            colour = int(token[5])
        elif token[9]:
            x = 0
        elif token[10]:
            x, y = 0, y + 6
        else:
            code, count = (token[7], int(token[6])) if token[6] else (token[8], 1)
            for bit in range(6):
                if (ord(code) - 63) >> bit & 1:
                    pixels[y + bit, x : x + count] = colours[colour]
            x += count
    assert not pixels[height:].any()
    return pixels[:height]


def test_sixels_are_the_image_in_216_colours() -> None:
    y, x = np.mgrid[:70, :50]
    image = np.stack([2 * x, 3 * y, x + y], -1).astype(np.uint8)
    read = from_sixels(sixels(image))
    assert read.shape == image.shape
    assert np.abs(read - image).max() <= 255 / 5
    means = [array[:68, :48].reshape(17, 4, 12, 4, 3).mean((1, 3)) for array in (read, image.astype(float))]
    assert np.abs(means[0] - means[1]).max() <= 5  # the dither keeps the colour of an area
    flat = np.full((12, 30, 3), 255, np.uint8)
    assert len(sixels(flat)) < 80
    assert np.abs(from_sixels(sixels(flat)) - flat).max() < 1


def test_an_image_replaces_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-kitty")
    terminal = Terminal()
    images = TerminalImages.on(terminal)
    assert images is not None
    images.show(noise_image())
    images.show(noise_image())
    assert terminal.getvalue().count("\n") == ROWS  # room, once
    assert terminal.getvalue().count(f"\x1b7\x1b[{ROWS}A\r\x1b_Ga=T") == 2
    assert terminal.getvalue().endswith("\x1b8")
    assert TerminalImages.on(io.StringIO()) is None


def test_enlarged_pixels_keep_their_proportions() -> None:
    small = noise_image()[:2, :3]
    large = enlarged(small, 10)
    assert large.shape == (10, 15, 3)
    assert np.array_equal(large, small.repeat(5, 0).repeat(5, 1))
