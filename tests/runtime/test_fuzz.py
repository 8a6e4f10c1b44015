"""Damaged documents and messages end in an error of the package's tree, or in an answer: in nothing else, and within limits.

SDRUNTIME_FUZZ=200000 makes so many inputs of each kind.
"""

from __future__ import annotations

import os

import pytest
from fuzzing import escaped

pytestmark = pytest.mark.slow

INPUTS = int(os.environ.get("SDRUNTIME_FUZZ", "200"))
_DOCUMENTS = ("manifest", "scheduler", "table", "tokenizer", "prompt", "golden", "npz", "message", "frame")
TARGETS = (*(f"fuzz_runtime:{name}" for name in _DOCUMENTS), "fuzz_adapters:lora", "fuzz_adapters:embedding")


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_escapes_the_error_tree(target: str) -> None:
    assert escaped(target, INPUTS) == {}


def test_an_escape_would_be_seen() -> None:
    escapes = escaped("fuzz_runtime:leaky", 40)
    assert sorted(where.split(" at ")[0] for where in escapes) == ["Hang", "MemoryError", "RecursionError", "TypeError"]
