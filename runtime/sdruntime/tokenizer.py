"""CLIP's byte-pair tokenizer (Radford et al. 2021; Sennrich et al. 2016) in pure Python, from the files of a checkpoint.

Text goes the way of transformers' CLIPTokenizer, id for id: special tokens are taken out; the rest is put into NFC, white space
made single spaces, lower-cased, cut into words by CLIP's pattern; the UTF-8 bytes of each word are merged pair by pair, best rank
first. What differs is the Unicode version alone: this uses Python's tables. As there, a text is never "fixed" (no ftfy).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from sdruntime.document import LARGEST
from sdruntime.errors import BundleError, SettingError
from sdruntime.files import FileFault, FileMissing, Folder
from sdruntime.record import json_from_text

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
LONGEST = 64 * 1024  # bytes of UTF-8 in a text
CONTEXT = 77  # positions of CLIP's text encoder
_END_OF_WORD = "</w>"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# field of Tokenizer -> name in the files, and what CLIPTokenizer takes without it
_TASKS = {
    "start": ("bos_token", _START),
    "end": ("eos_token", _END),
    "unknown": ("unk_token", _END),
    "pad": ("pad_token", _END),
}

# White space as Unicode has it. Python's own \s holds U+001C-1F as well.
_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# CLIP's word pattern, over a shadow of the text: `re` knows no \p{L}, so é, ² and § stand there for all letters, numbers and
# the rest beyond ASCII
_WORDS = re.compile(r"<\|(?:start|end)oftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[A-Za-zé]+|[0-9²]|[^ A-Za-zé0-9²]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialToken:
    """A token that is found in the text as it stands and never cut. `normalized`: looked for in the lower-cased text."""

    text: str
    id: int
    normalized: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """`vocab`: token -> id; `merges`: ids of a pair -> (rank, id of the two as one); ids of the tokens with a task of their own.

    `length`: tokens of an encoder's input, start and end among them.
    """

    vocab: Mapping[str, int] = field(repr=False)
    merges: Mapping[tuple[int, int], tuple[int, int]] = field(repr=False)
    specials: tuple[SpecialToken, ...]
    start: int
    end: int
    pad: int  # SD 1 pads with the end token, SD 2 with "!"
    unknown: int
    length: int = CONTEXT
    _inside: tuple[int, ...] = field(init=False, repr=False)  # byte -> id, within a word
    _last: tuple[int, ...] = field(init=False, repr=False)  # byte -> id, at the end of a word

    def __post_init__(self) -> None:
        if not 2 < self.length <= CONTEXT:
            raise ValueError(f"length {self.length}: 3 to {CONTEXT} belongs here")
        symbols = [_SYMBOLS[byte] for byte in range(256)]
        object.__setattr__(self, "_inside", tuple(self.vocab.get(symbol, self.unknown) for symbol in symbols))
        object.__setattr__(self, "_last", tuple(self.vocab.get(symbol + _END_OF_WORD, self.unknown) for symbol in symbols))

    @classmethod
    def open(cls, folder: Path | str) -> Tokenizer:
        """From vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json (which may be absent).

        Raises BundleError with every fault.
        """
        files, faults = {}, []
        try:
            opened = Folder(folder)
        except FileFault as error:
            raise BundleError(folder, [str(error)]) from error
        for name in FILES:
            try:
                files[name] = opened.read(name, most=LARGEST)
            except FileMissing:
                continue
            except FileFault as error:
                faults.append(f"{name}: not readable: {error}")
        if faults:
            raise BundleError(folder, faults)
        return cls.from_files(files, where=Path(folder))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes | memoryview], *, where: PurePath) -> Tokenizer:
        """As `open`, from what is in the files, by name. Raises BundleError with every fault; `where` is named in it."""
        return _tokenizer_from_files(files, where)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without start and end. Raises SettingError for more than 64 KiB of UTF-8, or a lone surrogate."""
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise SettingError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None
        if size > LONGEST:
            raise SettingError(f"a text of {size:,} bytes: at most {LONGEST:,} (64 KiB of UTF-8) are taken; shorten it")
        ids: list[int] = []
        for part in _parts(text, [token for token in self.specials if not token.normalized]):
            if isinstance(part, SpecialToken):
                ids.append(part.id)
                continue
            for piece in _parts(_normal(part), [token for token in self.specials if token.normalized]):
                if isinstance(piece, SpecialToken):
                    ids.append(piece.id)
                else:
                    for word in _words(piece):
                        ids += self._merged(word.encode())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, lower-cased and spaced as the tokenizer sees it; bytes that are no UTF-8 show as U+FFFD."""
        names = {number: token for token, number in self.vocab.items()} | {token.id: token.text + " " for token in self.specials}
        text = "".join(names[number] for number in ids).replace(_END_OF_WORD, " ")
        return bytes(_BYTES.get(symbol, 0x20) for symbol in text).decode(errors="replace").strip()

    def _merged(self, word: bytes) -> list[int]:
        """Merge the lowest rank first, the leftmost of equals: a heap of pairs over a linked list, n log n for n bytes."""
        ids = [self._inside[byte] for byte in word[:-1]] + [self._last[word[-1]]]
        merge = self.merges.get
        heap = [(*found, i) for i, pair in enumerate(pairwise(ids)) if (found := merge(pair))]
        if not heap:
            return ids
        heapify(heap)
        gone, after = -1, len(ids)
        left, right = list(range(-1, after - 1)), list(range(1, after + 1))
        while heap:
            rank, whole, i = heappop(heap)
            j = right[i]
            # either side may have become part of another token since this pair was seen
            if ids[i] == gone or j == after or merge((ids[i], ids[j])) != (rank, whole):
                continue
            ids[i], ids[j] = whole, gone
            right[i] = k = right[j]
            if k != after:
                left[k] = i
                if found := merge((whole, ids[k])):
                    heappush(heap, (*found, i))
            if (h := left[i]) >= 0 and (found := merge((ids[h], whole))):
                heappush(heap, (*found, h))
        return [number for number in ids if number != gone]


def _normal(text: str) -> str:
    # each character on its own, as the reference does: Python would make the Σ that ends a word a ς
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text)).replace("Σ", "σ").lower()


def _parts(text: str, tokens: list[SpecialToken]) -> Iterator[str | SpecialToken]:
    """`text` cut at its special tokens, the leftmost and of these the longest first."""
    if not tokens:
        yield text
        return
    by_text = {_normal(token.text) if token.normalized else token.text: token for token in tokens}
    pattern = "|".join(re.escape(found) for found in sorted(by_text, key=len, reverse=True))
    for part in re.split(f"({pattern})", text):
        yield by_text.get(part, part)


def _words(text: str) -> Iterator[str]:
    for match in _WORDS.finditer(text if text.isascii() else text.translate(_SHADOW)):
        word = text[match.start() : match.end()]
        # a special token's name that came out of lower-casing is found whole, then cut by the second, byte-level pattern
        yield from ("<|", word[2:-2], "|>") if word in (_START, _END) else (word,)


class _Shadow(dict[int, str]):
    """Code point -> itself in ASCII, else a stand-in for its class; filled as it is asked."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.category(chr(code))[0]
        self[code] = chr(code) if code < 128 else {"L": "é", "N": "²"}.get(kind, "§")
        return self[code]


_SHADOW = _Shadow()


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it is visible Latin-1, else the next code point from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_SYMBOLS = _byte_symbols()
_BYTES = {symbol: byte for byte, symbol in _SYMBOLS.items()}


def _tokenizer_from_files(files: Mapping[str, bytes | memoryview], where: PurePath) -> Tokenizer:
    faults: list[str] = []
    vocab = _vocab(_document(files, "vocab.json", faults), faults)
    merges = _merges(_text(files, "merges.txt", faults), vocab, faults)
    config = _document(files, "tokenizer_config.json", faults)
    named = _document(files, "special_tokens_map.json", faults) if "special_tokens_map.json" in files else {}
    specials, tasks = _specials(config, named, vocab, faults)
    length = config.get("model_max_length", CONTEXT)
    if not isinstance(length, int) or length < 3:
        faults.append(f"tokenizer_config.json: model_max_length {length!r} is not a whole number above 2")
    if faults:
        raise BundleError(where, faults)
    return Tokenizer(vocab=vocab, merges=merges, specials=specials, length=min(length, CONTEXT), **tasks)


def _text(files: Mapping[str, bytes | memoryview], name: str, faults: list[str]) -> str | None:
    if name not in files:
        faults.append(f"{name}: missing")
        return None
    try:
        return str(files[name], "utf-8")
    except UnicodeDecodeError as error:
        faults.append(f"{name}: not readable: {error}")
        return None


def _document(files: Mapping[str, bytes | memoryview], name: str, faults: list[str]) -> dict[str, Any]:
    text = _text(files, name, faults)
    if text is None:
        return {}
    try:
        document = json_from_text(text)
    except ValueError as error:
        faults.append(f"{name}: not readable: {error}")
        return {}
    if not isinstance(document, dict):
        faults.append(f"{name}: an object belongs here")
        return {}
    return document


def _vocab(document: dict[str, Any], faults: list[str]) -> dict[str, int]:
    by_id: dict[int, str] = {}
    wrong = []
    for token, number in document.items():
        if type(number) is not int or number < 0:
            wrong.append(f"vocab.json: {token!r}: its id {number!r} is not a whole number from 0 on")
        elif by_id.setdefault(number, token) != token:
            wrong.append(f"vocab.json: {token!r} has the id of {by_id[number]!r}")
    faults += _few(wrong)
    return document


def _merges(text: str | None, vocab: dict[str, int], faults: list[str]) -> dict[tuple[int, int], tuple[int, int]]:
    merges, wrong = {}, []
    lines = (text or "").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        try:
            merges[vocab[left], vocab[right]] = (number, vocab[left + right])  # the line is the rank
        except KeyError:
            missing = [name for name in (left, right, left + right) if name not in vocab]
            if not left or not right or " " in right:
                wrong.append(f"merges.txt: line {number}: two symbols belong here, not {line[:40]!r}")
            elif vocab:
                wrong.append(f"merges.txt: line {number}: not in vocab.json: {', '.join(map(repr, missing))}")
    faults += _few(wrong)
    return merges


def _specials(
    config: dict[str, Any], named: dict[str, Any], vocab: dict[str, int], faults: list[str]
) -> tuple[tuple[SpecialToken, ...], dict[str, int]]:
    """The special tokens, and the id of each task. `named` goes over the config, unless that has an added_tokens_decoder."""
    decoder = config.get("added_tokens_decoder")
    found: dict[str, SpecialToken] = {}
    for key, value in decoder.items() if isinstance(decoder, dict) else ():
        text, normalized = _special_text(value, f"added_tokens_decoder.{key}", faults)
        number = vocab.get(text, int(key) if key.isdecimal() else -1)
        found[text] = SpecialToken(text=text, id=number, normalized=normalized)
    settled, tasks = set(found), {}
    tokens = config if decoder is not None else config | named
    for task, (name, default) in _TASKS.items():
        text, normalized = _special_text(tokens.get(name) or default, name, faults)
        if text not in settled:  # of several tasks of one token the last says how it is looked for, as in the reference
            if vocab and text not in vocab:
                faults.append(f"vocab.json: no {text!r}, which is the {name}")
            found[text] = SpecialToken(text=text, id=vocab.get(text, -1), normalized=normalized)
        tasks[task] = found[text].id
    return tuple(found.values()), tasks


def _special_text(value: Any, where: str, faults: list[str]) -> tuple[str, bool]:
    """Text of a special token, and whether it is looked for in the normalised text: a string, or the fields of an AddedToken."""
    fields = {"content": value} if isinstance(value, str) else value
    text = fields.get("content") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text:
        faults.append(f"{where}: a token belongs here, not {value!r:.60}")
        return _END, False
    wrong = [name for name in ("lstrip", "rstrip", "single_word") if fields.get(name)]
    if wrong:
        faults.append(f"{where}: {', '.join(wrong)} true is not supported")
    return text, bool(fields.get("normalized", False))


def _few(faults: list[str]) -> list[str]:
    """The first ten: a damaged file has one fault, not fifty thousand."""
    return faults if len(faults) <= 10 else [*faults[:10], f"... and {len(faults) - 10:,} more like these"]
