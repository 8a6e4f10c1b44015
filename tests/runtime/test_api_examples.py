"""The examples of docs/api.md run as they stand, with `sd15` a small bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_page import EXAMPLES, PAGE


def test_no_example_is_missed() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") >= 7


@pytest.mark.parametrize("heading", EXAMPLES)
def test_it_runs(heading: str, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sd15").symlink_to(small_bundle)
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[heading], heading, "exec"), {"__name__": heading})
