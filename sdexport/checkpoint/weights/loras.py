"""Merge LoRAs into the weights of a checkpoint, each weight when it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

import numpy as np

from sdexport.checkpoint.weights.safetensors import Array, StoredTensor
from sdruntime.adapters.blocks import text_of
from sdruntime.adapters.file import AdapterFile
from sdruntime.adapters.lora import Lora, lora_from
from sdruntime.adapters.sets import AdapterSet, fit

PARTS = ("text_encoder", "text_encoder_2", "unet")  # that a LoRA can change
Weights = Mapping[str, Mapping[str, StoredTensor]]  # of each part, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedTensor(StoredTensor):
    """A stored tensor with the changes of LoRAs; `merge` returns the float32 weight that they make of it."""

    merge: Callable[[Array], Array]

    def read(self) -> Array:
        return self.merge(StoredTensor.read(self).astype(np.float32))


def resolved(texts: Sequence[str]) -> tuple[str, ...]:
    """Return each text of a LoRA (`lora_from`) with an absolute path and both strengths. Raises SettingError."""
    loras = map(lora_from, texts)
    return tuple("{}:{!r}:{!r}{}".format(Path(lora.path).absolute(), *lora.scales, text_of(lora.blocks)) for lora in loras)


def merged(weights: Weights, texts: Sequence[str], *, model: str) -> tuple[Weights, tuple[str, ...], str]:
    """Return the weights of the parts with LoRAs merged, a line for each LoRA, and the digest of all of them.

    `texts`: as `lora_from` takes them. Raises SettingError for a damaged file, or one that was made for another model.
    """
    parts = {part: weights[part] for part in PARTS if part in weights}
    shapes = {part: {name: tensor.shape for name, tensor in tensors.items()} for part, tensors in parts.items()}
    loras = [lora_from(text) for text in texts]
    fitted = [fit(AdapterFile.open(lora.path), shapes, model).weighted(lora.blocks, shapes) for lora in loras]
    adapters = AdapterSet.of((adapter, *lora.scales) for adapter, lora in zip(fitted, loras, strict=True))
    changed = {part: _merged(part, tensors, adapters) for part, tensors in parts.items()}
    lines = (
        f"LoRA {adapter.file.path.name} at {_strengths(lora)}: changes {adapter.line(shapes)}"
        for adapter, lora in zip(fitted, loras, strict=True)
    )
    return MappingProxyType({**weights, **changed}), tuple(lines), adapters.digest


def _merged(part: str, tensors: Mapping[str, StoredTensor], adapters: AdapterSet) -> Mapping[str, StoredTensor]:
    changed = dict(tensors)
    for name in adapters.weights(part):
        stored = {field.name: getattr(tensors[name], field.name) for field in fields(StoredTensor)}
        changed[name] = MergedTensor(**stored, merge=functools.partial(adapters.merged, part, name))
    return MappingProxyType(changed)


def _strengths(lora: Lora) -> str:
    unet, text = lora.scales
    return (f"{unet:g}" if unet == text else f"{unet:g} (text {text:g})") + (" by block" if lora.blocks else "")
