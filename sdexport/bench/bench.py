"""Benchmark a bundle against the alternatives: each contestant runs in its own process, and they take turns.

Every number comes from this run. Unknown values (the build time of an existing engine, the engine size for torch) are absent
from the document.
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
from sdexport.bench.contestant import Contestant, load_images
from sdexport.bench.diffusers import why_unavailable
from sdexport.bench.runners import TORCH
from sdexport.bench.subject import choose_engines, copy_without_engines, costs, first_components, machine_of, needs_no_guidance
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
from sdruntime.pipeline.jobs import SCHEDULER
from sdruntime.pipeline.requests.request import Request
from sdruntime.system import processor

SCHEMA = 1
STARTS = 3  # cold starts of each contestant, at most
ENOUGH = 3  # rounds that a median needs before it is compared with another
LISTEN = 0.5  # seconds over which the load of the machine is read before the benchmark
WHOLE = "end to end"
PROMPT = "a photograph of a lighthouse in a storm"
Summary = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The images to generate, and the time limit of the whole benchmark in `seconds`, excluding engine builds.

    `size` is (width, height) in pixels; None means the model's own. Raises SettingError.
    """

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
    """A progress event: what is being measured, and how many of the `total` parts are done."""

    what: str
    done: int
    total: int


@dataclass(slots=True, kw_only=True)
class Entry:
    """A contestant: the job of its process, its engines and its results."""

    name: str
    job: dict[str, Any]
    specs: Sequence[EngineSpec] = ()
    results: dict[str, Any] = field(default_factory=dict)


def bench(
    folder: Path,
    settings: Settings,
    *,
    backend: str = AUTO,
    against: Sequence[str] = (),
    model: str | None = None,
    rebuild: bool = False,
) -> Generator[Measuring, None, dict[str, Any]]:
    """Measure the engines of `backend` and each rival in `against` (a backend, or one of `TORCH`); return the document.

    `model` is the checkpoint for torch; None means the bundle's own source. With `rebuild`, the engines are rebuilt in a
    temporary copy for the measured shapes, and the document has the build times. A rival that fails is reported in the document.
    Raises BenchError if the bundle's own engines fail, and EngineError if none of them fits.
    """
    for name in against:
        if name not in TORCH and name not in BACKENDS:
            raise UnknownName("rival", name, [*TORCH, *OFFERED])
    if not (torches := [name for name in against if name in TORCH]) and model is not None:
        raise SettingError(f"model {model} without a rival that runs it: add --against torch")
    if torches and (lacking := why_unavailable(CPU)):
        raise EnvironmentFault(f"{torches[0]} cannot run: {lacking}: pip install torch diffusers transformers")
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    size = settings.size or manifest.model.usual_size[::-1]
    settings.request(size)
    machine, busy = Machine.here(), processor.busy(LISTEN)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        built: dict[str, dict[str, float]] = {}
        unbuilt: dict[str, str] = {}
        if rebuild:
            own = choose_engines(bundle, AUTO, machine, size)[0].backend if backend == AUTO else backend
            backend, scratch = own, copy_without_engines(folder, place / "bundle")
            for name in dict.fromkeys([own, *(rival for rival in against if rival in BACKENDS)]):
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
                entry.results["build_s"] = built[entry.name]
            if entry.name in unbuilt:
                entry.results["error"] = unbuilt[entry.name]
        yield from _measure(entries, manifest, settings, size, stack)
        return _document(bundle, machine, settings, size, entries, busy)


def _build(folder: Path, name: str, settings: Settings, size: tuple[int, int]) -> Generator[Measuring, None, dict[str, float]]:
    """Build the engines of backend `name`; return the seconds of each component."""
    seconds: dict[str, float] = {}
    static = BACKENDS[name].static
    request = BuildRequest(
        backend=name,
        size=f"{size[0]}x{size[1]}",
        batch=str(settings.batch) if static else None,
        guidance=("on" if settings.guidance > 1 else "off") if static else None,
    )
    for event in build_engines(folder, request):
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
    """Return the contestants, the bundle's own engines first."""
    manifest = bundle.manifest
    own = choose_engines(bundle, backend, machine, size)
    request = settings.request(size)
    fields = {name: getattr(request, name) for name in ("prompt", "seed", "steps", "guidance", "size")}
    common = {"bundle": str(bundle.folder), "request": fields, "batch": settings.batch}
    entries = [Entry(name=own[0].backend, job={**common, "kind": "bundle", "backend": own[0].backend}, specs=own)]
    checkpoint = ""
    for name in dict.fromkeys(against):
        if name in TORCH:
            checkpoint = checkpoint or str(_checkpoint(manifest, model))
            entries.append(Entry(name=name, job={**common, "kind": name, "checkpoint": checkpoint}))
        elif name != entries[0].name:
            entry = Entry(name=name, job={**common, "kind": "bundle", "backend": name})
            try:
                entry.specs = choose_engines(bundle, name, machine, size)
            except EngineError as error:
                entry.results["error"] = str(error)
            entries.append(entry)
    for entry in entries:
        entry.job["pictures"] = str(place / f"{entry.name}.npy")
    return entries


def _checkpoint(manifest: Manifest, model: str | None) -> Path:
    """Return the folder of the checkpoint that torch runs.

    Raises SettingError if the bundle's source cannot be found, and what `locate` raises for a given `model`.
    """
    source = model or str(manifest.provenance.get("source", ""))
    if model is None and "/" not in source:
        raise SettingError(f"torch needs the checkpoint of the bundle, {source or 'which the bundle does not name'}: add --model")
    return locate(source, precision=manifest.precision, allow_pickle=False).path


def _measure(
    entries: Sequence[Entry],
    manifest: Manifest,
    settings: Settings,
    size: tuple[int, int],
    stack: contextlib.ExitStack,
) -> Iterator[Measuring]:
    """Fill the `results` of each entry within `settings.seconds`: the remaining time is shared by the remaining columns."""
    columns = [*first_components(manifest), WHOLE, "outside"]
    total = len(columns) + 1
    deadline = time.monotonic() + settings.seconds
    yield Measuring(what="cold start", done=0, total=total)
    able = [entry for entry in entries if "error" not in entry.results]
    starters = {entry.name: _starter(entry, deadline) for entry in able}
    opened = cold_starts(starters, stack, seconds=settings.seconds / len(starters) / (total + 1))
    for entry in able:
        outcome = opened[entry.name]
        if isinstance(outcome, str):
            entry.results["error"] = outcome
        else:
            entry.results |= outcome[1]
    running = {entry.name: opened[entry.name][0] for entry in able if "error" not in entry.results}
    if entries[0].name not in running:
        raise BenchError(str(entries[0].results["error"]))
    first = load_images(Path(entries[0].job["pictures"]))
    for entry in able:
        if entry.name in running:
            images = load_images(Path(entry.job["pictures"]))
            entry.results["std"] = round(float(images[0].std()), 1)
            if entry is not entries[0]:
                entry.results["psnr"] = psnr(images, first)
    guided = settings.guidance > 1
    for done, column in enumerate(columns, start=1):
        yield Measuring(what=column, done=done, total=total)
        if column in (WHOLE, "outside"):
            action = "generate" if column == WHOLE else "outside"
            turns = {name: _turn(contestant, action) for name, contestant in running.items()}
        else:
            component = manifest.components[column]
            dims = call_dims(column, component, manifest, size, batch=settings.batch, guided=guided)
            turns = {name: _turn(contestant, "call", component=column, dims=dims) for name, contestant in running.items()}
        share = max(deadline - time.monotonic(), 0.0) / (total - done)
        taken = in_turn(turns, seconds=share / len(turns), until=time.monotonic() + share)
        for entry in able:
            if entry.name in taken:
                _store(entry, column, taken[entry.name])
    yield Measuring(what="done", done=total, total=total)


def _store(entry: Entry, column: str, taken: list[float] | str) -> None:
    times: Summary = {"error": taken} if isinstance(taken, str) else summary(taken)
    if column == WHOLE:
        entry.results["end_to_end"] = times
    elif column == "outside":
        entry.results["host_outside_unet_per_step"] = times
    else:
        entry.results.setdefault("components", {})[column] = times


def _starter(entry: Entry, deadline: float) -> Callable[[], Contestant]:
    return lambda: Contestant(entry.name, entry.job, deadline=deadline)


def _turn(contestant: Contestant, action: str, **arguments: Any) -> Turn:
    return lambda round_: contestant.measure(action, **arguments)


def cold_starts(starters: Mapping[str, Callable[[], Any]], stack: contextlib.ExitStack, *, seconds: float) -> dict[str, Any]:
    """Start each contestant in turn, STARTS times or for about `seconds` each; the last process of each stays running.

    Returns for each name the contestant and its first message, whose `cold` is the start of median length, or the text of its
    error.
    """
    outcomes: dict[str, Any] = {}
    colds: dict[str, list[dict[str, float]]] = {name: [] for name in starters}
    for round_ in range(STARTS):
        for name, start in starters.items():
            spent = sum(cold["whole_s"] for cold in colds[name])
            if isinstance(outcomes.get(name), str) or (round_ and spent + spent / round_ > seconds):
                continue
            if name in outcomes:
                outcomes[name][0].close()
            contestant = start()
            stack.callback(contestant.close)
            try:
                outcomes[name] = contestant, contestant.opened()
                colds[name].append(outcomes[name][1]["cold"])
            except BenchError as error:
                outcomes[name] = str(error)
    for name, outcome in outcomes.items():
        if not isinstance(outcome, str):
            ordered = sorted(colds[name], key=lambda cold: cold["whole_s"])
            median = ordered[(len(ordered) - 1) // 2]
            outcome[1]["cold"] = {key: round(value, 4) for key, value in median.items()} | {"starts": len(ordered)}
    return outcomes


def ratios(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return for each column (a component, or end to end) the time of each contestant as a ratio to the fastest.

    A median of fewer than `ENOUGH` rounds has no ratio.
    """
    columns: dict[str, dict[str, float]] = {}
    for name, results in entries.items():
        for column, times in {**results.get("components", {}), WHOLE: results.get("end_to_end", {})}.items():
            if times.get("n", 0) >= ENOUGH:
                columns.setdefault(column, {})[name] = times["p50_ms"]
    return {
        column: {name: round(p50 / min(medians.values()), 3) for name, p50 in medians.items()}
        for column, medians in columns.items()
    }


def _document(
    bundle: Bundle, machine: Machine, settings: Settings, size: tuple[int, int], entries: Sequence[Entry], busy: float | None
) -> dict[str, Any]:
    manifest = bundle.manifest
    for entry in entries:
        versions = entry.results.pop("versions", {})
        if entry.specs:
            versions = {spec.backend: spec.version for spec in entry.specs}
            entry.results |= {
                "engines": {spec.component: spec.name for spec in entry.specs},
                "target": entry.specs[0].target,
                "precision": manifest.precision,
                "engine_bytes": sum(manifest.files[path].size for spec in entry.specs for path in spec.files),
            }
        entry.results["versions"] = versions
    results = {entry.name: entry.results for entry in entries}
    warnings = costs(
        bundle,
        entries[0].specs,
        machine,
        guidance=settings.guidance,
        batch=settings.batch,
        unguided=needs_no_guidance(bundle),
    )
    columns = ratios(results)
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
        "contestants": results,
        "ratios": columns,
        "warnings": warnings,
    }
