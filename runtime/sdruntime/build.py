"""Engines into a bundle, from its own ONNX. Adds the engine's files and changes the manifest; nothing else."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from sdruntime.backends import backend
from sdruntime.bundle import ENGINES, Bundle, disk_full_as_error
from sdruntime.engine import EngineRequest, Ranges
from sdruntime.errors import DeviceMissing, LibraryMissing, SettingError, UnknownName
from sdruntime.manifest import EngineSpec, Manifest, ModelSpec

T = TypeVar("T")
Size = tuple[int, int]  # pixels: width, height
MOST_IMAGES = 8
LARGEST = 4  # times the default side


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What engines are built for, in pictures: (min, opt, max) sizes in pixels (width, height), and images in one call."""

    size: tuple[Size, Size, Size]
    batch: tuple[int, int, int]

    def __post_init__(self) -> None:
        sides = [tuple(size[axis] for size in self.size) for axis in (0, 1)]
        for name, triple in (("width", sides[0]), ("height", sides[1]), ("batch", self.batch)):
            if not 1 <= triple[0] <= triple[1] <= triple[2]:
                raise SettingError(f"{name}: min, opt and max are {triple}, but they must rise from 1")

    @classmethod
    def parse(cls, model: ModelSpec, *, size: str | None = None, batch: str | None = None) -> Shapes:
        """From "WxH", "MIN:MAX" or "MIN:OPT:MAX" of sizes and of batches. Raises SettingError.

        With no size: every size from the smallest to four times the model's own side; with no batch: 1 to 8 images.
        """
        height, width = model.default_size
        smallest = model.size_multiple
        sizes = ((smallest, smallest), (width, height), (LARGEST * width, LARGEST * height))
        if size is not None:
            sizes = _triple([parse_size(part) for part in size.split(":")], f"size {size!r}")
        batches = (1, 1, MOST_IMAGES)
        if batch is not None:
            if not re.fullmatch(r"\d{1,4}(:\d{1,4}){0,2}", batch):
                raise SettingError(f"batch {batch!r}: 4, 1:4 or 1:2:4 is the form (min:opt:max images)")
            batches = _triple([int(part) for part in batch.split(":")], f"batch {batch!r}")
        for side in {side for each in sizes for side in each}:
            if side % model.size_multiple:
                raise SettingError(f"size {size}: {side} is not a multiple of {model.size_multiple}")
        return cls(size=sizes, batch=batches)

    def ranges(self, component: str, manifest: Manifest) -> Ranges:
        """(min, opt, max) of each named dimension of a component, in its own units."""
        scale = 1 if component == "vae_encoder" else manifest.model.vae_factor
        # guidance takes an unconditional row for each conditional one, and is off for some jobs
        low, opt, high = self.batch
        known = {
            "batch": (low, opt, high) if component.startswith("vae") else (low, 2 * opt, 2 * high),
            "width": tuple(size[0] // scale for size in self.size),
            "height": tuple(size[1] // scale for size in self.size),
            "sequence": (77, 77, 77),
        }
        return {name: known[name] for name in manifest.components[component].dimensions}  # type: ignore[misc]

    @property
    def label(self) -> str:
        sizes = [f"{width}x{height}" for width, height in (self.size[0], self.size[2])]
        batches = [str(self.batch[0]), str(self.batch[2])]
        return "-".join(dict.fromkeys(sizes)) + "-b" + "-".join(dict.fromkeys(batches))


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEvent:
    """A step of `build_engines`: an engine begins, is done, or was there already."""

    component: str
    engine: str
    state: Literal["begin", "done", "present"]
    size: int = 0  # bytes written


def build_engines(
    folder: Path | str,
    *,
    backend_name: str,
    target: str | None = None,
    size: str | None = None,
    batch: str | None = None,
    components: Iterable[str] | None = None,
) -> Iterator[BuildEvent]:
    """Build an engine of each component and add it to the bundle; one that is there already is left alone.

    `target` None: the best that the library has here. Stopped at any point, the bundle holds the engines that were done.
    Raises BundleError, SettingError, LibraryMissing, DeviceMissing and OutOfSpace.
    """
    bundle = Bundle.open(folder)
    shapes = Shapes.parse(bundle.manifest.model, size=size, batch=batch)
    library = backend(backend_name, "engine").here()
    if library.version is None:
        raise LibraryMissing(library.missing)
    target = target or library.targets[0]
    if target not in library.targets:
        raise DeviceMissing(
            f"target {target!r}: {backend_name} {library.version} has {', '.join(library.targets)} on this machine"
        )
    for component in components or bundle.manifest.components:
        if component not in bundle.manifest.components:
            raise UnknownName("component", component, bundle.manifest.components)
        ranges = shapes.ranges(component, bundle.manifest)
        name = f"{component}-{backend_name}{library.version}-{target}-{bundle.manifest.precision}-{shapes.label}"
        wanted = (component, backend_name, library.version, target, ranges)
        if any(_identity(engine) == wanted for engine in bundle.manifest.engines):
            yield BuildEvent(component=component, engine=name, state="present")
            continue
        name = _free_name(name, bundle)
        yield BuildEvent(component=component, engine=name, state="begin")
        with disk_full_as_error(bundle.folder), tempfile.TemporaryDirectory(prefix=".building-", dir=bundle.folder) as scratch:
            request = EngineRequest(component=component, target=target, ranges=ranges, stem=name)
            built = backend(backend_name, "build").build_engine(bundle, request, Path(scratch))
            paths = {f"{ENGINES}/{path.name}": path for path in built.files}
            written = sum(path.stat().st_size for path in built.files)
            engine = EngineSpec(
                component=component,
                backend=backend_name,
                version=built.version,
                target=target,
                precision=built.precision,
                files=tuple(paths),
                ranges=ranges,
                memory=built.memory,
            )
            bundle = bundle.add_engine(engine, paths)
        yield BuildEvent(component=component, engine=name, state="done", size=written)


def parse_size(text: str) -> Size:
    """(width, height) in pixels, from "WxH". Raises SettingError."""
    if not re.fullmatch(r"\d{1,5}x\d{1,5}", text):
        raise SettingError(f"size {text!r}: WIDTHxHEIGHT in pixels is the form, such as 512x512")
    width, height = map(int, text.split("x"))
    return width, height


def _free_name(name: str, bundle: Bundle) -> str:
    """`name`, numbered where another engine (of the same limits, tuned for another size) has it already."""
    taken = {engine.name for engine in bundle.manifest.engines}
    return next(free for number in itertools.count(1) if (free := name if number == 1 else f"{name}-{number}") not in taken)


def _identity(engine: EngineSpec) -> tuple[str, str, str, str, Ranges]:
    return engine.component, engine.backend, engine.version, engine.target, dict(engine.ranges)


def _triple(parts: list[T], what: str) -> tuple[T, T, T]:
    if len(parts) > 3:
        raise SettingError(f"{what}: one value, MIN:MAX or MIN:OPT:MAX is the form")
    return parts[0], parts[len(parts) // 2 if len(parts) == 3 else 0], parts[-1]
