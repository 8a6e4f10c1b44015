"""The command `lora`: what an adapter file holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdruntime.cli.terminal import document
from sdruntime.errors import printable

_MOST_UNKNOWN = 5


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `lora`."""
    sub.add_argument("action", choices=["inspect"], metavar="inspect", help="show its base model, kinds, ranks and trigger words")
    sub.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file")


def lora(options: argparse.Namespace) -> None:
    """Run `sdruntime lora inspect`."""
    from sdruntime.adapters.describe import description
    from sdruntime.adapters.file import AdapterFile

    described = description(AdapterFile.open(options.file))
    if options.json:
        document(**described)
        return
    for line in _lines(described):
        print(printable(line))


def _lines(described: dict[str, Any]) -> list[str]:
    def counted(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} ({count})" for name, count in counts.items())

    unknown = described["unknown_keys"]
    more = f" and {len(unknown) - _MOST_UNKNOWN:,} more" if len(unknown) > _MOST_UNKNOWN else ""
    rows = {
        "base model": described["base"] or "unknown",
        "layers": counted(described["kinds"]) or "none",
        "ranks": counted(described["ranks"]),
        "keys": counted(described["keys"]),
        "types": ", ".join(described["types"]),
        "unknown keys": f"{', '.join(key[:80] for key in unknown[:_MOST_UNKNOWN])}{more}" if unknown else "",
        "title": described["title"],
        "author": described["author"],
        "network": described["network"],
        "trained on": described["trained_on"],
        "trigger words": ", ".join(described["trigger_words"]),
        "hash": described["hash"],
    }
    return [f"{described['file']}:", *(f"  {name + ':':<15} {str(text)[:400]}" for name, text in rows.items() if text)]
