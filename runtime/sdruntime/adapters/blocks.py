"""Strengths by block of a model, as the extension LoRA Block Weight of AUTOMATIC1111's web UI has them (`lbw=`).

A list has 17 numbers (26 for files that change every block) for Stable Diffusion 1 and 2, and 12 (20) for SDXL: first BASE, for
the text encoders and what is in no block of the UNet, then the UNet's blocks by their numbers in the original code. Blocks that
a list does not have count as 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from sdruntime.errors import SettingError, shown

BASE, MIDDLE = "BASE", "MID"
MOST_WEIGHT = 100.0


def _in(*numbers: int) -> tuple[str, ...]:
    return tuple(f"IN{number:02}" for number in numbers)


def _out(*numbers: int) -> tuple[str, ...]:
    return tuple(f"OUT{number:02}" for number in numbers)


# by the count of numbers: the blocks with attention, and all
_LISTS = {
    17: (BASE, *_in(1, 2, 4, 5, 7, 8), MIDDLE, *_out(*range(3, 12))),
    26: (BASE, *_in(*range(12)), MIDDLE, *_out(*range(12))),
}
_LISTS_XL = {
    12: (BASE, *_in(4, 5, 7, 8), MIDDLE, *_out(*range(6))),
    20: (BASE, *_in(*range(9)), MIDDLE, *_out(*range(9))),
}
_PLACE = re.compile(r"(input|middle|output)_blocks?\.(\d+)\.")


def block_of(name: str | None) -> str:
    """Return the block of a module by its name in the original code, or BASE."""
    place = _PLACE.match(f"{name}.")
    if place is None:
        return BASE
    [name] = {"input": _in, "output": _out}[place[1]](int(place[2])) if place[1] != "middle" else (MIDDLE,)
    return name


def check_weights(weights: Sequence[float]) -> None:
    """Raises SettingError unless these are as many numbers as one of the lists has."""
    counts = sorted({*_LISTS, *_LISTS_XL})
    if len(weights) not in counts:
        raise SettingError(f"lbw: {len(weights)} numbers: expected {', '.join(map(str, counts[:-1]))} or {counts[-1]}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= MOST_WEIGHT:  # NaN fails
            raise SettingError(f"lbw: {shown(weight)}: expected a number from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}")


def by_block(weights: Sequence[float], *, xl: bool) -> Mapping[str, float]:
    """Return the weights by block. Raises SettingError for a list of the other family."""
    lists = _LISTS_XL if xl else _LISTS
    if len(weights) not in lists:
        family, (some, more) = "SDXL" if xl else "Stable Diffusion 1 and 2", lists
        raise SettingError(f"lbw: {len(weights)} numbers: the model is one of {family}, whose lists have {some} or {more}")
    return dict(zip(lists[len(weights)], weights, strict=True))


def weights_from(text: str) -> tuple[float, ...]:
    """Return the numbers of a list. Raises SettingError."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = (math.nan,)
    if any(map(math.isnan, weights)):
        raise SettingError(f"lbw={text:.80}: expected numbers, such as 1,0,0,…: named lists are not supported")
    check_weights(weights)
    return weights


def text_of(weights: Sequence[float]) -> str:
    """Return the end of a LoRA's text, "" without weights."""
    return ":lbw=" + ",".join(repr(weight).removesuffix(".0") for weight in weights) if weights else ""
