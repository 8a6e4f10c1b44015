"""Write the tokenizer files of the shapes checkpoint: CLIP byte-pair encoding with merges learned from the caption words.

Every byte has its own token (inside and at the end of a word), so any text can be encoded; each caption word is one token.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def byte_letters() -> list[str]:
    """Return the printable letter for each byte 0..255 (GPT-2's table, in CLIP's order of the vocabulary)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(rest))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return the byte-pair merges that make every word (ASCII letters) one token, most frequent pair first (Sennrich 2016)."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in spelled):
        pairs = Counter(pair for parts in spelled for pair in itertools.pairwise(parts))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [merge(parts, best) for parts in spelled]
    return merges


def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Return `parts` with every occurrence of `pair`, from the left, joined."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def write_tokenizer(folder: Path, words: list[str]) -> dict[str, int]:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json to `folder`; return the vocabulary."""
    letters = byte_letters()
    merges = learn_merges(words)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        **specials,
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, value in (
        ("vocab.json", vocabulary),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", specials),
    ):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return vocabulary
