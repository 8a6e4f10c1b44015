"""With low_memory, ONNX Runtime keeps half-precision weights as they are stored, and the image stays the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from integration.reference import ours, psnr

from sdruntime.backends.base.engine import EngineOptions
from sdruntime.backends.ort import engine
from sdruntime.pipeline.pipeline import Pipeline


def test_half_precision_weights_stay_as_they_are(
    sd1_checkpoint: Path, exported_once: Callable[..., Path], ready: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    levels: list[Any] = []
    open_session = engine.open_session

    def opening(library: Any, bundle: Any, model: Any, files: Any, options: Any, *rest: Any) -> Any:
        levels.append((options.graph_optimization_level, options.enable_cpu_mem_arena, options.execution_order))
        return open_session(library, bundle, model, files, options, *rest)

    monkeypatch.setattr(engine, "open_session", opening)
    bundle = ready(exported_once(sd1_checkpoint, precision="fp16", audit=False))
    images = []
    for low_memory in (False, True):
        levels.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as: --low-memory has no effect
            options = EngineOptions(low_memory=low_memory)
            with Pipeline.open(bundle, backend="onnxruntime", options=options) as pipe:
                images.append(ours(pipe, "a red circle", seed=3, steps=3)[1])
        kept = (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, False, ort.ExecutionOrder.PRIORITY_BASED)
        assert set(levels) == {kept} if low_memory else kept not in levels
    assert psnr(*images) > 50
