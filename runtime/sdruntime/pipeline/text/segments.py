"""Emphasis in a prompt, in the syntax of AUTOMATIC1111's web UI: from a text to segments of text with a weight.

`(a)` multiplies the weight of a by 1.1, `[a]` divides it by 1.1, `(a:1.3)` multiplies it by 1.3; brackets nest. A backslash makes
the bracket, or the backslash, after it part of the text. The word BREAK outside of brackets ends a chunk.

Text that is not complete syntax is treated as in the web UI, which never refuses a bracket: an opening bracket that is not
closed reaches to the end of the text, a closing bracket that was not opened is text, round and square brackets are matched
independently of each other, and BREAK inside a bracket is a word, whose weight is the negated weight of the bracket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdruntime.errors import SettingError, shown

ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies the weight by
LARGEST_WEIGHT = 1000
_TOKENS = re.compile(r"(?P<escape>\\[()\[\]\\]?)|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<mark>[()\[\]])|(?P<text>[^\\()\[\]:]+|:)")
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a prompt, and the weight of its tokens."""

    text: str
    weight: float = 1.0


BREAK = Segment("BREAK", -1.0)  # ends a chunk


def segments(text: str) -> list[Segment]:
    """Return the segments of a prompt, neighbours of the same weight merged, and BREAK where a chunk ends.

    Raises SettingError for a weight that is not a number, or is too large.
    """
    pieces, opened = _pieces(text)
    opening: dict[int, list[tuple[bool, float, int]]] = {}  # piece -> the brackets that open before it
    for is_round, multiplier, start, stop in opened:
        if start < stop:
            opening.setdefault(start, []).append((is_round, multiplier, stop))
    # The open brackets of each kind, as (where it ends, the product of the multipliers up to it). Each kind nests in itself.
    stacks: dict[bool, list[tuple[int, float]]] = {True: [(len(pieces), 1.0)], False: [(len(pieces), 1.0)]}
    merged: list[tuple[list[str], float]] = []
    for index, piece in enumerate(pieces):
        for stack in stacks.values():
            while stack[-1][0] <= index:
                stack.pop()
        for is_round, multiplier, stop in opening.get(index, ()):
            stacks[is_round].append((stop, stacks[is_round][-1][1] * multiplier))
        weight = piece.weight * (stacks[True][-1][1] * stacks[False][-1][1])
        if not abs(weight) <= LARGEST_WEIGHT:  # also NaN
            fix = f"expected -{LARGEST_WEIGHT:,} to {LARGEST_WEIGHT:,}: remove brackets"
            raise SettingError(f"the weight {weight:g} of {shown(piece.text)} in the prompt: {fix}")
        if merged and merged[-1][1] == weight:
            merged[-1][0].append(piece.text)
        else:
            merged.append(([piece.text], weight))
    return [Segment("".join(texts), weight) for texts, weight in merged] or [Segment("")]


def _pieces(text: str) -> tuple[list[Segment], list[tuple[bool, float, int, int]]]:
    """Return the texts between the marks, before any bracket is applied, and the brackets in the order in which they open.

    A bracket is (round, multiplier, its first piece, the piece after its last).
    """
    pieces: list[Segment] = []
    brackets: list[tuple[bool, float, int, int]] = []
    open_of: dict[bool, list[int]] = {True: [], False: []}  # round, square -> indices into `brackets`
    for match in _TOKENS.finditer(text):
        mark, weight = match["mark"], match["weight"]
        if match["escape"]:
            pieces.append(Segment(match["escape"][1:]))
        elif mark in ("(", "["):
            is_round = mark == "("
            open_of[is_round].append(len(brackets))
            brackets.append((is_round, ROUND if is_round else SQUARE, len(pieces), -1))
        elif (weight is not None or mark == ")") and open_of[True]:
            _close(brackets, open_of[True].pop(), len(pieces), None if weight is None else _weight(match[0], weight))
        elif mark == "]" and open_of[False]:
            _close(brackets, open_of[False].pop(), len(pieces), None)
        else:
            pieces += _broken(match[0])
    for index in (*open_of[True], *open_of[False]):
        _close(brackets, index, len(pieces), None)
    return pieces, brackets


def _close(brackets: list[tuple[bool, float, int, int]], index: int, stop: int, weight: float | None) -> None:
    is_round, multiplier, start, _ = brackets[index]
    brackets[index] = (is_round, multiplier if weight is None else weight, start, stop)


def _weight(written: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise SettingError(f"the weight {shown(written)} in the prompt: expected a number, such as (a red fox:1.2)") from None


def _broken(text: str) -> list[Segment]:
    """Return the parts of a text around each BREAK, without the white space beside it."""
    words = _BREAK.split(text)
    last = len(words) - 1
    parts: list[Segment] = []
    for index, word in enumerate(words):
        word = word.lstrip() if index else word
        parts += [BREAK] if index else []
        parts.append(Segment(word if index == last else word.rstrip()))
    return parts
