"""Read recipes: TOML files that describe a bundle, its checkpoint and its engines. The fields are in engines/README.md."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from sdexport.checkpoint.overrides import named_controlnets
from sdexport.errors import RecipeError
from sdruntime.adapters.lora import lora_from
from sdruntime.backends.registry import BACKENDS, OFFERED
from sdruntime.bundle.manifest import Precision
from sdruntime.bundle.model import NO_DEFAULTS, Defaults, ModelSpec, PredictionType
from sdruntime.bundle.records import record_from_json
from sdruntime.engines.building import BuildRequest
from sdruntime.engines.shapes import Guidance, Shapes
from sdruntime.errors import SettingError, UnknownName, plain, shown
from sdruntime.system.document import read_document

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path("engines")
LARGEST = 1 << 20  # bytes of a recipe
_TARGET = re.compile(r"current|ampere\+|sm\d{2,3}|cuda|cpu")
_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]{0,99}", flags=re.ASCII)
_NAME_FORM = "expected at most 100 letters, digits and _ . + -"
# to check the syntax of sizes and batches; the export checks them against the real model (its multiple) before it starts
_ANY_MODEL = ModelSpec(
    name="any", family="sd1", prediction_type="epsilon", scaling_factor=1.0, vae_factor=1, size_multiple=1, default_size=(1, 1)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The description of a bundle and its engines.

    `model` is a folder or a model id of the hub, and `revision` its revision. `prediction_type`, `config` and `vae` replace parts
    of it, as in ExportOptions, and `defaults` what images are made with by default. `audit` measures half precision; `verify`
    checks the bundle and its engines.
    """

    name: str
    model: str
    engines: tuple[BuildRequest, ...]
    description: str = ""
    revision: str | None = None
    prediction_type: PredictionType | None = None
    config: str | None = None
    vae: str | None = None
    defaults: Defaults = NO_DEFAULTS
    preview_vae: str | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    precision: Precision = "fp32"
    audit: bool = True
    verify: bool = True

    def of(self, model: str) -> Recipe:
        """Return the recipe for another checkpoint, without the revision of the first and what changes or replaces its parts."""
        alone = dataclasses.replace(self, revision=None, prediction_type=None, config=None, vae=None, preview_vae=None)
        return dataclasses.replace(alone, model=model, controlnets={}, loras=(), embeddings=())


def recipe_names() -> list[str]:
    """Return the names of the recipes in `engines/`."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def recipe_file(name: str) -> Path:
    """Return the file of a recipe; `name` is a path ending in .toml or a name in `engines/`. Raises UnknownName, SettingError."""
    if name.endswith(".toml"):
        return Path(name)
    known = recipe_names()
    if not known:
        raise SettingError(f"recipe {name!r}: {FOLDER.resolve()} has no recipes: give the path of a file, such as {name}.toml")
    if name not in known:
        raise UnknownName("recipe", name, known)
    return FOLDER / f"{name}.toml"


def read_recipe(file: Path) -> Recipe:
    """Return the recipe in `file`. Raises RecipeError with every fault, each with the path of its field."""
    document = _read_toml(file)
    faults: list[str] = []
    text: RecipeText | None = record_from_json(RecipeText, document, where="", faults=faults)
    faults += _option_faults(document)
    if text is not None and text.revision and _is_path(text.model, file):
        faults.append("revision: a folder has no revision: only a model of the hub")
    name = file.stem if text is None else text.name or file.stem
    if text is not None and not text.name and not _NAME.fullmatch(name):
        faults.append(f"name: missing, and {shown(name)}, the file's, cannot name the bundle's folder: {_NAME_FORM}")
    if text is None or faults:
        raise RecipeError(file, faults)
    return Recipe(
        name=name,
        description=text.description,
        model=_source(text.model, file),
        revision=text.revision,
        prediction_type=text.prediction_type,
        config=None if text.config is None else str(file.parent / text.config),
        vae=None if text.vae is None else _source(text.vae, file),
        defaults=text.defaults,
        preview_vae=None if text.preview_vae is None else _source(text.preview_vae, file),
        controlnets=named_controlnets(
            *(
                [f"{name}={_source(model, file)}" for name, model in models.items()]
                for models in (text.controlnets, text.t2i_adapters)
            )
        ),
        loras=tuple(str(file.parent / lora) for lora in text.loras),
        embeddings=tuple(_embedding(source, file) for source in text.embeddings),
        precision=text.precision,
        audit=text.audit,
        verify=text.verify,
        engines=tuple(request for table in text.engines for request in table.requests()),
    )


def _is_path(model: str, recipe: Path) -> bool:
    """Return whether a recipe's text is a path, relative to the recipe, and not a hub id."""
    return model.startswith((".", "/")) or (recipe.parent / model).exists()


def _source(model: str, recipe: Path) -> str:
    return str(recipe.parent / model) if _is_path(model, recipe) else model


def _embedding(source: str, recipe: Path) -> str:
    """Return FILE or NAME=FILE with the path of the file from the current folder."""
    name, equals, path = ("", "", source) if (recipe.parent / source).exists() else source.rpartition("=")
    return f"{name}{equals}{recipe.parent / path}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = tomllib.loads(read_document(path, most=LARGEST).decode())
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(path, [f"not TOML: {error}"]) from error
    except RecursionError:
        raise RecipeError(path, ["not readable: nested too deeply"]) from None
    except (OSError, ValueError) as error:  # not UTF-8, too large, or a number with too many digits for Python
        raise RecipeError(path, [f"not readable: {plain(error)}"]) from error
    return document


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SettingError(f"{shown(name)} names the bundle's folder: {_NAME_FORM}")


def _check_model(model: str) -> None:
    if not model:
        raise SettingError("empty: expected a folder or a hub id")
    try:
        Path(model).exists()
    except (OSError, ValueError) as error:  # too long, or with a null character
        raise SettingError(f"{shown(model)} is not a valid path: {plain(error)}") from error


def _check_loras(loras: tuple[str, ...]) -> None:
    for lora in loras:
        lora_from(lora)


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise UnknownName("backend", name, OFFERED)


def _check_target(target: str) -> None:
    if not _TARGET.fullmatch(target):
        raise SettingError(f"unknown target {target!r}: must be current, ampere+, sm86 (a compute capability), cuda or cpu")


def _check_size(size: str) -> None:
    Shapes.parse(_ANY_MODEL, size=size)


def _check_batch(batch: int | str) -> None:
    Shapes.parse(_ANY_MODEL, batch=str(batch))


def _check_chunks(chunks: int | str) -> None:
    Shapes.parse(_ANY_MODEL, chunks=str(chunks))


def _check_not_empty(items: object) -> None:
    if items in ((), ""):
        raise SettingError("empty: give at least one, or omit the key for the default")


Target = Annotated[str, _check_target]
Targets = Target | Annotated[tuple[Target, ...], _check_not_empty]
Size = Annotated[str, _check_size]
Sizes = Size | Annotated[tuple[Size, ...], _check_not_empty]
Batch = Annotated[int | str, _check_batch]
Batches = Batch | Annotated[tuple[Batch, ...], _check_not_empty]
Chunks = Annotated[int | str, _check_chunks]
Options = Mapping[str, bool | int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentTable:
    """The settings of a component that differ from its [[engines]] table."""

    size: Sizes | None = None
    batch: Batches | None = None
    guidance: Guidance | None = None
    chunks: Chunks | None = None
    options: Options = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of BuildRequest that the table sets."""
        shapes: dict[str, Any] = {
            name: _joined(value) for name in ("size", "batch") if (value := getattr(self, name)) is not None
        }
        shapes |= {"guidance": self.guidance} if self.guidance else {}
        return shapes | ({"chunks": str(self.chunks)} if self.chunks is not None else {})

    def option_texts(self) -> dict[str, str]:
        """Return the options as the command line would pass them."""
        return {key: _option_text(value) for key, value in self.options.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentsTable:
    """The settings by component; False means no engine of that component."""

    text_encoder: Literal[False] | ComponentTable | None = None
    text_encoder_2: Literal[False] | ComponentTable | None = None
    unet: Literal[False] | ComponentTable | None = None
    vae_decoder: Literal[False] | ComponentTable | None = None
    vae_encoder: Literal[False] | ComponentTable | None = None
    preview_decoder: Literal[False] | ComponentTable | None = None
    step: Literal[False] | ComponentTable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginesTable(ComponentTable):
    """One [[engines]] table."""

    backend: Annotated[str, _check_backend]
    target: Targets | None = None
    components: ComponentsTable = field(default_factory=ComponentsTable)

    def requests(self) -> Iterator[BuildRequest]:
        """Yield a request for each target, and one for each component with its own settings."""
        tables = {entry.name: getattr(self.components, entry.name) for entry in dataclasses.fields(self.components)}
        separate = {name: table for name, table in tables.items() if table is not None}
        shapes, options = self.settings(), self.option_texts()
        for target in [self.target] if self.target is None or isinstance(self.target, str) else self.target:
            yield BuildRequest(backend=self.backend, target=target, **shapes, options=options, without=tuple(separate))
            for component, own in separate.items():
                if own is not False:
                    both = options | own.option_texts()
                    merged = shapes | own.settings()
                    yield BuildRequest(backend=self.backend, target=target, **merged, options=both, components=(component,))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeText:
    """The fields of a recipe file."""

    model: Annotated[str, _check_model]
    revision: Annotated[str, _check_not_empty] | None = None
    prediction_type: PredictionType | None = None
    config: Annotated[str, _check_model] | None = None
    vae: Annotated[str, _check_model] | None = None
    defaults: Defaults = NO_DEFAULTS
    preview_vae: Annotated[str, _check_model] | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    t2i_adapters: Mapping[str, str] = field(default_factory=dict)
    loras: Annotated[tuple[str, ...], _check_loras] = ()
    embeddings: tuple[str, ...] = ()
    precision: Precision = "fp32"
    audit: bool = True
    verify: bool = True
    name: Annotated[str, _check_name] | None = None
    description: str = ""
    engines: Annotated[tuple[EnginesTable, ...], _check_not_empty]


def _joined(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _option_text(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 1024:  # Python refuses to format a number of 5,000 digits
        return f"a number of {value.bit_length():,} bits"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _option_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield a fault for each option with an unknown name or an invalid value. `record_from_json` checks the types."""
    tables = document.get("engines")
    for index, table in enumerate(tables if isinstance(tables, list) else []):
        name = table.get("backend") if isinstance(table, dict) else None
        if not isinstance(name, str) or name not in BACKENDS:
            continue
        known, where = BACKENDS[name].options, f"engines[{index}]"
        components = table.get("components")
        places = {f"{where}.components.{key}": own for key, own in components.items()} if isinstance(components, dict) else {}
        for place, own in {where: table, **places}.items():
            options = own.get("options") if isinstance(own, dict) else None
            for key, value in options.items() if isinstance(options, dict) else ():
                if key not in known:
                    yield f"{place}.options.{key}: {UnknownName('option', key, known)}"
                elif isinstance(value, bool | int | str) and known[key][0](_option_text(value)) is None:
                    yield f"{place}.options.{key}: got {shown(value)}; expected {known[key][1]}"
