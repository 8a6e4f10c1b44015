"""A LoRA as a request names it: a file and its strengths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from sdruntime.adapters.blocks import check_weights, weights_from
from sdruntime.errors import SettingError, shown

MOST_LORAS = 32  # of a request
MOST_SCALE = 100.0  # LoRAs are used with -2 to 2


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA, or another adapter of its kind (LoCon, LoHa, LoKr, DoRA, LyCORIS full): a .safetensors file and its strengths.

    `scale`: the strength in the UNet. `text_scale`: the strength in the text encoders, None for the same. 0 leaves the weights
    as they are. `blocks`: numbers that multiply them by block (sdruntime.adapters.blocks), () for 1. Raises SettingError for a
    strength that is not finite or beyond -100 to 100.
    """

    path: Path | str
    scale: float = 1.0
    text_scale: float | None = None
    blocks: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike) or not os.fspath(self.path):
            raise SettingError(f"lora {shown(self.path)}: expected the path of a .safetensors file")
        for name in ("scale", "text_scale"):
            value = getattr(self, name)
            if value is None and name == "text_scale":
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not abs(float(value)) <= MOST_SCALE:  # NaN fails
                limits = f"{-MOST_SCALE:g} to {MOST_SCALE:g}"
                raise SettingError(f"lora {os.fspath(self.path)}: {name} {shown(value)}: expected a number from {limits}")
            object.__setattr__(self, name, float(value))
        if self.blocks:
            try:
                check_weights(self.blocks)
            except SettingError as error:
                raise SettingError(f"lora {os.fspath(self.path)}: {error}") from error
        object.__setattr__(self, "blocks", tuple(map(float, self.blocks)))

    @property
    def scales(self) -> tuple[float, float]:
        """The strengths in the UNet and in the text encoders."""
        return self.scale, self.scale if self.text_scale is None else self.text_scale


def lora_from(text: str) -> Lora:
    """Return the LoRA of FILE[:SCALE[:TEXT_SCALE]][:lbw=NUMBER,…]. Raises SettingError."""
    file, _, listed = (text, "", "") if Path(text).is_file() else text.partition(":lbw=")
    blocks, scales = weights_from(listed) if listed else (), list[float]()
    while len(scales) < 2 and not Path(file).is_file():
        start, colon, last = file.rpartition(":")
        try:
            scales.insert(0, float(last))
        except ValueError:
            break
        if not colon:
            break
        file = start
    scale = scales[0] if scales else 1.0
    return Lora(file, scale, scales[1] if len(scales) > 1 else None, blocks)


def loras_of(value: Any) -> tuple[Lora, ...]:
    """Return a sequence of LoRAs, each also as a text (`lora_from`). Raises SettingError."""
    if isinstance(value, Lora | str) or not isinstance(value, Sequence):
        raise SettingError(f'loras {shown(value)}: expected a list, such as [Lora("style.safetensors", 0.8)]')
    if len(value) > MOST_LORAS:
        raise SettingError(f"loras: {len(value):,} files; the maximum is {MOST_LORAS}")
    for lora in value:
        if not isinstance(lora, Lora | str):
            raise SettingError(f'loras: {shown(lora)}: expected Lora(path, scale), or "FILE:SCALE"')
    return tuple(lora_from(lora) if isinstance(lora, str) else lora for lora in value)
