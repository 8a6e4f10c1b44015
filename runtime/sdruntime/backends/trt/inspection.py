"""Inspect a half-precision engine: which layers compute in float32, and how many attentions were fused.

This reads the engine inspector's JSON at detailed verbosity. Its spelling of types and layers differs between versions, so
anything that is not recognized is omitted, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_FUSED = re.compile(r"f?mha|flash|attention", re.IGNORECASE)
_MOVES = re.compile(r"reformat|constant|shape|cast|copy", re.IGNORECASE)  # layers that compute nothing
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The layers of an engine. `single`: names of those that compute in float32. `fused` of `attentions` were fused."""

    single: tuple[str, ...]
    fused: int
    attentions: int

    def notes(self, component: str) -> Iterator[str]:
        """Yield a readable line for each shortcoming of a half-precision engine."""
        if self.single:
            names = ", ".join(self.single[:_SHOWN]) + (", …" if len(self.single) > _SHOWN else "")
            yield f"{component}: {len(self.single)} layers compute in float32: {names}"
        if self.fused < self.attentions:
            yield (
                f"{component}: {self.fused} of {self.attentions} attentions were fused: the others write their scores to memory, "
                "which is slow and large"
            )


def inspection_from_json(text: str, *, attentions: int) -> Inspection:
    """Parse the JSON of `EngineInspector.get_engine_information`. `attentions`: number of softmaxes in the network."""
    layers = [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
    single = [layer["Name"] for layer in layers if _computes(layer) and "float" in _types(layer)]
    fused = sum(bool(_FUSED.search(f"{layer.get('Name', '')} {layer.get('TacticName', '')}")) for layer in layers)
    return Inspection(single=tuple(single), fused=fused, attentions=attentions)


def _computes(layer: Mapping[str, Any]) -> bool:
    return not _MOVES.search(f"{layer.get('LayerType', '')}")


def _types(layer: Mapping[str, Any]) -> set[str]:
    """Return the types of a layer's outputs, in lower case. The key is "Format/Datatype" up to 10.x, "Datatype" from 11.0."""
    types = [str(out.get("Datatype") or out.get("Format/Datatype", "")) for out in layer.get("Outputs", ())]
    return {word.lower() for text in types for word in re.findall(r"[A-Za-z]+\d*", text)} & {"float", "half", "bfloat16", "bf16"}
