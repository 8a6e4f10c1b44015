"""Prompts as the text encoder reads them: start token, the text's tokens, end token, padding, and what did not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdruntime.pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenizedPrompt:
    """`ids`: int32 [S], as long as the tokenizer makes them; `used`: how many of them are the text's own; `cut`: the end of the
    text that did not fit, "" if all did.

    `cut` is written as the tokenizer sees it, in lower case.
    """

    text: str
    ids: NDArray[np.int32]
    used: int
    cut: str


def tokenize(tokenizer: Tokenizer, text: str) -> TokenizedPrompt:
    """One prompt, cut and padded to the tokenizer's length as diffusers does. Raises SettingError for a text over 64 KiB."""
    found = tokenizer.encode(tokenizer.expand(text))
    room = tokenizer.length - 2
    ids = np.full(tokenizer.length, tokenizer.pad, np.int32)
    row = [tokenizer.start, *found[:room], tokenizer.end]
    ids[: len(row)] = row
    cut = tokenizer.decode(found[room:]) if len(found) > room else ""
    return TokenizedPrompt(text=text, ids=ids, used=len(row) - 2, cut=cut)


def batch(prompts: Sequence[TokenizedPrompt]) -> NDArray[np.int32]:
    """The text encoder's input_ids, int32 [B,S]."""
    return np.stack([prompt.ids for prompt in prompts])
