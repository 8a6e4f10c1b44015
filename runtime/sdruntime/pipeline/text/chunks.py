"""Long prompts: split the tokens of a prompt into chunks that the text encoder takes one by one, as AUTOMATIC1111's web UI does.

A chunk has room for the tokens of the encoder's input less start and end: 75 for CLIP. When it is full, the text after its last
comma moves on to the next chunk if that is at most BACKTRACK tokens. BREAK ends a chunk. The vectors of one embedding stay in
one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdruntime.bundle.limits import MOST_CHUNKS
from sdruntime.errors import SettingError, shown
from sdruntime.pipeline.text.prompt import TokenizedPrompt
from sdruntime.pipeline.text.segments import BREAK, segments
from sdruntime.pipeline.text.tokenizer import Tokenizer

BACKTRACK = 20  # tokens
_COMMA = ",</w>"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """One input of the text encoder: `ids`, int32 [S], and the `weights` of these tokens, float32 [S], 1 for padding."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]


def whole(prompt: TokenizedPrompt) -> Chunk:
    """Return a prompt without syntax as one chunk."""
    return Chunk(ids=prompt.ids, weights=np.ones(len(prompt.ids), np.float32))


def chunks(tokenizer: Tokenizer, text: str) -> list[Chunk]:
    """Return the chunks of a prompt in the web UI's syntax, at least one.

    Raises SettingError for a text over 64 KiB or of more than MOST_CHUNKS chunks, and for a weight that is none.
    """
    room, comma = tokenizer.length - 2, tokenizer.vocab.get(_COMMA)
    done: list[list[tuple[int, float]]] = []
    chunk: list[tuple[int, float]] = []  # tokens with weights
    last_comma = -1

    def close() -> None:
        nonlocal chunk, last_comma
        done.append(chunk)
        chunk, last_comma = [], -1

    for segment in segments(text):
        if len(done) > MOST_CHUNKS:
            break
        if segment == BREAK:
            close()
            continue
        for ids in _units(tokenizer, segment.text):
            if ids[0] == comma:
                last_comma = len(chunk)
            elif len(chunk) == room and last_comma != -1 and len(chunk) - last_comma <= BACKTRACK:
                moved = chunk[last_comma + 1 :]
                del chunk[last_comma + 1 :]
                close()
                chunk = moved
            if len(chunk) + len(ids) > room:
                close()
            chunk += [(number, segment.weight) for number in ids]
    if chunk or not done:
        done.append(chunk)
    if len(done) > MOST_CHUNKS:
        raise SettingError(f"the prompt {shown(text)} has more than {MOST_CHUNKS} chunks of {room} tokens: shorten it")
    return [_chunk(tokenizer, tokens) for tokens in done]


def _units(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Yield the token ids of a text, those of an embedding of several vectors together, if they fit into one chunk."""
    ids, at = tokenizer.encode(tokenizer.expand(text)), 0
    while at < len(ids):
        count = tokenizer.vectors.get(ids[at], 1)
        unit = ids[at : at + (count if count <= tokenizer.length - 2 else 1)]
        yield unit
        at += len(unit)


def _chunk(tokenizer: Tokenizer, tokens: list[tuple[int, float]]) -> Chunk:
    ids = np.full(tokenizer.length, tokenizer.pad, np.int32)
    weights = np.ones(tokenizer.length, np.float32)
    ids[0], ids[len(tokens) + 1] = tokenizer.start, tokenizer.end
    if tokens:
        ids[1 : len(tokens) + 1] = [number for number, _ in tokens]
        weights[1 : len(tokens) + 1] = [weight for _, weight in tokens]
    return Chunk(ids=ids, weights=weights)
