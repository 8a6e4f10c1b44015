"""A CLIP tokenizer as its four classic files, also where a checkpoint has tokenizer.json only (as transformers 5 writes it)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdexport.checkpoint import pad_token
from sdruntime.record import read_json

TOKENS = 77
_ENDS = ("<|startoftext|>", "<|endoftext|>")


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json from the tokenizer in `source`.

    Raises ValueError when tokenizer.json holds no byte-pair vocabulary.
    """
    folder.mkdir()
    if (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(source / name, folder / name)
    else:
        _split(read_json(source / "tokenizer.json"), folder)
    special = {"bos_token": _ENDS[0], "eos_token": _ENDS[1], "unk_token": _ENDS[1], "pad_token": pad_token(source)}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True, "add_prefix_space": False}
    _write_json(folder / "tokenizer_config.json", settings | special)


def _split(document: Any, folder: Path) -> None:
    """vocab.json and merges.txt out of tokenizer.json, whose merges are "a b" or ["a", "b"], by its age."""
    model: Mapping[str, Any] = document.get("model", {}) if isinstance(document, dict) else {}
    if model.get("type") != "BPE":
        raise ValueError(f"tokenizer.json is of the type {model.get('type')!r}, not BPE")
    vocabulary = dict(model["vocab"])
    vocabulary |= {token["content"]: token["id"] for token in document.get("added_tokens", ())}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    _write_json(folder / "vocab.json", dict(sorted(vocabulary.items(), key=lambda item: item[1])))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
