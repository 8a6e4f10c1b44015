"""Run a bundle's engines or torch in a contestant's process. Both generate the same images with the same components."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdexport.bench.timing import Array, feeds_of, generate
from sdruntime.adapters.sets import AdapterSet
from sdruntime.backends.base.engine import CPU, Engine, EngineOptions, EngineWrapper
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import Precision
from sdruntime.bundle.roles import role
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.system.cuda import Cuda, devices

Message = dict[str, Any]
TORCH = ("torch", "torch-bf16", "torch-compile")
FEW = 4  # the fewest steps for measuring the time between steps


class Clock:
    """Record when calls began and ended."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float]] = []

    def add(self, begun: float) -> None:
        self.calls.append((begun, time.perf_counter()))

    def outside(self) -> float:
        """Return the mean time between two calls in seconds."""
        inside = sum(end - begun for begun, end in self.calls)
        return (self.calls[-1][1] - self.calls[0][0] - inside) / max(1, len(self.calls) - 1)


def requests(job: Message, *, few: int = 1) -> list[Request]:
    """Return a request for each image of the batch, with at least `few` steps; seeds count up from the job's own."""
    fields = dict(job["request"])
    fields["size"], fields["steps"] = tuple(fields["size"]), max(few, fields["steps"])
    seed = fields.pop("seed")
    return [Request(seed=seed + k, **fields) for k in range(job["batch"])]


class _Feeds:
    """A cache of random inputs for the components of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._manifest, self._cache = bundle.manifest, dict[tuple[Any, ...], dict[str, Array]]()

    def of(self, component: str, dims: Mapping[str, int]) -> dict[str, Array]:
        key = (component, *dims.items())
        if key not in self._cache:
            spec = self._manifest.components[component]
            self._cache[key] = feeds_of(spec, dims, self._manifest.model.vae_factor)
        return self._cache[key]


class _ClockedEngine(EngineWrapper):
    """An engine whose calls are timed."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        super().__init__(engine)
        self._clock = clock

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        begun = time.perf_counter()
        outputs = self._engine(feeds)
        self._clock.add(begun)
        return outputs


class _ClockedPipeline(Pipeline):
    clock: Clock | None = None

    def engine(self, component: str, *, rows: int = 1, adapters: AdapterSet | None = None, **dims: int) -> Engine:
        engine = super().engine(component, rows=rows, adapters=adapters, **dims)
        return _ClockedEngine(engine, self.clock) if self.clock is not None and role(component).kind == "denoiser" else engine


class BundleRunner:
    """Run a bundle with the engines of one backend."""

    def __init__(self, job: Message, arrived: list[float]) -> None:
        BACKENDS[job["backend"]].here()  # imports the library, so that its time counts as import
        arrived.append(time.monotonic())
        self._job, self._stack = job, contextlib.ExitStack()
        self._cuda = self._stack.enter_context(Cuda.open()) if devices() else None
        self._before = self._cuda.free_memory() if self._cuda else 0
        self._pipe = _ClockedPipeline(Bundle.open(job["bundle"]), backend=job["backend"], options=EngineOptions())
        self._stack.enter_context(self._pipe)
        self._feeds, self._on_device = _Feeds(self._pipe.bundle), BACKENDS[job["backend"]].loop is not None

    def generate(self) -> list[Array]:
        return generate(self._pipe, requests(self._job), on_device=True)

    def call(self, component: str, dims: Mapping[str, int]) -> object:
        sizes = {name: size for name, size in dims.items() if name != "batch"}
        return self._pipe.engine(component, rows=dims["batch"], adapters=None, **sizes)(self._feeds.of(component, dims))

    def outside(self) -> float:
        """Return the seconds between UNet calls; with the loop on the device, the CPU time of the calling thread per step.

        The calling thread runs ahead of the device there, so the wall-clock time between calls would not measure its work.
        """
        stream = self._pipe.stream(requests(self._job, few=FEW), on_device=self._on_device)
        if self._on_device:
            begun = time.thread_time()
            steps = sum(1 for _ in stream)
            return (time.thread_time() - begun) / steps
        self._pipe.clock = clock = Clock()
        try:
            for _ in stream:
                pass
        finally:
            self._pipe.clock = None
        return clock.outside()

    def about(self) -> Message:
        on_gpu = self._cuda is not None and self._pipe.engine("unet").spec.target != CPU
        return {"device_memory": self._before - self._cuda.free_memory()} if on_gpu and self._cuda else {}


class TorchRunner:
    """Run diffusers on the checkpoint: float16 on a GPU; float32 on a CPU, or bfloat16 for "torch-bf16"."""

    def __init__(self, job: Message, arrived: list[float]) -> None:
        import diffusers
        import torch

        from sdexport.bench.diffusers import COMPILED, EAGER, Diffusers, versions

        diffusers.DiffusionPipeline  # noqa: B018  diffusers imports it at the first access
        arrived.append(time.monotonic())
        self._job, self._torch, self._versions = job, torch, versions()
        self._gpu = torch.cuda.is_available()
        precision: Precision = "bf16" if job["kind"] == "torch-bf16" else "fp16" if self._gpu else "fp32"
        self._rival = Diffusers(Path(job["checkpoint"]), device="cuda" if self._gpu else "cpu", precision=precision)
        self._variant = EAGER
        if job["kind"] == "torch-compile":
            self._rival.compile("max-autotune" if self._gpu else "default")  # max-autotune takes an hour on a CPU
            self._variant = COMPILED
        self._bundle: Bundle | None = None

    def generate(self) -> list[Array]:
        return self._rival.generate(self._variant, requests(self._job))

    def call(self, component: str, dims: Mapping[str, int]) -> object:
        if self._bundle is None:
            self._bundle = Bundle.open(self._job["bundle"])
            self._feeds = _Feeds(self._bundle)
        self._rival.call(self._variant, component, self._feeds.of(component, dims))
        return None

    def outside(self) -> float:
        clock = Clock()
        with self._clocked(clock):
            self._rival.generate(self._variant, requests(self._job, few=FEW))
        return clock.outside()

    @contextlib.contextmanager
    def _clocked(self, clock: Clock) -> Iterator[None]:
        """Record the UNet calls of the block in `clock`, waiting for the GPU before and after each."""
        begun = 0.0

        def before(*_: object) -> None:
            nonlocal begun
            self._synchronize()
            begun = time.perf_counter()

        def after(*_: object) -> None:
            self._synchronize()
            clock.add(begun)

        unet = self._rival.unet(self._variant)
        hooks = [unet.register_forward_pre_hook(before), unet.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _synchronize(self) -> None:
        if self._gpu:
            self._torch.cuda.synchronize()

    def about(self) -> Message:
        memory = {"device_memory": self._torch.cuda.max_memory_reserved()} if self._gpu else {}
        return {"versions": dict(self._versions), **memory}
