"""Read the model card of a checkpoint: the YAML block at the head of README.md, as the Hugging Face hub defines it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdruntime.bundle.limits import LARGEST_SIDE, MOST_GUIDANCE
from sdruntime.sampling.table import MOST_STEPS
from sdruntime.system.document import open_regular

_LONGEST = 1 << 16  # bytes; the rest of a README is not read
_CELL = 8  # pixels of a latent cell
_PROMPTS = 8  # example prompts, at most
_LETTERS = 500  # length of a prompt, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The fields of a card that a bundle stores.

    `name` is the card's model_name, or that of its model-index. `license` is an SPDX identifier, the card's own id, or "unknown".
    `prompts` are the examples of its widget; `steps`, `guidance` and `size` (width, height) are those of its inference
    parameters, if they are valid.
    """

    name: str = ""
    license: str = "unknown"
    prompts: tuple[str, ...] = ()
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None


def read_card(folder: Path) -> Card:
    """Return the card of the checkpoint in `folder`; an empty one if it is missing or unreadable."""
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
    except Exception:  # a damaged card does not make the checkpoint unusable
        return Card()
    license_id = data.get("license")
    name = data.get("license_name") if license_id == "other" else None
    return Card(
        name=_text(data.get("model_name")),
        license=_text(name) or _text(license_id) or "unknown",
        prompts=tuple(_prompts(data.get("widget"))),
        steps=_number(data.get("inference"), "num_inference_steps", int, 1, MOST_STEPS),
        guidance=_number(data.get("inference"), "guidance_scale", float, 0, MOST_GUIDANCE),
        size=_size(data.get("inference")),
    )


def _number(inference: Any, name: str, kind: type, low: float, high: float) -> Any:
    """Return a number of `{"parameters": {name: number}}`, or None if it is missing or outside the range."""
    parameters = inference.get("parameters") if isinstance(inference, dict) else None
    value = parameters.get(name) if isinstance(parameters, dict) else None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or not low <= value <= high:
        return None
    return kind(value)


def _size(inference: Any) -> tuple[int, int] | None:
    width, height = (_number(inference, side, int, _CELL, LARGEST_SIDE) for side in ("width", "height"))
    return None if width is None or height is None or width % _CELL or height % _CELL else (width, height)


def _prompts(widget: Any) -> list[str]:
    """Return the texts of a widget's examples: `[{"text": prompt, "output": …}, …]`."""
    examples = widget if isinstance(widget, list) else []
    texts = [_text(example.get("text")) for example in examples if isinstance(example, dict)]
    return [text for text in texts if 0 < len(text) <= _LETTERS][:_PROMPTS]


def _text(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""
