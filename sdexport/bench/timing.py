"""Measure times and compare images: percentiles, contestants in turn, PSNR, random inputs of one component."""

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
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.result import Result
from sdruntime.verification.metrics import image_psnr

Array = NDArray[Any]
Generate = Callable[[int], list[Array]]  # a seed -> images, uint8 [H, W, 3]
Turn = Callable[[int], Sequence[float]]  # a round -> the seconds of one or more calls; rounds below 0 warm up
WARM, LEAST, MOST = 2, 5, 40  # rounds
_EVER = float("inf")


def psnr(one: Sequence[Array], other: Sequence[Array]) -> float:
    """Return the lowest PSNR of the pairs of uint8 images, in dB (`sdruntime.verification.metrics`); 0 if shapes differ."""
    pairs = zip(one, other, strict=True)
    return round(min(image_psnr(a, b) if a.shape == b.shape else 0.0 for a, b in pairs), 2)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, 95th percentile, minimum and maximum in milliseconds, and the number of times `n`."""
    milliseconds = 1e3 * np.asarray(seconds)
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return {"p50_ms": round(float(p50), 4), "p95_ms": round(float(p95), 4), "min_ms": round(float(milliseconds.min()), 4)} | {
        "max_ms": round(float(milliseconds.max()), 4),
        "n": len(seconds),
    }


def repeated(call: Callable[[], object], *, seconds: float) -> dict[str, Any]:
    """Return the `summary` of calling `call` for about `seconds`, after a warm-up."""
    for _ in range(WARM):
        call()
    taken: list[float] = []
    while len(taken) < LEAST or (sum(taken) < seconds and len(taken) < 10 * MOST):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return summary(taken)


def in_turn(entries: Mapping[str, Turn], *, seconds: float, until: float = _EVER) -> dict[str, list[float] | str]:
    """Call the entries in turn, A B C A B C, so that a change of the machine affects all alike.

    Returns the times of each in seconds, or the text of its error. Each entry gets WARM rounds to warm up, then LEAST to MOST
    rounds for about `seconds`. Once an entry has a time, it starts no round that would end after `until` (time.monotonic),
    judging by its last round. An entry that raised is not called again.
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
            except Exception as error:  # an entry that fails does not stop the others
                failed[name] = text_of(error)
                continue
            last[name] = time.monotonic() - begun
            if round_ >= 0:
                taken[name] += times
    return {name: failed.get(name, times) for name, times in taken.items()}


def race(entries: Mapping[str, Generate], *, seconds: float, until: float = float("inf")) -> dict[str, Any]:
    """Generate whole images in turn; return the `summary` of each contestant's times, or its `error`.

    Also returns the PSNR of its images against the first contestant's, for the same seed, and the standard deviation of its
    first image. For `seconds` and `until` see `in_turn`.
    """
    results: dict[str, Any] = {name: {} for name in entries}
    reference: list[Array] = []

    def turn(name: str, generate: Generate) -> Turn:
        def timed(round_: int) -> Sequence[float]:
            begun = time.perf_counter()
            images = generate(0)
            spent = time.perf_counter() - begun
            if round_ < 0:
                reference[:] = reference or images
                results[name] = {"psnr": psnr(images, reference), "std": round(float(images[0].std()), 1)}
            return [spent]

        return timed

    taken = in_turn({name: turn(name, generate) for name, generate in entries.items()}, seconds=seconds, until=until)
    for name, times in taken.items():
        results[name] = {"error": times} if isinstance(times, str) else results[name] | (summary(times) if times else {})
    return results


def ratio(of: Mapping[str, Any], to: Mapping[str, Any]) -> float | None:
    """Return the median of `to` divided by the median of `of`; None if one of them has no time."""
    if "p50_ms" not in of or "p50_ms" not in to:
        return None
    return round(float(to["p50_ms"]) / float(of["p50_ms"]), 3)


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def feeds_of(component: ComponentSpec, dims: Mapping[str, int], factor: int) -> dict[str, Array]:
    """Return random inputs of a component at `dims`, the same at every call. `factor` is the VAE's."""
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
    """Return the dimensions of a call of this engine for `batch` images of the model's own size."""
    size = pipe.model.usual_size[::-1]
    return call_dims(engine.spec.component, engine.component, pipe.bundle.manifest, size, batch=batch, guided=guided)


def call_dims(
    name: str, component: ComponentSpec, manifest: Manifest, size: tuple[int, int], *, batch: int, guided: bool
) -> dict[str, int]:
    """Return the dimensions of a call of component `name` for `batch` images of one prompt; `size` is (width, height), pixels."""
    width, height = (side // manifest.model.vae_factor for side in size)
    rows = {"guided": batch * (1 + guided), "texts": 1 + guided}.get(role(name).rows, batch)
    known = {"batch": rows, "height": height, "width": width, "sequence": manifest.text_length}
    return {dim: known[dim] for dim in component.dimensions}


def generate(pipe: Pipeline, requests: list[Request], *, on_device: bool) -> list[Array]:
    """Return the images of the requests, uint8 [H, W, 3]; `on_device` keeps the loop on the GPU if the backend can."""
    if on_device:
        return pipe(requests).pixels
    stream = pipe.stream(requests)
    for _ in stream:
        pass
    result: Result = stream.result
    return result.pixels
