"""Which files hold a network's weights, where several lie side by side: the choice that diffusers makes, by their names alone.

A variant ("non_ema", "fp32", "ema" …) that nobody requested is never read. Files of one variant are tried in the order of the
library that opens the network: diffusers' own networks from an index of shards first, transformers' from the whole file first,
and both from pickles only where there are no safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from sdruntime.bundle.manifest import Precision

Variant = Literal["", "fp16"]

# part -> the stem of its safetensors and of its pickles
_STEMS: Mapping[str, tuple[str, str]] = {
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
}
_DIFFUSERS = ("unet", "vae")  # the others are transformers'
PARTS = tuple(_STEMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """`name` in the folder of the network: the weights themselves, or an index that names the shards which hold them."""

    name: str
    index: bool
    pickled: bool


def chosen(part: str, names: Collection[str], precision: Precision, *, pickles: bool = True) -> WeightFile | None:
    """The weights of a network among the names of its folder, or None. fp16 prefers the fp16 variant, all others the full one."""
    wanted = (file for pickled in (False, True)[: 1 + pickles] for file in _candidates(part, precision, pickled))
    return next((file for file in wanted if file.name in names), None)


def expected(part: str) -> str:
    """The name of a network's full weights."""
    return f"{_STEMS[part][0]}.safetensors"


def shards_of(file: WeightFile, names: Collection[str]) -> list[str]:
    """Those of `names` that an index may name, as both libraries write them: STEM[.VARIANT]-00001-of-00002[.VARIANT].ENDING."""
    stem, _, ending = file.name.partition(".")
    ending, _, variant = ending.removesuffix(".json").partition(".index")
    numbers, dot = r"-\d+-of-\d+", re.escape(variant)
    pattern = rf"{stem}({dot}{numbers}|{numbers}{dot})\.{ending}"
    return [name for name in names if re.fullmatch(pattern, name)]


def _candidates(part: str, precision: Precision, pickled: bool) -> list[WeightFile]:
    stem, ending = _STEMS[part][pickled], "bin" if pickled else "safetensors"
    variants: tuple[Variant, ...] = ("fp16", "") if precision == "fp16" else ("", "fp16")
    found = []
    for variant in variants:
        dot = f".{variant}" if variant else ""
        whole = WeightFile(name=f"{stem}{dot}.{ending}", index=False, pickled=pickled)
        index = WeightFile(name=f"{stem}.{ending}.index{dot}.json", index=True, pickled=pickled)
        # diffusers looks for an index of pickled shards only when it is told to take no safetensors
        found += [index, whole] if part in _DIFFUSERS and not pickled else [whole, index]
    return found
