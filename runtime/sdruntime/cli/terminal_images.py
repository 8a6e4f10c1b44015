"""Show an image in a terminal that can: by the protocols of kitty and iTerm2, or as sixels (DEC VT340).

https://sw.kovidgoyal.net/kitty/graphics-protocol        https://iterm2.com/documentation-images.html
"""

from __future__ import annotations

import base64
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from sdruntime.cli.progress import is_terminal
from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.pipeline.images.png import png_from_image

Protocol = Literal["kitty", "iterm2", "sixel"]
ROWS = 16  # of text, that an image takes
CELL = (10, 20)  # pixels of a letter, (width, height), of a terminal that does not report them
_PIECE = 4096  # bytes of one kitty command
_LEVELS = 6  # of each colour, in sixels
# thresholds of an ordered dither, in steps of a level: Bayer's matrix of 4 by 4
_BAYER = (np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) + 0.5) / 16


def protocol_of(environment: Mapping[str, str] = os.environ) -> Protocol | None:
    """Return the protocol of the terminal that these environment variables describe; None if it shows no images."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", environment.get("LC_TERMINAL", ""))
    if term.startswith(("screen", "tmux")):  # which pass none of them on by default
        return None
    if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "iTerm2", "WezTerm"):
        return "iterm2"
    if term.startswith(("foot", "mlterm", "contour", "yaft")) or "sixel" in term or program == "mintty":
        return "sixel"
    return None


class TerminalImages:
    """An image above the current line of a terminal, that each call of `show` replaces."""

    def __init__(self, stream: TextIO, protocol: Protocol) -> None:
        self._stream, self._protocol, self._placed = stream, protocol, False
        self._cell = cell_of(stream)

    @classmethod
    def on(cls, stream: TextIO) -> TerminalImages | None:
        """Return the images of a stream, or None if it is no terminal that shows images."""
        protocol = protocol_of() if is_terminal(stream) else None
        return cls(stream, protocol) if protocol is not None else None

    def show(self, pixels: Pixels) -> None:
        """Show pixels uint8 [H, W, 3]. The cursor stays where it is."""
        if not self._placed:
            self._stream.write("\n" * ROWS)  # scrolls, so that there is room above
            self._placed = True
        self._stream.write(f"\x1b7\x1b[{ROWS}A\r{''.join(encoded(pixels, self._protocol, self._cell))}\x1b8")
        self._stream.flush()


def cell_of(stream: TextIO) -> tuple[int, int]:
    """Return the pixels of a letter of a terminal, (width, height), or CELL if it does not report them."""
    try:
        import fcntl
        import termios

        size = fcntl.ioctl(stream.fileno(), termios.TIOCGWINSZ, bytes(8))
    except (ImportError, OSError, ValueError):
        return CELL
    rows, columns, width, height = struct.unpack("4H", size)
    return (width // columns, height // rows) if 0 < columns <= width and 0 < rows <= height else CELL


def encoded(pixels: Pixels, protocol: Protocol, cell: tuple[int, int] = CELL) -> Iterator[str]:
    """Yield the parts of the control sequence that shows pixels uint8 [H, W, 3], ROWS lines high.

    `cell`: the pixels of a letter, (width, height).
    """
    if protocol == "sixel":
        yield sixels(enlarged(pixels, ROWS * cell[1]))
        return
    data = base64.b64encode(png_from_image(pixels)).decode()
    if protocol == "iterm2":
        yield f"\x1b]1337;File=inline=1;height={ROWS};preserveAspectRatio=1:{data}\x07"
        return
    columns = max(1, round(ROWS * cell[1] / cell[0] * pixels.shape[1] / pixels.shape[0]))  # older versions do not infer them
    # number 1, which replaces the one before; no answer; no move of the cursor
    control = f"a=T,f=100,i=1,q=2,C=1,r={ROWS},c={columns},"
    for start in range(0, len(data), _PIECE):
        yield f"\x1b_G{control}m={int(start + _PIECE < len(data))};{data[start : start + _PIECE]}\x1b\\"
        control = ""


def enlarged(pixels: Pixels, height: int) -> Pixels:
    """Return pixels at this height, each repeated as often as necessary, in their proportions."""
    width = max(1, round(pixels.shape[1] * height / pixels.shape[0]))
    rows, columns = (np.arange(side) * before // side for side, before in zip((height, width), pixels.shape, strict=False))
    larger: Pixels = pixels[rows][:, columns]
    return larger


def sixels(pixels: Pixels) -> str:
    """Return pixels as sixels: bands of six rows, each colour of a cube of 216 in turn."""
    height, width, _ = pixels.shape
    dither = np.tile(_BAYER, (-(-height // 4), -(-width // 4)))[:height, :width, None]
    levels = np.floor(pixels / 255 * (_LEVELS - 1) + dither).astype(np.int64)
    colours = levels @ np.array([_LEVELS**2, _LEVELS, 1])
    parts = [f'\x1bPq"1;1;{width};{height}']
    percent = [round(100 * level / (_LEVELS - 1)) for level in range(_LEVELS)]
    for colour in np.unique(colours).tolist():
        red, green, blue = colour // _LEVELS**2, colour // _LEVELS % _LEVELS, colour % _LEVELS
        parts.append(f"#{colour};2;{percent[red]};{percent[green]};{percent[blue]}")
    for top in range(0, height, 6):
        band = colours[top : top + 6]
        bits = 1 << np.arange(len(band))
        for colour in np.unique(band).tolist():
            column = bits @ (band == colour)
            parts.append(f"#{colour}{_runs(column + 63)}$")
        parts.append("-")
    return "".join(parts) + "\x1b\\"


def _runs(codes: NDArray[np.int64]) -> str:
    """Return characters, with runs of one as "!COUNT" and the character."""
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    counts = np.diff(starts, append=len(codes))
    return "".join(
        f"!{count}{chr(code)}" if count > 3 else chr(code) * count
        for code, count in zip(codes[starts].tolist(), counts.tolist(), strict=True)
    )
