"""What an adapter file says about itself: its kinds, ranks, components, base model, and the words of its training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sdruntime.adapters import kinds
from sdruntime.adapters.base import base_of, component_of
from sdruntime.adapters.file import AdapterFile
from sdruntime.adapters.names import split_key
from sdruntime.bundle.records import json_from_text

MOST_WORDS = 12
_TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "activation text")
_NAMED = {
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "network": ("ss_network_module",),
    "trained_on": ("ss_sd_model_name", "ss_base_model_version"),
}


def description(file: AdapterFile) -> dict[str, Any]:
    """Return what a file holds, for `sdruntime lora inspect --json`."""
    layers: dict[str, dict[str, str]] = {}
    unknown = []
    for key in file.tensors:
        parts = split_key(key)
        if parts is None:
            unknown.append(key)
        else:
            stem, tensor = parts
            layers.setdefault(stem, {})[tensor.removeprefix("bias.")] = key
    counts, ranks = Counter[str](), Counter[int]()
    for tensors in layers.values():
        shapes = {tensor: file.tensors[key].shape for tensor, key in tensors.items()}
        try:
            kind = kinds.kind_of(shapes)
            rank = kinds.rank_of(kind, shapes)
        except (ValueError, IndexError):  # an incomplete layer, or tensors without axes
            unknown += tensors.values()
            continue
        counts[_name(kind, shapes)] += 1
        ranks.update([] if rank is None else [rank])
    components = Counter(component_of(key) for key in file.tensors)
    words, source = _words(file.metadata)
    return {
        "file": str(file.path),
        "name": file.name,
        "sha256": file.sha256,
        "hash": file.short_hash,
        "base": base_of(file.tensors, file.metadata),
        "kinds": dict(counts.most_common()),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "keys": dict(components.most_common()),
        "types": sorted({tensor.dtype for tensor in file.tensors.values()}),
        "unknown_keys": sorted(unknown),
        **{name: next((file.metadata[key] for key in keys if key in file.metadata), None) for name, keys in _NAMED.items()},
        "trigger_words": words,
        "trigger_words_from": source,
    }


def _name(kind: str, shapes: kinds.Shapes) -> str:
    tucker = " (Tucker)" if {kinds.MID, "t1", "t2_k"} & shapes.keys() else ""
    dora = " with magnitudes (DoRA)" if {kinds.MAGNITUDE, kinds.DORA_SCALE} & shapes.keys() else ""
    convolution = " of convolutions" if any(len(shape) == 4 and max(shape[2:]) > 1 for shape in shapes.values()) else ""
    return f"{kind}{convolution}{tucker}{dora}"


def _words(metadata: Mapping[str, str]) -> tuple[list[str], str | None]:
    """Return the trigger words, or else the most frequent tags of the training captions; and the key that has them."""
    for key in _TRIGGERS:
        if text := metadata.get(key, "").strip():
            return [word.strip()[:120] for word in text.split(",") if word.strip()][:MOST_WORDS], key
    try:
        folders = json_from_text(metadata.get("ss_tag_frequency", "{}"))
    except ValueError:
        return [], None
    counts = Counter[str]()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[str(tag).strip()[:120]] += count if type(count) is int and 0 < count < 1 << 40 else 0
    return [tag for tag, _ in counts.most_common(MOST_WORDS)], "ss_tag_frequency" if counts else None
