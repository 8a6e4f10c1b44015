"""What to encode for one row of the UNet: texts, and how to read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from sdruntime.bundle.roles import role
from sdruntime.pipeline.text.editing import schedule
from sdruntime.pipeline.text.emphasis import Emphasis
from sdruntime.pipeline.text.tokenizer import check_text

Syntax = Literal["plain", "a1111"]
SYNTAXES: tuple[Syntax, ...] = get_args(Syntax)


@dataclass(frozen=True, slots=True)
class Wording:
    """A text, and all that its encoding depends on besides the bundle.

    `second`: the text for the second text encoder, None for the same one. `skip`: how many layers of the encoders to skip.
    `adapters`: the digest of the LoRAs' changes to the encoders, "" without.
    """

    text: str
    second: str | None = None
    syntax: Syntax = "plain"
    emphasis: Emphasis = "original"
    skip: int = 0
    adapters: str = ""

    def of(self, encoder: str) -> str:
        """Return the text for a text encoder."""
        return self.second if self.second is not None and role(encoder).takes_second_texts else self.text

    @property
    def empty(self) -> Wording:
        """The wording of an empty chunk beside this one's."""
        return Wording("", syntax=self.syntax, skip=self.skip, adapters=self.adapters)


def over_steps(wording: Wording, steps: int, passed: int = 0) -> dict[int, Wording]:
    """Return the wordings of a run of `steps` steps, each by the step from which it holds, from 0; more than one if it is edited.

    `passed`: the steps of a pass before this one. Raises SettingError for a text over 64 KiB or of too many changes.
    """
    if wording.syntax == "plain":
        return {0: wording}
    texts = _edited(wording.text, steps, passed)
    seconds = {} if wording.second is None else _edited(wording.second, steps, passed)
    changed: dict[int, Wording] = {}
    for step in sorted({*texts, *seconds}):
        wording = replace(wording, text=texts.get(step, wording.text), second=seconds.get(step, wording.second))
        changed[step] = wording
    return changed


def _edited(text: str, steps: int, passed: int) -> dict[int, str]:
    check_text(text)
    return dict(schedule(text, steps, passed))
