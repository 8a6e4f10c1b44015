"""Engines built with lora=true take other weights when they are opened; the engine without keeps its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trt.machine import Machine
from trt.refitted import built, bundle_of, one, run
from trt.surface import Surface

from sdruntime.backends.registry import BACKENDS
from sdruntime.errors import EngineError, SettingError


def test_new_weights(machine: Callable[..., Machine], surface: Surface, tmp_path: Path) -> None:
    here = machine(surface)
    folder = bundle_of(tmp_path / "bundle").folder
    backend = BACKENDS[here.backend]
    if surface.module == "tensorrt_rtx":
        with pytest.raises(SettingError, match=r"option lora: not with tensorrt-rtx .*sdexport build MODEL --lora FILE"):
            built(here, folder, lora="true")
        assert not backend.replaces_weights(built(here, folder).manifest.engines[-1])
        return
    with pytest.raises(SettingError, match="strip=true"):
        built(here, folder, lora="true", strip="true")
    bundle = built(here, folder, lora="true")
    assert backend.replaces_weights(bundle.manifest.engines[-1])
    assert run(bundle, None) == 4 * 2 + 1
    assert run(bundle, {"layer.weight": one(5)}) == 4 * 5 + 1  # the bias of the same layer is that of the bundle
    assert run(bundle, {"layer.weight": one(3), "layer.bias": one(-1)}) == 4 * 3 - 1
    assert run(bundle, None) == 4 * 2 + 1
    for wrong, message in (
        ({"other.weight": one(1)}, "does not take other.weight|other.weight"),
        ({"layer.weight": np.ones((2, 1, 1, 1), np.float32)}, "does not take layer.weight"),
    ):
        with pytest.raises((EngineError, KeyError), match=message):
            run(bundle, wrong)


def test_an_engine_without_the_option(machine: Callable[..., Machine], surface: Surface, tmp_path: Path) -> None:
    here = machine(surface)
    bundle = built(here, bundle_of(tmp_path / "bundle").folder)
    assert not BACKENDS[here.backend].replaces_weights(bundle.manifest.engines[-1])
    assert "merge the LoRA when the bundle is built" in BACKENDS[here.backend].for_adapters
