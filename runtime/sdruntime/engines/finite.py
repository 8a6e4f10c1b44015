"""Check every output of an engine for NaN and infinite values before it is used.

A sum over a tensor is finite only if every number is, so a good call costs one pass over its outputs: some microseconds, against
milliseconds per step. If a sum is not finite, each number is checked, since the sum itself may have overflowed.

If the loop runs on the device, its steps are not checked one by one. The final latents are, since NaN and infinite values persist
in them, and then the decoder's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.backends.base.feeds import call_rows
from sdruntime.bundle.manifest import EngineSpec, Precision
from sdruntime.errors import NotFinite, quoted


def is_finite(array: Array) -> bool:
    """Return whether no number of a float array is NaN or infinite."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.add.reduce(array, axis=None))) or bool(np.isfinite(array).all())


def checked_rows(
    engine: Engine, feeds: Mapping[str, Array], during: Callable[[int], str], bundle: Path | None = None
) -> Mapping[str, Array]:
    """Return the outputs of `call_rows`, after checking that they are finite.

    For the error, `during` describes the work of a row, and `bundle` is the bundle's folder. Raises NotFinite with the component,
    the output, the work of the first bad row and how to fix it.
    """
    outputs = call_rows(engine, feeds)
    for name, array in outputs.items():
        if not is_finite(array):
            raise _fault(engine.spec, name, array, feeds, during, bundle)
    return outputs


def _fault(
    spec: EngineSpec, name: str, array: Array, feeds: Mapping[str, Array], during: Callable[[int], str], bundle: Path | None
) -> NotFinite:
    bad = ~np.isfinite(array)
    row = int(np.argmax(bad.reshape(len(array), -1).any(axis=1)))
    count = f"{int(bad[row].sum()):,} of {array[row].size:,} numbers of {name} are NaN or infinite"
    bad_inputs = [key for key, feed in feeds.items() if feed.dtype.kind == "f" and not np.isfinite(feed[row]).all()]
    if bad_inputs:
        fix = f"so are numbers of its input ({', '.join(bad_inputs)}): check what computed that"
    else:
        fix = advice(spec.precision, bundle)
    return NotFinite(f"{spec.component}, {during(row)}: {count} (engine {spec.name}); {fix}", row)


def advice(precision: Precision | None = None, bundle: Path | None = None) -> str:
    """Return what to do about NaN or infinite outputs of an engine of this precision, None if it is unknown.

    `bundle`: the bundle's folder, for the command; None for the caller's own engines.
    """
    if precision is None:
        return f"if the engine is fp16, {advice('fp16')}; {advice('fp32', bundle)}"
    if precision == "fp32":
        command = f"`sdruntime verify {quoted(bundle)}`" if bundle else "`sdruntime verify`"
        return f"in fp32 this is no overflow: check the engine with {command}"
    return f"{precision} overflowed: build the bundle with --precision {'bf16 or fp32' if precision == 'fp16' else 'fp32'}"
