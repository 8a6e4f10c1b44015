"""Compute how much GPU memory a pipeline needs, before anything is loaded.

Weights and buffers add up over components. Activations do not: components run one after the other in one arena, whose size is the
largest need of one component.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sdruntime.backends.base.engine import CPU
from sdruntime.backends.base.feeds import shape_of
from sdruntime.bundle.manifest import EngineSpec, Manifest
from sdruntime.errors import OutOfSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The bytes of one engine: its loaded files, its activations (None if its builder did not report them), and the inputs and
    outputs of its largest profile."""

    component: str
    engine: str
    weights: int
    activations: int | None
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + (self.activations or 0) + self.buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The engines of a pipeline that run on the GPU."""

    parts: tuple[Part, ...]

    @property
    def arena(self) -> int:
        return max((part.activations or 0 for part in self.parts), default=0)

    @property
    def total(self) -> int:
        """Bytes if every engine is loaded."""
        return sum(part.weights + part.buffers for part in self.parts) + self.arena

    @property
    def lowest(self) -> int:
        """Bytes if one engine is loaded at a time (low memory)."""
        return max((part.total for part in self.parts), default=0)

    @property
    def complete(self) -> bool:
        return all(part.activations is not None for part in self.parts)

    def lines(self) -> list[str]:
        """Return a line of text for each engine, and one with the sums."""
        rows = [
            f"{part.component:<16}{part.weights:>14,} weights + "
            + ("activations unknown until it is opened" if part.activations is None else f"{part.activations:,} activations")
            + f" + {part.buffers:,} buffers"
            for part in self.parts
        ]
        least = "" if self.complete else "at least "
        return [*rows, f"{'all at once':<16}{least}{self.total:,} bytes; one at a time (--low-memory) {least}{self.lowest:,}"]

    def check(self, free: int, *, budget: int | None = None, low_memory: bool = False, where: str) -> None:
        """Check that the engines fit in `free` bytes and the `budget`. Raises OutOfSpace with the numbers and the fix."""
        room = free if budget is None else min(free, budget)
        needed = self.lowest if low_memory else self.total
        if needed <= room:
            return
        limit = f"{free:,} are free" if budget is None or free < budget else f"the budget is {budget:,}"
        table = "".join(f"\n  {line}" for line in self.lines())
        if not low_memory and self.lowest <= room:
            hint = "open it with --low-memory, which loads one component at a time"
        else:
            hint = "close other programs that use the GPU, or build engines for a smaller --size or --batch"
        raise OutOfSpace(f"{where}: the engines need {needed:,} bytes and {limit}: {hint}{table}")


def memory_plan(manifest: Manifest, engines: Iterable[EngineSpec]) -> MemoryPlan:
    """Return the plan of those `engines` that run on a GPU."""
    return MemoryPlan(parts=tuple(_part(manifest, engine) for engine in engines if engine.target != CPU))


def _part(manifest: Manifest, engine: EngineSpec) -> Part:
    component, factor = manifest.components[engine.component], manifest.model.vae_factor
    sizes = []
    for profile in engine.profiles:
        dims = {name: high for name, (_, _, high) in profile.items()}
        tensors = (*component.engine_inputs, *component.outputs)
        sizes.append(sum(math.prod(shape_of(tensor, dims, factor)) * np.dtype(tensor.dtype).itemsize for tensor in tensors))
    return Part(
        component=engine.component,
        engine=engine.name,
        weights=manifest.size_of(engine),
        activations=engine.memory,
        buffers=max(sizes),
    )
