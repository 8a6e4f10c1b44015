"""Tokens added to a vocabulary, found in a text by the rules of Hugging Face's tokenizers: the leftmost, of these the longest.

A token that is `normalized` is looked for in the lower-cased text by its own lower-cased name, the others in the text as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from sdruntime.errors import SettingError

MOST = 10_000  # tokens added to one vocabulary
LONGEST = 200  # characters of such a token

# White space as Unicode has it. Python's own \s holds U+001C-1F as well.
SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# letters by Unicode's Alphabetic that no general category holds
_CIRCLED = [(0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189)]
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is found in the text as it stands and never cut.

    `single_word`: only where no word character is next to it; `lstrip`, `rstrip`: the white space on that side is part of it.
    """

    text: str
    id: int
    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A token in a text, and the characters that it stood for."""

    token: AddedToken
    text: str


class Finder:
    """Finds the tokens of one kind (normalized, or not) in texts of that kind."""

    def __init__(self, tokens: Iterable[AddedToken], name: Callable[[str], str]) -> None:
        self._tokens: Mapping[str, AddedToken] = {name(token.text): token for token in tokens}
        by_first: dict[str, set[int]] = {}
        for text in self._tokens:
            by_first.setdefault(text[0], set()).add(len(text))
        # a text is looked at where one of these characters is, for tokens of these lengths
        self._lengths = {first: sorted(lengths, reverse=True) for first, lengths in by_first.items()}
        self._first = re.compile("[" + "".join(map(re.escape, self._lengths)) + "]") if self._lengths else None

    def split(self, text: str) -> Iterator[str | Found]:
        """The parts of `text` in its order; where there are none between two tokens, nothing."""
        begin = 0  # of what is not yet given out; behind the place of a token where that took white space before it
        for start, stop, token in self._matches(text):
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
                continue
            if token.lstrip:
                start = max(begin, _left_of_spaces(text, start))
            if token.rstrip and (spaces := SPACES.match(text, stop)):
                stop = spaces.end()
            if begin < start:
                yield text[begin:start]
            yield Found(token, text[start:stop])
            begin = stop
        if begin < len(text):
            yield text[begin:]

    def _matches(self, text: str) -> Iterator[tuple[int, int, AddedToken]]:
        at = 0
        while self._first and (place := self._first.search(text, at)):
            at = place.start()
            for length in self._lengths[text[at]]:
                token = self._tokens.get(text[at : at + length])
                if token is not None:
                    yield at, at + length, token
                    at += length
                    break
            else:
                at += 1


def _left_of_spaces(text: str, end: int) -> int:
    while end and SPACES.match(text, end - 1, end):
        end -= 1
    return end


def _is_word(character: str) -> bool:
    """Whether it is a word character by Unicode (UTS 18, annex C): letters, marks, digits, connectors, joiners."""
    if not character:
        return False
    kind = unicodedata.category(character)
    if kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or character in _JOINERS:
        return True
    return kind == "So" and any(first <= ord(character) <= last for first, last in _CIRCLED)


def expanded(text: str, tokens: Iterable[AddedToken], seen: Callable[[str], Iterable[str]], *, most: int) -> str:
    """`text` with the further vectors of each token written out, as diffusers' pipelines do: "<cat>" becomes "<cat> <cat>_1 …".

    `seen`: the tokens of a text, by their names; called only where a token has further ones. Where two such tokens are part of
    each other diffusers' order is that of a hash; here it is that of the text.

    Raises SettingError where that comes to more than `most` characters.
    """
    names = {token.text for token in tokens}
    heads = {name for name in names if f"{name}_1" in names}
    if not heads or not any(head in text for head in heads):
        return text
    for name in dict.fromkeys(name for name in seen(text) if name in heads):
        number, parts = 1, [name]
        while f"{name}_{number}" in names:
            parts.append(f"{name}_{number}")
            number += 1
        written = " ".join(parts)
        size = len(text) + text.count(name) * (len(written) - len(name))
        if size > most:
            raise SettingError(
                f"a text of {size:,} characters, as {name!r} stands for {len(parts)} tokens: at most {most:,}; shorten it"
            )
        text = text.replace(name, written)
    return text
