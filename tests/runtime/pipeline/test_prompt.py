"""prompt.py: padding as each checkpoint pads, and truncation that is reported."""

import dataclasses

import numpy as np
import pytest
from clip_files import KINDS, golden_ids, write_kind

from sdruntime.errors import SettingError
from sdruntime.pipeline.text.prompt import tokenize
from sdruntime.pipeline.text.tokenizer import Tokenizer

IDS = golden_ids()


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.open(write_kind(tmp_path / "tokenizer", "sd1"))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_cut_and_padded_as_the_reference_does(kind, tmp_path):
    tokenizer = Tokenizer.open(write_kind(tmp_path / "tokenizer", kind))
    ids = np.stack([tokenize(tokenizer, prompt).ids for prompt in IDS["prompts"]])
    assert ids.dtype == np.int32
    assert np.array_equal(ids, IDS["kinds"][kind]["padded"])


def test_the_empty_prompt_is_start_end_and_padding(tokenizer):
    prompt = tokenize(tokenizer, "")
    assert prompt.ids.tolist() == [tokenizer.start, tokenizer.end] + 75 * [tokenizer.pad]
    assert (prompt.used, prompt.cut) == (0, "")


def test_what_fits_is_not_cut(tokenizer):
    word = "red "
    (one,) = tokenizer.encode(word)
    prompt = tokenize(tokenizer, word * 75)
    assert prompt.ids.tolist() == [tokenizer.start] + 75 * [one] + [tokenizer.end]
    assert (prompt.used, prompt.cut) == (75, "")


def test_what_does_not_fit_is_reported_in_words(tokenizer):
    prompt = tokenize(tokenizer, "red " * 75 + "Circle on the LEFT")
    assert prompt.used == 75
    assert prompt.cut == "circle on the left"
    assert prompt.text.endswith("Circle on the LEFT")
    assert prompt.ids[-1] == tokenizer.end


def test_a_shorter_encoder_takes_fewer_tokens(tokenizer):
    prompt = tokenize(dataclasses.replace(tokenizer, length=5), "red on red the left")
    assert prompt.ids.shape == (5,)
    assert (prompt.used, prompt.cut) == (3, "the left")


def test_a_prompt_over_64_kib_is_refused(tokenizer):
    with pytest.raises(SettingError, match="64 KiB"):
        tokenize(tokenizer, "x" * 65537)
