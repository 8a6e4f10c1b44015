"""CLIP's byte-pair tokenizer (Radford et al. 2021; Sennrich et al. 2016) in pure Python, from the files of a checkpoint.

The ids equal those of transformers' CLIPTokenizer: split off added tokens; normalize the rest to NFC, single spaces and lower
case; split it into words by CLIP's pattern; merge the UTF-8 bytes of each word pair by pair, best rank first. Only the Unicode
version may differ, which is that of Python's tables. Like CLIPTokenizer, it does not repair text (no ftfy).
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
from sdruntime.pipeline.text.added_tokens import MOST, SPACES, AddedToken, Finder, Match, expanded, vectors_of
from sdruntime.system.document import LARGEST
from sdruntime.system.files import FileFault, FileMissing, Folder

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
LONGEST = 64 * 1024  # bytes of UTF-8 in a text
CONTEXT = 77  # positions of CLIP's own text encoder
_LARGEST_ID = 1 << 30
_END_OF_WORD = "</w>"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# field of Tokenizer -> name in the files, and the default of CLIPTokenizer
_SPECIAL = {
    "start": ("bos_token", _START),
    "end": ("eos_token", _END),
    "unknown": ("unk_token", _END),
    "pad": ("pad_token", _END),
}

# CLIP's word pattern, for a text in which é, ² and § stand for all non-ASCII letters, numbers and other characters, as `re`
# does not support \p{L}
_WORDS = re.compile(r"<\|(?:start|end)oftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[A-Za-zé]+|[0-9²]|[^ A-Za-zé0-9²]+")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """CLIP's tokenizer.

    `vocab`: token -> id. `merges`: ids of a pair -> (rank, id of the merged token). `start`, `end`, `pad`, `unknown`: ids of the
    special tokens. `length`: tokens of the encoder's input, including start and end. `vectors`: id of the first token of an
    embedding of several -> how many, as `expand` writes them out.
    """

    vocab: Mapping[str, int] = field(repr=False)
    merges: Mapping[tuple[int, int], tuple[int, int]] = field(repr=False)
    added: tuple[AddedToken, ...]
    start: int
    end: int
    pad: int  # SD 1 pads with the end token, SD 2 with "!"
    unknown: int
    length: int = CONTEXT
    vectors: Mapping[int, int] = field(init=False, repr=False)
    _names: Mapping[int, str] = field(init=False, repr=False)
    _finders: tuple[Finder, Finder] = field(init=False, repr=False)  # for the original text, for the normalized text
    _inside: tuple[int, ...] = field(init=False, repr=False)  # byte -> id, within a word
    _last: tuple[int, ...] = field(init=False, repr=False)  # byte -> id, at the end of a word

    def __post_init__(self) -> None:
        if not 2 < self.length <= LONGEST_TEXT:
            raise ValueError(f"length {self.length}: expected 3 to {LONGEST_TEXT:,}")
        names = {number: token for token, number in self.vocab.items()} | {token.id: token.text for token in self.added}
        normalized, plain = ([token for token in self.added if token.normalized is kind] for kind in (True, False))
        object.__setattr__(self, "vectors", vectors_of(self.added))
        object.__setattr__(self, "_names", names)
        object.__setattr__(self, "_finders", (Finder(plain, str), Finder(normalized, normal)))
        symbols = [_SYMBOLS[byte] for byte in range(256)]
        object.__setattr__(self, "_inside", tuple(self.vocab.get(symbol, self.unknown) for symbol in symbols))
        object.__setattr__(self, "_last", tuple(self.vocab.get(symbol + _END_OF_WORD, self.unknown) for symbol in symbols))

    @classmethod
    def open(cls, folder: Path | str, *, length: int | None = None) -> Tokenizer:
        """Read vocab.json, merges.txt, tokenizer_config.json and, if present, special_tokens_map.json.

        `length`: tokens of the encoder's input; None for the config's model_max_length. Raises BundleError with every fault.
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
        """Do what `open` does, from the contents of the files by name. Raises BundleError for `where` with every fault."""
        return _tokenizer_from_files(files, where, length)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without start and end. Raises SettingError for over 64 KiB of UTF-8, or a lone surrogate."""
        return [number for number, _ in self._tokens(text)]

    def expand(self, text: str) -> str:
        """Return `text` with multi-vector tokens written out ("<cat>" -> "<cat> <cat>_1"), as in diffusers.

        Raises as `encode` does.
        """
        return expanded(text, self.added, lambda text: (name for _, name in self._tokens(text)), most=LONGEST)

    def _tokens(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield each token's id and name; for an added token, the characters that it matched."""
        check_text(text)
        plain, normalized = self._finders
        for part in plain.split(text):
            for piece in normalized.split(normal(part)) if isinstance(part, str) else (part,):
                if isinstance(piece, Match):
                    yield from ((piece.token.id + k, piece.text if k == 0 else "") for k in range(piece.token.vectors))
                else:
                    for word in _words(piece):
                        yield from ((number, self._names[number]) for number in self._merge(word.encode()))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the normalized text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        added = {token.id + k: b"" if k else token.text.encode() + b" " for token in self.added for k in range(token.vectors)}
        parts = (added[number] if number in added else self._bytes(number) for number in ids)
        return b"".join(parts).decode(errors="replace").strip()

    def _bytes(self, number: int) -> bytes:
        return bytes(_BYTES.get(symbol, 0x20) for symbol in self._names[number].replace(_END_OF_WORD, " "))

    def _merge(self, word: bytes) -> list[int]:
        """Merge the pair of lowest rank first, the leftmost of equals. A heap over a linked list: O(n log n) for n bytes."""
        ids = [self._inside[byte] for byte in word[:-1]] + [self._last[word[-1]]]
        merge = self.merges.get
        heap = [(*merged, i) for i, pair in enumerate(pairwise(ids)) if (merged := merge(pair))]
        if not heap:
            return ids
        heapify(heap)
        gone, after = -1, len(ids)
        left, right = list(range(-1, after - 1)), list(range(1, after + 1))
        while heap:
            rank, whole, i = heappop(heap)
            j = right[i]
            # out of date: either side has become part of another token since this pair was pushed
            if ids[i] == gone or j == after or merge((ids[i], ids[j])) != (rank, whole):
                continue
            ids[i], ids[j] = whole, gone
            right[i] = k = right[j]
            if k != after:
                left[k] = i
                if merged := merge((whole, ids[k])):
                    heappush(heap, (*merged, i))
            if (h := left[i]) >= 0 and (merged := merge((ids[h], whole))):
                heappush(heap, (*merged, h))
        return [number for number in ids if number != gone]


def check_text(text: str) -> None:
    """Raises SettingError for over 64 KiB of UTF-8, or a lone surrogate."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise SettingError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None
    if size > LONGEST:
        raise SettingError(f"a text of {size:,} bytes; the maximum is {LONGEST:,} (64 KiB of UTF-8): shorten it")


def normal(text: str) -> str:
    """Return a text normalized for splitting: NFC, single spaces, lower case."""
    # transformers lower-cases each character by itself; Python would make a Σ at the end of a word a ς
    return SPACES.sub(" ", unicodedata.normalize("NFC", text)).replace("Σ", "σ").lower()


def _words(text: str) -> Iterator[str]:
    for match in _WORDS.finditer(text if text.isascii() else text.translate(_SHADOW)):
        word = text[match.start() : match.end()]
        # as in transformers: a special token's name in the lower-cased text is one match, then split by the byte-level pattern
        yield from ("<|", word[2:-2], "|>") if word in (_START, _END) else (word,)


class _Shadow(dict[int, str]):
    """Translation table: an ASCII code point -> itself, any other -> a stand-in for its class. Filled on demand."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.category(chr(code))[0]
        self[code] = chr(code) if code < 128 else {"L": "é", "N": "²"}.get(kind, "§")
        return self[code]


_SHADOW = _Shadow()


def byte_symbols() -> dict[int, str]:
    """Return GPT-2's printable symbol of each byte: itself if it is visible Latin-1, else the next code point from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_SYMBOLS = byte_symbols()
_BYTES = {symbol: byte for byte, symbol in _SYMBOLS.items()}


def _tokenizer_from_files(files: Mapping[str, bytes | memoryview], where: PurePath, length: int | None) -> Tokenizer:
    faults: list[str] = []
    vocab = _vocab(_document(files, "vocab.json", faults), faults)
    merges = _merges(_text(files, "merges.txt", faults), vocab, faults)
    config = _document(files, "tokenizer_config.json", faults)
    named = _document(files, "special_tokens_map.json", faults) if "special_tokens_map.json" in files else {}
    added, special = _added(config, named, vocab, faults)
    if length is None:
        length = config.get("model_max_length", CONTEXT)
        if type(length) is not int or length < 3:
            faults.append(f"tokenizer_config.json: model_max_length {length!r:.40} is not a whole number above 2")
        elif length > LONGEST_TEXT:  # transformers' placeholder for "no limit"
            length = CONTEXT
    if faults:
        raise BundleError(where, faults)
    return Tokenizer(vocab=vocab, merges=merges, added=added, length=length, **special)


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
    faults += _first_of(wrong)
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
    faults += _first_of(wrong)
    return merges


def _added(
    config: dict[str, Any], named: dict[str, Any], vocab: dict[str, int], faults: list[str]
) -> tuple[tuple[AddedToken, ...], dict[str, int]]:
    """Return the added tokens and the ids of the special tokens. `named` overrides the config unless that has an
    added_tokens_decoder."""
    decoder = config.get("added_tokens_decoder")
    added: dict[str, AddedToken] = {}
    for key, value in decoder.items() if isinstance(decoder, dict) else ():
        where = f"added_tokens_decoder.{key}"
        token = _token(value, where, faults)
        number = vocab.get(token.text, int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1)
        if number < 0:
            faults.append(f"{where:.60}: expected an id")
        added[token.text] = dataclasses.replace(token, id=number)
    decoded, special = set(added), {}
    tokens = config if decoder is not None else config | named
    for role, (name, default) in _SPECIAL.items():
        token = _token(tokens.get(name) or default, name, faults)
        if token.text not in decoded:  # the last role of a token decides how it is matched, as in transformers
            if vocab and token.text not in vocab:
                faults.append(f"vocab.json: no {token.text!r}, which is the {name}")
            added[token.text] = dataclasses.replace(token, id=vocab.get(token.text, -1))
        special[role] = added[token.text].id
    if len(added) > MOST:
        faults.append(f"{len(added):,} added tokens, more than the supported {MOST:,}")
    return tuple(added.values()), special


def _token(value: Any, where: str, faults: list[str]) -> AddedToken:
    """Return a token without its id, from a string or the fields of an AddedToken."""
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


def _first_of(faults: list[str]) -> list[str]:
    """Return the first ten faults and a count of the rest: a damaged file can have fifty thousand."""
    return faults if len(faults) <= 10 else [*faults[:10], f"... and {len(faults) - 10:,} more like these"]
