"""Names of tensors, from one layout to another: by the module that holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sdexport.checkpoint.weights.safetensors import StoredTensor

Tensors = Mapping[str, StoredTensor]
Shape = tuple[int, ...]
Inside = Callable[[str, str], str | None]  # (new name of a module, name within it) -> the name within it in another layout
_LISTED = 20  # names in a line
_TIME_WIDTH = 256  # of the embedding of each time id of SDXL


class Misfit(ValueError):
    """The tensors are not those of the network that most of them make; the message has a line for each kind of fault.

    `config`: of that network.
    """

    def __init__(self, config: Mapping[str, Any], lines: Iterable[str]) -> None:
        super().__init__("\n".join(lines))
        self.config = config


def within(tensors: Tensors, prefix: str) -> dict[str, StoredTensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def children(names: Iterable[str], module: str) -> list[int]:
    """Return the numbers of a module's numbered children: of `input_blocks.0.0.weight` that is 0. Gaps are filled.

    A number that is more than twice as large as the count of those before it does not count.
    """
    start = f"{module}."
    numbers = {name[len(start) :].partition(".")[0] for name in names if name.startswith(start)}
    count = last = 0
    for number in sorted(int(number) for number in numbers if number.isascii() and number.isdecimal() and len(number) < 5):
        if number <= 2 * count + 1:
            count, last = count + 1, number + 1
    return list(range(last))


def size(tensors: Tensors, *places: tuple[str, int, int], usual: int | None = None) -> int:
    """Return the size that most of some axes have: of each tensor its name, its number of axes, and the axis.

    A tensor that is missing or has another number of axes does not count. If none counts, return `usual`; without it, raise
    ValueError.
    """
    sizes = Counter(
        tensors[name].shape[axis] for name, axes, axis in places if name in tensors and len(tensors[name].shape) == axes
    )
    if not sizes and usual is not None:
        return usual  # `check_fit` reports the names
    if not sizes:
        raise ValueError(f"{places[0][0]} is missing, or has not {places[0][1]} axes")
    return sizes.most_common(1)[0][0]


def outputs(tensors: Tensors, *modules: str, axes: int = 4, usual: int | None = None) -> int:
    """Return the number of outputs that most of these modules have, by their weights of so many axes and their biases."""
    weights, biases = ((f"{name}.weight", axes, 0) for name in modules), ((f"{name}.bias", 1, 0) for name in modules)
    return size(tensors, *weights, *biases, usual=usual)


def added_embedding(tensors: Tensors, name: str, *, pooled: int | None, ids: int) -> dict[str, object]:
    """Return the settings of a UNet that embeds a pooled text, `pooled` wide, and `ids` time ids, with weight `name`.

    {} without a pooled text. A weight that does not fit, or is missing, is taken for one of SDXL.
    """
    if pooled is None:
        return {}
    shape = tensors[name].shape if name in tensors else ()
    width = shape[1] if len(shape) == 2 else 0
    if width <= pooled or (width - pooled) % ids:
        width = pooled + ids * _TIME_WIDTH
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled) // ids,
        "projection_class_embeddings_input_dim": width,
    }


def in_module(rest: str, parts: Mapping[str, str]) -> str | None:
    """Return the new name of a module's weight or bias, of which `parts` has the module's own modules; None for another name."""
    part, _, kind = rest.rpartition(".")
    if kind not in ("weight", "bias") or (part and part not in parts):
        return None
    return f"{parts[part]}.{kind}" if part else kind


def reverse(parts: Mapping[str, str]) -> dict[str, str]:
    """Return the old name for each new one."""
    return {new: old for old, new in parts.items()}


def moved(name: str, places: Mapping[str, str], inside: Callable[[str, str, str], str | None]) -> str | None:
    """Return the other name of a tensor: `places` has that of its module, `inside(module, place, rest)` that within it.

    If several modules contain the tensor, the innermost counts. None: no module has it.
    """
    parts = name.split(".")
    cut = next((cut for cut in range(len(parts) - 1, 0, -1) if ".".join(parts[:cut]) in places), 0)
    if not cut:
        return None
    module = ".".join(parts[:cut])
    rest = inside(module, places[module], ".".join(parts[cut:]))
    return None if rest is None else f"{places[module]}.{rest}"


def renamed(tensors: Tensors, places: Mapping[str, str], inside: Inside) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors by new names, and the names that no module has; as `moved`, with `inside(place, rest)`."""
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        new = moved(name, places, lambda _, place, rest: inside(place, rest))
        if new is None:
            unknown.append(name)
        else:
            renamed[new] = tensor
    return renamed, unknown


def check_fit(
    config: Mapping[str, Any],
    expected: Mapping[str, Shape],
    weights: Tensors,
    *,
    unknown: Iterable[str] = (),
    old: Callable[[str], str] = str,
    stored_shape: Callable[[str, Shape], Shape] = lambda _, shape: shape,
    file: Tensors | None = None,
    spellings: Callable[[str], Iterable[str]] = lambda name: (name,),
) -> None:
    """Raise Misfit with the names that are unknown and missing, and the wrong shapes, each in one line with their number.

    `expected`: the shapes of the network of `config`. `file`: the tensors as they are stored, if not as in `weights`, where
    `old` has the name and `stored_shape` the shape of a weight of this name and shape. `spellings`: the names under which a
    weight may be stored.
    """
    stored = {name: next((other for other in spellings(name) if other in weights), None) for name in expected}
    known = set(stored.values())
    lines = {
        "unknown name": [*unknown, *(old(name) for name in weights if name not in known)],
        "missing name": [old(name) for name, other in stored.items() if other is None],
        "wrong shape": [
            f"{old(name)} {list((file or weights).get(old(name), weights[other]).shape)}, where "
            f"{list(stored_shape(name, expected[name]))} fits"
            for name, other in stored.items()
            if other is not None and weights[other].shape != expected[name]
        ],
    }
    faults = [_line(kind, list(dict.fromkeys(names))) for kind, names in lines.items() if names]
    if faults:
        raise Misfit(config, faults)


def _line(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    separator = "; " if kind == "wrong shape" else ", "
    shown = separator.join(f"{name:.120}" for name in names[:_LISTED])
    return f"{len(names):,} {kind}{'s' if len(names) > 1 else ''}: {shown}{more}"
