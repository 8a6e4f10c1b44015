"""The examples of docs/api.md: by the heading of their section, each the whole Python of it."""

from __future__ import annotations

import re

from places import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
_SECTIONS = {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}
EXAMPLES = {
    heading: "\n".join(blocks)
    for heading, part in _SECTIONS.items()
    if (blocks := re.findall(r"```python\n(.*?)```", part, re.DOTALL))
}
