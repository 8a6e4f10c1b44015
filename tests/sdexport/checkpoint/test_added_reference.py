"""Tokens added to a tokenizer: read from a checkpoint, written to a bundle and found in a text as transformers does each.

Random tokenizers in every layout that transformers reads, hostile and random texts; a text on which the two differ must hold a
code point that this Python's Unicode tables do not know yet.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clip_files import write_kind

from sdexport.checkpoint.tokenizer import NAMES, read_tokenizer
from sdruntime.pipeline.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", minversion="5", reason="the reference is transformers 5's tokenizer")

TEXTS = [
    "<cat>",
    "<cat>_1",
    "<cat>_2",
    "<CAT>-x",
    "sks",
    "SKS",
    "Ünïcode",
    "é",
    "red circle",
    " lead",
    "trail ",
    "!",
    "a",
    "!!",
    "~~",
]
TEXTS += [
    "<cat",
    "cat>",
    "l",
    "the",
    "light",
    "\u3000wide\u3000",
    "Σ",
    "<|mid|>",
    "①",
    "ﬁ",
    "a\nb",
    "<|startoftext|>",
    "_",
    "4",
]
PIECES = [
    *TEXTS,
    " ",
    "  ",
    "\t",
    "_",
    "-",
    "x",
    "\u0301",
    "\u200d",
    "Ⓐ",
    "²",
    "ⅷ",
    "\u203f",
    "4",
    "e\u0301",
    "\x1c",
    "ＣＡＴ",
    "<",
    ">",
]
RANGES = [(0x20, 0x80), (0xA0, 0x250), (0x300, 0x3000), (0x1F100, 0x1F200), (0x3000, 0xD800)]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


# marks that came with Unicode 10 to 14: the tables of tokenizers' normalisation are older, and leave them where they stand
NEW_MARKS = re.compile("[\u07fd\u0898-\u089f\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1abf-\u1ace\u1df6-\u1dfa]")


def random_text(rng: random.Random, tokens: list[str]) -> str:
    parts = []
    for _ in range(rng.randrange(1, 10)):
        piece = rng.choice(tokens) if tokens and rng.random() < 0.4 else rng.choice(PIECES)
        if rng.random() < 0.1:
            piece = chr(rng.randrange(*rng.choice(RANGES)))
        parts.append(rng.choice((piece, piece, piece.upper(), piece + " ")))
    return "".join(parts)


def random_token(rng: random.Random, text: str) -> dict[str, Any]:
    flags = {flag: rng.random() < 0.4 for flag in FLAGS}
    return {"content": text, **flags, "special": rng.random() < 0.4}


def write_random(rng: random.Random, folder: Path) -> list[str]:
    """Add random tokens to the tokenizer in `folder`, in a random layout; returns their texts."""
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    chosen, lowered = [], set()
    for text in rng.sample(TEXTS, rng.randrange(1, 9)):
        name = unicodedata.normalize("NFC", text).lower()
        if name not in lowered:  # of those that differ in case alone a hash decides there; here they are refused
            lowered.add(name)
            chosen.append(text)
    fresh = [text for text in chosen if text not in vocab]
    ids = {text: vocab[text] if text in vocab else len(vocab) + fresh.index(text) for text in chosen}
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    layout = rng.choice(("decoder", "added_tokens.json", "tokenizer.json", "extra", "saved"))
    if layout == "decoder":
        config["added_tokens_decoder"] = {str(ids[text]): random_token(rng, text) for text in rng.sample(chosen, len(chosen))}
    elif layout == "added_tokens.json":
        (folder / "added_tokens.json").write_text(json.dumps({text: ids[text] for text in fresh}), "utf-8")
        if rng.random() < 0.5:
            config["additional_special_tokens"] = rng.sample(chosen, rng.randrange(len(chosen) + 1))
    elif layout == "tokenizer.json":
        merges = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
        added = [{"id": ids[text], **random_token(rng, text)} for text in chosen]
        model = {"type": "BPE", "vocab": vocab, "merges": merges}
        whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
        whole |= {"pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    elif layout == "extra":
        config["extra_special_tokens"] = [
            text if rng.random() < 0.5 else {"__type": "AddedToken", **random_token(rng, text)} for text in chosen
        ]
    if rng.random() < 0.3:
        config["mask_token"] = rng.choice(chosen)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    if layout == "saved":
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([transformers.AddedToken(**random_token(rng, text)) for text in chosen])
        shutil.rmtree(folder)
        tokenizer.save_pretrained(folder)
    return chosen


def pairs(rng: random.Random, base: Path, count: int) -> Iterator[tuple[list[str], Tokenizer, Any, Any]]:
    """The texts of the added tokens; ours in the bundle, transformers' from the checkpoint and from the bundle."""
    for number in range(count):
        folder = write_kind(base / f"in{number}", rng.choice(("sd1", "sd2", "sdxl", "saved")))
        tokens = write_random(rng, folder)
        stored = read_tokenizer({name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()})
        stored.write(base / f"out{number}", length=77)
        load = transformers.CLIPTokenizer.from_pretrained
        yield tokens, Tokenizer.open(base / f"out{number}"), load(folder), load(base / f"out{number}")
        shutil.rmtree(folder)
        shutil.rmtree(base / f"out{number}")


def compare(seed: int, base: Path, tokenizers: int, texts: int) -> tuple[int, list[Any]]:
    """How many texts were compared, and those that differ though Python knows every code point of them."""
    from diffusers.loaders import TextualInversionLoaderMixin

    rng, wrong, compared = random.Random(seed), [], 0
    converter = TextualInversionLoaderMixin()
    for tokens, ours, theirs, again in pairs(rng, base, tokenizers):
        for _ in range(texts):
            text = random_text(rng, tokens)
            if any("\ud800" <= char < "\ue000" or unicodedata.category(char) == "Cn" for char in text) or NEW_MARKS.search(text):
                continue
            compared += 1
            expected = theirs(text, add_special_tokens=False).input_ids
            found = ours.encode(text), again(text, add_special_tokens=False).input_ids
            if found != (expected, expected):
                wrong.append((text, expected, found, theirs.added_tokens_decoder))
            if ours.expand(text) != converter._maybe_convert_prompt(text, theirs):
                wrong.append((text, "expanded", ours.expand(text)))
    return compared, wrong


CAT, MARK = {"image_token": "<cat>"}, {"__type": "AddedToken", "lstrip": False}
LAYOUTS: list[dict[str, dict[str, Any]]] = [
    {"config": {"additional_special_tokens": CAT}},
    {"config": {"extra_special_tokens": CAT, "additional_special_tokens": ["é"]}},
    {"config": {"additional_special_tokens": ["sks"]}, "map": {"additional_special_tokens": ["é"]}},
    {"config": {"extra_special_tokens": CAT}, "map": {"additional_special_tokens": ["é"]}},
    {"config": {"additional_special_tokens": ["sks"]}, "map": {"extra_special_tokens": ["é", {"content": "Red"}]}},
    {"config": {"extra_special_tokens": []}, "map": {"additional_special_tokens": ["é"]}},
    {"map": {"additional_special_tokens": ["é"]}, "added": {"<cat>": 600, "é": 524}},
    {"config": {"mask_token": {"content": "RED", **MARK}}},  # special, and so found as it stands
    {"config": {"extra_special_tokens": [{"content": "RED", **MARK}]}},  # not so those of the list
    {"config": {"mask_token": "SKS", "added_tokens_decoder": {"600": {"content": "SKS"}, "601": {"content": "É"}}}},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_places_of_special_tokens_are_merged_as_transformers_does(layout: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    folder = write_kind(tmp_path / "clip", "sd1")
    names = {"config": "tokenizer_config.json", "map": "special_tokens_map.json", "added": "added_tokens.json"}
    for key, changes in layout.items():
        path = folder / names[key]
        path.write_text(json.dumps((json.loads(path.read_text("utf-8")) if path.exists() else {}) | changes), "utf-8")
    ours = read_tokenizer({name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}).tokenizer
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    for text in ("a <cat> of <CAT>s", "é É caffé", "sks SKS Sks", "a red, RED cat"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_random_tokenizers_and_texts(tmp_path: Path) -> None:
    compared, wrong = compare(20261130, tmp_path, 20, 120)
    assert not wrong, wrong[0]
    assert compared > 2000


@pytest.mark.full
def test_200000_random_texts(tmp_path: Path) -> None:
    compared, wrong = compare(7, tmp_path, 1000, 215)
    assert not wrong, wrong[0]
    assert compared > 200_000
