"""The examples of docs/api.md run as they stand, with `sd15` a small bundle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}
EXAMPLES = {
    heading: "\n".join(blocks)
    for heading, part in SECTIONS.items()
    if (blocks := re.findall(r"```python\n(.*?)```", part, re.DOTALL))
}


def test_no_example_is_missed() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") >= 7


@pytest.mark.parametrize("heading", EXAMPLES)
def test_it_runs(heading: str, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sd15").symlink_to(small_bundle)
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[heading], heading, "exec"), {"__name__": heading})
