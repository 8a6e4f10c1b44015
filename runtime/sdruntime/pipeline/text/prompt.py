"""A prompt as input of the text encoder: start token, tokens of the text, end token, padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdruntime.pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenizedPrompt:
    """A prompt as token ids.

    `ids`: int32 [S], S the tokenizer's length. `used`: how many of them belong to the text. `cut`: the end of the text that did
    not fit, normalized (in lower case), "" if all fits.
    """

    text: str
    ids: NDArray[np.int32]
    used: int
    cut: str


def tokenize(tokenizer: Tokenizer, text: str) -> TokenizedPrompt:
    """Tokenize a prompt, cut and padded to the tokenizer's length as in diffusers. Raises SettingError for a text over 64 KiB."""
    tokens = tokenizer.encode(tokenizer.expand(text))
    room = tokenizer.length - 2
    ids = np.full(tokenizer.length, tokenizer.pad, np.int32)
    row = [tokenizer.start, *tokens[:room], tokenizer.end]
    ids[: len(row)] = row
    cut = tokenizer.decode(tokens[room:]) if len(tokens) > room else ""
    return TokenizedPrompt(text=text, ids=ids, used=len(row) - 2, cut=cut)
