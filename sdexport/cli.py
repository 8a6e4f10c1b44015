"""The command line: the only file of sdexport that prints or picks an exit code.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 usage, 3 environment,
5 a bundle that is not whole, 130 interrupted; the errors carry them.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sdexport import __version__
from sdexport.errors import SdexportError
from sdruntime.errors import SdruntimeError

if TYPE_CHECKING:
    from sdexport.bench import Measuring
    from sdexport.build import EngineProgress, Progress
    from sdexport.engines import Failure, Outcome

SCHEMA = 1
INTERRUPTED = 130
WORST_FIRST = (3, 5, 1, 2)  # of several failures the code is the first of these
End = TypeVar("End")


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into a message and an exit code."""

    @functools.wraps(command)
    def reporting(**options: Any) -> None:
        try:
            command(**options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer has no reader
            sys.exit(128 + signal.SIGPIPE)
        except (SdexportError, SdruntimeError, MemoryError, OSError) as error:
            _fail(f"error: {_told(error)}", _code(error))

    return reporting


def _told(error: Exception) -> str:
    return "out of memory: free some, or export on a larger machine" if isinstance(error, MemoryError) else str(error)


def _code(error: Exception) -> int:
    return error.exit_code if isinstance(error, (SdexportError, SdruntimeError)) else 3


as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdexport")
def main() -> None:
    """Stable Diffusion out of PyTorch: a diffusers checkpoint becomes a bundle that sdruntime runs."""


@main.command()
@click.argument("model", required=False)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle: a folder, replaced as a whole.")
@click.option("--recipe", type=click.Path(path_type=Path), help="The file that says all but this; MODEL replaces its own.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--backend", "backends", multiple=True, help="Also build engines for this library here; may be repeated.")
@click.option("--target", help="What the engines are for: current, ampere+, sm86, …, cuda, cpu.")
@click.option("--size", help="Pictures that the engines take: 512x512, or MIN:MAX, or MIN:OPT:MAX, or a list A,B.")
@click.option("--batch", help="Images in one call of the engines: 4, or 1:4, or 1:2:4, or a list 1,2,4.")
@click.option(
    "--guidance", type=click.Choice(["on", "off", "any"]), help="Whether the engines' pictures are drawn with guidance."
)
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights too. Only for a checkpoint that you trust.")
@as_json
@reported
def build(
    model: str | None,
    output: Path,
    recipe: Path | None,
    precision: Any,
    backends: tuple[str, ...],
    target: str | None,
    size: str | None,
    batch: str | None,
    guidance: Any,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Export MODEL, a diffusers folder or a hub id, to a bundle."""
    if recipe is not None:
        _refuse_beside_a_recipe(click.get_current_context())
    elif not backends and (target or size or batch or guidance):
        raise click.UsageError("--target, --size, --batch and --guidance are of engines: name a --backend too")
    if model is None and recipe is None:
        raise click.UsageError("name a MODEL, or a --recipe")
    from sdexport.build import Options
    from sdexport.build import build as events
    from sdexport.engines import options_of
    from sdexport.recipe import read_recipe
    from sdruntime.build import Asked

    engines = tuple(Asked(backend=name, target=target, size=size, batch=batch, guidance=guidance) for name in backends)
    options = Options(precision=precision, engines=engines, allow_pickle=allow_pickle)
    if recipe is not None:
        found = read_recipe(recipe) if model is None else read_recipe(recipe).of(model)
        model, options = found.model, options_of(found)
    assert model is not None
    built = _shown(events(model, output, options))
    if as_json:
        _document(bundle=str(built.folder), up_to_date=built.up_to_date, written=built.written, peak_memory=built.peak)
    elif built.up_to_date:
        click.echo(f"{built.folder} is up to date")
    else:
        click.echo(f"{built.folder}: {built.written:,} bytes written, peak memory {built.peak / 1e9:.2f} GB")


def _refuse_beside_a_recipe(context: click.Context) -> None:
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and name not in ("model", "output", "recipe", "as_json"):
            raise click.UsageError(f"{option.opts[0]} beside --recipe: the recipe says it; change {context.params['recipe']}")


@main.command()
@click.argument("recipes", metavar="[RECIPE]...", nargs=-1)
@click.option("--model", help="A folder or hub id in place of the recipe's own; for one RECIPE.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("engines/built"),
    show_default=True,
    help="Where the bundles go: a folder for each recipe.",
)
@click.option("--python", help="Build the engines with this interpreter: it has the engine library and numpy, and no torch.")
@as_json
@reported
def engines(recipes: tuple[str, ...], model: str | None, output: Path, python: str | None, as_json: bool) -> None:
    """Build the bundle and the engines of each RECIPE: a path, or a name of engines/; all of engines/ where none is named.

    What is there already stays, and what fails does not stop the rest.
    """
    from sdexport.engines import run_recipe
    from sdexport.interpreter import Interpreter
    from sdexport.recipe import recipe_names

    names = recipes or recipe_names()
    if not names:
        raise click.UsageError("there is no recipe in engines/: name the file of one")
    if model and len(names) != 1:
        raise click.UsageError("--model takes the place of one recipe's: name that RECIPE")
    builder = Interpreter(python=python) if python else None
    outcomes: list[Outcome] = []
    for name in names:
        click.echo(f"== {name}", err=True)
        taken = [outcome.bundle for outcome in outcomes]
        outcomes.append(_shown(run_recipe(name, output, model=model, builder=builder, taken=taken)))
        for failure in outcomes[-1].failures:
            click.echo(f"error: {_failed(failure)}", err=True)
    if as_json:
        _document(recipes=[_outcome(outcome) for outcome in outcomes])
    else:
        _table(outcomes)
    codes = {_code(failure.error) for outcome in outcomes for failure in outcome.failures}
    if codes:
        sys.exit(min(codes, key=lambda code: WORST_FIRST.index(code) if code in WORST_FIRST else len(WORST_FIRST)))


def _table(outcomes: Sequence[Outcome]) -> None:
    """One row for each recipe, and under it the reasons of what failed, a line each."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", overflow="fold")
    for heading in ("built", "there already", "failed", "engine bytes", "ONNX bytes", "seconds"):
        table.add_column(heading, justify="right")
    for each in outcomes:
        written = sum(event.size for event in each.built)
        counts = (len(each.built), len(each.present), len(each.failures))
        table.add_row(each.recipe, *map(str, counts), f"{written:,}", f"{each.exported:,}", f"{each.seconds:.1f}")
    Console().print(table)
    for each in outcomes:
        for failure in each.failures:
            click.echo(f"{each.recipe}: {_failed(failure).splitlines()[0]}")


def _failed(failure: Failure) -> str:
    return f"{failure.what}: {_told(failure.error)}" if failure.what else _told(failure.error)


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "recipe": outcome.recipe,
        "bundle": None if outcome.bundle is None else str(outcome.bundle),
        "exported": outcome.exported,
        "built": [{"engine": event.engine, "bytes": event.size, "seconds": event.seconds} for event in outcome.built],
        "present": [event.engine for event in outcome.present],
        "failed": [
            {"engines": failure.what, "error": _told(failure.error), "exit_code": _code(failure.error)}
            for failure in outcome.failures
        ],
        "seconds": round(outcome.seconds, 3),
    }


def _shown(events: Iterable[Progress | EngineProgress | End]) -> End:
    """Follow a build on standard error, with rich; returns its end, the first event that is no step."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from sdexport.build import EngineProgress, Progress

    columns = (TextColumn("{task.description:<16}"), TextColumn("{task.fields[stage]:<10}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}
        for event in events:
            stage: str
            if isinstance(event, Progress):
                name, stage, done, total = event.component, event.stage.name, event.stage.done, event.stage.total
            elif not isinstance(event, EngineProgress):
                return event
            else:
                name, stage = event.event.engine, event.event.state
                done, total = (0, 0) if stage in ("begin", "stage") else (1, 1)
                if event.event.stage is not None:
                    stage, done, total = event.event.stage.name, event.event.stage.done, event.event.stage.total
            if name not in tasks:
                tasks[name] = progress.add_task(name, stage=stage, total=None)
            progress.update(tasks[name], stage=stage, completed=done, total=total or None)
    raise AssertionError("a build tells its end")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@as_json
@reported
def inspect(bundle: Path, as_json: bool) -> None:
    """Tell what a bundle holds, and whether every byte of it is as it was written."""
    from sdruntime.bundle import Bundle
    from sdruntime.errors import BundleError
    from sdruntime.record import json_from_record

    opened = Bundle.open(bundle)
    if changed := opened.changed_files():
        raise BundleError(bundle, changed)
    manifest = opened.manifest
    if as_json:
        _document(manifest=json_from_record(manifest))
        return
    model, made = manifest.model, manifest.provenance
    click.echo(f"{model.name}: {model.family}, {model.prediction_type}, {manifest.precision}, license {model.license}")
    click.echo(f"from {made.get('source', 'unknown')}, {made.get('revision', 'no revision')}, {made.get('created', 'no date')}")
    click.echo(
        f"latents of {model.latent_channels} channels, 1/{model.vae_factor} of the picture's sides, times {model.scaling_factor}"
    )
    for name, component in manifest.components.items():
        size = sum(manifest.files[path].size for path in component.files)
        click.echo(f"{name}: {size:,} bytes")
        for arrow, tensors in (("<-", component.inputs), ("->", component.outputs)):
            for tensor in tensors:
                click.echo(f"  {arrow} {tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]")
    for engine in manifest.engines:
        click.echo(f"engine {engine.name}: {engine.backend} {engine.version}, {engine.target}")
    click.echo(f"{len(manifest.files)} files, {sum(file.size for file in manifest.files.values()):,} bytes, every hash is right")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="auto", show_default=True, help="Whose engines are measured.")
@click.option("--against", multiple=True, help="Beside them: torch, torch-bf16, torch-compile, or a backend; may be repeated.")
@click.option("--model", help="The checkpoint for torch, a folder or a hub id, where the bundle's own source is not to be found.")
@click.option("--rebuild", is_flag=True, help="Build the engines in a scratch copy, for these shapes, and time it.")
@click.option("--steps", default=20, show_default=True)
@click.option("--batch", default=1, show_default=True, help="Pictures of one call.")
@click.option("--size", help="WxH in pixels; the model's own if not given.")
@click.option("--guidance", default=7.5, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="For each contestant in each column, about.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write the tables to this file.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also draw the ratios, as SVG, to this file.")
@as_json
@reported
def bench(bundle: Path, size: str | None, markdown: Path | None, picture: Path | None, as_json: bool, **options: Any) -> None:
    """Measure a bundle beside what you would otherwise run: components, whole pictures, memory, cold start."""
    from sdexport.bench import Settings, size_of
    from sdexport.bench import bench as events
    from sdexport.chart import markdown as lines
    from sdexport.chart import svg

    settings = Settings(
        size=size_of(size) if size else None, **{name: options.pop(name) for name in ("steps", "batch", "guidance", "seconds")}
    )
    document = _measured(events(bundle, settings, **options))
    if markdown:
        markdown.write_text("\n".join(lines(document)) + "\n", encoding="utf-8")
    if picture:
        picture.write_text(svg(document), encoding="utf-8")
    for warning in document["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    click.echo(json.dumps(document, indent=1, allow_nan=False) if as_json else "\n".join(lines(document)))


def _measured(events: Iterable[Measuring | dict[str, Any]]) -> dict[str, Any]:
    """Follow a benchmark on standard error, with rich; returns its document."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    with Bars(TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        for event in events:
            if isinstance(event, dict):
                return event
            progress.update(task, description=event.what, completed=event.done, total=event.total or None)
    raise AssertionError("a benchmark tells its end")


@main.command()
@as_json
@reported
def doctor(as_json: bool) -> None:
    """Tell what this machine can export, and which engines it can build; for what is missing, the line that installs it."""
    import platform

    from sdexport.cache import cache_folder, versions
    from sdruntime.backends import BACKENDS, backend

    found = versions()
    engines = {name: backend(name, "engine").here(name) for name in BACKENDS if name != "fake"}
    missing = {name: f"pip install {name}" for name, version in found.items() if version == "missing"}
    missing |= {name: library.missing for name, library in engines.items() if library.version is None}
    folder = cache_folder()
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    if as_json:
        _document(
            python=platform.python_version(),
            machine=platform.machine(),
            libraries=found,
            engines={name: {"version": each.version, "targets": list(each.targets)} for name, each in engines.items()},
            missing=missing,
            cache={"folder": str(folder), "size": kept},
        )
        return
    click.echo(f"sdexport {__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name, version in found.items():
        click.echo(f"{name:<14}{version}")
    for name, library in engines.items():
        if library.version is not None:
            click.echo(f"{name:<14}{library.version}: builds engines for {', '.join(library.targets)}")
    for name, line in missing.items():
        click.echo(f"missing: {name}: {line}")
    click.echo(f"kept traces: {kept:,} bytes in {folder} (safe to remove)")


def _document(**fields: Any) -> None:
    click.echo(json.dumps({"schema": SCHEMA, **fields}, indent=1, allow_nan=False))


def _fail(message: str, code: int) -> None:
    click.echo(message, err=True)
    sys.exit(code)
