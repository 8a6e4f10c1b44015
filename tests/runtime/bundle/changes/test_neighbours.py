"""Builders and readers that use one bundle at the same time: no engine is lost, nothing is broken, no reader fails."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from places import TESTS

pytestmark = pytest.mark.slow


def wrong(rounds: int, locks: str, kind: str) -> dict[str, int]:
    command = [sys.executable, str(TESTS / "neighbours.py"), str(rounds), locks, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)["wrong"]
    return found


@pytest.mark.parametrize("locks", ["flock", "stubbed"])
@pytest.mark.parametrize(("kind", "rounds"), [("different", 4), ("same", 2), ("stale", 2), ("export", 4)])
def test_neighbours_neither_lose_nor_break_anything(kind: str, rounds: int, locks: str) -> None:
    assert wrong(rounds, locks, kind) == {}


@pytest.mark.full
@pytest.mark.parametrize("locks", ["flock", "stubbed"])
@pytest.mark.parametrize("kind", ["different", "same", "stale", "export"])
def test_neighbours_neither_lose_nor_break_anything_in_200_rounds(kind: str, locks: str) -> None:
    assert wrong(200, locks, kind) == {}


def test_without_a_lock_the_same_check_finds_what_goes_wrong() -> None:
    assert wrong(8, "none", "different")
