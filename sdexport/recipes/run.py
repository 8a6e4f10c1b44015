"""Run recipes: build each bundle with its engines. A failure is recorded in the outcome, and the rest is still built."""

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
    """The interface for building engines into a bundle."""

    def check(self, request: BuildRequest, precision: Precision) -> None:
        """Raise the errors that can be known before the work."""
        ...

    def build(self, folder: Path, request: BuildRequest, *, verify: bool) -> Generator[BuildEvent, None, None]:
        """Build engines. With `verify`, each is checked against the bundle's reference outputs before it is added."""
        ...


class CurrentInterpreter:
    """Build engines in this interpreter."""

    def check(self, request: BuildRequest, precision: Precision) -> None:
        request.resolve_library(precision)

    def build(self, folder: Path, request: BuildRequest, *, verify: bool) -> Generator[BuildEvent, None, None]:
        return build_engines(folder, request, check=check_engine if verify else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failure of the engines of a backend and target (`what`), or of the whole recipe if `what` is empty."""

    what: str
    error: Exception


@dataclass(slots=True, kw_only=True)
class RecipeResult:
    """The outcome of a recipe. `exported` is the size of the bundle without its engines in bytes, 0 if it was up to date."""

    recipe: str
    bundle: Path | None = None
    exported: int = 0
    built: list[BuildEvent] = field(default_factory=list)
    present: list[BuildEvent] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    @contextlib.contextmanager
    def keeping(self, what: str) -> Iterator[None]:
        """Record an error as a failure, unless there is an equal one: engines of one backend mostly fail for one reason."""
        try:
            yield
        except FAULTS as error:
            if str(error) not in [str(failure.error) for failure in self.failures]:
                self.failures.append(Failure(what=what, error=error))


def options_of(recipe: Recipe) -> ExportOptions:
    """Return the options of `sdexport.build.export.build` for a recipe."""
    return ExportOptions(
        revision=recipe.revision,
        prediction_type=recipe.prediction_type,
        defaults=recipe.defaults,
        config=recipe.config,
        vae=recipe.vae,
        preview_vae=recipe.preview_vae,
        controlnets=recipe.controlnets,
        loras=recipe.loras,
        embeddings=recipe.embeddings,
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
) -> Generator[ExportProgress | EngineProgress, None, RecipeResult]:
    """Run the recipe `name`, a path or a name in engines/, into a folder of `output`; return its `RecipeResult`.

    `model` replaces the recipe's. Engines that cannot be built are failures, and the others are still built; if all of them are
    known to fail, nothing is exported. `taken` are the bundles of other recipes, which this one must not replace. Raises only
    KeyboardInterrupt; finished work stays in the bundle.
    """
    begun, outcome = time.monotonic(), RecipeResult(recipe=Path(name).name.removesuffix(".toml"))
    with outcome.keeping(""):
        recipe = read_recipe(recipe_file(name))
        outcome.recipe, outcome.bundle = recipe.name, output / recipe.name
        if outcome.bundle in taken:
            raise SettingError(f"{recipe_file(name)}: {outcome.bundle} is another recipe's bundle: give this one another name")
        yield from _run(recipe if model is None else recipe.of(model), outcome.bundle, outcome, builder or CurrentInterpreter())
    outcome.seconds = time.monotonic() - begun
    return outcome


def _run(recipe: Recipe, bundle: Path, outcome: RecipeResult, builder: Builder) -> Iterator[ExportProgress | EngineProgress]:
    possible = []
    for request in recipe.engines:
        with outcome.keeping(_label(request)):
            builder.check(request, recipe.precision)
            possible.append(request)
    if not possible:
        return
    exported = yield from export(recipe.model, bundle, options_of(recipe))
    outcome.exported = exported.written
    for request in possible:
        build = contextlib.closing(builder.build(bundle, request, verify=recipe.verify))
        with outcome.keeping(_label(request)), build as events:
            for event in events:
                yield EngineProgress(event=event)
                engines = {"done": outcome.built, "present": outcome.present}.get(event.state)
                if engines is not None:
                    engines.append(event)


def _label(request: BuildRequest) -> str:
    return " ".join(filter(None, (request.backend, request.target, *request.components)))
