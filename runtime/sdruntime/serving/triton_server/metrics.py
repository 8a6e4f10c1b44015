"""The metrics of an instance, at Triton's /metrics beside its own, which count nothing of use for a decoupled model."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import Any

import triton_python_backend_utils as pb

from sdruntime.errors import QueueFull
from sdruntime.serving.batcher import Batcher

STAGES = ("queued", "encode", "denoise", "decode")


class Metrics:
    """Counters and gauges, with the names that `sdruntime serve` gives them where it has the same. `labels`: those of each."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._families: list[Any] = []  # Triton keeps a metric only as long as its family
        counter, gauge = pb.MetricFamily.COUNTER, pb.MetricFamily.GAUGE
        images = self._family("sdruntime_images_total", "Images by outcome.", counter)
        self._images = {outcome: self._of(images, outcome=outcome) for outcome in ("done", "failed", "cancelled")}
        rejected = self._family("sdruntime_rejected_total", "Requests that were not taken, by reason.", counter)
        self._rejected = {reason: self._of(rejected, reason=reason) for reason in ("queue_full", "invalid")}
        seconds = self._family("sdruntime_stage_seconds_total", "Seconds of finished images, by stage.", counter)
        self._seconds = {stage: self._of(seconds, stage=stage) for stage in STAGES}
        self._steps = self._of(self._family("sdruntime_steps_total", "Denoising steps.", counter))
        self._waiting = self._of(self._family("sdruntime_images_waiting", "Requests that wait.", gauge))
        self._running = self._of(self._family("sdruntime_images_running", "Requests that run.", gauge))
        self._capacity = self._of(self._family("sdruntime_queue_capacity", "Requests that may wait.", gauge))
        self._counted = 0

    def _family(self, name: str, what: str, kind: Any) -> Any:
        self._families.append(pb.MetricFamily(name=name, description=what, kind=kind))
        return self._families[-1]

    def _of(self, family: Any, **labels: str) -> Any:
        return family.Metric(labels={**self._labels, **labels})

    def done(self, timings: Mapping[str, float]) -> None:
        """Count a finished image, with the seconds of its stages."""
        self._images["done"].increment(1)
        for stage in STAGES:
            self._seconds[stage].increment(timings[stage])

    def failed(self, error: BaseException) -> None:
        """Count a request that has no image."""
        self._images["cancelled" if isinstance(error, CancelledError) else "failed"].increment(1)

    def rejected(self, error: BaseException) -> None:
        """Count a request that was not put into the queue."""
        self._rejected["queue_full" if isinstance(error, QueueFull) else "invalid"].increment(1)

    def update(self, batcher: Batcher) -> None:
        """Bring what the batcher counts up to date. Called on one thread."""
        counts = batcher.counts
        self._steps.increment(counts.steps - self._counted)
        self._counted = counts.steps
        self._waiting.set(counts.waiting)
        self._running.set(counts.running)
        self._capacity.set(batcher.queue)
