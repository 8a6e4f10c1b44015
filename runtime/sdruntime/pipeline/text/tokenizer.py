"""CLIP's byte-pair tokenizer (Radford et al. 2021; Sennrich et al. 2016) in pure Python, from the files of a checkpoint.

Text goes the way of transformers' CLIPTokenizer, id for id: added tokens are taken out; the rest is put into NFC, white space
made single spaces, lower-cased, cut into words by CLIP's pattern; the UTF-8 bytes of each word are merged pair by pair, best rank
first. What differs is the Unicode version alone: this uses Python's tables. As there, a text is never "fixed" (no ftfy).
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from sdruntime.bundle.manifest import LONGEST_TEXT
from sdruntime.bundle.records import json_from_text
from sdruntime.errors import BundleError, SettingError, plain
from sdruntime.pipeline.text.added_tokens import LONGEST as LONGEST_TOKEN
from sdruntime.pipeline.text.added_tokens import MOST, SPACES, AddedToken, Finder, Found, expanded
from sdruntime.system.document import LARGEST
from sdruntime.system.files import FileFault, FileMissing, Folder

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
LONGEST = 64 * 1024  # bytes of UTF-8 in a text
CONTEXT = 77  # positions of CLIP's own text encoder
_LARGEST_ID = 1 << 30
_END_OF_WORD = "</w>"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# field of Tokenizer -> name in the files, and what CLIPTokenizer takes without it
_TASKS = {
    "start": ("bos_token", _START),
    "end": ("eos_token", _END),
    "unknown": ("unk_token", _END),
    "pad": ("pad_token", _END),
}

# CLIP's word pattern, over a shadow of the text: `re` knows no \p{L}, so é, ² and § stand there for all letters, numbers and
# the rest beyond ASCII
_WORDS = re.compile(r"<\|(?:start|end)oftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[A-Za-zé]+|[0-9²]|[^ A-Za-zé0-9²]+")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """`vocab`: token -> id; `merges`: ids of a pair -> (rank, id of the two as one); ids of the tokens with a task of their own.

    `length`: tokens of an encoder's input, start and end among them.
    """

    vocab: Mapping[str, int] = field(repr=False)
    merges: Mapping[tuple[int, int], tuple[int, int]] = field(repr=False)
    added: tuple[AddedToken, ...]
    start: int
    end: int
    pad: int  # SD 1 pads with the end token, SD 2 with "!"
    unknown: int
    length: int = CONTEXT
    _names: Mapping[int, str] = field(init=False, repr=False)
    _finders: tuple[Finder, Finder] = field(init=False, repr=False)  # in a text as it is, in a normal one
    _inside: tuple[int, ...] = field(init=False, repr=False)  # byte -> id, within a word
    _last: tuple[int, ...] = field(init=False, repr=False)  # byte -> id, at the end of a word

    def __post_init__(self) -> None:
        if not 2 < self.length <= LONGEST_TEXT:
            raise ValueError(f"length {self.length}: expected 3 to {LONGEST_TEXT:,}")
        names = {number: token for token, number in self.vocab.items()} | {token.id: token.text for token in self.added}
        normalized, plain = ([token for token in self.added if token.normalized is kind] for kind in (True, False))
        object.__setattr__(self, "_names", names)
        object.__setattr__(self, "_finders", (Finder(plain, str), Finder(normalized, normal)))
        symbols = [_SYMBOLS[byte] for byte in range(256)]
        object.__setattr__(self, "_inside", tuple(self.vocab.get(symbol, self.unknown) for symbol in symbols))
        object.__setattr__(self, "_last", tuple(self.vocab.get(symbol + _END_OF_WORD, self.unknown) for symbol in symbols))

    @classmethod
    def open(cls, folder: Path | str, *, length: int | None = None) -> Tokenizer:
        """From vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json (which may be absent).

        `length`: tokens that the encoder takes; where None, the config's model_max_length. Raises BundleError with every fault.
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
                faults.append(f"{name}: not readable: {plain(error)}")
        if faults:
            raise BundleError(folder, faults)
        return cls.from_files(files, where=Path(folder), length=length)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes | memoryview], *, where: PurePath, length: int | None = None) -> Tokenizer:
        """As `open`, from what is in the files, by name. Raises BundleError with every fault; `where` is named in it."""
        return _tokenizer_from_files(files, where, length)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without start and end. Raises SettingError for more than 64 KiB of UTF-8, or a lone surrogate."""
        return [number for number, _ in self._tokens(text)]

    def expand(self, text: str) -> str:
        """`text` with the further vectors of its added tokens written out ("<cat>" -> "<cat> <cat>_1"), as diffusers does.

        Raises as `encode` does.
        """
        return expanded(text, self.added, lambda text: (name for _, name in self._tokens(text)), most=LONGEST)

    def _tokens(self, text: str) -> Iterator[tuple[int, str]]:
        """The id of each token and its name: of an added one the characters that it stood for."""
        _check_text(text)
        plain, normalized = self._finders
        for part in plain.split(text):
            for piece in normalized.split(normal(part)) if isinstance(part, str) else (part,):
                if isinstance(piece, Found):
                    yield piece.token.id, piece.text
                else:
                    for word in _words(piece):
                        yield from ((number, self._names[number]) for number in self._merged(word.encode()))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, lower-cased and spaced as the tokenizer sees it; bytes that are no UTF-8 show as U+FFFD."""
        added = {token.id: token.text.encode() + b" " for token in self.added}
        parts = (added[number] if number in added else self._bytes(number) for number in ids)
        return b"".join(parts).decode(errors="replace").strip()

    def _bytes(self, number: int) -> bytes:
        return bytes(_BYTES.get(symbol, 0x20) for symbol in self._names[number].replace(_END_OF_WORD, " "))

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


def _check_text(text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise SettingError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None
    if size > LONGEST:
        raise SettingError(f"a text of {size:,} bytes: at most {LONGEST:,} (64 KiB of UTF-8) are taken; shorten it")


def normal(text: str) -> str:
    """A text as it is cut into words: NFC, single spaces, lower case."""
    # each character on its own, as the reference does: Python would make the Σ that ends a word a ς
    return SPACES.sub(" ", unicodedata.normalize("NFC", text)).replace("Σ", "σ").lower()


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


def _tokenizer_from_files(files: Mapping[str, bytes | memoryview], where: PurePath, length: int | None) -> Tokenizer:
    faults: list[str] = []
    vocab = _vocab(_document(files, "vocab.json", faults), faults)
    merges = _merges(_text(files, "merges.txt", faults), vocab, faults)
    config = _document(files, "tokenizer_config.json", faults)
    named = _document(files, "special_tokens_map.json", faults) if "special_tokens_map.json" in files else {}
    added, tasks = _added(config, named, vocab, faults)
    if length is None:
        length = config.get("model_max_length", CONTEXT)
        if type(length) is not int or length < 3:
            faults.append(f"tokenizer_config.json: model_max_length {length!r:.40} is not a whole number above 2")
        elif length > LONGEST_TEXT:  # as a tokenizer says that knows of no encoder
            length = CONTEXT
    if faults:
        raise BundleError(where, faults)
    return Tokenizer(vocab=vocab, merges=merges, added=added, length=length, **tasks)


def _text(files: Mapping[str, bytes | memoryview], name: str, faults: list[str]) -> str | None:
    if name not in files:
        faults.append(f"{name}: missing")
        return None
    try:
        return str(files[name], "utf-8")
    except UnicodeDecodeError as error:
        faults.append(f"{name}: not readable: {plain(error)}")
        return None


def _document(files: Mapping[str, bytes | memoryview], name: str, faults: list[str]) -> dict[str, Any]:
    text = _text(files, name, faults)
    if text is None:
        return {}
    try:
        document = json_from_text(text)
    except ValueError as error:
        faults.append(f"{name}: not readable: {plain(error)}")
        return {}
    if not isinstance(document, dict):
        faults.append(f"{name}: expected an object")
        return {}
    return document


def _vocab(document: dict[str, Any], faults: list[str]) -> dict[str, int]:
    by_id: dict[int, str] = {}
    wrong, vocab = [], dict.fromkeys(document, -1)
    for token, number in document.items():
        if type(number) is not int or not 0 <= number < _LARGEST_ID:
            wrong.append(f"vocab.json: {token!r:.60}: its id {number!r:.40} is not a whole number from 0 on")
            continue
        vocab[token] = number
        if by_id.setdefault(number, token) != token:
            wrong.append(f"vocab.json: {token!r:.60} has the id of {by_id[number]!r:.60}")
    faults += _few(wrong)
    return vocab


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
                wrong.append(f"merges.txt: line {number}: expected two symbols, got {line[:40]!r}")
            elif vocab:
                wrong.append(f"merges.txt: line {number}: not in vocab.json: {', '.join(map(repr, missing)):.200}")
    faults += _few(wrong)
    return merges


def _added(
    config: dict[str, Any], named: dict[str, Any], vocab: dict[str, int], faults: list[str]
) -> tuple[tuple[AddedToken, ...], dict[str, int]]:
    """The added tokens, and the id of each task. `named` goes over the config, unless that has an added_tokens_decoder."""
    decoder = config.get("added_tokens_decoder")
    found: dict[str, AddedToken] = {}
    for key, value in decoder.items() if isinstance(decoder, dict) else ():
        where = f"added_tokens_decoder.{key}"
        token = _token(value, where, faults)
        number = vocab.get(token.text, int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1)
        if number < 0:
            faults.append(f"{where:.60}: expected an id")
        found[token.text] = dataclasses.replace(token, id=number)
    settled, tasks = set(found), {}
    tokens = config if decoder is not None else config | named
    for task, (name, default) in _TASKS.items():
        token = _token(tokens.get(name) or default, name, faults)
        if token.text not in settled:  # of several tasks of one token the last says how it is looked for, as in the reference
            if vocab and token.text not in vocab:
                faults.append(f"vocab.json: no {token.text!r}, which is the {name}")
            found[token.text] = dataclasses.replace(token, id=vocab.get(token.text, -1))
        tasks[task] = found[token.text].id
    if len(found) > MOST:
        faults.append(f"{len(found):,} added tokens, more than the {MOST:,} that are read")
    return tuple(found.values()), tasks


def _token(value: Any, where: str, faults: list[str]) -> AddedToken:
    """A token without its id: a string, or the fields of an AddedToken."""
    fields = {"content": value} if isinstance(value, str) else value
    text = fields.get("content") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_TOKEN or not _is_unicode(text):
        faults.append(f"{where:.60}: expected a token, got {value!r:.60}")
        return AddedToken(text=_END, id=-1)
    flags = {name: fields.get(name, False) for name in ("normalized", "single_word", "lstrip", "rstrip")}
    faults += [
        f"{where:.60}: {name} {flag!r:.20} is not true or false" for name, flag in flags.items() if not isinstance(flag, bool)
    ]
    return AddedToken(text=text, id=-1, **{name: flag is True for name, flag in flags.items()})


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _few(faults: list[str]) -> list[str]:
    """The first ten: a damaged file has one fault, not fifty thousand."""
    return faults if len(faults) <= 10 else [*faults[:10], f"... and {len(faults) - 10:,} more like these"]
