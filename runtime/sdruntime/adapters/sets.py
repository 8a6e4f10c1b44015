"""A set of adapters over one model: the weights that it changes, and what it makes of them.

The change of each file follows from the model's own weights, not from those that another file has changed. The changes are added.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sdruntime.adapters import kinds
from sdruntime.adapters.base import UNET, base_of
from sdruntime.adapters.blocks import block_of, by_block
from sdruntime.adapters.file import AdapterFile
from sdruntime.adapters.kinds import Kind
from sdruntime.adapters.names import Match, Shape, original_names, resolve
from sdruntime.arrays import Array
from sdruntime.bundle.records import json_from_text
from sdruntime.bundle.roles import role
from sdruntime.errors import SettingError, lines_of

_PEFT = "lora_adapter_metadata"  # a JSON object of peft's settings, by diffusers
_MOST_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The part of a file that changes one weight. `settings`: peft's, of the component. `factor`: multiplies its strength."""

    file: AdapterFile
    match: Match
    kind: Kind
    settings: Mapping[str, object]
    factor: float = 1.0

    def added(self, weight: Array, strength: float, result: Array) -> Array:
        """Return `result`, a float32 weight that other layers have changed or not, with the change of this one at a strength."""
        strength *= self.factor
        keys = self.match.keys
        read = self.file.read(keys.values())
        tensors = {tensor: read[key] for tensor, key in keys.items()}
        delta = kinds.change(self.kind, tensors, weight.shape, self._scale(tensors))
        if kinds.MAGNITUDE in tensors or kinds.DORA_SCALE in tensors:
            changed = kinds.changed(weight, delta, strength, tensors)
            return changed if result is weight else result + (changed - weight)
        return np.asarray(result + np.float32(strength) * delta)

    def _scale(self, tensors: Mapping[str, Array]) -> float:
        rank = kinds.rank_of(self.kind, {name: array.shape for name, array in tensors.items()})
        if rank is None:  # not factored: alpha has no meaning
            return 1.0
        alpha = float(tensors[kinds.ALPHA].reshape(())) if kinds.ALPHA in tensors else self._alpha_of_peft()
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") is True else rank)

    def _alpha_of_peft(self) -> float | None:
        patterns, alpha = self.settings.get("alpha_pattern"), self.settings.get("lora_alpha")
        module = self.match.weight.rpartition(".")[0]
        for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
            if module == pattern or module.endswith(f".{pattern}"):
                alpha = value
        return float(alpha) if isinstance(alpha, int | float) and not isinstance(alpha, bool) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A file whose keys were found in a model: `layers` by component and weight. `blocks`: the list that weighted them."""

    file: AdapterFile
    layers: Mapping[str, Mapping[str, tuple[Layer, ...]]]
    blocks: tuple[float, ...] = ()

    def line(self, components: Mapping[str, Mapping[str, Shape]]) -> str:
        """Return how many weights of each component the file changes."""
        counts = [f"{len(of)} of {len(components[component])} weights of {component}" for component, of in self.layers.items()]
        return ", ".join(counts)

    def weighted(self, blocks: Sequence[float], components: Mapping[str, Mapping[str, Shape]]) -> Fitted:
        """Return the file with strengths by block (sdruntime.adapters.blocks), without the layers of those of 0.

        `components`: as for `fit`. Raises SettingError for a list of another family.
        """
        if not blocks:
            return self
        try:
            factors = by_block(blocks, xl=any(role(component).takes_second_texts for component in components))
        except SettingError as error:
            raise SettingError(f"LoRA {self.file.path}: {error}") from error
        kept: dict[str, dict[str, tuple[Layer, ...]]] = {}
        for component, layers in self.layers.items():
            names = original_names(components[component]) if component == UNET else {}
            for weight, of in layers.items():
                factor = factors.get(block_of(names.get(weight.rpartition(".")[0])), 0.0)
                if factor:
                    kept.setdefault(component, {})[weight] = tuple(replace(layer, factor=factor) for layer in of)
        return replace(self, layers=kept, blocks=tuple(blocks))


def fit(file: AdapterFile, components: Mapping[str, Mapping[str, Shape]], model: str) -> Fitted:
    """Find the weights of a model that a file changes.

    `components`: the shapes of the weights of the text encoders and the UNet. `model`: its name, for messages. Raises
    SettingError if a key is left over or a shape does not fit: then the file was probably made for another model.
    """
    matches, unmatched = resolve(file.tensors, components)
    settings = _peft_settings(file)
    layers: dict[str, dict[str, tuple[Layer, ...]]] = {}
    faults = []
    for part in matches:
        shapes = {tensor: file.tensors[key].shape for tensor, key in part.keys.items()}
        try:
            kind = kinds.kind_of(shapes)
            kinds.check_shapes(kind, shapes, part.shape)
        except ValueError as error:
            faults.append(f"{part.stem}: {error}")
            continue
        prefix = f"{part.component}."
        own = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
        own = own if part.stem.startswith(prefix) else dict(settings)
        layer = Layer(file=file, match=part, kind=kind, settings=own)
        of = layers.setdefault(part.component, {})
        of[part.weight] = (*of.get(part.weight, ()), layer)
    if unmatched or faults:
        raise SettingError(_misfit(file, model, len(file.tensors) - len(unmatched), unmatched, faults))
    return Fitted(file=file, layers=layers)


def _misfit(file: AdapterFile, model: str, matched: int, unmatched: Sequence[str], faults: Sequence[str]) -> str:
    base = base_of(file.tensors, file.metadata)
    looks = f"; it looks made for {base}" if base else ""
    what = f"{matched:,} of its {len(file.tensors):,} keys match"
    what += f", but {len(faults):,} layers of other shapes" if faults else ""
    listed = [f"unknown key {key:.120}" for key in unmatched[:_MOST_LISTED]]
    if len(unmatched) > _MOST_LISTED:
        listed.append(f"… and {len(unmatched) - _MOST_LISTED:,} more unknown keys")
    listed += [fault[:200] for fault in faults[:_MOST_LISTED]]
    return f"LoRA {file.path}: does not fit the model {model}: {what}{looks}\n{lines_of(listed)}"


def _peft_settings(file: AdapterFile) -> Mapping[str, object]:
    text = file.metadata.get(_PEFT)
    if text is None:
        return {}
    try:
        settings = json_from_text(text)
        if not isinstance(settings, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise SettingError(f"LoRA {file.path}: {_PEFT} of its metadata is damaged: {error}") from error
    return settings


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """Files with their strengths in the UNet and in the text encoders. Two sets are equal if their digests are."""

    digest: str
    members: tuple[tuple[Fitted, float, float], ...] = field(compare=False, repr=False)

    @classmethod
    def of(cls, members: Iterable[tuple[Fitted, float, float]]) -> AdapterSet:
        """Return the set of these files, without those of strength 0 in both."""
        used = tuple((fitted, unet, text) for fitted, unet, text in members if unet or text)
        return cls(_digest([fitted.file.sha256, unet, text, *fitted.blocks] for fitted, unet, text in used), used)

    def digest_of(self, *components: str) -> str:
        """Return a digest of what the set changes in some components, "" if that is nothing."""
        return _digest(
            [component, fitted.file.sha256, strength, *fitted.blocks]
            for component in components
            for fitted, strength in self._strengths(component)
            if component in fitted.layers
        )

    def weights(self, component: str) -> dict[str, Shape]:
        """Return the shapes of the weights of a component that the set changes."""
        changed: dict[str, Shape] = {}
        for fitted, _ in self._strengths(component):
            changed |= {name: layers[0].match.shape for name, layers in fitted.layers.get(component, {}).items()}
        return changed

    def merged(self, component: str, name: str, weight: Array) -> Array:
        """Return what the set makes of a weight of the model, float32. Raises SettingError if a file has changed."""
        weight = np.asarray(weight, np.float32)
        result = weight
        for fitted, strength in self._strengths(component):
            for layer in fitted.layers.get(component, {}).get(name, ()):
                result = layer.added(weight, strength, result)
        return result

    def _strengths(self, component: str) -> list[tuple[Fitted, float]]:
        """Return the files with their strengths in a component, without those of strength 0."""
        strengths = [(fitted, unet if component == UNET else text) for fitted, unet, text in self.members]
        return [(fitted, strength) for fitted, strength in strengths if strength]


def _digest(parts: Iterable[object]) -> str:
    listed = list(parts)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest() if listed else ""
