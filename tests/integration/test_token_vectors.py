"""A text encoder takes vectors in place of rows of its table, in every backend, and is the same as before without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.families.components import components
from sdexport.verification.golden import TorchEngine
from sdruntime.arrays import Array
from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.registry import backend
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.interface import TOKEN_VECTORS
from sdruntime.engines.building import BuildRequest, build_engines

ENCODERS = ("text_encoder", "text_encoder_2")
ROW, AT = 1, (2, 5)  # of the ids that are replaced


@pytest.fixture(scope="module", params=["onnxruntime", pytest.param("openvino", marks=pytest.mark.full)])
def bundle(request: pytest.FixtureRequest, sdxl_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pytest.importorskip(request.param, reason="the backend is not installed")
    folder = Path(copytree(sdxl_bundle, tmp_path_factory.mktemp(request.param) / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend=request.param, components=ENCODERS)):
        pass
    return Bundle.open(folder)


def with_vectors(engine: TorchEngine, vectors: Array) -> None:
    """Enlarge the table of an encoder in torch, as transformers does for added tokens."""
    import torch

    table = engine.module.weights.get_input_embeddings()
    table.weight = torch.nn.Parameter(torch.cat([table.weight, torch.from_numpy(vectors)]), requires_grad=False)


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_are_rows_of_a_larger_table(bundle: Bundle, sdxl_checkpoint: Path, name: str) -> None:
    checkpoint = read_checkpoint(sdxl_checkpoint, name="tiny")
    component = next(component for component in components(checkpoint) if component.name == name)
    spec = bundle.manifest.components[name]
    reference = TorchEngine(checkpoint, component, spec)
    ids = component.example_feeds()["input_ids"]
    vectors = np.random.default_rng(3).standard_normal((len(AT), component.config["hidden_size"])).astype(np.float32)
    given, placed = ids.copy(), np.zeros((*ids.shape, vectors.shape[1]), np.float32)
    given[ROW, AT], placed[ROW, AT] = component.config["vocab_size"] + np.arange(len(AT)), vectors
    (engine_spec,) = (engine for engine in bundle.manifest.engines if engine.component == name)
    with backend(engine_spec.backend).open_engine(bundle, engine_spec, EngineOptions(threads=1), Shared()) as engine:
        plain, same = reference({"input_ids": ids}), engine({"input_ids": ids})
        with_vectors(reference, vectors)
        expected, outputs = reference({"input_ids": given}), engine({"input_ids": given, TOKEN_VECTORS: placed})
        zeros = engine({"input_ids": ids, TOKEN_VECTORS: np.zeros_like(placed)})
    assert largest(same, plain) <= 1e-5
    assert largest(outputs, expected) <= 1e-5
    assert largest(expected, plain) > 1e-2  # the vectors act
    assert all(np.array_equal(zeros[output], same[output]) for output in same)
    assert all(np.array_equal(outputs[output][1 - ROW], same[output][1 - ROW]) for output in same)


def largest(first: Mapping[str, Array], second: Mapping[str, Array]) -> float:
    return max(float(np.abs(first[name] - second[name]).max()) for name in second)
