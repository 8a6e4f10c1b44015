"""Prompt editing and alternation, in the syntax of AUTOMATIC1111's web UI: which text a prompt is at each step.

* `[a:b:when]` is a, then b; `[b:when]` is nothing, then b; `[a::when]` is a, then nothing. `when` is the number of steps before
  the change, or, if it has a decimal point, their share of all steps.
* `[a|b|c]` is a at the first step, b at the second, and so on, from the beginning again after the last.

Steps are calls of the UNet that this image makes; a sampler of second order makes two per step. All else stays as it is, for
`segments` to read. As in the web UI, brackets that are none of these forms, or do not match, are text, with what is in them; a
bar outside of square brackets, or a backslash before a line break or the end, turns all editing off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sdruntime.errors import SettingError

MOST_TEXTS = 256  # of one prompt
_CLOSING = {"(": ")", "[": "]"}
_TOKENS = re.compile(r"[()\[\]:|]|(?:[^\\()\[\]:|]|\\.)+|\\")
_NUMBER = re.compile(r"\s*(?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


@dataclass(frozen=True, slots=True, eq=False)
class _Edit:
    """`[before:after:when]`, `when` a number of steps, or a share of them if it has a decimal point."""

    before: Sequence[_Part]
    after: Sequence[_Part]
    when: str

    def last(self, steps: int, passed: int) -> int:
        """Return the number of steps that show `before`, of a pass of `steps` after `passed` steps of the one before."""
        share = float(self.when)
        share = (share - bool(passed)) * steps if "." in self.when else share - passed
        return int(max(0.0, min(float(steps), share)))


@dataclass(frozen=True, slots=True, eq=False)
class _Alternation:
    options: Sequence[Sequence[_Part]]


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """A bracket of emphasis, as text. It is kept whole: to copy its parts into every bracket around it takes quadratic time."""

    parts: Sequence[_Part]


_Part = str | _Edit | _Alternation | _Group


@dataclass(slots=True, eq=False)
class _Frame:
    """A bracket that is open: its parts, split at each colon or bar. `number`: whether only plain text follows the last one."""

    mark: str
    fields: list[list[_Part]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def written(self) -> Iterator[_Part]:
        """Yield the parts as text, for a bracket that has no meaning of its own."""
        yield self.mark
        for separator, parts in zip(("", *self.separators), self.fields, strict=True):
            yield separator
            yield from parts

    def closed(self) -> _Part | None:
        """Return what the bracket stands for once it is closed, None if it is not one of the forms."""
        if self.mark == "[" and "|" in self.separators:
            return None if ":" in self.separators else _Alternation(self.fields)
        if self.mark == "(" or not self.separators:
            return None if len(self.separators) > 1 else _Group([*self.written(), _CLOSING[self.mark]])
        last = self.fields[-1]
        number = _NUMBER.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        if number is None or len(self.separators) > 2:
            return None
        return _Edit(self.fields[0] if len(self.separators) == 2 else [], self.fields[-2], number["number"])


class _NotASchedule(Exception):
    """The text as a whole is not of the grammar, so that none of it is editing."""


def schedule(text: str, steps: int, passed: int = 0) -> list[tuple[int, str]]:
    """Return the texts of a prompt over `steps` steps, as (the step from which it holds, from 0; text).

    `passed`: the steps of a first pass, before this one. As in the web UI, numbers of steps then count from its beginning, and
    shares above 1 are of this pass. Neighbours differ. Raises SettingError if there are more than MOST_TEXTS texts.
    """
    try:
        parts = _parsed(text)
    except _NotASchedule:
        return [(0, text)]
    changes, periods = _occurring(parts, steps, passed)
    texts: dict[tuple[int, ...], str] = {}
    result: list[tuple[int, str]] = []
    reached = 0
    for step in range(steps) if periods else sorted({0, *(change for change in changes if change < steps)}):
        while reached < len(changes) and changes[reached] <= step:
            reached += 1
        key = (reached, *(step % period for period in periods))
        if key not in texts:
            if len(texts) == MOST_TEXTS:
                raise SettingError(
                    f"the prompt changes to more than {MOST_TEXTS} texts in {steps:,} steps: use fewer [a|b] or [a:b:when] in it"
                )
            texts[key] = _at(parts, step, steps, passed)
        if not result or result[-1][1] != texts[key]:
            result.append((step, texts[key]))
    return result


def _parsed(text: str) -> list[_Part]:
    """Return the parts of a text. Raises _NotASchedule."""
    top: list[_Part] = []
    frames: list[_Frame] = []

    def give_up() -> None:
        """Turn all open brackets into text: what holds a bracket without meaning has no meaning itself."""
        for frame in frames:
            if "|" in frame.separators:
                raise _NotASchedule
            top.extend(frame.written())
        frames.clear()

    for match in _TOKENS.finditer(text):
        token = match[0]
        if token == "\\":
            raise _NotASchedule
        if token in ("(", "["):
            frames.append(_Frame(token))
        elif token in (")", "]"):
            if frames and _CLOSING[frames[-1].mark] == token and (part := frames[-1].closed()) is not None:
                frames.pop()
                (frames[-1].fields[-1] if frames else top).append(part)
            else:
                give_up()
                top.append(token)
        elif token == "|" and (not frames or frames[-1].mark == "("):
            raise _NotASchedule
        elif token in (":", "|") and frames:
            frames[-1].separators.append(token)
            frames[-1].fields.append([])
        else:
            (frames[-1].fields[-1] if frames else top).append(token)
    give_up()
    return top


def _occurring(parts: Sequence[_Part], steps: int, passed: int) -> tuple[list[int], list[int]]:
    """Return the steps at which an edit changes the text, and the lengths of the alternations."""
    changes, periods, left = set(), set(), [parts]
    while left:
        for part in left.pop():
            if isinstance(part, _Edit):
                changes.add(part.last(steps, passed))
                left += [part.before, part.after]
            elif isinstance(part, _Alternation):
                periods.add(len(part.options))
                left += part.options
            elif isinstance(part, _Group):
                left.append(part.parts)
    return sorted(changes), sorted(periods)


def _at(parts: Sequence[_Part], step: int, steps: int, passed: int) -> str:
    """Return the text at a step, from 0."""
    texts, left = [], [iter(parts)]
    while left:
        part = next(left[-1], None)
        if part is None:
            left.pop()
        elif isinstance(part, str):
            texts.append(part)
        elif isinstance(part, _Group):
            left.append(iter(part.parts))
        elif isinstance(part, _Edit):
            left.append(iter(part.before if step < part.last(steps, passed) else part.after))
        else:
            left.append(iter(part.options[step % len(part.options)]))
    return "".join(texts)
