"""The reference outputs of a bundle: the outputs of its networks in PyTorch, in float32.

    golden/golden.json    Golden: the cases, the images' requests (`drawings`), tolerances, and the checkpoint that was run
    golden/numbers.npz    a sample of each output of each case, and each image

Inputs are not stored: `Case.feeds` generates them from a seed, equal on every machine to one unit in the last place.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from sdruntime.arrays import Array
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.dimensions import named_in, size_of
from sdruntime.bundle.interface import pixels_of_cell
from sdruntime.bundle.limits import LARGEST_DIM, NOISE_LEVELS
from sdruntime.bundle.manifest import ComponentSpec, Manifest, Precision
from sdruntime.bundle.records import json_from_record, record_from_json
from sdruntime.bundle.roles import role
from sdruntime.bundle.tasks import NOISE_LEVEL, TIME_IDS, guidance_width, task_of
from sdruntime.errors import BundleError, plain, quoted
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.noise.cpu import NoiseStream
from sdruntime.verification.inputs import task_settings
from sdruntime.verification.npz import LARGEST, read_npz
from sdruntime.verification.tolerance import TOLERANCES, Tolerance

DOCUMENT, NUMBERS = "golden/golden.json", "golden/numbers.npz"
FORMAT, REVISION = "sdexport-golden", 1
SAMPLE = 4096  # numbers that are stored of an output
MOST_BOUND = 1 << 31  # of whole numbers, which are int32
MOST_NUMBERS = 1 << 26  # in the inputs of a case
_LARGEST_VAE = 768 * 768  # pixels: a larger VAE call in float32 needs gigabytes
# bounds of inputs that are whole numbers, whatever their type
_RANGES = {"timestep": 1000, TIME_IDS: 1024, NOISE_LEVEL: NOISE_LEVELS}
_LARGEST_SIDE = 256  # pixels, of an image
_PROMPTS = ("a photograph of a red cat in a green garden", "an old map of an island, and the sea around it, in ink")


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """The shape and statistics of an output. `norm`: its Euclidean norm."""

    shape: tuple[int, ...]
    mean: float
    std: float
    min: float
    max: float
    norm: float

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.min), abs(self.max))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of a component.

    `dims`: its named dimensions. `below`: the exclusive upper bound of each input of whole numbers. `outputs`: digests of the
    reference outputs; a sample of each is in the numbers, under `key`. `optional`: it also has the optional inputs.
    """

    component: str
    name: str
    seed: int
    dims: Mapping[str, int]
    below: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, Digest] = field(default_factory=dict)
    optional: bool = False

    def __post_init__(self) -> None:
        for name in ("dims", "below", "outputs"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for what, numbers, most in (("below", self.below, MOST_BOUND), ("dims", self.dims, LARGEST_DIM)):
            if faults := [name for name, number in numbers.items() if not 1 <= number <= most]:
                raise ValueError(f"case {self.name}: {what} {faults[0]}: {numbers[faults[0]]} is outside 1 to {most:,}")

    def key(self, output: str) -> str:
        """Return the name of an output's sample in the numbers."""
        return f"{self.component}.{self.name}.{output}"

    def feeds(self, component: ComponentSpec) -> dict[str, Array]:
        """Generate the inputs from the seed: standard normal numbers, or whole numbers below a bound."""
        noise = NoiseStream(self.seed)
        feeds: dict[str, Array] = {}
        for spec in component.engine_inputs if self.optional else component.inputs:
            shape = tuple(size_of(dim, self.dims) for dim in spec.shape)
            if spec.name in self.below:
                feeds[spec.name] = noise.integers(self.below[spec.name], shape).astype(spec.dtype)
            else:
                feeds[spec.name] = noise.normal(shape)
        return feeds


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceImage:
    """The settings of an image of the whole pipeline. `sampler` None: the checkpoint's own. `size`: pixels, (width, height)."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]
    sampler: str | None = None

    def request(self, manifest: Manifest) -> Request:
        """Return the request, with the image and the mask that the bundle's UNet needs."""
        task = task_of(manifest.components["unet"])
        return Request(
            prompt=self.prompt,
            negative=self.negative,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            size=self.size,
            sampler=self.sampler,
            **task_settings(task, self.size, self.seed, factor=manifest.model.vae_factor),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """The reference outputs. `checkpoint`: the hash of the weights that were run; `reference`: the versions of the libraries."""

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
    """Return the cases of a bundle, without outputs.

    Each component is called at a small size with two rows, and at the model's own size with one (a VAE up to 768×768 pixels). A
    UNet that takes the residuals of ControlNets is also called with them.
    `step`, which is arithmetic without weights, has no cases. `vocabulary`: the number of tokens of each text encoder.
    """
    cases: list[Case] = []
    model = manifest.model
    odd = model.step % model.size_multiple  # where possible, at a size for which the UNet must crop
    small = (2 * model.size_multiple + odd, 3 * model.size_multiple - odd)
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
            unit, cell = part.factor(model.vae_factor), pixels_of_cell(spec) if part.kind == "T2I-Adapter" else 1
            high, wide = (max(1, side // unit // cell) * cell for side in (height, width))
            sizes = {"batch": rows, "height": high, "width": wide, "sequence": manifest.text_length}
            dims = {dim: sizes[dim] for dim in spec.dimensions}
            cases.append(Case(component=component, name=name, seed=1000 + len(cases), dims=dims, below=below))
        if part.kind == "denoiser" and spec.optional_inputs:
            small_case = next(case for case in cases if case.component == component)
            cases.append(dataclasses.replace(small_case, name="optional", seed=1000 + len(cases), optional=True))
    return tuple(cases)


def reference_images(manifest: Manifest, *, steps: int = 6, sampler: str | None = None) -> tuple[ReferenceImage, ...]:
    """Return the reference images of a bundle: two prompts, the model's own examples first, with sides of at most 256 pixels if
    the model allows it."""
    model = manifest.model
    multiple = math.lcm(model.size_multiple, 8)  # diffusers' pipelines require multiples of 8, whatever the VAE's factor
    height, width = (_small_side(side, multiple) for side in model.default_size)
    negative = "" if guidance_width(manifest.components["unet"]) else "a blurred text"
    return tuple(
        ReferenceImage(
            prompt=prompt, negative=negative, seed=7 + k, steps=steps, guidance=5.0, size=(width, height), sampler=sampler
        )
        for k, prompt in enumerate((*model.prompts, *_PROMPTS)[: len(_PROMPTS)])
    )


def _small_side(side: int, multiple: int) -> int:
    return max(multiple, min(side, _LARGEST_SIDE) // multiple * multiple)


def digest_of(output: Array) -> Digest:
    """Return the digest of an output, computed in float64."""
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
    """Return numbers of an output, float32 [at most SAMPLE], at positions that the seed determines."""
    flat = output.reshape(-1)
    if flat.size <= SAMPLE:
        return flat.astype(np.float32)
    return flat[NoiseStream(seed).integers(flat.size, (SAMPLE,))].astype(np.float32)


def write_golden(bundle: Bundle, golden: Golden, numbers: Mapping[str, Array]) -> Bundle:
    """Return the bundle with these reference outputs in place of its own."""
    packed = io.BytesIO()
    np.savez_compressed(packed, **numbers)  # type: ignore[arg-type]
    document = json.dumps(json_from_record(golden), indent=1, allow_nan=False) + "\n"
    return bundle.with_files({DOCUMENT: document.encode(), NUMBERS: packed.getvalue()})


def build_command(bundle: Bundle, precision: Precision | None = None) -> str:
    """Return the command that exports a bundle again. `precision` None: the bundle's own.

    A bundle does not store the path of a checkpoint's folder, only its name, so path/to/ stands for the rest.
    """
    source = str(bundle.manifest.provenance.get("source", "")) or "checkpoint"
    model = source if "/" in source else f"path/to/{source}"
    return f"sdexport build {quoted(model)} --precision {precision or bundle.manifest.precision} -o {quoted(bundle.folder)}"


def read_golden(bundle: Bundle) -> tuple[Golden, dict[str, Array]]:
    """Return the reference outputs of a bundle.

    Raises BundleError if it has no reference outputs, with the command that adds them, or if they are damaged.
    """
    if DOCUMENT not in bundle.manifest.files or NUMBERS not in bundle.manifest.files:
        fault = "no reference outputs: it was built with --no-verify, or by an older sdexport"
        raise BundleError(bundle.folder, [f"{fault}; export it again with {build_command(bundle)}"])
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


def image_key(index: int) -> str:
    """Return the name of an image in the numbers."""
    return f"picture.{index}"


def _size_of(dim: int | str, dims: Mapping[str, int]) -> int:
    """Return the size of a dimension, or 1 if the case does not have it, which is a fault of its own."""
    return size_of(dim, dims) if isinstance(dim, int) or named_in(dim) in dims else 1


def _numbers_of(case: Case, spec: ComponentSpec) -> int:
    tensors = spec.engine_inputs if case.optional else spec.inputs
    shapes = [[_size_of(dim, case.dims) for dim in tensor.shape] for tensor in tensors]
    return sum(math.prod(shape) for shape in shapes)


def _faults(golden: Golden, numbers: Mapping[str, Array], manifest: Manifest) -> Iterator[str]:
    """Yield what does not fit together in the reference outputs and the manifest."""
    for case in golden.cases:
        spec = manifest.components.get(case.component)
        if spec is None:
            yield f"{DOCUMENT}: a case of {case.component!r}, which the bundle does not have"
            continue
        if (count := _numbers_of(case, spec)) > MOST_NUMBERS:
            yield f"{DOCUMENT}: case {case.component}.{case.name}: {count:,} numbers in its inputs; at most {MOST_NUMBERS:,}"
            continue
        unsized = sorted(set(spec.dimensions) - set(case.dims))
        if unsized or set(case.outputs) != {tensor.name for tensor in spec.outputs}:
            yield f"{DOCUMENT}: case {case.component}.{case.name} does not match the inputs and outputs of {case.component}"
            continue
        for output, digest in case.outputs.items():
            sample = numbers.get(case.key(output))
            if sample is None or sample.shape != (min(SAMPLE, math.prod(digest.shape)),) or sample.dtype != np.float32:
                yield f"{NUMBERS}: {case.key(output)} is missing, or of another size"
    for index, reference in enumerate(golden.drawings):
        image = numbers.get(image_key(index))
        if image is None or image.shape != (*reference.size[::-1], 3) or image.dtype != np.uint8:
            yield f"{NUMBERS}: {image_key(index)} is missing, or of another size"
