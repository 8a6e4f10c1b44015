"""A checkpoint in one file, presented as a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdexport.checkpoint.card import Card
from sdexport.checkpoint.original.controlnet import read_controlnet
from sdexport.checkpoint.original.layout import Original, read_original, read_vae_alone
from sdexport.checkpoint.original.naming import Tensors
from sdexport.checkpoint.original.tokenizer import clip_tokenizer
from sdexport.checkpoint.source import StoredWeights
from sdexport.checkpoint.weights.safetensors import read_header_and_metadata, with_scales
from sdexport.checkpoint.weights.torch_file.file import REFUSED_PICKLE, is_torch_file, read_torch_file
from sdexport.errors import CheckpointError
from sdruntime.errors import plain

_UNKNOWN = "unknown"


class SingleFile:
    """A source of `sdexport.checkpoint.checkpoint`: `original` is what the file holds, and `metadata` what it says of itself."""

    def __init__(self, path: Path, original: Original, metadata: Mapping[str, str]) -> None:
        self.path, self.inferred = path, original.inferred
        self._original, self._metadata = original, metadata
        self._documents: Mapping[str, Mapping[str, Any]] = {
            "model_index.json": original.index,
            "scheduler/scheduler_config.json": original.scheduler,
            **{f"{part}/config.json": config for part, config in original.configs.items()},
        }
        self._files = {
            f"{tokenizer}/{name}": data
            for tokenizer, pad in original.pads.items()
            for name, data in clip_tokenizer(pad=pad).items()
        }

    def document(self, path: str) -> Any:
        if path not in self._documents:
            raise FileNotFoundError(path)
        return dict(self._documents[path])

    def file(self, path: str) -> bytes | None:
        if path in self._documents:
            return json.dumps(self._documents[path]).encode()
        return self._files.get(path)

    def card(self) -> Card:
        return Card(
            name=self._metadata.get("modelspec.title", ""), license=self._metadata.get("modelspec.license", "") or _UNKNOWN
        )

    def inputs(self, parts: Iterable[str]) -> Mapping[str, Path]:
        return {}

    def weights(self, part: str, faults: list[str]) -> StoredWeights:
        return StoredWeights(files={self.path.name: self.path}, tensors=MappingProxyType(dict(self._original.weights[part])))


class PartFile:
    """A source of nothing but one part. The config of a VAE has no scaling_factor."""

    inferred: tuple[str, ...] = ()

    def __init__(self, path: Path, part: str, config: Mapping[str, Any], tensors: Tensors) -> None:
        self.path, self.part, self.config, self._tensors = path, part, config, tensors

    def document(self, path: str) -> Any:
        if path != f"{self.part}/config.json":
            raise FileNotFoundError(path)
        return dict(self.config)

    def file(self, path: str) -> bytes | None:
        return None

    def card(self) -> Card:
        return Card()

    def inputs(self, parts: Iterable[str]) -> Mapping[str, Path]:
        return {}

    def weights(self, part: str, faults: list[str]) -> StoredWeights:
        return StoredWeights(files={f"{self.part}/{self.path.name}": self.path}, tensors=MappingProxyType(dict(self._tensors)))


def read_vae_file(path: Path, *, allow_pickle: bool = False) -> PartFile:
    """Return the VAE in a file: a VAE alone, or that of a whole checkpoint. Raises CheckpointError."""
    try:
        return PartFile(path, "vae", *read_vae_alone(_read(path, allow_pickle)[0]))
    except (OSError, ValueError) as error:
        raise CheckpointError(path.name, plain(error).split("\n")) from None


def read_controlnet_file(path: Path, part: str, unet: Mapping[str, Any], *, allow_pickle: bool = False) -> PartFile:
    """Return the ControlNet in a file, which becomes the part `part`. `unet`: the UNet's config. Raises CheckpointError."""
    try:
        return PartFile(path, part, *read_controlnet(_read(path, allow_pickle)[0], unet))
    except (OSError, ValueError) as error:
        raise CheckpointError(path.name, [f"{part}: {line}" for line in plain(error).split("\n")]) from None


def read_single_file(path: Path, *, allow_pickle: bool = False, with_vae: bool = True) -> SingleFile:
    """Return what a safetensors file or a file of torch.save holds, without its VAE if another one replaces it.

    Raises CheckpointError with every fault.
    """
    try:
        tensors, metadata = _read(path, allow_pickle)
        return SingleFile(path, read_original(tensors, metadata, with_vae=with_vae), metadata)
    except (OSError, ValueError) as error:
        raise CheckpointError(path.name, plain(error).split("\n")) from None


def _read(path: Path, allow_pickle: bool) -> tuple[Tensors, Mapping[str, str]]:
    """Return the tensors and the metadata of a file. Its contents decide what it is, not its name."""
    if is_torch_file(path):
        if not allow_pickle:
            raise ValueError(REFUSED_PICKLE)
        return with_scales(read_torch_file(path)), {}
    try:
        tensors, metadata = read_header_and_metadata(path)
    except ValueError as error:
        if path.suffix == ".safetensors":
            raise
        raise ValueError(f"neither a file of torch.save nor a safetensors file: {error}") from None
    return with_scales(tensors), metadata
