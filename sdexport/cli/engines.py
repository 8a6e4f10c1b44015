"""The command `engines`: build recipes and print a table of the outcomes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdexport.cli.following import run_with_progress
from sdexport.cli.reporting import shared, with_progress
from sdruntime.cli.terminal import Failed, code_of, document, reason_of

if TYPE_CHECKING:
    from sdexport.recipes.run import Failure, RecipeResult
    from sdruntime.cli.progress import Reporter


WORST_FIRST = (3, 5, 4, 1, 2)  # if several recipes fail, the exit code is the first of these


@click.command()
@click.argument("recipes", metavar="[RECIPE]...", nargs=-1)
@click.option("--model", help="Use this folder or model id instead of the recipe's own; for a single RECIPE.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("engines/built"),
    show_default=True,
    help="Where to write the bundles, one folder per recipe.",
)
@click.option("--python", help="Build the engines with this interpreter, which needs the engine library and NumPy, but no torch.")
@shared
@with_progress
def engines(
    recipes: tuple[str, ...], model: str | None, output: Path, python: str | None, as_json: bool, reporter: Reporter
) -> None:
    """Build the bundle and the engines of each RECIPE.

    RECIPE is a path or a name in engines/; without one, all of engines/.

    Engines that exist already are kept. If a recipe fails, the others are still built.
    """
    from sdexport.recipes.interpreter import Interpreter
    from sdexport.recipes.recipe import recipe_names
    from sdexport.recipes.run import run_recipe

    names = recipes or recipe_names()
    if not names:
        raise click.UsageError("no recipe in engines/: give a recipe file")
    if model and len(names) != 1:
        raise click.UsageError("--model replaces the model of one recipe: give a single RECIPE")
    builder = Interpreter(python=python) if python else None
    outcomes: list[RecipeResult] = []
    for name in names:
        reporter.clear()
        if not as_json:
            reporter.note(f"== {name}")
        taken = [outcome.bundle for outcome in outcomes]
        outcomes.append(run_with_progress(run_recipe(name, output, model=model, builder=builder, taken=taken), reporter))
        for failure in outcomes[-1].failures:
            reporter.note(f"error: {_failed(failure)}")
    reporter.close()
    errors = [failure.error for outcome in outcomes for failure in outcome.failures]
    worst = min(errors, key=_rank, default=None)
    if as_json:
        fields = [_outcome(outcome) for outcome in outcomes]
        if worst is not None:
            raise Failed(worst, recipes=fields)
        document(recipes=fields)
        return
    _table(outcomes)
    if worst is not None:
        sys.exit(code_of(worst))


def _rank(error: Exception) -> int:
    code = code_of(error)
    return WORST_FIRST.index(code) if code in WORST_FIRST else len(WORST_FIRST)


def _table(outcomes: Sequence[RecipeResult]) -> None:
    """Print a row for each recipe, then a line for each failure."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", overflow="fold")
    for heading in ("built", "up to date", "failed", "engine bytes", "ONNX bytes", "seconds"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        written = sum(event.size for event in outcome.built)
        counts = (len(outcome.built), len(outcome.present), len(outcome.failures))
        table.add_row(outcome.recipe, *map(str, counts), f"{written:,}", f"{outcome.exported:,}", f"{outcome.seconds:.1f}")
    Console().print(table)
    for outcome in outcomes:
        for failure in outcome.failures:
            click.echo(f"{outcome.recipe}: {_failed(failure).splitlines()[0]}")


def _failed(failure: Failure) -> str:
    return f"{failure.what}: {reason_of(failure.error)}" if failure.what else reason_of(failure.error)


def _outcome(outcome: RecipeResult) -> dict[str, Any]:
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
