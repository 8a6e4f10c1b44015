"""The reference outputs of a bundle: what its networks returned in PyTorch, in float32.

    golden/golden.json    Golden: cases, drawings, tolerances, and which checkpoint was run
    golden/numbers.npz    a sample of each output of each case; the image of each drawing

Inputs are not stored: `feeds` makes them again from a seed, the same on every machine to one unit in the last place.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import ComponentSpec, Manifest, Precision
from sdruntime.bundle.records import json_from_record, record_from_json
from sdruntime.bundle.roles import role
from sdruntime.errors import BundleError, plain, quoted
from sdruntime.pipeline.request import Request
from sdruntime.sampling.noise import NoiseStream
from sdruntime.verification.npz import LARGEST, read_npz
from sdruntime.verification.tolerance import TOLERANCES, Tolerance

DOCUMENT, NUMBERS = "golden/golden.json", "golden/numbers.npz"
FORMAT, REVISION = "sdexport-golden", 1
SAMPLE = 4096  # numbers of an output that are kept
MOST_NUMBERS = 1 << 26  # of a case's inputs
_LARGEST_VAE = 768 * 768  # pixels: a VAE in float32 takes gigabytes above
_RANGES = {"timestep": 1000, "time_ids": 1024}  # inputs that are whole numbers, whatever their type
_LARGEST_PICTURE = 256  # pixels of a side
_PROMPTS = ("a photograph of a red cat in a green garden", "an old map of an island, and the sea around it, in ink")


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """An output in five numbers; `norm` is its Euclidean length."""

    shape: tuple[int, ...]
    mean: float
    std: float
    min: float
    max: float
    norm: float

    @property
    def largest(self) -> float:
        return max(abs(self.min), abs(self.max))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of a component. `dims`: its named dimensions; `below`: of each input of whole numbers, the bound that they lie
    under. `outputs`: what the reference answered; a sample of each is in the numbers, under `key`."""

    component: str
    name: str
    seed: int
    dims: Mapping[str, int]
    below: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, Digest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dims", "below", "outputs"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def key(self, output: str) -> str:
        return f"{self.component}.{self.name}.{output}"

    def feeds(self, component: ComponentSpec) -> dict[str, Array]:
        """The inputs, made from the seed: unit normal numbers, or whole ones below a bound."""
        noise = NoiseStream(self.seed)
        made: dict[str, Array] = {}
        for spec in component.inputs:
            shape = tuple(self.dims[dim] if isinstance(dim, str) else dim for dim in spec.shape)
            if spec.name in self.below:
                made[spec.name] = noise.integers(self.below[spec.name], shape).astype(spec.dtype)
            else:
                made[spec.name] = noise.normal(shape)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceImage:
    """An image of the whole pipeline, with the checkpoint's own sampler, or `sampler`. `size`: pixels, (width, height)."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]
    sampler: str | None = None

    @property
    def request(self) -> Request:
        return Request(
            prompt=self.prompt,
            negative=self.negative,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            size=self.size,
            sampler=self.sampler,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """`checkpoint`: the hash of the weights that the reference ran; `reference`: the versions of its libraries."""

    checkpoint: str
    reference: Mapping[str, str]
    cases: tuple[Case, ...]
    drawings: tuple[ReferenceImage, ...]
    tolerances: Mapping[str, Tolerance]
    format: str = FORMAT
    revision: int = REVISION

    def __post_init__(self) -> None:
        missing = sorted(set(TOLERANCES) - set(self.tolerances))
        if missing:
            raise ValueError(f"tolerances: {', '.join(missing)} missing")
        for name in ("reference", "tolerances"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


def cases_of(manifest: Manifest, vocabulary: Mapping[str, int]) -> tuple[Case, ...]:
    """The calls of a bundle's reference outputs: each component at a small size in two rows, and at the model's own in one
    (a VAE up to 768×768 pixels). `step`, which is arithmetic without weights, has none.

    `vocabulary`: of each text encoder, how many tokens it knows.
    """
    made: list[Case] = []
    model = manifest.model
    small = (2 * model.size_multiple, 3 * model.size_multiple)
    for component, spec in manifest.components.items():
        part = role(component)
        if not part.has_reference:
            continue
        below = {tensor.name: _RANGES[tensor.name] for tensor in spec.inputs if tensor.name in _RANGES}
        below |= {tensor.name: vocabulary[component] for tensor in spec.inputs if tensor.dtype != "float32"}
        for name, rows, (height, width) in (("small", 2, small), ("own", 1, model.default_size)):
            sized = {"height", "width"} <= set(spec.dimensions)
            if name == "own" and (not sized or (part.stage == "vae" and height * width > _LARGEST_VAE)):
                continue
            unit = part.factor(model.vae_factor)
            every = {"batch": rows, "height": height // unit, "width": width // unit, "sequence": manifest.text_length}
            dims = {dim: every[dim] for dim in spec.dimensions}
            made.append(Case(component=component, name=name, seed=1000 + len(made), dims=dims, below=below))
    return tuple(made)


def reference_images(manifest: Manifest, *, steps: int = 6, sampler: str | None = None) -> tuple[ReferenceImage, ...]:
    """The reference images of a bundle: two prompts, the model's own examples first, at most 256 pixels a side where the
    model allows it."""
    model = manifest.model
    multiple = math.lcm(model.size_multiple, 8)  # diffusers' pipelines take eights, whatever the VAE's factor
    height, width = (_small_side(side, multiple) for side in model.default_size)
    return tuple(
        ReferenceImage(
            prompt=prompt, negative="a blurred text", seed=7 + k, steps=steps, guidance=5.0, size=(width, height), sampler=sampler
        )
        for k, prompt in enumerate((*model.prompts, *_PROMPTS)[: len(_PROMPTS)])
    )


def _small_side(side: int, multiple: int) -> int:
    return max(multiple, min(side, _LARGEST_PICTURE) // multiple * multiple)


def digest_of(output: Array) -> Digest:
    wide = output.astype(np.float64)
    return Digest(
        shape=output.shape,
        mean=float(wide.mean()),
        std=float(wide.std()),
        min=float(wide.min()),
        max=float(wide.max()),
        norm=float(np.linalg.norm(wide)),
    )


def sample_of(output: Array, seed: int) -> Array:
    """Some numbers of an output, float32 [at most SAMPLE], from places that follow from the seed."""
    flat = output.reshape(-1)
    if flat.size <= SAMPLE:
        return flat.astype(np.float32)
    return flat[NoiseStream(seed).integers(flat.size, (SAMPLE,))].astype(np.float32)


def write_golden(bundle: Bundle, golden: Golden, numbers: Mapping[str, Array]) -> Bundle:
    """Return the bundle with these reference outputs instead of its own."""
    packed = io.BytesIO()
    np.savez_compressed(packed, **numbers)  # type: ignore[arg-type]
    document = json.dumps(json_from_record(golden), indent=1, allow_nan=False) + "\n"
    return bundle.with_files({DOCUMENT: document.encode(), NUMBERS: packed.getvalue()})


def build_command(bundle: Bundle, precision: Precision | None = None) -> str:
    """Return the command that exports a bundle again, in its own precision where None.

    The path of a folder is not kept in a bundle: its name stands behind path/to/.
    """
    source = str(bundle.manifest.provenance.get("source", "")) or "checkpoint"
    model = source if "/" in source else f"path/to/{source}"
    return f"sdexport build {quoted(model)} --precision {precision or bundle.manifest.precision} -o {quoted(bundle.folder)}"


def read_golden(bundle: Bundle) -> tuple[Golden, dict[str, Array]]:
    """Return the reference outputs of a bundle.

    Raises BundleError if it has none, with the command that makes them, or if they are damaged.
    """
    if DOCUMENT not in bundle.manifest.files or NUMBERS not in bundle.manifest.files:
        fault = "no reference outputs: it was built with --no-verify, or by an older sdexport"
        raise BundleError(bundle.folder, [f"{fault}; this builds it with them: {build_command(bundle)}"])
    document = bundle.read_json(DOCUMENT)
    if not isinstance(document, dict) or (document.get("format"), document.get("revision")) != (FORMAT, REVISION):
        raise BundleError(bundle.folder, [f"{DOCUMENT}: expected {FORMAT} of revision {REVISION}: upgrade sdruntime"])
    faults: list[str] = []
    golden = record_from_json(Golden, document, where=DOCUMENT, faults=faults)
    numbers: dict[str, Array] = {}
    if not faults:
        try:
            numbers = read_npz(bundle.read(NUMBERS, most=LARGEST))
        except ValueError as error:
            raise BundleError(bundle.folder, [f"{NUMBERS}: not readable: {plain(error)}"]) from error
        faults = list(_faults(golden, numbers, bundle.manifest))
    if faults:
        raise BundleError(bundle.folder, faults)
    return golden, numbers


def picture_key(index: int) -> str:
    return f"picture.{index}"


def _numbers_of(case: Case, spec: ComponentSpec) -> int:
    shapes = [[case.dims.get(dim, 1) if isinstance(dim, str) else dim for dim in tensor.shape] for tensor in spec.inputs]
    return sum(math.prod(shape) for shape in shapes)


def _faults(golden: Golden, numbers: Mapping[str, Array], manifest: Manifest) -> Any:
    for case in golden.cases:
        spec = manifest.components.get(case.component)
        if spec is None:
            yield f"{DOCUMENT}: a case of {case.component!r}, which the bundle does not have"
            continue
        if (numbers_asked := _numbers_of(case, spec)) > MOST_NUMBERS:
            yield f"{DOCUMENT}: case {case.component}.{case.name}: {numbers_asked:,} numbers as inputs, above {MOST_NUMBERS:,}"
            continue
        unsized = sorted(set(spec.dimensions) - set(case.dims))
        if unsized or set(case.outputs) != {tensor.name for tensor in spec.outputs}:
            yield f"{DOCUMENT}: case {case.component}.{case.name} is not of the inputs and outputs of {case.component}"
            continue
        for output, digest in case.outputs.items():
            found = numbers.get(case.key(output))
            if found is None or found.shape != (min(SAMPLE, math.prod(digest.shape)),) or found.dtype != np.float32:
                yield f"{NUMBERS}: {case.key(output)} is missing, or of another size"
    for index, drawing in enumerate(golden.drawings):
        found = numbers.get(picture_key(index))
        if found is None or found.shape != (*drawing.size[::-1], 3) or found.dtype != np.uint8:
            yield f"{NUMBERS}: {picture_key(index)} is missing, or of another size"
