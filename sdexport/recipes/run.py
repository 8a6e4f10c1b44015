"""Recipes run: each becomes a bundle with its engines. What fails is kept beside what was done, and the rest goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sdexport.build.events import EngineProgress, ExportOptions, ExportProgress
from sdexport.build.export import export
from sdexport.errors import SdexportError
from sdexport.recipes.recipe import Recipe, read_recipe, recipe_file
from sdruntime.bundle.manifest import Precision
from sdruntime.engines.building import BuildEvent, BuildRequest, build_engines
from sdruntime.errors import SdruntimeError, SettingError
from sdruntime.verification.verify import check_engine

FAULTS = (SdexportError, SdruntimeError, MemoryError, OSError)


class Builder(Protocol):
    """What builds engines into a bundle."""

    def check(self, asked: BuildRequest, precision: Precision) -> None:
        """Raise what can be refused before the work."""
        ...

    def build(self, folder: Path, asked: BuildRequest, *, verify: bool) -> Generator[BuildEvent, None, None]:
        """`verify`: hold each to the bundle's reference outputs before it is added."""
        ...


class CurrentInterpreter:
    """This interpreter."""

    def check(self, asked: BuildRequest, precision: Precision) -> None:
        asked.resolve_library(precision)

    def build(self, folder: Path, asked: BuildRequest, *, verify: bool) -> Generator[BuildEvent, None, None]:
        return build_engines(folder, asked, check=check_engine if verify else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What failed: the engines of a backend and target, or, where `what` is empty, the recipe as a whole."""

    what: str
    error: Exception


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a recipe. `exported`: bytes of the bundle without its engines, 0 where it was up to date."""

    recipe: str
    bundle: Path | None = None
    exported: int = 0
    built: list[BuildEvent] = field(default_factory=list)
    present: list[BuildEvent] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    @contextlib.contextmanager
    def keeping(self, what: str) -> Iterator[None]:
        """Make a failure of an error, once of the same: engines of one backend mostly fail for one reason."""
        try:
            yield
        except FAULTS as error:
            if str(error) not in [str(failure.error) for failure in self.failures]:
                self.failures.append(Failure(what=what, error=error))


def options_of(recipe: Recipe) -> ExportOptions:
    return ExportOptions(
        revision=recipe.revision,
        precision=recipe.precision,
        engines=recipe.engines,
        audit=recipe.audit,
        verify=recipe.verify,
    )


def run_recipe(
    name: str,
    output: Path,
    *,
    model: str | None = None,
    builder: Builder | None = None,
    taken: Collection[Path | None] = (),
) -> Generator[ExportProgress | EngineProgress, None, Outcome]:
    """Run the recipe `name`, a path or a name of engines/, into a folder of `output`; returns its `Outcome`.

    `model` takes the place of the recipe's. Engines that cannot be built are failures, and the others are built; nothing is
    exported where all of them are known to fail. `taken`: bundles of other recipes, which this one may not replace. Raises
    KeyboardInterrupt only: what was done is in the bundle, and stays.
    """
    begun, outcome = time.monotonic(), Outcome(recipe=Path(name).name.removesuffix(".toml"))
    with outcome.keeping(""):
        recipe = read_recipe(recipe_file(name))
        outcome.recipe, outcome.bundle = recipe.name, output / recipe.name
        if outcome.bundle in taken:
            raise SettingError(f"{recipe_file(name)}: {outcome.bundle} is another recipe's bundle: give this one another name")
        yield from _run(recipe if model is None else recipe.of(model), outcome.bundle, outcome, builder or CurrentInterpreter())
    outcome.seconds = time.monotonic() - begun
    return outcome


def _run(recipe: Recipe, bundle: Path, outcome: Outcome, builder: Builder) -> Iterator[ExportProgress | EngineProgress]:
    able = []
    for asked in recipe.engines:
        with outcome.keeping(_label(asked)):
            builder.check(asked, recipe.precision)
            able.append(asked)
    if not able:
        return
    exported = yield from export(recipe.model, bundle, options_of(recipe))
    outcome.exported = exported.written
    for asked in able:
        build = contextlib.closing(builder.build(bundle, asked, verify=recipe.verify))
        with outcome.keeping(_label(asked)), build as events:
            for event in events:
                yield EngineProgress(event=event)
                kept = {"done": outcome.built, "present": outcome.present}.get(event.state)
                if kept is not None:
                    kept.append(event)


def _label(asked: BuildRequest) -> str:
    return " ".join(filter(None, (asked.backend, asked.target, *asked.components)))
