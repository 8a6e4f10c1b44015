"""tokenizer.py against transformers' CLIPTokenizer itself: random strings, and every code point of three planes.

A string on which the two differ must hold a code point that this Python's Unicode tables do not know yet.
"""

import random
import unicodedata

import pytest
from clip_files import KINDS, write_kind

from sdruntime.pipeline.text.tokenizer import Tokenizer

# the fast tokenizer of transformers 4 took "<|EndOfText|>" for text, unlike its slow one; since 5 there is one
transformers = pytest.importorskip("transformers", minversion="5", reason="the reference is transformers 5's tokenizer")

PIECES = [
    "lower",
    "light",
    "the",
    "ll",
    "aaaa",
    " ",
    "\n",
    "!",
    "!!",
    "'s",
    "'S",
    "'",
    "4k",
    "é",
    "e\u0301",
    "\u0301",
    "Σ",
    "ſ",
    "İ",
]
PIECES += ["<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "<|STARTOFTEXT|>", "<|", "|>", "\u3000", "\x1c", "\x1f", "\x85"]
RANGES = [(0, 0x80), (0x80, 0x250), (0x300, 0x3000), (0x3000, 0xD800), (0x1F000, 0x1FB00), (0x10000, 0x110000)]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Ours and the reference's backend, from the same files."""
    folder = write_kind(tmp_path_factory.mktemp("clip") / request.param, request.param)
    return Tokenizer.open(folder), transformers.CLIPTokenizer.from_pretrained(folder).backend_tokenizer


def random_string(rng):
    return "".join(
        rng.choice(PIECES) if rng.random() < 0.6 else chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(12))
    )


def unexplained(tokenizer, reference, texts):
    """The texts whose ids differ though Python knows every code point of them, and how many differ in all."""
    encoded = reference.encode_batch(texts, add_special_tokens=False)
    differ = [text for text, found in zip(texts, encoded, strict=True) if tokenizer.encode(text) != found.ids]
    return [text for text in differ if not any(unicodedata.category(char) == "Cn" for char in text)], len(differ)


def test_10000_random_strings(pair):
    rng = random.Random(20261124)
    texts = [
        text for text in (random_string(rng) for _ in range(10_300)) if not any("\ud800" <= char < "\ue000" for char in text)
    ]
    assert len(texts) >= 10_000
    wrong, differ = unexplained(*pair, texts)
    assert not wrong
    assert differ < len(texts) / 20  # and those few hold a code point that is new


@pytest.mark.full
def test_every_code_point_between_two_letters(tmp_path):
    """Of the planes that hold more than ideographs and nothing."""
    folder = write_kind(tmp_path / "clip", "sd1")
    pair = Tokenizer.open(folder), transformers.CLIPTokenizer.from_pretrained(folder).backend_tokenizer
    for codes in (range(0xD800), range(0xE000, 0x20000), range(0xE0000, 0xE0200)):
        wrong, _ = unexplained(*pair, [f"a{chr(code)}b" for code in codes])
        assert not wrong


def test_merges_in_an_order_that_no_training_gives(tmp_path):
    folder = write_kind(tmp_path / "clip", "sd1")
    head, *merges = (folder / "merges.txt").read_text("utf-8").splitlines()
    rng = random.Random(3)
    for _ in range(5):
        rng.shuffle(merges)
        (folder / "merges.txt").write_text("\n".join([head, *merges, ""]), encoding="utf-8")
        reference = transformers.CLIPTokenizer.from_pretrained(folder).backend_tokenizer
        texts = ["".join(rng.choices("aehiloprstw", k=60)) for _ in range(200)]
        assert unexplained(Tokenizer.open(folder), reference, texts) == ([], 0)
