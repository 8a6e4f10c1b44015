"""Check every output of an engine for NaN and infinite values before it is used.

A sum over a tensor is finite only if the tensor is, so one pass over the outputs is all that a good call costs: some microseconds
beside the milliseconds of a step. A sum that overflows by itself is looked at again, number by number.

Where the loop runs on the device, its steps are not looked at one by one: the latents that come back at its end are, which hold
whatever went wrong on the way, and then the decoder's output.
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
    """Whether no number of a float array is NaN or infinite."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.add.reduce(array, axis=None))) or bool(np.isfinite(array).all())


def checked_rows(
    engine: Engine, feeds: Mapping[str, Array], during: Callable[[int], str], bundle: Path | None = None
) -> Mapping[str, Array]:
    """`call_rows`, and a look at what came out. `during` says of a row what was being done, and `bundle` where its bundle is,
    for the error.

    Raises NotFinite, naming component, output, the work of the first bad row and the way out.
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
    spoilt = [each for each, feed in feeds.items() if feed.dtype.kind == "f" and not np.isfinite(feed[row]).all()]
    if spoilt:
        way_out = f"they were so in its input already ({', '.join(spoilt)}): look at what made that"
    else:
        way_out = advice(spec.precision, bundle)
    return NotFinite(f"{spec.component}, {during(row)}: {count} (engine {spec.name}); {way_out}", row)


def advice(precision: Precision | None = None, bundle: Path | None = None) -> str:
    """Return what to do about an engine of this precision, where it is known, that returns numbers that are not finite.

    `bundle`: its folder, for the command; None for engines of the caller's.
    """
    if precision is None:
        return f"where the engine is fp16, {advice('fp16')}; {advice('fp32', bundle)}"
    if precision == "fp32":
        command = f"`sdruntime verify {quoted(bundle)}`" if bundle else "`sdruntime verify`"
        return f"in fp32 this is no overflow: check the engine with {command}"
    return f"{precision} overflowed: build the bundle with --precision {'bf16 or fp32' if precision == 'fp16' else 'fp32'}"
