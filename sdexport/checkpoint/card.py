"""The model card of a checkpoint: the YAML block at the head of README.md, as the Hugging Face hub defines it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdruntime.system.document import open_regular

_LONGEST = 1 << 16  # bytes of a README that are read
_PROMPTS = 8  # example prompts that are kept
_LETTERS = 500  # of a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """`name`: its model_name, or that of its model-index. `license`: an SPDX identifier or the card's own id, "unknown" if it has
    none. `prompts`: the examples of its widget."""

    name: str = ""
    license: str = "unknown"
    prompts: tuple[str, ...] = ()


def read_card(folder: Path) -> Card:
    """Return what the card in `folder` says; a missing or unreadable one says nothing."""
    try:
        with open_regular(folder / "README.md") as file:
            text = file.read(_LONGEST).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return Card()
    if not text.startswith("---"):
        return Card()
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text, ignore_metadata_errors=True).data
    except Exception:  # whatever YAML holds: the card is advice, and no part of the checkpoint
        return Card()
    license_id = data.get("license")
    name = data.get("license_name") if license_id == "other" else None
    return Card(
        name=_text(data.get("model_name")),
        license=_text(name) or _text(license_id) or "unknown",
        prompts=tuple(_prompts(data.get("widget"))),
    )


def _prompts(widget: Any) -> list[str]:
    """The texts of a widget's examples: `[{"text": prompt, "output": …}, …]`."""
    examples = widget if isinstance(widget, list) else []
    texts = [_text(each.get("text")) for each in examples if isinstance(each, dict)]
    return [text for text in texts if 0 < len(text) <= _LETTERS][:_PROMPTS]


def _text(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""
