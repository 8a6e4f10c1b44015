"""The texts of a request: what each row of the UNet is conditioned on, at each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdruntime.errors import SettingError, Unsupported
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.text.conditioning import Condition, Conditioner
from sdruntime.pipeline.text.wording import Wording, over_steps

Conditions = Mapping[Wording, Condition]


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """`at`: the step from which they hold, from 0 -> the prompt, and with guidance the negative prompt.

    `no_negative`: the request has no negative prompt, for which some models take zeros instead of an empty text.
    """

    at: Mapping[int, tuple[Wording, ...]]
    no_negative: bool

    @classmethod
    def of(
        cls, request: Request, *, steps: int, conditioner: Conditioner, guided: bool, passed: int = 0, adapters: str = ""
    ) -> Texts:
        """Return the texts of a request over its model calls; if `guided`, with the negative prompt.

        `passed`: the model calls of a pass before this one. `adapters`: as `Wording` has it. Raises SettingError for what the
        text encoders do not support.
        """
        most, encoders = conditioner.most_skipped, len(conditioner.tokenizers)
        if request.clip_skip > most:
            if not most:
                raise Unsupported("clip_skip: the bundle was exported without the text encoder's inner layers: export it again")
            raise SettingError(f"clip_skip {request.clip_skip}: the model's text encoders allow 0 to {most}")
        for name in ("prompt_2", "negative_2"):
            if getattr(request, name) is not None and encoders < 2:
                raise SettingError(f"{name}: the model has one text encoder: omit it, and write all in {name[:-2]}")
        parts = [(request.prompt, request.prompt_2, request.clip_skip)]
        if guided:
            skip = 0 if request.prompt_syntax == "plain" else request.clip_skip  # diffusers' negative prompt skips nothing
            parts.append((request.negative or "", request.negative_2, skip))
        syntax, emphasis = request.prompt_syntax, request.emphasis
        wordings = [Wording(text, second, syntax, emphasis, skip, adapters) for text, second, skip in parts]
        read = [over_steps(wording, steps, passed) for wording in wordings]
        at: dict[int, tuple[Wording, ...]] = {}
        current = [wordings[0] for wordings in read]
        for step in sorted(set().union(*read)):
            current = [changes.get(step, before) for changes, before in zip(read, current, strict=True)]
            at[step] = tuple(current)
        return cls(at=at, no_negative=request.negative is None and request.negative_2 is None)

    def after(self, passed: int) -> Texts:
        """Return the texts from the step `passed` on."""
        at: dict[int, tuple[Wording, ...]] = {}
        for step, wordings in sorted(self.at.items()):
            at[max(step - passed, 0)] = wordings
        return Texts(at=at, no_negative=self.no_negative)

    def encoded(self, conditions: Conditions, *, zero_absent: bool) -> dict[int, list[tuple[str, Condition]]]:
        """Return each text with its condition, by step: the prompt, and with guidance the negative prompt.

        `zero_absent`: the model takes zeros if there is no negative prompt.
        """
        encoded = {}
        for step, (prompt, *negative) in self.at.items():
            encoded[step] = [(prompt.text, conditions[prompt])]
            for wording in negative:
                zeros = zero_absent and self.no_negative
                encoded[step] += [(wording.text, conditions[prompt].zeros() if zeros else conditions[wording])]
        return encoded

    @property
    def wordings(self) -> list[Wording]:
        """Every wording, in the order of the steps."""
        return list(dict.fromkeys(wording for wordings in self.at.values() for wording in wordings))
