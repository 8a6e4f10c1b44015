"""The arrays of a call: held against what a component takes and an engine was built for, split and padded to its batch sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.dimensions import size_of
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec, TensorSpec
from sdruntime.errors import EngineError


def check_feeds(component: ComponentSpec, spec: EngineSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """The size of each named dimension in `feeds`. Raises EngineError where names, types or shapes are not what the component
    and a profile of the engine take."""
    dims = dims_of(component, spec, feeds)
    if not spec.admits(**dims):
        asked = ", ".join(f"{name} {size}" for name, size in dims.items())
        raise EngineError(f"engine {spec.name}: {asked}, but it was built for {spec.shapes}")
    return dims


def check_tensors(component: ComponentSpec, spec: EngineSpec, inputs: Collection[str], outputs: Collection[str]) -> None:
    """Raise EngineError where an opened engine does not take what the component is fed, or lacks one of its outputs."""
    fed, taken = {tensor.name for tensor in component.engine_inputs}, {tensor.name for tensor in component.outputs}
    if set(inputs) != fed or not taken <= set(outputs):
        has = f"{', '.join(sorted(inputs))} -> {', '.join(sorted(outputs))}"
        belongs = f"{', '.join(sorted(fed))} -> {', '.join(sorted(taken))}"
        raise EngineError(f"engine {spec.name}: it takes and gives {has:.300}, but the manifest says {belongs:.300}")


def dims_of(component: ComponentSpec, spec: EngineSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """The size of each named dimension in `feeds`. Raises EngineError where names, types or shapes are not the component's."""
    tensors, needed = component.engine_inputs, [tensor.name for tensor in component.inputs]
    if sum(tensor.name in feeds for tensor in tensors) != len(feeds) or not all(name in feeds for name in needed):
        optional = ", ".join(tensor.name for tensor in component.optional_inputs)
        raise EngineError(
            f"{spec.component}: fed {', '.join(feeds)}, but it takes {', '.join(needed)}"
            + (f" and optionally {optional}" if optional else "")
        )
    dims: dict[str, int] = {}
    for tensor in tensors:  # the optional ones at the end: their sizes follow from those of the others
        if tensor.name not in feeds:
            continue
        array = feeds[tensor.name]
        fits = array.dtype == np.dtype(tensor.dtype) and array.ndim == len(tensor.shape)
        for size, dim in zip(array.shape, tensor.shape, strict=False):
            if isinstance(dim, str):
                fits = fits and size == (size_of(dim, dims) if "/" in dim else dims.setdefault(dim, size))
            else:
                fits = fits and size == dim
        if not fits:
            shape = ", ".join(map(str, tensor.shape))
            raise EngineError(
                f"{spec.component}.{tensor.name}: expected {tensor.dtype} [{shape}], got {array.dtype} {list(array.shape)}"
            )
    return dims


def shape_of(tensor: TensorSpec, dims: Mapping[str, int], factor: int) -> tuple[int, ...]:
    """A tensor's shape where `dims` are chosen; an output's `image_height` follows from `height` by the VAE's factor."""
    known = dict(dims)
    for name, size in dims.items():
        known[f"image_{name}"], known[f"latent_{name}"] = size * factor, size // factor
    return tuple(size_of(dim, known) for dim in tensor.shape)


def filled(component: ComponentSpec, dims: Mapping[str, int], feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return `feeds` with zeros for each optional input that it lacks. `dims`: the size of each named dimension."""
    absent = [tensor for tensor in component.optional_inputs if tensor.name not in feeds]
    if not absent:
        return feeds
    zeros = {each.name: np.zeros([size_of(dim, dims) for dim in each.shape], each.dtype) for each in absent}
    return {**feeds, **zeros}


def call_rows(engine: Engine, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Call `engine` with any number of rows along `batch`, the first axis of every tensor: split to what its largest profile
    takes, padded with copies of the last row to the smallest profile that has room. The outputs have the rows of `feeds`."""
    rows = len(next(iter(feeds.values())))
    dims = dims_of(engine.component, engine.spec, feeds) if len(engine.spec.profiles) > 1 else {}
    dims.pop("batch", None)
    sizes = [engine.spec.profiles[index]["batch"] for index in engine.spec.admitting(**dims)]
    if not sizes or any(low <= rows <= high for low, _, high in sizes):
        return engine(feeds)  # which tells, where no profile takes it
    most = max(high for _, _, high in sizes)
    parts = []
    for start in range(0, rows, most):
        piece = {name: array[start : start + most] for name, array in feeds.items()}
        size = min(most, rows - start)
        low = min(max(low, size) for low, _, high in sizes if size <= high)
        if size < low:
            piece = {name: np.concatenate([array, np.repeat(array[-1:], low - size, axis=0)]) for name, array in piece.items()}
        parts.append({name: array[:size] for name, array in engine(piece).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
