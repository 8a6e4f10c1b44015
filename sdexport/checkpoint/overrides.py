"""Replace parts of a checkpoint: its VAE, its documents, or what its UNet predicts."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdexport.checkpoint.card import Card
from sdexport.checkpoint.configs.tables import IMAGE_PROJECTION
from sdexport.checkpoint.folder import DiffusersFolder
from sdexport.checkpoint.opening import PATH as SCHEDULER
from sdexport.checkpoint.opening import without_defaults
from sdexport.checkpoint.original.file import PartFile, read_controlnet_file, read_vae_file
from sdexport.checkpoint.pipelines import VAES
from sdexport.checkpoint.source import Source, StoredWeights
from sdexport.checkpoint.weights.ip_adapter import IpAdapter, read_ip_adapter
from sdexport.errors import CheckpointError
from sdruntime.bundle.manifest import Precision
from sdruntime.bundle.model import PredictionType
from sdruntime.bundle.roles import CONTROLNET, IMAGE_ENCODER, T2I_ADAPTER, role, short_name
from sdruntime.errors import SettingError, shown

_VAE, _VAE_CONFIG, _UNET_CONFIG = "vae", "vae/config.json", "unet/config.json"
PREVIEW_VAE = "preview_vae"
_INDEX = "model_index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What replaces parts of a checkpoint. Plain data, so that jobs can carry it; the paths are of this machine.

    `prediction_type` replaces the scheduler's. `config` is a diffusers folder whose documents (configs, tokenizers, scheduler)
    replace the checkpoint's own; it needs no weights. `vae` is a folder or file with another VAE. `preview_vae` is a folder with
    a tiny VAE whose decoder becomes a component for previews. `controlnets` are folders and files of ControlNets, and
    folders of T2I-Adapters, by component. `loras` are merged into the weights: FILE:SCALE:TEXT_SCALE each. `ip_adapter` is the
    file of an IP-Adapter, and `image_encoder` the folder of its image encoder; "" for the one beside the file.
    """

    prediction_type: PredictionType | None = None
    config: str = ""
    vae: str = ""
    preview_vae: str = ""
    controlnets: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    ip_adapter: str = ""
    image_encoder: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loras", tuple(self.loras))  # a list, if it comes from another process

    def __bool__(self) -> bool:
        return self != NO_OVERRIDES


NO_OVERRIDES = Overrides()


def named_controlnets(controlnets: Iterable[str], t2i_adapters: Iterable[str] = ()) -> dict[str, str]:
    """Return the MODEL of each "[NAME=]MODEL" by the name of its component. Raises SettingError."""
    named: dict[str, str] = {}
    for kind, texts in ((CONTROLNET, controlnets), (T2I_ADAPTER, t2i_adapters)):
        for text in texts:
            where = f"{_option_of(kind)} {shown(text)}"
            match = re.fullmatch(r"(?:([a-z0-9][a-z0-9_-]{0,39})=)?(.+)", text)
            if match is None:
                raise SettingError(f"{where}: expected MODEL or NAME=MODEL")
            component = f"{kind}_{match[1]}" if match[1] and match[1] != kind else kind
            if short_name(component) in map(short_name, named):
                which = match[1] or "without a name"
                raise SettingError(f"{where}: the second one {which}: give each of several a name, as NAME=MODEL")
            named[component] = match[2]
    return named


def _option_of(component: str) -> str:
    return "--t2i-adapter" if role(component).kind == "T2I-Adapter" else "--controlnet"


class Overridden:
    """A source with parts of others."""

    def __init__(self, source: Source, overrides: Overrides, precision: Precision, *, allow_pickle: bool) -> None:
        self.path, self._source, self._prediction = source.path, source, overrides.prediction_type
        self._documents = _documents(Path(overrides.config), precision) if overrides.config else None
        self._vae = _vae(Path(overrides.vae), precision, allow_pickle) if overrides.vae else None
        self._preview = _preview_vae(Path(overrides.preview_vae), precision, allow_pickle) if overrides.preview_vae else None
        self._added: dict[str, Source] = {
            name: self._controlnet(name, Path(place), precision, allow_pickle) for name, place in overrides.controlnets.items()
        }
        self._adapter = read_ip_adapter(Path(overrides.ip_adapter)) if overrides.ip_adapter else None
        encoder = None if self._adapter is None else _image_encoder(self._adapter, overrides, precision, allow_pickle)
        lines = list(source.inferred)
        if self._documents is not None:
            lines.append(f"configs, tokenizers and scheduler: of {self._documents.path.name}, where it has them (--config)")
        if self._vae is not None:
            lines.append(f"VAE: of {self._vae.path.name} (--vae)")
        if self._preview is not None:
            lines.append(f"decoder of previews: of {self._preview.path.name} (--preview-vae)")
        lines += [f"{name}: of {source.path.name} ({_option_of(name)})" for name, source in self._added.items()]
        if encoder is not None and self._adapter is not None:
            lines.append(f"{IMAGE_ENCODER}: of {encoder.path.name}, for {self._adapter.path.name} (--ip-adapter)")
            self._added[IMAGE_ENCODER] = encoder
        if self._prediction:
            lines.append(f"prediction type {self._prediction} (--prediction-type)")
        self.inferred = tuple(lines)

    def _controlnet(self, name: str, path: Path, precision: Precision, allow_pickle: bool) -> DiffusersFolder | PartFile:
        option, adapts = _option_of(name), role(name).kind == "T2I-Adapter"
        if path.is_file() and adapts:
            raise CheckpointError(path, [f"{option}: a single file: give the diffusers folder of the adapter, with config.json"])
        if path.is_file():
            unet: Any = {}
            with contextlib.suppress(OSError, ValueError):  # reported where the config is read
                unet = self._beside_vae(_UNET_CONFIG).document(_UNET_CONFIG)
            written = without_defaults(unet, _UNET_CONFIG, []) if isinstance(unet, dict) else {}
            return read_controlnet_file(path, name, written, allow_pickle=allow_pickle)
        if not path.is_dir():
            raise CheckpointError(path, [f"{option}: no such folder or file"])
        within = "adapter" if adapts else "controlnet"  # of a pipeline with it
        inner = (path / within).is_dir() and not (path / "config.json").exists()
        return DiffusersFolder(path, precision, allow_pickle, places={name: within if inner else "."})

    def document(self, path: str) -> Any:
        document = self._document(path)
        if path == SCHEDULER and self._prediction and isinstance(document, dict):
            return document | {"prediction_type": self._prediction}
        if path == _INDEX and self._vae is not None and isinstance(document, dict):
            return document | {_VAE: self._vae_class(self._vae)}
        return document

    def _vae_class(self, vae: DiffusersFolder | PartFile) -> list[str]:
        """Return the library and the class of the other VAE; its config names it, except in a file."""
        try:
            named = None if isinstance(vae, PartFile) else vae.document(_VAE_CONFIG).get("_class_name")
        except (OSError, ValueError, AttributeError):  # reported where the config is read
            named = None
        return list(next((pair for pair in VAES if pair[1] == named), VAES[0]))

    def _document(self, path: str) -> Any:
        if path == _VAE_CONFIG and isinstance(self._vae, PartFile):
            return dict(self._vae.config) | {"scaling_factor": self._scaling_factor(self._vae)}
        return self._owner(path).document(path)

    def _scaling_factor(self, vae: PartFile) -> Any:
        """Return the checkpoint's own scaling factor: a file of a VAE does not hold one."""
        try:
            return self._beside_vae(_VAE_CONFIG).document(_VAE_CONFIG)["scaling_factor"]
        except (OSError, ValueError, LookupError, TypeError):
            what = f"the checkpoint has no {_VAE_CONFIG} with one, and the file {vae.path.name} cannot hold one"
            raise ValueError(f"no scaling_factor is known: {what}: use a folder of a VAE, with config.json") from None

    def _owner(self, path: str) -> Source:
        """Return the source that a document is read from."""
        for part, source in ((_VAE, self._vae), (PREVIEW_VAE, self._preview), *self._added.items()):
            if source is not None and path.startswith(f"{part}/"):
                return source
        return self._beside_vae(path)

    def _beside_vae(self, path: str) -> Source:
        has = self._documents is not None and (self._documents.path / path).exists()
        return self._documents if self._documents is not None and has else self._source

    def file(self, path: str) -> bytes | None:
        if path in (SCHEDULER, _INDEX):
            return json.dumps(self.document(path)).encode()
        folder = path.rpartition("/")[0]  # a tokenizer's files belong together
        if self._documents is not None and folder and (self._documents.path / folder).is_dir():
            return self._documents.file(path)
        return self._source.file(path)

    def weights(self, part: str, faults: list[str]) -> StoredWeights:
        owner = {_VAE: self._vae, PREVIEW_VAE: self._preview, **self._added}.get(part) or self._source
        stored = owner.weights(part, faults)
        if part != "unet" or self._adapter is None:
            return stored
        file = {f"{part}/{self._adapter.path.name}": self._adapter.path}
        return StoredWeights(
            files=MappingProxyType({**stored.files, **file}),
            tensors=MappingProxyType({**stored.tensors, **self._adapter.weights(stored.tensors)}),
        )

    def card(self) -> Card:
        return self._source.card()

    def inputs(self, parts: Iterable[str]) -> Mapping[str, Path]:
        parts = tuple(parts)
        own = self._source.inputs(parts).items()
        inputs = {name: path for name, path in own if name.partition("/")[0] not in self._added}
        for source in (self._documents, self._vae, self._preview, *self._added.values()):
            listed = {} if source is None else source.inputs(parts)
            inputs |= {name: path for name, path in listed.items() if self._owner(name) is source and path.exists()}
        return inputs


class ImageEncoder:
    """A source of the image encoder of an IP-Adapter. The adapter's projection is among its settings and weights."""

    inferred: tuple[str, ...] = ()

    def __init__(self, folder: DiffusersFolder, adapter: IpAdapter) -> None:
        self.path, self._folder, self._adapter = folder.path, folder, adapter

    def document(self, path: str) -> Any:
        document = self._folder.document(path)
        if path == f"{IMAGE_ENCODER}/config.json" and isinstance(document, dict):
            return document | {IMAGE_PROJECTION: dict(self._adapter.projection)}
        return document

    def file(self, path: str) -> bytes | None:
        return self._folder.file(path)

    def weights(self, part: str, faults: list[str]) -> StoredWeights:
        stored = self._folder.weights(part, faults)
        return StoredWeights(files=stored.files, tensors=MappingProxyType({**stored.tensors, **self._adapter.image}))

    def card(self) -> Card:
        return self._folder.card()

    def inputs(self, parts: Iterable[str]) -> Mapping[str, Path]:
        return self._folder.inputs(parts)


def _image_encoder(adapter: IpAdapter, overrides: Overrides, precision: Precision, allow_pickle: bool) -> ImageEncoder:
    place = Path(overrides.image_encoder) if overrides.image_encoder else adapter.path.parent / IMAGE_ENCODER
    if not (place / "config.json").is_file():
        advice = "give the folder of the adapter's image encoder, with config.json, as --image-encoder DIR"
        raise CheckpointError(place, [f"no image encoder for {adapter.path.name}: {advice}"])
    folder = DiffusersFolder(place, precision, allow_pickle, places={IMAGE_ENCODER: "."})
    return ImageEncoder(folder, adapter)


def _documents(path: Path, precision: Precision) -> DiffusersFolder:
    if not path.is_dir():
        raise CheckpointError(path, ["--config: no such folder: give a diffusers folder; its weights are not needed"])
    return DiffusersFolder(path, precision, allow_pickle=False)


def _vae(path: Path, precision: Precision, allow_pickle: bool) -> DiffusersFolder | PartFile:
    if path.is_file():
        return read_vae_file(path, allow_pickle=allow_pickle)
    if not path.is_dir():
        raise CheckpointError(path, ["--vae: no such folder or file"])
    return DiffusersFolder(path, precision, allow_pickle, places={_VAE: _place_of_vae(path)})


def _preview_vae(path: Path, precision: Precision, allow_pickle: bool) -> DiffusersFolder:
    if not path.is_dir():
        raise CheckpointError(path, ["--preview-vae: no such folder: give one of an AutoencoderTiny, with config.json"])
    return DiffusersFolder(path, precision, allow_pickle, places={PREVIEW_VAE: _place_of_vae(path)})


def _place_of_vae(path: Path) -> str:
    """Return where the VAE is in a folder of a VAE or of a checkpoint."""
    return "." if (path / "config.json").exists() and not (path / _VAE).exists() else _VAE
