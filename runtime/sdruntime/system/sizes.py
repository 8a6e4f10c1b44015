"""Parse sizes: 512x768 in pixels, 512M in bytes."""

from __future__ import annotations

import re

from sdruntime.errors import SettingError

Size = tuple[int, int]  # pixels: width, height


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> Size:
    """Return (width, height) in pixels from "WxH". Raises SettingError."""
    if not re.fullmatch(r"\d{1,5}x\d{1,5}", text):
        raise SettingError(f"size {text!r}: expected WIDTHxHEIGHT in pixels, such as 512x512")
    width, height = map(int, text.split("x"))
    return width, height


def parse_bytes(text: str) -> int:
    """Return bytes from a number with an optional suffix K, M or G (powers of 1024). Raises SettingError."""
    match = re.fullmatch(r"(\d{1,12})([KMG]?)", text)
    if match is None:
        raise SettingError(f"{text!r}: expected a number of bytes, such as 600M or 4G")
    return int(match[1]) * _UNITS[match[2]]
