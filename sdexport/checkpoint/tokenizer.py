"""Read a checkpoint's CLIP tokenizer as transformers' CLIPTokenizer does, and write it as the four files of a bundle.

tokenizer.json takes precedence over vocab.json and merges.txt. Tokens are added from tokenizer_config.json
(`added_tokens_decoder`), or else from added_tokens.json and tokenizer.json; then the special tokens with a role (bos, eos, …). A
token that the vocabulary lacks gets the next free id, in the order of the ids in the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdruntime.bundle.manifest import LONGEST_TEXT
from sdruntime.bundle.records import json_from_text
from sdruntime.errors import BundleError
from sdruntime.pipeline.text.added_tokens import SPACES
from sdruntime.pipeline.text.tokenizer import FILES, Tokenizer, normal

NAMES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_START, _END = "<|startoftext|>", "<|endoftext|>"
# the roles of special tokens in transformers, in its order, with CLIPTokenizer's defaults
_TASKS = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "sep_token": "", "pad_token": _END}
_TASKS |= {"cls_token": "", "mask_token": ""}
_KEPT = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_UNLIMITED = 10**20  # transformers' model_max_length for "no limit" is larger
# settings of tokenizer_config.json that change the ids of a text, with the only supported value of each
_SETTINGS = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
_SETTINGS |= dict.fromkeys(("vocab", "merges", "fast_tokenizer_files", "gguf_file", "tokenizer_object"))

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTokenizer:
    """The four `files` of a bundle by name, the `tokenizer` read from them, and the checkpoint's `limit` in tokens, if any."""

    files: Mapping[str, str]
    tokenizer: Tokenizer
    pad_token: str
    limit: int | None

    @property
    def largest(self) -> tuple[int, str]:
        """Return the largest id and its token; the text encoder's embedding table must contain it."""
        ids = {number: token for token, number in self.tokenizer.vocab.items()}
        ids |= {token.id: token.text for token in self.tokenizer.added}
        return max(ids.items())

    def write(self, folder: Path, *, length: int) -> None:
        """Write the files into a new folder, for a text encoder of `length` tokens."""
        folder.mkdir()
        config = json.loads(self.files["tokenizer_config.json"]) | {"model_max_length": length}
        for name, text in (dict(self.files) | {"tokenizer_config.json": _json(config)}).items():
            (folder / name).write_text(text, encoding="utf-8")


def read_tokenizer(files: Mapping[str, bytes]) -> StoredTokenizer:
    """Return the tokenizer of a checkpoint. `files` are those of NAMES that exist. Raises ValueError if they are not valid."""
    texts = {name: _text(name, data) for name, data in files.items()}
    config, whole = _object(texts, "tokenizer_config.json"), _object(texts, "tokenizer.json")
    decoded = "added_tokens_decoder" in config
    mapped = {} if decoded else _object(texts, "special_tokens_map.json")
    extras = _Extras.of(config, mapped)
    config |= {key: value | {"special": True} if isinstance(value, dict) else value for key, value in mapped.items()}
    for key, value in _SETTINGS.items():
        if config.get(key, value) != value:
            raise ValueError(f"tokenizer_config.json: {key} {config[key]!r:.40} is not supported")
    if whole:
        vocab, merges = _model(whole)
    elif "vocab.json" in texts and "merges.txt" in texts:
        vocab = _object(texts, "vocab.json")
        merges = [line.removesuffix("\r") for line in texts["merges.txt"].split("\n") if line.strip("\r")]
    else:
        raise ValueError("has neither vocab.json and merges.txt nor tokenizer.json")
    tasks = _tasks(config, extras)
    added = _added(extras, tasks, _numbered(config["added_tokens_decoder"]) if decoded else _loose(texts, whole, tasks, extras))
    numbered, complete = {}, dict(vocab)
    for content, fields in added.items():
        # as in transformers, the ids in the files only determine the order
        number = complete.setdefault(content, len(complete))
        numbered[str(number)] = fields
    names = {name: tasks[name]["content"] for name in _KEPT}
    settings = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "add_prefix_space": False} | names
    settings["added_tokens_decoder"] = numbered
    if len(numbered) != len(added):
        raise ValueError("two added tokens have the same id: the vocabulary has gaps or duplicates")
    limit = _limit(config)
    documents = {
        "vocab.json": _json(complete),
        "merges.txt": "\n".join(["#version: 0.2", *(merge for merge in merges if not merge.startswith("#version"))]) + "\n",
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(names),
    }
    assert documents.keys() == set(FILES)
    try:
        encoded = {name: text.encode() for name, text in documents.items()}
        tokenizer = Tokenizer.from_files(encoded, where=Path(), length=limit or 77)
    except BundleError as error:
        raise ValueError("; ".join(error.faults)) from None
    except UnicodeEncodeError:
        raise ValueError("a token is not valid Unicode") from None
    _check_texts(tokenizer)
    return StoredTokenizer(files=documents, tokenizer=tokenizer, pad_token=names["pad_token"], limit=limit)


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not readable: {error}") from None


def _object(texts: Mapping[str, str], name: str) -> Fields:
    """Return the JSON object of a file; empty if there is no such file."""
    if name not in texts:
        return {}
    try:
        document = json_from_text(texts[name])
    except ValueError as error:
        raise ValueError(f"{name} is not readable: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{name} is not a JSON object")
    return document


def _model(whole: Fields) -> tuple[Fields, list[str]]:
    """Return the vocabulary and the merges of tokenizer.json. Older files write a merge as "a b", newer ones as ["a", "b"]."""
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(f"tokenizer.json is of the type {kind!r:.40}, not BPE")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("tokenizer.json: expected a model with vocab and merges")
    lines = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not all(isinstance(part, str) and _is_symbol(part) for part in parts)
        ):
            raise ValueError(f"tokenizer.json: merges: expected two symbols, got {merge!r:.60}")
        lines.append(" ".join(parts))
    return vocab, lines


def _is_symbol(text: str) -> bool:
    return bool(text) and " " not in text and "\n" not in text


def _token(value: Any, where: str) -> Fields:
    """Return the fields of an AddedToken, as transformers creates it from a string or an object."""
    if isinstance(value, str):
        value = {"content": value, "special": True}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise ValueError(f"{where:.60}: expected a token, got {value!r:.60}")
    # by default special tokens are not normalized; `_added` decides, as only it knows which tokens are special
    fields = {flag: value.get(flag, None if flag == "normalized" else False) for flag in _FLAGS}
    invalid = [flag for flag in fields if flag in value and not isinstance(fields[flag], bool)]
    invalid += [key for key in value if key not in (*_FLAGS, "content", "__type", "id")]
    if invalid:
        raise ValueError(f"{where:.60}: {invalid[0]:.40} is not a valid field of a token")
    return {"content": value["content"]} | fields


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extras:
    """Special tokens without a role: `named` and `listed` ones; `known` are those special for tokens of added_tokens.json."""

    named: Fields
    listed: list[Fields]
    known: list[Fields]

    @classmethod
    def of(cls, config: Fields, mapped: Fields) -> _Extras:
        """Merge the special tokens of tokenizer_config.json (`config`) and special_tokens_map.json (`mapped`).

        Each file may have them under two keys, which are merged in the order of transformers; a list that comes later is ignored.
        """
        new, old, named = "extra_special_tokens", "additional_special_tokens", dict[str, Any]()
        kept = {key: config[key] for key in (new, old) if key in config}

        def settle(*, moved: bool) -> None:
            if moved and old in kept:
                kept[new] = kept.pop(old)
            if isinstance(kept.get(new), dict):
                named.update(kept.pop(new))

        settle(moved=not kept.get(new))
        if isinstance(mapped.get(old), dict):
            raise ValueError(f"special_tokens_map.json: {old}: expected a list of tokens, got {mapped[old]!r:.60}")
        more = mapped.get(new)
        if isinstance(more, list):
            marked = ({**token, "__type": "", "special": True} if isinstance(token, dict) else token for token in more)
            more = [*(kept.get(new) or []), *marked]
        kept |= ({new: more} if new in mapped else {}) | ({old: mapped[old]} if old in mapped else {})
        settle(moved=False)
        known = _listed(kept.get(new), new)
        settle(moved=new not in kept)
        return cls(named=named, listed=_listed(kept.get(new), new), known=known)


def _listed(tokens: Any, where: str) -> list[Fields]:
    if not isinstance(tokens or [], list):
        raise ValueError(f"{where}: expected a list of tokens, got {tokens!r:.60}")
    plain = [token for token in tokens or [] if isinstance(token, dict) and "__type" not in token]
    if plain:
        raise ValueError(f"{where}: transformers reads no token from {plain[0]!r:.60}: write its text alone")
    return [_token(token, where) for token in tokens or []]


def _tasks(config: Fields, extras: _Extras) -> dict[str, Fields]:
    """Return the token of each role: transformers' roles first, then the model's own (`*_token`)."""
    values = {task: config.get(task) or default for task, default in _TASKS.items()}
    flags = ("add_bos_token", "add_eos_token")
    own = (key for key in config if key.endswith("_token") and key not in flags)
    values |= {key: config[key] for key in own if isinstance(config[key], (str, dict))} | extras.named
    return {task: _token(value, task) for task, value in values.items() if value or task in _KEPT}


def _numbered(decoder: Any) -> dict[int, Fields]:
    """Return {id: token} of added_tokens_decoder."""
    if not isinstance(decoder, dict) or not all(_is_number(key) for key in decoder):
        raise ValueError("tokenizer_config.json: added_tokens_decoder: expected tokens by id")
    return {int(key): _token(value, f"added_tokens_decoder.{key}") for key, value in decoder.items()}


def _loose(texts: Mapping[str, str], whole: Fields, tasks: Mapping[str, Fields], extras: _Extras) -> dict[int, Fields]:
    """Return {id: token} of added_tokens.json and tokenizer.json."""
    special = {token["content"] for token in (*tasks.values(), *extras.known)}
    loose: dict[int, Fields] = {}
    for content, index in _object(texts, "added_tokens.json").items():
        if type(index) is not int:
            raise ValueError(f"added_tokens.json: {content!r:.60}: expected a number, got {index!r:.40}")
        flags = {"special": content in special, "normalized": content not in special}
        loose[index] = _token({"content": content} | flags, "added_tokens.json")
    tokens = whole.get("added_tokens", [])
    for token in tokens if isinstance(tokens, list) else [None]:
        if not isinstance(token, dict) or type(token.get("id")) is not int:
            raise ValueError(f"tokenizer.json: added_tokens: expected a token with an id, got {token!r:.60}")
        loose[token["id"]] = _token(token, "tokenizer.json: added_tokens")
    return loose


def _added(extras: _Extras, tasks: Mapping[str, Fields], numbered: Mapping[int, Fields]) -> dict[str, Fields]:
    """Return the tokens by text, in the order in which they get ids. Among equal texts the last one's flags apply."""
    listed = [token for _, token in sorted(numbered.items())]
    known = {token["content"] for token in listed}
    named = {token["content"] for token in tasks.values()}
    more = [token for token in (*tasks.values(), *extras.listed) if token["content"] not in known]
    added: dict[str, Fields] = {}
    for token in (*listed, *more):
        special = token["special"] or token["content"] in named
        normalized = not special if token["normalized"] is None else token["normalized"]
        added[token["content"]] = token | {"special": special, "normalized": normalized}
    return added


def _limit(config: Fields) -> int | None:
    limit = config.get("model_max_length", config.get("max_len"))
    if limit is None or (type(limit) in (int, float) and limit > _UNLIMITED):
        return None
    if type(limit) is not int or not 2 < limit <= LONGEST_TEXT:
        raise ValueError(
            f"tokenizer_config.json: model_max_length {limit!r:.40} is not a whole number from 3 to {LONGEST_TEXT:,}"
        )
    return limit


def _check_texts(tokenizer: Tokenizer) -> None:
    """Refuse tokens that crash the reference (only white space) or have undefined order in it (two that differ only in case)."""
    texts: dict[str, str] = {}
    for token in tokenizer.added:
        if SPACES.fullmatch(token.text):
            raise ValueError(f"the added token {token.text!r} is only white space")
        if token.normalized and texts.setdefault(normal(token.text), token.text) != token.text:
            raise ValueError(f"the added tokens {texts[normal(token.text)]!r} and {token.text!r} differ only in case")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"
