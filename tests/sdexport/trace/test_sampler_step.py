"""The component `step`: the weighted sums that it stands for, to float32, whatever the precision of the bundle."""

from __future__ import annotations

import numpy as np
import pytest

from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.sampler_step import SLOTS, SOURCES, TARGETS


@pytest.mark.parametrize("name", ["sd1", "sd1_fp16"])
@pytest.mark.parametrize(("jobs", "cells"), [(1, 64), (5, 256)])
def test_step_is_a_product_of_weights_and_sources(request: pytest.FixtureRequest, name: str, jobs: int, cells: int) -> None:
    import onnxruntime

    bundle = Bundle.open(request.getfixturevalue(f"{name}_bundle"))
    session = onnxruntime.InferenceSession(bytes(bundle.read("step/model.onnx")))
    random = np.random.default_rng(jobs)
    feeds = {
        "state": random.standard_normal((jobs, SLOTS, cells), np.float32),
        "weights": random.standard_normal((jobs, TARGETS, SOURCES), np.float32),
        **{part: random.standard_normal((jobs, cells), np.float32) for part in ("uncond", "cond", "noise")},
    }
    state, sample, again = session.run(["next_state", "sample", "sample_again"], feeds)
    sources = np.concatenate([feeds["state"], *(feeds[part][:, None] for part in ("uncond", "cond", "noise"))], axis=1)
    expected = np.einsum("jts,jsc->jtc", feeds["weights"].astype(np.float64), sources)
    assert np.abs(state - expected[:, :SLOTS]).max() < 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(sample, expected[:, SLOTS], atol=2e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(again, sample)
