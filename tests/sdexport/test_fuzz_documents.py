"""Damaged recipes and tokenizers: as tests/runtime/test_fuzz.py, for what sdexport reads."""

from __future__ import annotations

import os

import pytest
from fuzzing import escaped

INPUTS = int(os.environ.get("SDRUNTIME_FUZZ", "200"))


@pytest.mark.parametrize("target", ["recipe", "tokenizer"])
def test_nothing_escapes_the_error_tree(target: str) -> None:
    assert escaped(f"fuzz_sdexport:{target}", INPUTS) == {}
