"""Names of tensors, from one layout to another: by the module that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sdexport.checkpoint.weights.safetensors import StoredTensor

Tensors = Mapping[str, StoredTensor]


def within(tensors: Tensors, prefix: str) -> dict[str, StoredTensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def children(names: Iterable[str], module: str) -> list[int]:
    """Return the numbers of a module's numbered children, in order: of `input_blocks.0.0.weight` that is 0."""
    start = f"{module}."
    numbers = {name[len(start) :].partition(".")[0] for name in names if name.startswith(start)}
    return sorted(int(number) for number in numbers if number.isascii() and number.isdecimal() and len(number) < 5)


def shape_of(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    """Return a tensor's shape. Raises ValueError where there is no such tensor, or one with another number of axes."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    shape = tensors[name].shape
    if len(shape) != axes:
        raise ValueError(f"{name} is {list(shape)}: {axes} axes are expected")
    return shape


def added_embedding(tensors: Tensors, name: str, *, pooled: int | None, ids: int) -> dict[str, object]:
    """Return the settings of a UNet that embeds a pooled text, `pooled` wide, and `ids` time ids; {} without weight `name`."""
    if name not in tensors or pooled is None:
        return {}
    width = shape_of(tensors, name, 2)[1]
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


def renamed(tensors: Tensors, places: Mapping[str, str], inside: Callable[[str, str], str | None]) -> dict[str, StoredTensor]:
    """Return the tensors by new names: `places` has that of the module, `inside(module, rest)` that within it.

    If several modules contain a tensor, the innermost counts. Raises ValueError with the names that no module has.
    """
    found, unknown = {}, []
    for name, tensor in tensors.items():
        parts = name.split(".")
        cuts = (cut for cut in range(len(parts) - 1, 0, -1) if ".".join(parts[:cut]) in places)
        cut = next(cuts, 0)
        place = places.get(".".join(parts[:cut]), "")
        rest = inside(place, ".".join(parts[cut:])) if cut else None
        if rest is None:
            unknown.append(name)
        else:
            found[f"{place}.{rest}"] = tensor
    if unknown:
        more = f" and {len(unknown) - 20:,} more" if len(unknown) > 20 else ""
        raise ValueError(f"{len(unknown):,} unknown names: {', '.join(f'{name:.80}' for name in unknown[:20])}{more}")
    return found
