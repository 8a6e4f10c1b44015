"""Recipes: which bundle is built from which checkpoint, with which engines, as a TOML file says. Fields: engines/README.md."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sdexport.errors import RecipeError
from sdexport.recipes.toml import Where, read_toml
from sdruntime.backends.registry import BACKENDS, OFFERED
from sdruntime.bundle.manifest import ModelSpec, Precision
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.engines.building import BuildRequest
from sdruntime.engines.shapes import Guidance, Shapes
from sdruntime.errors import SettingError, UnknownName, shown

FOLDER = Path("engines")
RECIPE = ("name", "description", "model", "revision", "precision", "audit", "verify", "engines")
ENGINES = ("backend", "target", "size", "batch", "guidance", "options", "components")
COMPONENT = ("size", "batch", "guidance", "options")
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", STEP)
_TARGET = re.compile(r"current|ampere\+|sm\d{2,3}|cuda|cpu")
# checks the form of sizes and batches; the real model's multiple is checked before the export begins
_ANY_MODEL = ModelSpec(
    name="any", family="sd1", prediction_type="epsilon", scaling_factor=1.0, vae_factor=1, size_multiple=1, default_size=(1, 1)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a bundle is built and with which engines. `model`: a folder, relative to the file, or a model id; `revision`: of it.
    `audit`, `verify`: whether to measure half precision, and whether to check the bundle and its engines."""

    name: str
    model: str
    engines: tuple[BuildRequest, ...]
    description: str = ""
    revision: str | None = None
    precision: Precision = "fp32"
    audit: bool = True
    verify: bool = True

    def of(self, model: str) -> Recipe:
        """Return the recipe for another checkpoint, without the revision, which belonged to the first."""
        return dataclasses.replace(self, model=model, revision=None)


def recipe_names() -> list[str]:
    """Those of `engines/`."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def recipe_file(name: str) -> Path:
    """The file of a recipe: a path ending in .toml, or the name of one in `engines/`. Raises UnknownName."""
    if name.endswith(".toml"):
        return Path(name)
    known = recipe_names()
    if not known:
        raise SettingError(f"recipe {name!r}: no recipe is in {FOLDER.resolve()}: give the path of a file, such as {name}.toml")
    if name not in known:
        raise UnknownName("recipe", name, known)
    return FOLDER / f"{name}.toml"


def read_recipe(file: Path) -> Recipe:
    """Raises RecipeError with every fault, each with its line and field."""
    document, lines = read_toml(file)
    reader = _Reader()
    recipe = reader.recipe(document, file)
    if reader.faults:
        placed = sorted((_line(lines, where), _shown_place(where), what) for where, what in reader.faults)
        raise RecipeError(file, [f"{file}:{line}: {place}: {what}" for line, place, what in placed])
    return recipe


class _Reader:
    """Takes the values out of a document and keeps what is wrong with them, each with its place."""

    def __init__(self) -> None:
        self.faults: list[tuple[Where, str]] = []

    def fault(self, where: Where, what: object) -> None:
        self.faults.append((where, str(what)))

    def recipe(self, document: Mapping[str, Any], file: Path) -> Recipe:
        self.known_keys(document, (), RECIPE)
        name = self.text(document, (), "name") or file.stem
        if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]{0,99}", name, flags=re.ASCII):
            self.fault(("name",), f"{shown(name)} names the bundle's folder: expected at most 100 letters, digits and _ . + -")
        model = self.text(document, (), "model", needed=True) or ""
        found = file.parent / model
        try:
            is_path = model.startswith((".", "/")) or found.exists()
        except (OSError, ValueError) as error:  # longer than a name can be, or with a zero in it
            self.fault(("model",), f"{shown(model)} can be no path: {error.strerror if isinstance(error, OSError) else error}")
            is_path = False
        revision = self.text(document, (), "revision")
        if revision and is_path:
            self.fault(("revision",), "a folder has no revision: only a model of the hub")
        return Recipe(
            name=name,
            description=self.text(document, (), "description") or "",
            model=str(found) if is_path else model,
            revision=revision,
            precision=self.choice(document, (), "precision", get_args(Precision)) or "fp32",
            audit=self.flag(document, (), "audit"),
            verify=self.flag(document, (), "verify"),
            engines=self.engines(document),
        )

    def engines(self, document: Mapping[str, Any]) -> tuple[BuildRequest, ...]:
        tables = document.get("engines")
        if not isinstance(tables, list) or not tables:
            self.fault(("engines",), "missing" if tables is None else "expected [[engines]] tables")
            return ()
        return tuple(asked for index, table in enumerate(tables) for asked in self.asked(table, ("engines", index)))

    def asked(self, table: Any, where: Where) -> list[BuildRequest]:
        """One for each target, and each component that has settings of its own."""
        if not self.is_table(table, where, ENGINES):
            return []
        name = self.text(table, where, "backend", needed=True) or ""
        if name and name not in BACKENDS:
            self.fault((*where, "backend"), UnknownName("backend", name, OFFERED))
        targets = [target for at, target in self.items(table, where, "target", str, "text") if self.is_target(at, target)]
        shapes, options = self.shapes(table, where), self.options(table, where, name)
        apart = self.components(table, where, name)
        found = []
        for target in targets or [None]:
            found.append(BuildRequest(backend=name, target=target, **shapes, options=options, without=tuple(apart)))
            for component, own in apart.items():
                if own is not None:
                    merged = {**shapes, **own[0]}
                    both = {**options, **own[1]}
                    found.append(BuildRequest(backend=name, target=target, **merged, options=both, components=(component,)))
        return found

    def components(
        self, table: Mapping[str, Any], where: Where, name: str
    ) -> dict[str, tuple[dict[str, Any], dict[str, str]] | None]:
        """The components that are not as the others: their own shapes and options, or None for one that is omitted."""
        found: dict[str, tuple[dict[str, Any], dict[str, str]] | None] = {}
        where = (*where, "components")
        tables = table.get("components", {})
        if not self.is_table(tables, where, COMPONENTS):
            return found
        for component, own in tables.items():
            at = (*where, component)
            if own is False:
                found[component] = None
            elif not isinstance(own, dict):
                self.fault(at, f"expected false (no engine of it) or a table, got {_shown(own)}")
            elif self.is_table(own, at, COMPONENT):
                found[component] = self.shapes(own, at), self.options(own, at, name)
        return found

    def shapes(self, table: Mapping[str, Any], where: Where) -> dict[str, Any]:
        """The keyword arguments of BuildRequest for what the table says of shapes."""
        found: dict[str, Any] = {}
        forms: dict[str, tuple[Any, str]] = {
            "size": (str, "text such as '512x512'"),
            "batch": ((int, str), "a number or text such as '1:4'"),
        }
        for key, (kinds, form) in forms.items():
            texts = [str(value) for at, value in self.items(table, where, key, kinds, form) if self.is_shape(at, key, str(value))]
            if texts:
                found[key] = ",".join(texts)
        guidance = self.choice(table, where, "guidance", get_args(Guidance))
        return found | ({"guidance": guidance} if guidance else {})

    def options(self, table: Mapping[str, Any], where: Where, name: str) -> dict[str, str]:
        """As the command line would give them: text."""
        where = (*where, "options")
        known = BACKENDS[name].options if name in BACKENDS else None
        options = table.get("options", {})
        if not self.is_table(options, where, options if known is None else known):
            return {}
        found = {}
        for key, value in options.items():
            if not isinstance(value, (str, int)):
                self.fault((*where, key), f"expected text, a whole number, true or false, got {_shown(value)}")
                continue
            found[key] = str(value).lower() if isinstance(value, bool) else str(value)
            if known and key in known and known[key][0](found[key]) is None:
                self.fault((*where, key), f"{_shown(value)}: expected {known[key][1]}")
        return found

    def is_table(self, value: Any, where: Where, known: Collection[str]) -> bool:
        if not isinstance(value, dict):
            self.fault(where, f"expected a table, got {_shown(value)}")
            return False
        self.known_keys(value, where, known)
        return True

    def known_keys(self, table: Mapping[str, Any], where: Where, known: Collection[str]) -> None:
        for key in table:
            if key not in known:
                self.fault((*where, key), UnknownName("key", key, known) if known else f"unknown key {key!r}: none is allowed")

    def text(self, table: Mapping[str, Any], where: Where, key: str, *, needed: bool = False) -> str | None:
        value = table.get(key)
        if value is None:
            if needed:
                self.fault((*where, key), "missing")
        elif not isinstance(value, str) or not value:
            self.fault((*where, key), f"expected text, got {_shown(value)}")
        return value if isinstance(value, str) else None

    def flag(self, table: Mapping[str, Any], where: Where, key: str) -> bool:
        """True where nothing is said."""
        value = table.get(key, True)
        if not isinstance(value, bool):
            self.fault((*where, key), f"expected true or false, got {_shown(value)}")
        return value is True

    def choice(self, table: Mapping[str, Any], where: Where, key: str, choices: Collection[str]) -> Any:
        value = table.get(key)
        if value is not None and value not in choices:
            self.fault((*where, key), f"expected {' or '.join(map(repr, choices))}, got {_shown(value)}")
        return value

    def items(
        self, table: Mapping[str, Any], where: Where, key: str, kinds: type | tuple[type, ...], form: str
    ) -> list[tuple[Where, Any]]:
        """The value of a key, or the values where it is a list, each with its place."""
        value, place = table.get(key), (*where, key)
        if value is None:
            return []
        listed = [((*place, index), each) for index, each in enumerate(value)] if isinstance(value, list) else [(place, value)]
        if not listed:
            self.fault(place, "the list is empty: leave the key out to have the default")
        found = []
        for at, each in listed:
            if isinstance(each, kinds) and not isinstance(each, bool):
                found.append((at, each))
            else:
                self.fault(at, f"expected {form}, got {_shown(each)}")
        return found

    def is_target(self, where: Where, target: str) -> bool:
        known = _TARGET.fullmatch(target) is not None
        if not known:
            self.fault(where, f"unknown target {target!r}: current, ampere+, sm86 (a compute capability), cuda and cpu are known")
        return known

    def is_shape(self, where: Where, key: str, text: str) -> bool:
        try:
            Shapes.parse(_ANY_MODEL, **{key: text})  # type: ignore[arg-type]
        except SettingError as error:
            self.fault(where, error)
            return False
        return True


def _line(lines: Mapping[Where, int], where: Where) -> int:
    """That of the place, or of the nearest table around it for what is missing there."""
    while where and where not in lines:
        where = where[:-1]
    return lines.get(where, 1)


def _shown_place(where: Where) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
