"""A closed engine raises one error in every backend. TensorRT's are in tests/trt."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from places import FIXTURE

from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import SdruntimeError


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if not backend.gpu_only])
def test_a_closed_engine_says_so(name: str, tmp_path: Path) -> None:
    if missing := BACKENDS[name].here().missing:
        pytest.skip(missing)
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend=name, size="64x64", components=("text_encoder",))):
        pass
    bundle = Bundle.open(folder)
    [spec] = bundle.manifest.engines
    engine = BACKENDS[name].open_engine(bundle, spec, EngineOptions(threads=1), Shared())
    feeds = {"input_ids": np.zeros((1, bundle.manifest.text_length), np.int32)}
    assert engine(feeds)["last_hidden_state"].shape[0] == 1
    for _ in range(2):
        engine.close()
        for inputs in (feeds, {}):
            with pytest.raises(SdruntimeError, match=rf"^engine {spec.name} is closed: open it again$") as caught:
                engine(inputs)
            assert type(caught.value) is SdruntimeError
