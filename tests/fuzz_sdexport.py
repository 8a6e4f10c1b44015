"""What is fuzzed of sdexport: recipes and tokenizer.json. Torch is not loaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from bundles import make_bundle
from fuzzing import Once, damaged, mutated

from sdexport.checkpoint.tokenizer import read_tokenizer
from sdexport.errors import SdexportError
from sdexport.recipes.recipe import read_recipe
from sdruntime.errors import SdruntimeError

RECIPE: dict[str, Any] = {
    "name": "small",
    "description": "A recipe.",
    "model": "owner/model",
    "revision": "main",
    "precision": "fp16",
    "audit": True,
    "verify": False,
    "engines": [
        {
            "backend": "tensorrt",
            "target": ["sm86", "current"],
            "size": "512x512",
            "batch": [1, "1:2:4"],
            "guidance": "on",
            "options": {"workspace": "2G", "optimization_level": 3},
            "components": {"vae_encoder": False, "unet": {"batch": 2, "options": {"strip": True}}},
        },
        {"backend": "openvino", "size": ["64x64", "64x64:128x128"], "options": {"inference_precision": "bf16"}},
    ],
}


def toml_of(value: Any) -> str:
    """A value as TOML, what it cannot hold as text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value))


def refused(act: Any, *kinds: type[Exception]) -> bool:
    try:
        act()
    except (SdexportError, SdruntimeError, *kinds):
        return True
    return False


def recipe(folder: Path) -> Once:
    """A mutated recipe, or one with damaged bytes."""
    path = folder / "recipe.toml"

    def once(chance: random.Random) -> bool:
        document = mutated(RECIPE, chance, most=2)
        pairs = document.items() if isinstance(document, dict) else [("name", document)]
        try:
            text = "".join(f"{json.dumps(str(key))} = {toml_of(value)}\n" for key, value in pairs)
        except RecursionError:  # deeper than Python writes
            text = f"name = {'[' * 10_000}"
        if chance.random() < 0.1:
            text = text.replace("3", chance.choice(["3" * 5000, "0x" + "f" * 5000, "1e999", "1979-05-27", "'''x'''"]), 1)
        data = text.encode(errors="surrogatepass")
        path.write_bytes(damaged(data, chance) if chance.random() < 0.2 else data)
        return refused(lambda: read_recipe(path))

    return once


def tokenizer(folder: Path) -> Once:
    """The mutated files of a checkpoint's tokenizer, as transformers 4 and 5 write them: ValueError says what is wrong."""
    source = make_bundle(folder / "bundle").folder / "tokenizer"
    vocabulary = json.loads((source / "vocab.json").read_text()) | {"ab": 514, "abc</w>": 515}
    documents: dict[str, Any] = {
        "vocab.json": vocabulary,
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": 513, "content": "<|endoftext|>", "special": True}],
            "model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b", ["ab", "c</w>"]]},
        },
        "tokenizer_config.json": {"model_max_length": 77, "added_tokens_decoder": {"513": {"content": "<|endoftext|>"}}},
        "special_tokens_map.json": json.loads((source / "special_tokens_map.json").read_text()),
        "added_tokens.json": {"<x>": 516},
    }

    def once(chance: random.Random) -> bool:
        if chance.random() < 0.5:
            kept = [name for name in documents if name != "tokenizer.json"]
        else:
            kept = [name for name in documents if name != "vocab.json"]
        changed = chance.choice(kept)
        files = {"merges.txt": b"#version: 0.2\na b\nab c</w>\n"}
        for name in kept:
            if name in ("vocab.json", "tokenizer.json") or chance.random() < 0.7:
                document = mutated(documents[name], chance, most=2) if name == changed else documents[name]
                files[name] = json.dumps(document).encode()
        if chance.random() < 0.1:
            name = chance.choice(list(files))
            files[name] = damaged(files[name], chance)
        return refused(lambda: read_tokenizer(files), ValueError)

    return once
