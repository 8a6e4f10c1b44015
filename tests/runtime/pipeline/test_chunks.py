"""Chunks of a prompt, with a tokenizer whose tokens are single letters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.limits import MOST_CHUNKS
from sdruntime.errors import SettingError
from sdruntime.pipeline.text.added_tokens import AddedToken
from sdruntime.pipeline.text.chunks import chunks
from sdruntime.pipeline.text.emphasis import emphasized
from sdruntime.pipeline.text.prompt import tokenize
from sdruntime.pipeline.text.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.open(bundle.folder / "tokenizer")


def texts(tokenizer: Tokenizer, prompt: str) -> list[str]:
    special = (tokenizer.start, tokenizer.end, tokenizer.pad)
    return [tokenizer.decode(i for i in chunk.ids.tolist() if i not in special) for chunk in chunks(tokenizer, prompt)]


def words(*counts: str | int) -> str:
    """words(3, ",") -> "a a a ,"."""
    return " ".join(" ".join("a" * count) if isinstance(count, int) else count for count in counts)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (words(75), [words(75)]),
        (words(76), [words(75), "a"]),
        (words(60, ",", 14, "b c"), [words(60, ","), words(14, "b c")]),
        (words(55, ",", 19, "b"), [words(55, ","), words(19, "b")]),  # 20 tokens from the comma on
        (words(54, ",", 20, "b"), [words(54, ",", 20), "b"]),  # 21
        (words(75, ", b"), [words(75), ", b"]),  # the comma itself does not move anything
        (words(60, ",", 14, ","), [words(60, ",", 14), ","]),
        (words(60, ",", 10, ",", 3, "b"), [words(60, ",", 10, ","), words(3, "b")]),
        ("a BREAK b", ["a", "b"]),
        ("BREAK b", ["", "b"]),
        ("a BREAK", ["a"]),
        ("", [""]),
        (words(70, ",", 2, "BREAK", 3), [words(70, ",", 2), words(3)]),
        (words(70, ",", 2, "BREAK", 76), [words(70, ",", 2), words(75), "a"]),  # a comma of another chunk is not looked at
    ],
)
def test_where_chunks_end(tokenizer: Tokenizer, prompt: str, expected: list[str]) -> None:
    assert texts(tokenizer, prompt) == expected


def test_ids_and_weights_of_a_chunk(tokenizer: Tokenizer) -> None:
    tokenizer = dataclasses.replace(tokenizer, pad=0)  # SD 2 pads with another token than the end token
    first, second = chunks(tokenizer, "a (b:1.5) [c] BREAK (d)")
    a, b, c, d = tokenizer.encode("a b c d")
    assert first.ids.tolist() == [tokenizer.start, a, b, c, tokenizer.end] + [0] * 72
    assert first.weights[:6].tolist() == np.float32([1, 1, 1.5, 1 / 1.1, 1, 1]).tolist()
    assert (first.weights[5:] == 1).all()
    assert second.ids.tolist() == [tokenizer.start, d, tokenizer.end] + [0] * 74
    assert (chunks(tokenizer, "a b")[0].ids == tokenize(tokenizer, "a b").ids).all()


def test_an_embedding_is_not_split(tokenizer: Tokenizer) -> None:
    added = [AddedToken(text=f"<x>{end}", id=600 + k) for k, end in enumerate(("", "_1", "_2"))]
    tokenizer = dataclasses.replace(tokenizer, added=(*tokenizer.added, *added))
    first, second = chunks(tokenizer, words(73, "<x> b"))
    assert first.ids[74:].tolist() == [tokenizer.end, tokenizer.pad, tokenizer.pad]
    assert second.ids[1:5].tolist() == [600, 601, 602, *tokenizer.encode("b")]
    long = dataclasses.replace(tokenizer, length=4)  # it fits into no chunk
    assert [chunk.ids[1:3].tolist() for chunk in chunks(long, "<x>")] == [[600, 601], [602, long.end]]


def test_a_prompt_of_too_many_chunks_is_refused(tokenizer: Tokenizer) -> None:
    assert len(chunks(tokenizer, words(75 * MOST_CHUNKS))) == MOST_CHUNKS
    for prompt in (words(75 * MOST_CHUNKS + 1), "BREAK " * 10000 + "a"):
        with pytest.raises(SettingError, match="has more than 32 chunks of 75 tokens: shorten it"):
            chunks(tokenizer, prompt)


def test_emphasis_by_hand() -> None:
    hidden = np.float32([[1, 2], [3, 6]])  # mean 3
    weights = np.float32([1, 2])
    assert emphasized(hidden, weights, "no-norm").tolist() == [[1, 2], [6, 12]]  # mean 5.25
    assert np.allclose(emphasized(hidden, weights, "original"), np.array([[1, 2], [6, 12]]) * 3 / 5.25)
    assert emphasized(hidden, weights, "ignore") is hidden
    assert emphasized(np.float32([[1, -2], [0.5, 0]]), np.float32([0, 0]), "original").tolist() == [[0, 0], [0, 0]]
