"""Input arrays of an engine call: check them against the component and the engine, split and pad them to its batch sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.dimensions import is_derived, size_of
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec, TensorSpec
from sdruntime.errors import EngineError


def check_feeds(component: ComponentSpec, spec: EngineSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """Return the size of each named dimension in `feeds`.

    Raises EngineError if names, types or shapes do not match the component, or no profile of the engine accepts the sizes.
    """
    dims = dims_of(component, spec, feeds)
    if not spec.admits(**dims):
        sizes = ", ".join(f"{name} {size}" for name, size in dims.items())
        raise EngineError(f"engine {spec.name}: {sizes}, but it was built for {spec.shapes}")
    return dims


def check_tensors(component: ComponentSpec, spec: EngineSpec, inputs: Collection[str], outputs: Collection[str]) -> None:
    """Raise EngineError if an open engine's inputs are not those of the component, or one of its outputs is missing."""
    fed, fetched = {tensor.name for tensor in component.engine_inputs}, {tensor.name for tensor in component.outputs}
    if set(inputs) != fed or not fetched <= set(outputs):
        actual = f"{', '.join(sorted(inputs))} -> {', '.join(sorted(outputs))}"
        expected = f"{', '.join(sorted(fed))} -> {', '.join(sorted(fetched))}"
        raise EngineError(f"engine {spec.name}: its inputs and outputs are {actual:.300}, but the manifest says {expected:.300}")


def dims_of(component: ComponentSpec, spec: EngineSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """Return the size of each named dimension in `feeds`. Raises EngineError if names, types or shapes do not match."""
    tensors, required = component.engine_inputs, [tensor.name for tensor in component.inputs]
    if sum(tensor.name in feeds for tensor in tensors) != len(feeds) or not all(name in feeds for name in required):
        optional = ", ".join(tensor.name for tensor in component.optional_inputs)
        raise EngineError(
            f"{spec.component}: fed {', '.join(feeds)}, but it takes {', '.join(required)}"
            + (f" and optionally {optional}" if optional else "")
        )
    dims: dict[str, int] = {}
    for tensor in sorted(tensors, key=_derives):  # sizes that follow from others come last
        if tensor.name not in feeds:
            continue
        array = feeds[tensor.name]
        fits = array.dtype == np.dtype(tensor.dtype) and array.ndim == len(tensor.shape)
        for size, dim in zip(array.shape, tensor.shape, strict=False):
            if isinstance(dim, str):
                fits = fits and size == (size_of(dim, dims) if is_derived(dim) else dims.setdefault(dim, size))
            else:
                fits = fits and size == dim
        if not fits:
            shape = ", ".join(map(str, tensor.shape))
            raise EngineError(
                f"{spec.component}.{tensor.name}: expected {tensor.dtype} [{shape}], got {array.dtype} {list(array.shape)}"
            )
    return dims


def _derives(tensor: TensorSpec) -> bool:
    return any(isinstance(dim, str) and is_derived(dim) for dim in tensor.shape)


def shape_of(tensor: TensorSpec, dims: Mapping[str, int], factor: int) -> tuple[int, ...]:
    """Return a tensor's shape for the given `dims`. An output's `image_height` is `height` times the VAE `factor`."""
    known = dict(dims)
    for name, size in dims.items():
        known[f"image_{name}"], known[f"latent_{name}"] = size * factor, size // factor
    return tuple(size_of(dim, known) for dim in tensor.shape)


def fill_optional_inputs(component: ComponentSpec, dims: Mapping[str, int], feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return `feeds` with zeros added for each missing optional input. `dims`: the size of each named dimension."""
    absent = [tensor for tensor in component.optional_inputs if tensor.name not in feeds]
    if not absent:
        return feeds
    zeros = {tensor.name: np.zeros([size_of(dim, dims) for dim in tensor.shape], tensor.dtype) for tensor in absent}
    return {**feeds, **zeros}


def call_rows(engine: Engine, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Call `engine` with any number of rows along `batch`, the first axis of every tensor.

    They are split and padded as `split_rows` says. The outputs have as many rows as `feeds`.
    """
    rows = len(next(iter(feeds.values())))
    dims = dims_of(engine.component, engine.spec, feeds) if len(engine.spec.profiles) > 1 else {}
    dims.pop("batch", None)
    sizes = [engine.spec.profiles[index]["batch"] for index in engine.spec.admitting(**dims)]
    calls = split_rows(rows, sizes) if sizes else [(rows, rows)]
    if calls == [(rows, rows)]:
        return engine(feeds)  # raises EngineError if no profile accepts the sizes
    parts, start = [], 0
    for size, count in calls:
        part = {name: padded(array[start : start + size], count) for name, array in feeds.items()}
        parts.append({name: array[:size] for name, array in engine(part).items()})
        start += size
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split_rows(rows: int, batches: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Return the calls that compute `rows` rows: for each, its rows, and its rows with padding.

    `batches` are the (min, opt, max) of the profiles. A call has as many rows as the largest takes, and is padded to the smallest
    profile that has room.
    """
    most = max(high for _, _, high in batches)
    sizes = [min(most, rows - start) for start in range(0, rows, most)]
    return [(size, min(max(low, size) for low, _, high in batches if size <= high)) for size in sizes]


def padded(array: Array, rows: int) -> Array:
    """Return the array with copies of its last row, up to `rows` rows."""
    return array if len(array) == rows else np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])
