"""The manifest of a bundle: the contract between sdexport, which writes it, and sdruntime, which reads it.

`load_manifest` reports all faults of a manifest at once; `save_manifest` replaces the file by one rename.
`sdruntime.bundle.bundle` checks the files that a manifest lists.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sdruntime.bundle.audit import Audit
from sdruntime.bundle.dimensions import is_derived, named_in
from sdruntime.bundle.limits import LARGEST_DIM, MOST, MOST_AXES
from sdruntime.bundle.model import ModelSpec
from sdruntime.bundle.records import json_from_record, json_from_text, record_from_json, twins
from sdruntime.bundle.roles import of_kind, role
from sdruntime.errors import BundleError, plain, quoted
from sdruntime.system.document import LARGEST
from sdruntime.system.durable import replace_file
from sdruntime.system.files import FileFault, FileMissing, Folder

NAME = "manifest.json"
FORMAT = "sdexport-bundle"
REVISION = 1

Precision = Literal["fp32", "fp16", "bf16"]
Dtype = Literal["float32", "int32", "int64"]
Profile = Mapping[str, tuple[int, int, int]]

LONGEST_TEXT = 4096  # tokens

_SAFE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")


def check_path(path: str) -> None:
    """Raise ValueError unless `path` is at most four names of letters, digits and `_ . + -`, joined by `/`."""
    parts = path.split("/")
    if len(parts) > 4 or not all(_SAFE_PART.fullmatch(part) for part in parts):
        raise ValueError(f"{path!r} is not a plain name inside the bundle")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpec:
    """The size and SHA-256 of a file. Raises ValueError for a negative size or a malformed hash."""

    size: int  # bytes
    sha256: str

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size {self.size} is negative")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError("sha256 is not 64 hexadecimal digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor of a component. A dimension is a number, or a name (`batch`, `height`, …) whose size each call chooses."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if len(self.shape) > MOST_AXES:
            raise ValueError(f"tensor {self.name:.100}: {len(self.shape)} dimensions are above {MOST_AXES}")
        for dim in self.shape:
            if dim == "" or (isinstance(dim, int) and not 1 <= dim <= LARGEST_DIM):
                raise ValueError(f"tensor {self.name}: dimension {dim!r} is neither a name nor a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSpec:
    """A network of the pipeline and its ONNX files. `files`: the model first, then its external data."""

    files: tuple[str, ...]
    config: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    optional_inputs: tuple[TensorSpec, ...] = ()  # such as ControlNet residuals; zeros by default
    audit: Audit | None = None  # of a half-precision graph, if it was audited

    def __post_init__(self) -> None:
        if not self.files or not self.inputs or not self.outputs:
            raise ValueError("a component needs a file, an input and an output")
        _check_unique("tensor", [tensor.name for tensor in (*self.inputs, *self.optional_inputs, *self.outputs)])
        own = set(self.dimensions)
        images = {prefix + dim for dim in own for prefix in ("image_", "latent_")}
        _check_dimensions(self.inputs, own, parts=False)
        _check_dimensions(self.optional_inputs, own)
        _check_dimensions(self.outputs, own | images)

    @property
    def onnx(self) -> str:
        return self.files[0]

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The names of the dimensions whose sizes a call chooses, in the order of the inputs."""
        dims = [dim for tensor in self.inputs for dim in tensor.shape if isinstance(dim, str) and not is_derived(dim)]
        return tuple(dict.fromkeys(dims))

    @property
    def engine_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of an engine, including the optional ones."""
        return (*self.inputs, *self.optional_inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """An engine of a component: the library that built it, its requirements and the shapes it supports.

    `version` is the engine library's; `target` is "cpu", "cuda", a compute capability ("sm89") or "ampere+". A profile has
    (min, opt, max) for each named dimension, in the component's own units: rows for `batch`, latent cells for a UNet's `height`.
    `files`: the file that the library opens, then the files it refers to. `platform`: the required system and processor
    ("linux-x86_64"), "" for any. `options`: the backend's build options, so that the engine can be rebuilt.
    """

    component: str
    backend: str
    version: str
    target: str
    precision: Precision
    files: tuple[str, ...]
    profiles: tuple[Profile, ...]
    memory: int | None = None  # bytes of activations on the device, if known
    platform: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.files or not self.profiles:
            raise ValueError("an engine needs a file and a profile")
        for part in (self.backend, self.version, self.target):
            if not _SAFE_PART.fullmatch(part):
                raise ValueError(f"{part!r} is not a plain name")
        for profile in self.profiles:
            for name, (low, opt, high) in profile.items():
                if not 1 <= low <= opt <= high:
                    raise ValueError(f"range of {name}: min {low}, opt {opt}, max {high} do not rise from 1")
                if high > (most := MOST.get(name, LARGEST_DIM)):
                    raise ValueError(f"range of {name}: max {high:,} is above {most:,}")
        object.__setattr__(self, "profiles", tuple(MappingProxyType(dict(profile)) for profile in self.profiles))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def name(self) -> str:
        """The name in messages: the engine's first file, without the engines folder and the file's ending."""
        return self.files[0].removeprefix("engines/").rsplit(".", 1)[0]

    def admitting(self, **dims: int) -> list[int]:
        """Return the indices of the profiles that contain all of these sizes, the tightest first.

        A dimension that a profile does not name is not checked.
        """
        indices = [index for index, profile in enumerate(self.profiles) if _admits(profile, dims)]
        return sorted(indices, key=lambda index: math.prod(high - low + 1 for low, _, high in self.profiles[index].values()))

    def admits(self, **dims: int) -> bool:
        """Return whether a profile contains all of these sizes."""
        return bool(self.admitting(**dims))

    @property
    def shapes(self) -> str:
        """The sizes of each profile, as text for messages."""
        return " or ".join(
            ", ".join(f"{name} {low}" if low == high else f"{name} {low} to {high}" for name, (low, _, high) in profile.items())
            for profile in self.profiles
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of a bundle. Raises ValueError with every fault.

    `precision` is that of every `<component>/model.onnx`. `generation` increases with each change, so that a reader that misses a
    file can detect that the bundle has changed.
    """

    model: ModelSpec
    precision: Precision
    components: Mapping[str, ComponentSpec]
    files: Mapping[str, FileSpec]  # every file of the bundle except the manifest
    engines: tuple[EngineSpec, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    revision: int = REVISION
    generation: int = 0

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ValueError("; ".join(faults))
        for name in ("components", "files", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def text_length(self) -> int:
        """The number of tokens in the text encoder's input_ids, including start, end and padding."""
        return next(_text_lengths(self.components))[1]

    def size_of(self, engine: EngineSpec) -> int:
        """Return the bytes of an engine's files."""
        return sum(self.files[path].size for path in engine.files)

    def _faults(self) -> Iterable[str]:
        for path in (*self.components, *self.files):
            try:
                check_path(path)
            except ValueError as error:
                yield str(error)
        yield from _missing_components(self.components)
        yield from _unclear_texts(self.components)
        listed = [(f"component {name}", (*spec.files, spec.config)) for name, spec in self.components.items()]
        listed += [(f"engine {engine.name}", engine.files) for engine in self.engines]
        for owner, paths in listed:
            yield from (f"{owner}: {path} is not among the files" for path in paths if path not in self.files)
        for engine in self.engines:
            component = self.components.get(engine.component)
            if component is None:
                yield f"engine {engine.name}: the bundle has no component {engine.component!r}"
                continue
            for profile in engine.profiles:
                if set(profile) != set(component.dimensions):
                    dimensions, ranges = ", ".join(component.dimensions), ", ".join(profile)
                    yield f"engine {engine.name}: ranges for {ranges or 'nothing'}, but {engine.component} has {dimensions}"


def opened_folder(folder: Path) -> Folder:
    """Open the folder of a bundle. Raises BundleError."""
    try:
        return Folder(folder)
    except FileFault as error:
        raise BundleError(folder / NAME, [f"not a bundle: {error} (sdexport build writes one)"]) from error


def load_manifest(folder: Path) -> Manifest:
    """Read `folder`/manifest.json. Raises BundleError with every fault."""
    return read_manifest(opened_folder(folder))


def read_manifest(files: Folder) -> Manifest:
    """Read the manifest of an open folder, as `load_manifest` does."""
    path, document = files.path / NAME, manifest_document(files)
    faults: list[str] = []
    manifest = record_from_json(Manifest, document, where="", faults=faults)
    if faults:
        raise BundleError(path, faults)
    assert isinstance(manifest, Manifest)
    return manifest


def manifest_document(files: Folder) -> dict[str, Any]:
    """Return the JSON document in manifest.json after checking only its format and revision. Raises BundleError."""
    path = files.path / NAME
    try:
        document = json_from_text(files.read(NAME, most=LARGEST).decode(), infinity=False)
    except FileMissing:
        raise BundleError(path, [_no_manifest(files)]) from None
    except (FileFault, ValueError) as error:
        raise BundleError(path, [f"not readable: {plain(error)}"]) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(path, [f"format: expected {FORMAT!r}: not the manifest of a bundle"])
    if document.get("revision") != REVISION:
        fault = f"revision {document.get('revision')!r}, but this sdruntime reads revision {REVISION}"
        raise BundleError(path, [f"{fault}: upgrade sdruntime, or export again with the sdexport that goes with it"])
    return document


def _no_manifest(files: Folder) -> str:
    """Return the fault of a folder without a manifest, which may be a checkpoint."""
    try:
        files.status("model_index.json")
    except FileFault:
        return "no such file: not a bundle (sdexport build writes one)"
    command = f"sdexport build {quoted(files.path)} -o {quoted(f'{files.path}-bundle')}"
    return f"no such file: {files.path} is a checkpoint, not a bundle: {command}"


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder`/manifest.json by one rename, so that a power failure leaves either the old or the new one."""
    document = json_from_record(manifest)
    head = {key: document.pop(key) for key in ("format", "revision")}
    replace_file(folder / NAME, (json.dumps(head | document, indent=1, allow_nan=False) + "\n").encode())


def _missing_components(components: Mapping[str, ComponentSpec]) -> Iterable[str]:
    for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        kind = role(name).kind
        if name not in components and not (kind == "text encoder" and of_kind(components, kind)):
            yield f"components: {name} is missing"


def _text_lengths(components: Mapping[str, ComponentSpec]) -> Iterator[tuple[str, int]]:
    """Yield each text encoder's name and its number of tokens, or 0 if its inputs do not specify it."""
    for name in of_kind(components, "text encoder"):
        shape = next((tensor.shape for tensor in components[name].inputs if tensor.name == "input_ids"), ())
        yield name, shape[1] if len(shape) == 2 and isinstance(shape[1], int) else 0


def _unclear_texts(components: Mapping[str, ComponentSpec]) -> Iterable[str]:
    lengths = dict(_text_lengths(components))
    for name, length in lengths.items():
        if not 2 < length <= LONGEST_TEXT:
            yield f"component {name}: input_ids takes {length or 'no fixed number of'} tokens, not 3 to {LONGEST_TEXT:,}"
    if len(set(lengths.values())) > 1:
        yield f"text encoders of different lengths: {', '.join(f'{name} takes {length}' for name, length in lengths.items())}"


def _admits(profile: Profile, dims: Mapping[str, int]) -> bool:
    return all(profile[name][0] <= size <= profile[name][2] for name, size in dims.items() if name in profile)


def _check_dimensions(tensors: Iterable[TensorSpec], known: Collection[str], *, parts: bool = True) -> None:
    """Raise ValueError for a dimension whose name is not in `known`, and for a part of one unless `parts`."""
    for tensor in tensors:
        for dim in tensor.shape:
            if isinstance(dim, str) and (named_in(dim) not in known or ("/" in dim and not parts)):
                raise ValueError(f"tensor {tensor.name}: dimension {dim!r} does not follow from those of the inputs")


def _check_unique(what: str, names: list[str]) -> None:
    if repeated := sorted(twins(names)):
        raise ValueError(f"{what} named twice: {', '.join(repeated)}")
