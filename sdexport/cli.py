"""The command line: the only file of sdexport that prints or picks an exit code.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 usage, 3 environment,
4 numbers that do not hold, 5 a bundle that is not whole, 130 interrupted; the errors carry them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sdexport import __version__
from sdexport.check import bench, verify
from sdexport.command import Commands, shared, with_progress
from sdruntime.command import Failed, code_of, document, reason_of
from sdruntime.errors import quoted

if TYPE_CHECKING:
    from sdexport.build import EngineProgress, Progress
    from sdexport.engines import Failure, Outcome
    from sdruntime.progress import Progress as Shown

WORST_FIRST = (3, 5, 4, 1, 2)  # of several failures the code is the first of these
End = TypeVar("End")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdexport")
@shared
def main(**_: Any) -> None:
    """Stable Diffusion out of PyTorch: a diffusers checkpoint becomes a bundle that sdruntime runs."""


main.add_command(verify)
main.add_command(bench)


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
@click.option("--no-audit", is_flag=True, help="Half precision without measuring what must stay float32: quicker, and unproven.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights too. Only for a checkpoint that you trust.")
@click.option("--no-verify", is_flag=True, help="Neither make golden numbers nor hold the bundle to them.")
@shared
@with_progress
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
    no_audit: bool,
    allow_pickle: bool,
    no_verify: bool,
    as_json: bool,
    shown: Shown,
) -> None:
    """Export MODEL, a diffusers folder or a hub id, to a bundle."""
    if recipe is not None:
        _refuse_beside_a_recipe(click.get_current_context())
    elif not backends and (target or size or batch or guidance):
        raise click.UsageError("--target, --size, --batch and --guidance are of engines: name a --backend too")
    if model is None and recipe is None:
        raise click.UsageError("name a MODEL, or a --recipe")
    if no_audit and recipe is None and precision == "fp32":
        shown.note("warning: --no-audit has no effect: fp32 is not audited")
    from sdexport.build import Options
    from sdexport.build import build as events
    from sdexport.engines import options_of
    from sdexport.recipe import read_recipe
    from sdruntime.build import Asked

    engines = tuple(Asked(backend=name, target=target, size=size, batch=batch, guidance=guidance) for name in backends)
    options = Options(precision=precision, engines=engines, allow_pickle=allow_pickle, audit=not no_audit, verify=not no_verify)
    if recipe is not None:
        found = read_recipe(recipe) if model is None else read_recipe(recipe).of(model)
        options = options_of(found)
        options = dataclasses.replace(options, audit=options.audit and not no_audit, verify=options.verify and not no_verify)
        model = found.model
    assert model is not None
    built = _followed(events(model, output, options), shown)
    if as_json:
        document(
            bundle=str(built.folder),
            up_to_date=built.up_to_date,
            written=built.written,
            checks=built.checks,
            peak_memory=built.peak,
            changes=list(built.changes),
        )
        return
    for line in built.changes:
        shown.note(f"note: {line}")
    if built.up_to_date:
        shown.print(f"{built.folder} is up to date")
    else:
        shown.print(f"{built.folder}: {built.written:,} bytes written, peak memory {built.peak / 1e9:.2f} GB")
        if built.checks:
            shown.print(f"{built.checks} checks against PyTorch passed")
        elif options.verify:
            why = "no CPU runs bf16 in ONNX Runtime" if options.precision == "bf16" else "pip install onnxruntime"
            command = f"sdruntime verify {quoted(built.folder)}"
            shown.note(f"warning: nothing here could check the numbers ({why}): on the device, {command} does")


def _refuse_beside_a_recipe(context: click.Context) -> None:
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and name not in ("model", "output", "recipe", "no_audit", "no_verify", "as_json"):
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
@shared
@with_progress
def engines(recipes: tuple[str, ...], model: str | None, output: Path, python: str | None, as_json: bool, shown: Shown) -> None:
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
        shown.clear()
        if not as_json:
            shown.note(f"== {name}")
        taken = [outcome.bundle for outcome in outcomes]
        outcomes.append(_followed(run_recipe(name, output, model=model, builder=builder, taken=taken), shown))
        for failure in outcomes[-1].failures:
            shown.note(f"error: {_failed(failure)}")
    shown.close()
    errors = [failure.error for outcome in outcomes for failure in outcome.failures]
    worst = min(errors, key=_rank, default=None)
    if as_json:
        found = [_outcome(outcome) for outcome in outcomes]
        if worst is not None:
            raise Failed(worst, recipes=found)
        document(recipes=found)
        return
    _table(outcomes)
    if worst is not None:
        sys.exit(code_of(worst))


def _rank(error: Exception) -> int:
    code = code_of(error)
    return WORST_FIRST.index(code) if code in WORST_FIRST else len(WORST_FIRST)


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
    return f"{failure.what}: {reason_of(failure.error)}" if failure.what else reason_of(failure.error)


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "recipe": outcome.recipe,
        "bundle": None if outcome.bundle is None else str(outcome.bundle),
        "exported": outcome.exported,
        "built": [{"engine": event.engine, "bytes": event.size, "seconds": event.seconds} for event in outcome.built],
        "present": [event.engine for event in outcome.present],
        "failed": [
            {"engines": failure.what, "error": reason_of(failure.error), "exit_code": code_of(failure.error)}
            for failure in outcome.failures
        ],
        "seconds": round(outcome.seconds, 3),
    }


def _followed(events: Iterable[Progress | EngineProgress | End], shown: Shown) -> End:
    """Show a build; returns its end, the first event that is no step."""
    from sdexport.build import EngineProgress, Progress

    for event in events:
        if isinstance(event, Progress):
            stage = event.stage
            shown.show(event.component, stage.name, done=stage.done, total=stage.total, unit="B")
        elif isinstance(event, EngineProgress):
            each = event.event
            if each.stage is None:
                shown.show(each.engine, "" if each.state == "begin" else each.state)
            else:
                shown.show(each.engine, each.stage.name, done=each.stage.done, total=each.stage.total)
        else:
            return event
    raise AssertionError("a build tells its end")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--precision", is_flag=True, help="Tell which nodes stay in float32 beside half precision, why, and the numbers.")
@shared
def inspect(bundle: Path, precision: bool, as_json: bool, quiet: bool) -> None:
    """Tell what a bundle holds, and whether every byte of it is as it was written."""
    from sdruntime.bundle import Bundle
    from sdruntime.errors import BundleError
    from sdruntime.record import json_from_record

    opened = Bundle.open(bundle)
    if changed := opened.changed_files():
        raise BundleError(bundle, changed)
    manifest = opened.manifest
    if precision:
        from sdexport.describe import audit_document, audit_lines

        if as_json:
            document(**audit_document(manifest))
        else:
            click.echo("\n".join(audit_lines(manifest)))
        return
    if as_json:
        document(manifest=json_from_record(manifest))
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
@shared
def doctor(as_json: bool, quiet: bool) -> None:
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
        document(
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
