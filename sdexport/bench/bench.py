"""A bundle measured beside what its user would otherwise run: each contestant in a process of its own, called in turn.

Every number is of this run. What is unknown (the build time of an engine that was there already, the size of an engine that
torch has not) is missing in the document.
"""

from __future__ import annotations

import contextlib
import platform
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdexport import __version__
from sdexport.bench.contestant import Contestant, pictures_of
from sdexport.bench.diffusers import missing
from sdexport.bench.drawers import TORCH
from sdexport.bench.subject import bare, chosen, costs, draws_unguided, machine_of, parts
from sdexport.bench.timing import Turn, call_dims, in_turn, psnr, summary
from sdexport.checkpoint.hub import locate
from sdexport.errors import BenchError, EnvironmentFault
from sdruntime.backends.base.engine import CPU
from sdruntime.backends.registry import BACKENDS, OFFERED
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec, Manifest
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.engines.choose import AUTO, Machine
from sdruntime.errors import EngineError, SdruntimeError, SettingError, UnknownName
from sdruntime.pipeline.pipeline import SCHEDULER
from sdruntime.pipeline.request import Request
from sdruntime.system import processor

SCHEMA = 1
STARTS = 3  # cold starts of each contestant, where they are quick
ENOUGH = 3  # rounds that a time must be the median of, to be compared with another
LISTEN = 0.5  # seconds for which the machine is watched before anything is measured
WHOLE = "end to end"
PROMPT = "a photograph of a lighthouse in a storm"
Summary = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is generated, and how many `seconds` the whole benchmark may take, without building engines. `size`: (width, height)
    in pixels, the model's own where None. Raises SettingError."""

    steps: int = 20
    batch: int = 1
    size: tuple[int, int] | None = None
    guidance: float = 7.5
    seconds: float = 120.0
    prompt: str = PROMPT
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seconds"):
            if not getattr(self, name) >= 1:
                raise SettingError(f"{name} {getattr(self, name)}: must be at least 1")

    def request(self, size: tuple[int, int]) -> Request:
        return Request(prompt=self.prompt, seed=self.seed, steps=self.steps, guidance=self.guidance, size=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """Where a benchmark is."""

    what: str
    done: int
    total: int


@dataclass(slots=True, kw_only=True)
class Entry:
    """A contestant: its process's job and its results."""

    name: str
    job: dict[str, Any]
    specs: Sequence[EngineSpec] = ()
    told: dict[str, Any] = field(default_factory=dict)


def bench(
    folder: Path,
    settings: Settings,
    *,
    backend: str = AUTO,
    against: Sequence[str] = (),
    model: str | None = None,
    rebuild: bool = False,
) -> Generator[Measuring, None, dict[str, Any]]:
    """Measure the engines of `backend`, and each of `against` (a backend, or one of `TORCH`) beside them; returns the
    document.

    `model`: the checkpoint for torch, the bundle's own source where None. `rebuild`: rebuild the engines in a temporary copy,
    for the measured shapes, and report the time. A contestant that fails is reported in the document; that the bundle's
    own engines fail raises BenchError, and sdruntime's errors where none of them fits.
    """
    for name in against:
        if name not in TORCH and name not in BACKENDS:
            raise UnknownName("rival", name, [*TORCH, *OFFERED])
    if not (torches := [name for name in against if name in TORCH]) and model is not None:
        raise SettingError(f"model {model} without a rival that runs it: add --against torch")
    if torches and (lacking := missing(CPU)):
        raise EnvironmentFault(f"{torches[0]} cannot run: {lacking}: pip install torch diffusers transformers")
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    size = settings.size or manifest.model.default_size[::-1]
    settings.request(size)
    machine, busy = Machine.here(), processor.busy(LISTEN)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        built: dict[str, dict[str, float]] = {}
        unbuilt: dict[str, str] = {}
        if rebuild:
            own = chosen(bundle, AUTO, machine, size)[0].backend if backend == AUTO else backend
            backend, scratch = own, bare(folder, place / "bundle")
            for name in dict.fromkeys([own, *(each for each in against if each in BACKENDS)]):
                try:
                    built[name] = yield from _build(scratch, name, settings, size)
                except SdruntimeError as error:
                    if name == own:
                        raise
                    unbuilt[name] = str(error)
            bundle = Bundle.open(scratch)
            manifest = bundle.manifest
        entries = _entries(bundle, machine, settings, size, backend, against, model, place)
        for entry in entries:
            if entry.name in built:
                entry.told["build_s"] = built[entry.name]
            if entry.name in unbuilt:
                entry.told["error"] = unbuilt[entry.name]
        yield from _measure(entries, manifest, settings, size, stack)
        return _document(bundle, machine, settings, size, entries, busy)


def _build(folder: Path, name: str, settings: Settings, size: tuple[int, int]) -> Generator[Measuring, None, dict[str, float]]:
    """Returns the seconds of each component."""
    seconds: dict[str, float] = {}
    static = BACKENDS[name].static
    asked = BuildRequest(
        backend=name,
        size=f"{size[0]}x{size[1]}",
        batch=str(settings.batch) if static else None,
        guidance=("on" if settings.guidance > 1 else "off") if static else None,
    )
    for event in build_engines(folder, asked):
        yield Measuring(what=f"{name}: building {event.component}", done=len(seconds), total=0)
        if event.state == "done":
            seconds[event.component] = round(event.seconds, 3)
    return seconds


def _entries(
    bundle: Bundle,
    machine: Machine,
    settings: Settings,
    size: tuple[int, int],
    backend: str,
    against: Sequence[str],
    model: str | None,
    place: Path,
) -> list[Entry]:
    """The bundle's own engines first."""
    manifest = bundle.manifest
    own = chosen(bundle, backend, machine, size)
    request = settings.request(size)
    asked = {name: getattr(request, name) for name in ("prompt", "seed", "steps", "guidance", "size")}
    common = {"bundle": str(bundle.folder), "request": asked, "batch": settings.batch}
    entries = [Entry(name=own[0].backend, job={**common, "kind": "bundle", "backend": own[0].backend}, specs=own)]
    checkpoint = ""
    for name in dict.fromkeys(against):
        if name in TORCH:
            checkpoint = checkpoint or str(_checkpoint(manifest, model))
            entries.append(Entry(name=name, job={**common, "kind": name, "checkpoint": checkpoint}))
        elif name != entries[0].name:
            entry = Entry(name=name, job={**common, "kind": "bundle", "backend": name})
            try:
                entry.specs = chosen(bundle, name, machine, size)
            except EngineError as error:
                entry.told["error"] = str(error)
            entries.append(entry)
    for entry in entries:
        entry.job["pictures"] = str(place / f"{entry.name}.npy")
    return entries


def _checkpoint(manifest: Manifest, model: str | None) -> Path:
    """Raises SettingError where the bundle's source is not to be found here; what `locate` raises for a model that was named."""
    source = model or str(manifest.provenance.get("source", ""))
    if model is None and "/" not in source:
        raise SettingError(f"torch needs the checkpoint of the bundle, {source or 'which the bundle does not name'}: add --model")
    return locate(source, precision=manifest.precision, allow_pickle=False).folder


def _measure(
    entries: Sequence[Entry],
    manifest: Manifest,
    settings: Settings,
    size: tuple[int, int],
    stack: contextlib.ExitStack,
) -> Iterator[Measuring]:
    """Fill what is `told` of each entry, within `settings.seconds`: what is left is shared by the columns that are left."""
    columns = [*parts(manifest), WHOLE, "outside"]
    total = len(columns) + 1
    deadline = time.monotonic() + settings.seconds
    yield Measuring(what="cold start", done=0, total=total)
    able = [entry for entry in entries if "error" not in entry.told]
    starters = {entry.name: _starter(entry, deadline) for entry in able}
    opened = cold_starts(starters, stack, seconds=settings.seconds / len(starters) / (total + 1))
    for entry in able:
        found = opened[entry.name]
        if isinstance(found, str):
            entry.told["error"] = found
        else:
            entry.told |= found[1]
    running = {entry.name: opened[entry.name][0] for entry in able if "error" not in entry.told}
    if entries[0].name not in running:
        raise BenchError(str(entries[0].told["error"]))
    first = pictures_of(Path(entries[0].job["pictures"]))
    for entry in able:
        if entry.name in running:
            pictures = pictures_of(Path(entry.job["pictures"]))
            entry.told["std"] = round(float(pictures[0].std()), 1)
            if entry is not entries[0]:
                entry.told["psnr"] = psnr(pictures, first)
    guided = settings.guidance > 1
    for done, column in enumerate(columns, start=1):
        yield Measuring(what=column, done=done, total=total)
        if column in (WHOLE, "outside"):
            turns = {name: _turn(each, "draw" if column == WHOLE else "outside") for name, each in running.items()}
        else:
            component = manifest.components[column]
            dims = call_dims(column, component, manifest, size, batch=settings.batch, guided=guided)
            turns = {name: _turn(each, "call", component=column, dims=dims) for name, each in running.items()}
        share = max(deadline - time.monotonic(), 0.0) / (total - done)
        taken = in_turn(turns, seconds=share / len(turns), until=time.monotonic() + share)
        for entry in able:
            if entry.name in taken:
                _keep(entry, column, taken[entry.name])
    yield Measuring(what="done", done=total, total=total)


def _keep(entry: Entry, column: str, taken: list[float] | str) -> None:
    found: Summary = {"error": taken} if isinstance(taken, str) else summary(taken)
    if column == WHOLE:
        entry.told["end_to_end"] = found
    elif column == "outside":
        entry.told["host_outside_unet_per_step"] = found
    else:
        entry.told.setdefault("components", {})[column] = found


def _starter(entry: Entry, deadline: float) -> Callable[[], Contestant]:
    return lambda: Contestant(entry.name, entry.job, deadline=deadline)


def _turn(contestant: Contestant, do: str, **arguments: Any) -> Turn:
    return lambda round_: contestant.ask(do, **arguments)


def cold_starts(starters: Mapping[str, Callable[[], Any]], stack: contextlib.ExitStack, *, seconds: float) -> dict[str, Any]:
    """Each contestant started in turn, STARTS times or for about `seconds`, the last one left running: (it, what it told, `cold`
    being the start of median length), or the text of its error."""
    found: dict[str, Any] = {}
    colds: dict[str, list[dict[str, float]]] = {name: [] for name in starters}
    for round_ in range(STARTS):
        for name, start in starters.items():
            spent = sum(cold["whole_s"] for cold in colds[name])
            if isinstance(found.get(name), str) or (round_ and spent + spent / round_ > seconds):
                continue
            if name in found:
                found[name][0].close()
            contestant = start()
            stack.callback(contestant.close)
            try:
                found[name] = contestant, contestant.opened()
                colds[name].append(found[name][1]["cold"])
            except BenchError as error:
                found[name] = str(error)
    for name, each in found.items():
        if not isinstance(each, str):
            ordered = sorted(colds[name], key=lambda cold: cold["whole_s"])
            middle = ordered[(len(ordered) - 1) // 2]
            each[1]["cold"] = {key: round(value, 4) for key, value in middle.items()} | {"starts": len(ordered)}
    return found


def ratios(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each column (a component, or end to end): how many times as long as the quickest each contestant takes. A time of fewer
    than `ENOUGH` rounds has no ratio."""
    columns: dict[str, dict[str, float]] = {}
    for name, told in entries.items():
        for column, found in {**told.get("components", {}), WHOLE: told.get("end_to_end", {})}.items():
            if found.get("n", 0) >= ENOUGH:
                columns.setdefault(column, {})[name] = found["p50_ms"]
    return {
        column: {name: round(time / min(times.values()), 3) for name, time in times.items()} for column, times in columns.items()
    }


def _document(
    bundle: Bundle, machine: Machine, settings: Settings, size: tuple[int, int], entries: Sequence[Entry], busy: float | None
) -> dict[str, Any]:
    manifest = bundle.manifest
    for entry in entries:
        versions = entry.told.pop("versions", {})
        if entry.specs:
            versions = {spec.backend: spec.version for spec in entry.specs}
            entry.told |= {
                "engines": {spec.component: spec.name for spec in entry.specs},
                "target": entry.specs[0].target,
                "precision": manifest.precision,
                "engine_bytes": sum(manifest.files[path].size for spec in entry.specs for path in spec.files),
            }
        entry.told["versions"] = versions
    told = {entry.name: entry.told for entry in entries}
    warnings = costs(
        bundle,
        entries[0].specs,
        machine,
        guidance=settings.guidance,
        batch=settings.batch,
        unguided=draws_unguided(bundle),
    )
    columns = ratios(told)
    behind = {name: times[entries[0].name] for name, times in columns.items() if times.get(entries[0].name, 1) > 1.03}
    warnings += [f"{entries[0].name} is not the quickest at {name}: {ratio:.2f} times the best" for name, ratio in behind.items()]
    return {
        "schema": SCHEMA,
        "bundle": {"name": manifest.model.name, "family": manifest.model.family, "precision": manifest.precision},
        "machine": machine_of(machine) | {"busy": busy},
        "versions": {"sdexport": __version__, "python": platform.python_version()},
        "settings": {
            "steps": settings.steps,
            "batch": settings.batch,
            "size": list(size),
            "guidance": settings.guidance,
            "seconds": settings.seconds,
            "prompt": settings.prompt,
            "seed": settings.seed,
            "sampler": str(bundle.read_json(SCHEDULER).get("_class_name")),
        },
        "contestants": told,
        "ratios": columns,
        "warnings": warnings,
    }
