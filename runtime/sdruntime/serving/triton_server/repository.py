"""Write the model into a repository of Triton: NAME/config.pbtxt and NAME/1/model.py, which imports ours."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sdruntime.bundle.bundle import Bundle, disk_full_as_error
from sdruntime.errors import SettingError
from sdruntime.serving.triton_server.tensors import INPUTS, OUTPUTS, TensorRow
from sdruntime.system.durable import make_folders, replace_file, sync_tree
from sdruntime.system.owner import owned_folder, sweep

CONFIG, MODEL = "config.pbtxt", "1/model.py"
FIRST_LINE = "# Written by `sdruntime triton`, which replaces a model with this line."
STUB = '''\
"""Written by `sdruntime triton`. The model is part of the package sdruntime: to upgrade it, upgrade the package."""

from sdruntime.serving.triton_server.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHOWN = 5


def write_model(repository: Path, bundle: Path, *, name: str = "", instances: int = 1, **parameters: str) -> Path:
    """Write the model of a bundle into a repository, which is created if it is missing, and return the model's folder.

    `name`: that of the model (the bundle's folder). `parameters`: those of its config, such as QUEUE. An existing model of this
    command is replaced. Raises SettingError for anything else in its place, BundleError, OutOfSpace; then nothing is changed.
    """
    bundle = Bundle.open(bundle).folder.resolve()
    name = name or bundle.name
    if not _NAME.fullmatch(name):
        raise SettingError(f"--name {name!r}: expected letters, digits, points, - and _: choose another name")
    if instances < 1:
        raise SettingError(f"--instances {instances}: at least 1")
    place = Path(os.path.abspath(repository)) / name  # noqa: PTH100  # resolve() would follow the last link
    check_place(place)
    text = config_text(name, instances, {"BUNDLE": str(bundle), **parameters})
    with disk_full_as_error(repository):
        make_folders(place.parent)
        if place.exists() and any(place.iterdir()):
            replace_file(place / MODEL, STUB.encode())
            replace_file(place / CONFIG, text.encode())
            return place
        prefix = f".{name}.staged-"
        sweep(place.parent, prefix)
        with owned_folder(place.parent, prefix) as staged:
            (staged / MODEL).parent.mkdir()
            (staged / MODEL).write_text(STUB, encoding="utf-8")
            (staged / CONFIG).write_text(text, encoding="utf-8")
            sync_tree(staged)
            staged.rename(place)  # an empty folder may be in its place
    return place


def check_place(place: Path) -> None:
    """Raise SettingError unless a model may be written to `place`: it is missing, empty, or a model of this command."""
    instead = "choose another --name or -o, or remove it yourself"
    for folder in (place.parent, place):
        if folder.exists() and not folder.is_dir():
            raise SettingError(f"{folder}: this is a file, not a folder: {instead}")
    if place.is_symlink():
        raise SettingError(f"{place}: a symbolic link is never replaced: {instead}")
    if not place.exists() or not any(place.iterdir()):
        return
    try:
        first = (place / CONFIG).read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        first = ""
    if first != FIRST_LINE:
        raise SettingError(f"{place}: this is not a model that `sdruntime triton` wrote: {instead}")
    if others := sorted(_others(place)):
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise SettingError(
            f"{place}: it has files that this command does not write: {', '.join(others[:_SHOWN])}{more}: {instead}"
        )


def _others(place: Path) -> Iterator[str]:
    """Yield the files in a model's folder that are not ours. Python's compiled files do not count."""
    for path in place.rglob("*"):
        name = path.relative_to(place).as_posix()
        if name not in (CONFIG, MODEL, "1", "1/__pycache__") and path.parent.name != "__pycache__":
            yield name


def config_text(name: str, instances: int, parameters: Mapping[str, str]) -> str:
    """Return config.pbtxt: a decoupled model, which takes any number of requests at a time and batches them itself."""
    lines = [
        FIRST_LINE,
        f"name: {_quoted(name)}",
        'backend: "python"',
        "",
        "# No batching and no queue of Triton's: each instance has a queue of its own, whose requests share UNet calls.",
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        "",
        "# On a machine with GPUs, `count` instances for each of them. One batches more than two.",
        f"instance_group [ {{ kind: KIND_AUTO, count: {instances} }} ]",
        "",
        "# BUNDLE: the folder where the server sees it. QUEUE: requests that wait. RUNNING: those that run at a time.",
        *(
            f"parameters {{ key: {_quoted(key)}, value {{ string_value: {_quoted(value)} }} }}"
            for key, value in parameters.items()
        ),
        "",
        *_tensor_lines("input", INPUTS),
        "",
        *_tensor_lines("output", OUTPUTS),
    ]
    return "\n".join(lines) + "\n"


def _tensor_lines(kind: str, rows: Sequence[TensorRow]) -> Iterator[str]:
    for row in rows:
        dims = ", ".join(map(str, row.dims))
        optional = ", optional: true" if kind == "input" and row.optional else ""
        yield f"# {row.what}"
        yield f"{kind} {{ name: {_quoted(row.name)}, data_type: TYPE_{row.dtype}, dims: [ {dims} ]{optional} }}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
