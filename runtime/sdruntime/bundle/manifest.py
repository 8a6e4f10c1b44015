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
from sdruntime.bundle.dimensions import named_in
from sdruntime.bundle.limits import LARGEST_DIM, LARGEST_SIDE, MODEL, MOST, MOST_AXES, MOST_GUIDANCE
from sdruntime.bundle.records import json_from_record, json_from_text, record_from_json, twins
from sdruntime.bundle.roles import of_kind, role
from sdruntime.errors import BundleError, SettingError, plain, quoted
from sdruntime.sampling.samplers import resolve
from sdruntime.sampling.table import MOST_STEPS
from sdruntime.system.document import LARGEST
from sdruntime.system.durable import replace_file
from sdruntime.system.files import FileFault, FileMissing, Folder

NAME = "manifest.json"
FORMAT = "sdexport-bundle"
REVISION = 1

Precision = Literal["fp32", "fp16", "bf16"]
Family = Literal["sd1", "sd2", "sdxl"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
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
        dims = [dim for tensor in self.inputs for dim in tensor.shape if isinstance(dim, str) and "/" not in dim]
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
class LinearPreview:
    """Colours of a latent cell without the VAE: colour = weights · latents + bias, in [-1, 1].

    `weights`: for red, green and blue, a number per latent channel. `psnr`: dB against the VAE's images, averaged over each cell.
    """

    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]
    psnr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the model's authors generate images with, for requests that do not say otherwise; None: nothing is known."""

    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps {self.steps} is outside 1 to {MOST_STEPS:,}")
        if self.guidance is not None and not 0 <= self.guidance <= MOST_GUIDANCE:
            raise ValueError(f"guidance {self.guidance:g} is outside 0 to {MOST_GUIDANCE}")
        if self.sampler is not None:
            try:
                resolve(self.sampler)
            except SettingError as error:
                raise ValueError(str(error)) from error

    def __str__(self) -> str:
        """Return what is known as text: "steps 4, guidance 1"."""
        guidance = None if self.guidance is None else f"{self.guidance:g}"
        known = {"steps": self.steps, "guidance": guidance, "sampler": self.sampler}
        return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


NO_DEFAULTS = Defaults()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The properties of the checkpoint that the pipeline needs. Sizes are in pixels, (height, width)."""

    name: str
    family: Family
    prediction_type: PredictionType
    scaling_factor: float  # latents = (posterior - shift_factor) * scaling_factor
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()  # per channel; with latents_std: latents = (posterior - mean) * scaling_factor / std
    latents_std: tuple[float, ...] = ()
    latent_channels: int = 4
    vae_factor: int = 8  # pixels per latent cell
    size_multiple: int = 64  # pixels: the VAE's factor times the UNet's downsampling
    size_step: int | None = None  # pixels: sizes must be multiples of it; None: of size_multiple, for a UNet that cannot crop
    default_size: tuple[int, int] = (512, 512)
    defaults: Defaults = NO_DEFAULTS
    pad_token: str = "<|endoftext|>"
    zero_empty_negative: bool = False  # SDXL base: no negative prompt means zeros, not the empty text's embedding
    masked_decoder: bool = False  # the decoder should also take an image and a mask, which is not supported: no inpainting
    license: str = "unknown"  # an SPDX identifier, or the id on the model card
    prompts: tuple[str, ...] = ()  # example prompts from the model card
    preview: LinearPreview | None = None

    def __post_init__(self) -> None:
        for name in ("scaling_factor", "latent_channels", "vae_factor", "size_multiple"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers for {self.latent_channels} latent channels")
        if bool(self.latents_mean) != bool(self.latents_std) or any(std <= 0 for std in self.latents_std):
            raise ValueError("latents_mean and latents_std belong together, and latents_std is positive")
        if any(abs(mean) > 1e6 for mean in self.latents_mean) or not all(1e-6 <= std <= 1e6 for std in self.latents_std):
            raise ValueError("latents_mean is outside -1e6 to 1e6, or latents_std outside 1e-6 to 1e6")
        for name, least, most in MODEL:
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name):g} is outside {least:g} to {most:g}")
        if self.preview is not None:
            shape = [*map(len, self.preview.weights), len(self.preview.bias)]
            if shape != [*[self.latent_channels] * 3, 3]:
                raise ValueError(f"preview: expected 3 colours of {self.latent_channels} weights, and 3 numbers as bias")
        if self.size_multiple % self.vae_factor:
            raise ValueError(f"size_multiple {self.size_multiple} is not a multiple of vae_factor {self.vae_factor}")
        if self.size_step is not None and (self.size_step < 1 or self.size_step % self.vae_factor):
            raise ValueError(f"size_step {self.size_step} is not a multiple of vae_factor {self.vae_factor}")
        if any(side < 1 or side % self.step for side in self.default_size):
            raise ValueError(f"default_size {self.default_size} is not a multiple of {self.step}")
        if max(self.default_size) > LARGEST_SIDE:
            raise ValueError(f"default_size {self.default_size}: a side is above {LARGEST_SIDE:,} pixels")

    @property
    def step(self) -> int:
        """What sizes must be multiples of, in pixels."""
        return self.size_step or self.size_multiple


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
    """Raise ValueError for a dimension whose name is not in `known`, and for a fraction unless `parts`."""
    for tensor in tensors:
        for dim in tensor.shape:
            if isinstance(dim, str) and (named_in(dim) not in known or (dim not in known and not parts)):
                raise ValueError(f"tensor {tensor.name}: dimension {dim!r} does not follow from those of the inputs")


def _check_unique(what: str, names: list[str]) -> None:
    if repeated := sorted(twins(names)):
        raise ValueError(f"{what} named twice: {', '.join(repeated)}")
