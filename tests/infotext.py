"""A reader of AUTOMATIC1111's infotext, to the rules of its `parse_generation_parameters`.

The last line holds the settings if at least three `key: value` pairs are found in it, else it belongs to the prompt. A key begins
with a letter and has two characters or more (letters, digits, spaces, `-`, `/`); a value is a JSON string or reaches to the next
comma. `Negative prompt:` begins the negative prompt, which later lines continue. A value 640x480 becomes two. What is missing
becomes the web UI's default.
"""

from __future__ import annotations

import json
import re

_PAIR = re.compile(r"\s*(?P<key>\w[\w \-/]+):\s*(?P<value>\"(?:\\.|[^\\\"])+\"|[^,]*)(?:,|$)")
_MARK = "Negative prompt:"
DEFAULTS = {"Clip skip": "1", "Schedule type": "Automatic", "RNG": "GPU", "Hires upscaler": "None"}


def read_infotext(text: str) -> dict[str, str]:
    lines = text.strip().split("\n")
    found = _PAIR.findall(lines[-1])
    body = lines[:-1] if len(found) >= 3 else lines
    parts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    kind = "Prompt"
    for line in (each.strip() for each in body):
        if line.startswith(_MARK):
            kind, line = "Negative prompt", line.removeprefix(_MARK).strip()
        parts[kind].append(line)
    settings = {kind: "\n".join(of_kind) for kind, of_kind in parts.items()}
    for key, value in found if len(found) >= 3 else ():
        if not value:
            raise ValueError(f"{key} has no value, over which the web UI stumbles")
        if value[0] == value[-1] == '"':
            value = json.loads(value)
        if sides := re.fullmatch(r"(\d+)x(\d+)", value):
            settings |= {f"{key}-1": sides[1], f"{key}-2": sides[2]}
        else:
            settings[key] = value
    return {**DEFAULTS, **settings}
