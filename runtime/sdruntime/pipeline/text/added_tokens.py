"""Find added tokens in a text by the rules of Hugging Face's tokenizers: the leftmost match, then the longest.

A `normalized` token is matched by its normalized name in the normalized text, any other token in the original text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdruntime.errors import SettingError

MOST = 10_000  # tokens added to one vocabulary
LONGEST = 200  # characters of such a token

# Unicode white space. Python's \s also matches U+001C to U+001F.
SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# circled letters: Alphabetic in Unicode, but of no letter category
_CIRCLED = [(0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189)]
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is matched as a whole and never split.

    `single_word`: match only between non-word characters. `lstrip`, `rstrip`: the match includes white space on that side.
    """

    text: str
    id: int
    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    vectors: int = 1  # how many ids, from `id` on, it stands for


@dataclass(frozen=True, slots=True)
class Match:
    """A token in a text, and the characters that it matched."""

    token: AddedToken
    text: str


class Finder:
    """Find tokens of one kind, normalized or not, in texts of that kind."""

    def __init__(self, tokens: Iterable[AddedToken], name: Callable[[str], str]) -> None:
        self._tokens: Mapping[str, AddedToken] = {name(token.text): token for token in tokens}
        by_first: dict[str, set[int]] = {}
        for text in self._tokens:
            by_first.setdefault(text[0], set()).add(len(text))
        # first character -> lengths of the tokens that begin with it, longest first
        self._lengths = {first: sorted(lengths, reverse=True) for first, lengths in by_first.items()}
        self._first = re.compile("[" + "".join(map(re.escape, self._lengths)) + "]") if self._lengths else None

    def split(self, text: str) -> Iterator[str | Match]:
        """Yield the parts of `text` in order: matches, and the non-empty texts between them."""
        begin = 0  # end of the previous match, which may be past `start` if that match took white space
        for start, stop, token in self._matches(text):
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
                continue
            if token.lstrip:
                start = max(begin, _left_of_spaces(text, start))
            if token.rstrip and (spaces := SPACES.match(text, stop)):
                stop = spaces.end()
            if begin < start:
                yield text[begin:start]
            yield Match(token, text[start:stop])
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
    """Whether a character is a word character (UTS 18, annex C): letter, mark, digit, connector or joiner."""
    if not character:
        return False
    kind = unicodedata.category(character)
    if kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or character in _JOINERS:
        return True
    return kind == "So" and any(first <= ord(character) <= last for first, last in _CIRCLED)


def vectors_of(tokens: Sequence[AddedToken]) -> dict[int, int]:
    """Return the number of tokens of each multi-vector token, by the id of its first: that of "<cat>", beside "<cat>_1"."""
    ids = {token.text: token.id for token in tokens}
    counts = {token.id: token.vectors for token in tokens if token.vectors > 1}
    for name in ids:
        number = 1
        while f"{name}_{number}" in ids:
            number += 1
        if number > 1:
            counts[ids[name]] = number
    return counts


def expanded(text: str, tokens: Iterable[AddedToken], tokenize: Callable[[str], Iterable[str]], *, most: int) -> str:
    """Return `text` with multi-vector tokens written out as in diffusers' pipelines: "<cat>" becomes "<cat> <cat>_1 …".

    `tokenize`: return the names of the tokens of a text; called only if the text has a multi-vector token. If one such name
    contains another, the order matters: diffusers uses that of a hash, this function that of the text.

    Raises SettingError if the result has more than `most` characters.
    """
    names = {token.text for token in tokens}
    heads = {name for name in names if f"{name}_1" in names}
    if not heads or not any(head in text for head in heads):
        return text
    for name in dict.fromkeys(name for name in tokenize(text) if name in heads):
        number, parts = 1, [name]
        while f"{name}_{number}" in names:
            parts.append(f"{name}_{number}")
            number += 1
        written = " ".join(parts)
        size = len(text) + text.count(name) * (len(written) - len(name))
        if size > most:
            raise SettingError(
                f"a text of {size:,} characters, as {name!r} stands for {len(parts)} tokens; the maximum is {most:,}: shorten it"
            )
        text = text.replace(name, written)
    return text
