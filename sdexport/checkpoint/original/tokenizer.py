"""CLIP's tokenizer, which single files do not hold: the vocabulary follows from its 48,894 merges.

`merges.txt.gz` has the merges of openai/CLIP's bpe_simple_vocab_16e6.txt (MIT licence) that its tokenizer uses.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from sdruntime.pipeline.text.tokenizer import byte_symbols

_MERGES = Path(__file__).with_name("merges.txt.gz")
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LENGTH = 77


def clip_tokenizer(*, pad: str) -> dict[str, bytes]:
    """Return the files of a tokenizer's folder, as `sdexport.checkpoint.tokenizer.read_tokenizer` takes them."""
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": _LENGTH} | special
    return {**_vocabulary(), "tokenizer_config.json": json.dumps(config).encode()}


@functools.cache
def _vocabulary() -> Mapping[str, bytes]:
    """Return the files that do not depend on the padding token: SDXL has two tokenizers with the same vocabulary."""
    merges = gzip.decompress(_MERGES.read_bytes()).decode().splitlines()
    units = list(byte_symbols().values())
    words = [*units, *(f"{unit}</w>" for unit in units), *(merge.replace(" ", "") for merge in merges), _START, _END]
    documents = {
        "vocab.json": json.dumps({word: number for number, word in enumerate(words)}),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
    }
    return MappingProxyType({name: text.encode() for name, text in documents.items()})
