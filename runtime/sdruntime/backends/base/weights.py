"""New weights for an engine, in place of those that it was built with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from sdruntime.arrays import Array

MERGE = "merge the LoRA when the bundle is built: sdexport build MODEL --lora FILE"
REBUILD = f"build the engine again, or {MERGE}"


class Weights(Protocol):
    """New values of some weights of a component, by their names in the checkpoint: the names of its ONNX model."""

    @property
    def names(self) -> Collection[str]: ...

    def lending(self) -> AbstractContextManager[Mapping[str, Array]]:
        """Lend the values, float32, each of which is computed when it is looked up. Raises BundleError, SettingError."""
        ...


def check_found(missing: Collection[str]) -> None:
    """Raises ValueError if weights are `missing` in an engine."""
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        listed = f"{', '.join(names[:3])}{more}"
        raise ValueError(f"{len(names)} weights are not in the engine under their names: {listed}: {REBUILD}")
