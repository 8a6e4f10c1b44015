"""How anything is measured here: percentiles, contestants in turn, likeness of images, inputs of one component."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdruntime.backends.base.engine import Engine
from sdruntime.backends.base.feeds import shape_of
from sdruntime.bundle.manifest import ComponentSpec, Manifest
from sdruntime.bundle.roles import role
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.request import Request
from sdruntime.pipeline.result import Result
from sdruntime.verification.metrics import picture_psnr

Array = NDArray[Any]
Draw = Callable[[int], list[Array]]  # a seed -> images, uint8 [H, W, 3]
Turn = Callable[[int], Sequence[float]]  # a round -> the seconds of one call or of some; rounds below 0 warm up
WARM, LEAST, MOST = 2, 5, 40  # rounds
_EVER = float("inf")


def psnr(one: Sequence[Array], other: Sequence[Array]) -> float:
    """The lowest of pairs of uint8 images, in dB (`sdruntime.verification.metrics`); 0 for images of two shapes."""
    pairs = zip(one, other, strict=True)
    return round(min(picture_psnr(a, b) if a.shape == b.shape else 0.0 for a, b in pairs), 2)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Milliseconds: median, 95th percentile, least, largest; and of how many."""
    milliseconds = 1e3 * np.asarray(seconds)
    middle, high = np.percentile(milliseconds, [50, 95])
    return {"p50_ms": round(float(middle), 4), "p95_ms": round(float(high), 4), "min_ms": round(float(milliseconds.min()), 4)} | {
        "max_ms": round(float(milliseconds.max()), 4),
        "n": len(seconds),
    }


def repeated(call: Callable[[], object], *, seconds: float) -> dict[str, Any]:
    """`call` timed for about so long, after a warm-up."""
    for _ in range(WARM):
        call()
    taken: list[float] = []
    while len(taken) < LEAST or (sum(taken) < seconds and len(taken) < 10 * MOST):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return summary(taken)


def in_turn(entries: Mapping[str, Turn], *, seconds: float, until: float = _EVER) -> dict[str, list[float] | str]:
    """Contestants in turn, A B C A B C, so that a change of the machine strikes all alike: the times of each, or what it raised.

    Each gets LEAST to MOST rounds after WARM ones, and about `seconds`. One that has a time begins no round that would end after
    `until` (of time.monotonic), judged by its last one. One that raised is not called again.
    """
    taken: dict[str, list[float]] = {name: [] for name in entries}
    failed: dict[str, str] = {}
    last = dict.fromkeys(entries, 0.0)
    for round_ in range(-WARM, MOST):
        for name, turn in entries.items():
            enough = round_ >= LEAST and sum(taken[name]) > seconds
            late = time.monotonic() + last[name] > until and (taken[name] or -WARM < round_ < 0)
            if name in failed or enough or late:
                continue
            begun = time.monotonic()
            try:
                times = turn(round_)
            except Exception as error:  # recorded, and the others go on
                failed[name] = text_of(error)
                continue
            last[name] = time.monotonic() - begun
            if round_ >= 0:
                taken[name] += times
    return {name: failed.get(name, times) for name, times in taken.items()}


def race(entries: Mapping[str, Draw], *, seconds: float, until: float = float("inf")) -> dict[str, Any]:
    """Whole images, in turn. Each contestant: its times, or its `error`; and the PSNR of its images against the first one's,
    of the same seed. `seconds`, `until`: see `in_turn`."""
    told: dict[str, Any] = {name: {} for name in entries}
    reference: list[Array] = []

    def turn(name: str, draw: Draw) -> Turn:
        def drawing(round_: int) -> Sequence[float]:
            begun = time.perf_counter()
            pictures = draw(0)
            spent = time.perf_counter() - begun
            if round_ < 0:
                reference[:] = reference or pictures
                told[name] = {"psnr": psnr(pictures, reference), "std": round(float(pictures[0].std()), 1)}
            return [spent]

        return drawing

    found = in_turn({name: turn(name, draw) for name, draw in entries.items()}, seconds=seconds, until=until)
    for name, times in found.items():
        told[name] = {"error": times} if isinstance(times, str) else told[name] | (summary(times) if times else {})
    return told


def ratio(of: Mapping[str, Any], to: Mapping[str, Any]) -> float | None:
    """How many times as long the second one takes; None where one has no time."""
    if "p50_ms" not in of or "p50_ms" not in to:
        return None
    return round(float(to["p50_ms"]) / float(of["p50_ms"]), 3)


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def feeds_of(component: ComponentSpec, dims: Mapping[str, int], factor: int) -> dict[str, Array]:
    """Inputs of a component at `dims`, random and always the same. `factor`: the VAE's."""
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in component.inputs:
        shape = shape_of(tensor, dims, factor)
        integers = tensor.dtype.startswith("int")
        feeds[tensor.name] = (
            random.integers(0, 500, shape).astype(tensor.dtype) if integers else random.standard_normal(shape, dtype=np.float32)
        )
    if "timestep" in feeds:
        feeds["timestep"][:] = 500
    return feeds


def dims_of(engine: Engine, pipe: Pipeline, *, batch: int, guided: bool) -> dict[str, int]:
    """The dimensions of a call of this component for `batch` images of the model's own size."""
    size = pipe.model.default_size[::-1]
    return call_dims(engine.spec.component, engine.component, pipe.bundle.manifest, size, batch=batch, guided=guided)


def call_dims(
    name: str, component: ComponentSpec, manifest: Manifest, size: tuple[int, int], *, batch: int, guided: bool
) -> dict[str, int]:
    """The dimensions of a call of the component `name` for `batch` images of one prompt. `size`: (width, height) in pixels."""
    width, height = (side // manifest.model.vae_factor for side in size)
    rows = {"guided": batch * (1 + guided), "texts": 1 + guided}.get(role(name).rows, batch)
    known = {"batch": rows, "height": height, "width": width, "sequence": manifest.text_length}
    return {dim: known[dim] for dim in component.dimensions}


def drawn(pipe: Pipeline, asked: list[Request], *, on_device: bool) -> list[Array]:
    """Whole images, from the prompt on."""
    if on_device:
        return pipe(asked).pixels
    stream = pipe.stream(asked)
    for _ in stream:
        pass
    result: Result = stream.result
    return result.pixels
