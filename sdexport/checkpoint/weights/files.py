"""Choose the files of a network's weights as diffusers does, by their names, if there are several.

Variants that were not requested ("non_ema", "fp32", "ema" …) are never read. Files of one variant are tried in the order of the
library that opens the network: diffusers tries an index of shards first, transformers the single file first, and both read
pickles only if there are no safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from sdruntime.bundle.manifest import Precision
from sdruntime.bundle.roles import IMAGE_ENCODER

Variant = Literal["", "fp16"]

_DIFFUSED = ("diffusion_pytorch_model", "diffusion_pytorch_model")  # of every part that is not listed, such as a ControlNet
# part -> the stem of its safetensors and of its pickles
_STEMS: Mapping[str, tuple[str, str]] = {
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
    IMAGE_ENCODER: ("model", "pytorch_model"),
    **dict.fromkeys(("unet", "vae", "preview_vae"), _DIFFUSED),
}
_BY_TRANSFORMERS = ("text_encoder", "text_encoder_2", IMAGE_ENCODER)  # the libraries try the files in another order
PARTS = tuple(part for part in _STEMS if part != IMAGE_ENCODER)  # of a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A file in the folder of a network: the weights, or an `index` of their shards."""

    name: str
    index: bool
    pickled: bool


def choose_weight_file(part: str, names: Collection[str], precision: Precision, *, pickles: bool = True) -> WeightFile | None:
    """Return the weights of a network among the `names` in its folder, or None.

    fp16 prefers the fp16 variant, the other precisions the full weights.
    """
    candidates = (file for pickled in (False, True)[: 1 + pickles] for file in _candidates(part, precision, pickled))
    return next((file for file in candidates if file.name in names), None)


def full_weights_name(part: str) -> str:
    """Return the file name of a network's full weights."""
    return f"{_STEMS.get(part, _DIFFUSED)[0]}.safetensors"


def shards_of(file: WeightFile, names: Collection[str]) -> list[str]:
    """Return the `names` that an index may list; the libraries write STEM[.VARIANT]-00001-of-00002[.VARIANT].ENDING."""
    stem, _, ending = file.name.partition(".")
    ending, _, variant = ending.removesuffix(".json").partition(".index")
    numbers, dot = r"-\d+-of-\d+", re.escape(variant)
    pattern = rf"{stem}({dot}{numbers}|{numbers}{dot})\.{ending}"
    return [name for name in names if re.fullmatch(pattern, name)]


def _candidates(part: str, precision: Precision, pickled: bool) -> list[WeightFile]:
    stem, ending = _STEMS.get(part, _DIFFUSED)[pickled], "bin" if pickled else "safetensors"
    variants: tuple[Variant, ...] = ("fp16", "") if precision == "fp16" else ("", "fp16")
    files = []
    for variant in variants:
        dot = f".{variant}" if variant else ""
        whole = WeightFile(name=f"{stem}{dot}.{ending}", index=False, pickled=pickled)
        index = WeightFile(name=f"{stem}.{ending}.index{dot}.json", index=True, pickled=pickled)
        # diffusers tries an index of pickled shards first only with use_safetensors=False
        files += [index, whole] if part not in _BY_TRANSFORMERS and not pickled else [whole, index]
    return files
