"""How much of the second model each weight takes: one number, and others for parts of the networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sdruntime.errors import SettingError

PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
_FORM = "expected a number, and PART=NUMBER for parts, such as 0.5,vae=0,unet.up_blocks.1=0.8"


@dataclass(frozen=True, slots=True)
class Weights:
    """`default` for all, and by part: a network, or the beginning of the names of its weights after its own.

    The longest part that fits a name counts.
    """

    default: float = 0.5
    parts: Mapping[str, float] = field(default_factory=dict)

    def of(self, network: str, name: str) -> float:
        """Return the number for a weight of a network."""
        path = f"{network}.{name}"
        fitting = [part for part in self.parts if path == part or path.startswith(f"{part}.")]
        return self.parts[max(fitting, key=len)] if fitting else self.default


def weights_from(text: str) -> Weights:
    """Return the weights of NUMBER[,PART=NUMBER…]. Raises SettingError."""
    default, parts = 0.5, dict[str, float]()
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        part, equals, number = entry.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SettingError(f"weights {text!r:.80}: {entry!r:.40}: {_FORM}")
        if not equals:
            default = value
        elif part.split(".")[0] not in PARTS:
            raise SettingError(f"weights {text!r:.80}: {part!r:.60} is in none of {', '.join(PARTS)}: {_FORM}")
        else:
            parts[part] = value
    return Weights(default, parts)
