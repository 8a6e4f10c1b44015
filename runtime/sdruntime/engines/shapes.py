"""The shapes that engines are built for: from image sizes and batch sizes to the profiles of each component."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from sdruntime.bundle.limits import MOST_CHUNKS
from sdruntime.bundle.manifest import EngineSpec, Manifest, Profile
from sdruntime.bundle.model import ModelSpec
from sdruntime.bundle.roles import role
from sdruntime.errors import SettingError, shown
from sdruntime.system.sizes import Size, parse_size

T = TypeVar("T")
Guidance = Literal["on", "off", "any"]
MOST_IMAGES = 8
LARGEST = 4  # times the default side


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """`sizes` in pixels (width, height) and `batches` in images per call, each as (min, opt, max). Every size is combined with
    every batch. `guidance`: whether an image takes two rows of a UNet call (on), one (off), or either (any). `chunks`: how many
    outputs of the text encoder a prompt has, one after the other, as (min, opt, max)."""

    sizes: tuple[tuple[Size, Size, Size], ...]
    batches: tuple[tuple[int, int, int], ...]
    guidance: Guidance = "any"
    chunks: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        triples: list[tuple[str, tuple[int, int, int]]] = [("batch", batch) for batch in self.batches]
        triples += [("chunks", self.chunks)]
        for low, opt, high in self.sizes:
            triples += [("width", (low[0], opt[0], high[0])), ("height", (low[1], opt[1], high[1]))]
        for name, (least, best, most) in triples:
            if not 1 <= least <= best <= most:
                raise SettingError(f"{name} {least}:{best}:{most}: MIN, OPT and MAX must rise from 1")

    @classmethod
    def parse(
        cls,
        model: ModelSpec,
        *,
        size: str | None = None,
        batch: str | None = None,
        guidance: Guidance | None = None,
        chunks: str | None = None,
        static: bool = False,
    ) -> Shapes:
        """Parse comma-separated lists of sizes and of batches, and `chunks`, each one value, "MIN:MAX" or "MIN:OPT:MAX".

        A size is written "WxH". Defaults for a `static` engine: the model's own size, one image, guidance on and prompts of one
        chunk. For others: every size from the smallest to four times the model's own side, 1 to 8 images, guidance on or off,
        and 1 to MOST_CHUNKS chunks. Raises SettingError.
        """
        height, width = model.usual_size
        smallest = min(model.size_multiple, height, width)
        own = f"{width}x{height}"
        if size is None:
            size = own if static else f"{smallest}x{smallest}:{own}:{LARGEST * width}x{LARGEST * height}"
        if batch is None:
            batch = "1" if static else f"1:1:{MOST_IMAGES}"
        sizes = [_triple([parse_size(part) for part in text.split(":")], f"size {text!r}") for text in size.split(",")]
        for side in {side for triple in sizes for pair in triple for side in pair}:
            if side % model.step:
                raise SettingError(f"size {size}: {side} is not a multiple of {model.step}")
        batches = []
        for text in batch.split(","):
            if any(len(part) > 4 for part in text.split(":") if part.isdecimal()):
                raise SettingError(f"batch {batch!r}: more than 9999 images in one call")
            if not re.fullmatch(r"\d{1,4}(:\d{1,4}){0,2}", text):
                raise SettingError(f"batch {batch!r}: expected 4, 1:4 or 1:2:4 (min:opt:max images), or a list such as 1,2,4")
            batches.append(_triple([int(part) for part in text.split(":")], f"batch {text!r}"))
        if chunks is None:
            chunks = "1" if static else f"1:{MOST_CHUNKS}"
        if not re.fullmatch(r"\d{1,2}(:\d{1,2}){0,2}", chunks):
            raise SettingError(f"chunks {shown(chunks)}: expected 1, 1:3 or 1:1:3 (min:opt:max chunks of a prompt)")
        counts = _triple([int(part) for part in chunks.split(":")], f"chunks {chunks!r}")
        if counts[2] > MOST_CHUNKS:
            raise SettingError(f"chunks {chunks}: at most {MOST_CHUNKS}")
        guidance = guidance or ("on" if static else "any")
        return cls(sizes=tuple(sizes), batches=tuple(batches), guidance=guidance, chunks=counts)

    def profiles(self, component: str, manifest: Manifest) -> tuple[Profile, ...]:
        """Return (min, opt, max) of each named dimension of a component, in its own units, for each size and batch."""
        part, channels = role(component), manifest.model.latent_channels
        scale = part.factor(manifest.model.vae_factor)
        batches = self.batches if part.rows == "images" else tuple(map(self._rows, self.batches))
        if part.rows in ("texts", "jobs"):  # any number of them
            batches = ((1, min(2, batches[-1][2]), max(high for _, _, high in batches)),)
        profiles: list[Profile] = []
        for size, batch in itertools.product(self.sizes, batches):
            known = {
                "batch": batch,
                "width": tuple(width // scale for width, _ in size),
                "height": tuple(height // scale for _, height in size),
                "sequence": tuple(count * manifest.text_length for count in self.chunks),
                "jobs": batch,
                "cells": tuple(channels * (width // scale) * (height // scale) for width, height in size),
            }
            profile = {name: known[name] for name in manifest.components[component].dimensions}
            if profile not in profiles:
                profiles.append(profile)  # type: ignore[arg-type]
        return tuple(profiles)

    def _rows(self, batch: tuple[int, int, int]) -> tuple[int, int, int]:
        low, opt, high = batch
        return {"off": batch, "any": (low, 2 * opt, 2 * high), "on": (2 * low, 2 * opt, 2 * high)}[self.guidance]

    @property
    def label(self) -> str:
        """The shapes in an engine's file name: limits joined by "-", the members of a list by "+"."""
        sizes = ["-".join(dict.fromkeys(f"{w}x{h}" for w, h in (low, high))) for low, _, high in self.sizes]
        batches = ["-".join(dict.fromkeys((str(low), str(high)))) for low, _, high in self.batches]
        label = "+".join(dict.fromkeys(sizes)) + "-b" + "+".join(dict.fromkeys(batches))
        if self.chunks[2] not in (1, MOST_CHUNKS):  # the defaults
            label += "-c" + "-".join(dict.fromkeys((str(self.chunks[0]), str(self.chunks[2]))))
        return label if len(label) <= 80 else f"{len(self.sizes)}sizes-{len(self.batches)}batches"


def shapes_in_pixels(engine: EngineSpec, model: ModelSpec) -> str:
    """Return a text with the ranges of each profile of an engine, with sizes in pixels of the image."""
    return " or ".join(
        ", ".join(_range(name, low, high) for name, (low, high) in _sides_first(engine.component, model, profile).items())
        for profile in ({name: (low, high) for name, (low, _, high) in profile.items()} for profile in engine.profiles)
    )


def dims_in_pixels(component: str, model: ModelSpec, dims: Mapping[str, int]) -> str:
    """Return a text with the dimensions of a call, with its size in pixels of the image."""
    ranges = _sides_first(component, model, {name: (size, size) for name, size in dims.items()})
    return ", ".join(_range(name, low, high) for name, (low, high) in ranges.items())


def _sides_first(component: str, model: ModelSpec, ranges: Mapping[str, tuple[int, int]]) -> dict[str, tuple[object, object]]:
    """Return the ranges with width and height joined to one size in pixels, named "", before the others."""
    if not {"width", "height"} <= ranges.keys():
        return dict(ranges)
    factor = role(component).factor(model.vae_factor)
    low, high = (f"{factor * width}x{factor * height}" for width, height in zip(ranges["width"], ranges["height"], strict=True))
    return {"": (low, high)} | {name: pair for name, pair in ranges.items() if name not in ("width", "height")}


def _range(name: str, low: object, high: object) -> str:
    return f"{name} {low}".strip() if low == high else f"{name} {low} to {high}".strip()


def _triple(parts: list[T], what: str) -> tuple[T, T, T]:
    if len(parts) > 3:
        raise SettingError(f"{what}: expected one value, MIN:MAX or MIN:OPT:MAX")
    return parts[0], parts[len(parts) // 2 if len(parts) == 3 else 0], parts[-1]
