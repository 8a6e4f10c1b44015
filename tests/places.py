"""Where the tests' files are."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"  # what PyTorch and diffusers answered, stored
FIXTURE = TESTS / "runtime" / "fixture-bundle-1"  # a bundle of the first revision, never written again
SHAPES = ROOT / "examples" / "shapes"
