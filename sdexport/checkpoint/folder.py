"""A diffusers folder: its documents, and the files of its weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdexport.checkpoint.card import Card, read_card
from sdexport.checkpoint.source import StoredWeights
from sdexport.checkpoint.tree import read_own
from sdexport.checkpoint.weights.files import WeightFile, choose_weight_file, full_weights_name
from sdexport.checkpoint.weights.safetensors import StoredTensor, is_regular, merge_shards, read_header
from sdexport.checkpoint.weights.torch_file.file import REFUSED_PICKLE, read_torch_file
from sdexport.errors import CheckpointError
from sdruntime.bundle.manifest import NAME, Precision, load_manifest
from sdruntime.bundle.records import read_json
from sdruntime.errors import BundleError, plain, quoted


class DiffusersFolder:
    """A source of `sdexport.checkpoint.checkpoint`. Raises CheckpointError if the folder is a bundle.

    `places`: the folder of a part, if it is not the one of its name.
    """

    inferred: tuple[str, ...] = ()

    def __init__(
        self, path: Path, precision: Precision, allow_pickle: bool, *, places: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.path, self.precision, self.allow_pickle, self._places = path, precision, allow_pickle, places
        self._refuse_a_bundle()

    def document(self, path: str) -> Any:
        return read_json(self._location(path))

    def _location(self, path: str) -> Path:
        """Return the path of a file that a diffusers folder has at `path`."""
        part, _, rest = path.partition("/")
        return self.path / self._places.get(part, part) / rest

    def file(self, path: str) -> bytes | None:
        return read_own(self._location(path), self.path)

    def card(self) -> Card:
        return read_card(self.path)

    def inputs(self, parts: Iterable[str]) -> Mapping[str, Path]:
        names = ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts))
        return {name: self._location(name) for name in names}

    def weights(self, part: str, faults: list[str]) -> StoredWeights:
        files, pickled = self._weight_files(part, faults)
        tensors = self._tensors(part, files, read_torch_file if pickled else read_header, faults)
        named = {f"{part}/{path.name}": path for path in files}
        return StoredWeights(files=MappingProxyType(named), tensors=tensors)

    def _refuse_a_bundle(self) -> None:
        """Raise CheckpointError if the folder is a bundle, which has a model_index.json too."""
        if (self.path / NAME).is_file():
            with contextlib.suppress(BundleError):
                load_manifest(self.path)
                advice = f"sdruntime build {quoted(self.path)} --backend onnxruntime adds engines to it"
                raise CheckpointError(self.path, [f"a bundle already, not a checkpoint: {advice}"])

    def _weight_files(self, name: str, faults: list[str]) -> tuple[tuple[Path, ...], bool]:
        """Return the files that diffusers would open (the weights, or the shards of an index), and whether they are pickles."""
        folder = self._location(name)
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        file = choose_weight_file(name, present, self.precision)
        if file is None:
            others = sorted(path for path in present if path.endswith((".safetensors", ".bin")))
            beside = f": {', '.join(others[:8])} exist, but diffusers opens none of them" if others else ""
            faults.append(f"{name}/{full_weights_name(name)} is missing{beside}")
            return (), False
        if file.pickled and not self.allow_pickle:
            faults.append(f"{name}/{file.name} is {REFUSED_PICKLE}")
            return (), True
        files = self._shards(name, file, faults) if file.index else (folder / file.name,)
        unreadable = [path for path in files if not is_regular(path)]
        faults.extend(
            f"{name}/{path.name} {'is not a regular file' if path.exists() else 'is missing'}"
            + (f", a shard named by {file.name}" if file.index else "")
            for path in unreadable
        )
        return tuple(path for path in files if path not in unreadable), file.pickled

    def _shards(self, name: str, index: WeightFile, faults: list[str]) -> tuple[Path, ...]:
        listed = f"{name}/{index.name}"
        try:
            document = self.document(listed)
        except (OSError, ValueError) as error:
            faults.append(f"{listed} is not readable: {plain(error)}")
            return ()
        places = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(places, dict) or not places:
            faults.append(f"{listed}: weight_map is missing")
            return ()
        shards = sorted({str(shard) for shard in places.values()})
        ending = "bin" if index.pickled else "safetensors"
        valid = [shard for shard in shards if re.fullmatch(rf"[\w.-]+\.{ending}", shard)]
        faults.extend(
            f"{listed}: the shard {shard!r:.60} is not a .{ending} file of this folder" for shard in shards if shard not in valid
        )
        return tuple(self._location(f"{name}/{shard}") for shard in valid)

    def _tensors(
        self, name: str, files: tuple[Path, ...], read: Callable[[Path], dict[str, StoredTensor]], faults: list[str]
    ) -> Mapping[str, StoredTensor]:
        headers = []
        for path in files:
            try:
                headers.append((path, read(path)))
            except (OSError, ValueError) as error:
                faults.append(f"{path.relative_to(self.path)}: {plain(error)}")
        try:
            return MappingProxyType(merge_shards(headers))
        except ValueError as error:
            faults.append(f"{name}: {error}")
            return {}
