"""A component with an optional input whose sizes follow from others: zeros if a job has none, also beside jobs that have one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle, with_fake_engines
from computed import Parts, predict, request_for

from sdruntime.arrays import Array
from sdruntime.bundle.bundle import Bundle, write_bundle
from sdruntime.bundle.dimensions import size_of
from sdruntime.bundle.manifest import ComponentSpec, TensorSpec
from sdruntime.errors import EngineError
from sdruntime.pipeline.pipeline import Pipeline

RESIDUAL = TensorSpec(name="residual", dtype="float32", shape=("batch", 4, "height/2", "width/2"))


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A pipeline whose UNet takes a residual of half the sides and adds it, each cell to four."""
    made = Parts(tmp_path / "bundle")
    made.unet.component = dataclasses.replace(made.unet.component, optional_inputs=(RESIDUAL,))

    def work(feeds: dict[str, Array]) -> dict[str, Array]:
        return {"out_sample": predict(feeds)["out_sample"] + feeds["residual"].repeat(2, axis=2).repeat(2, axis=3)}

    made.unet._work = work  # type: ignore[assignment]
    return made


def drawn(pipe: Pipeline, residuals: dict[int, float], seeds: tuple[int, ...]) -> list[Array]:
    """The latents of a job for each seed; those in `residuals` have one of that value in both of their rows."""
    jobs = pipe.jobs([request_for(seed) for seed in seeds])
    for seed, job in zip(seeds, jobs, strict=True):
        if seed in residuals:
            residual = np.full((4, 4, 4), residuals[seed], np.float32)
            job.rows = tuple({**row, "residual": residual} for row in job.rows)
    for _ in pipe.loop(jobs, pipe.steppers):
        pass
    return [job.run.x.copy() for job in jobs]


def test_jobs_with_and_without_an_optional_input_share_a_batch(parts: Parts) -> None:
    with parts.pipeline() as pipe:
        alone = [drawn(pipe, {2: 0.3}, (seed,))[0] for seed in (1, 2, 3)]
        plain = drawn(pipe, {}, (2,))[0]
        before = len(parts.unet.calls)
        together = drawn(pipe, {2: 0.3}, (1, 2, 3))
        assert parts.unet.rows[before:] == [6] * 4
    for ours, reference in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5)
    assert np.abs(together[1] - plain).min() > 0.01


def test_an_optional_input_of_another_size_is_refused(parts: Parts) -> None:
    feeds = {
        "sample": np.zeros((2, 4, 8, 16), np.float32),
        "timestep": np.zeros(2, np.float32),
        "encoder_hidden_states": np.zeros((2, 77, 8), np.float32),
    }
    assert parts.unet(feeds | {"residual": np.zeros((2, 4, 4, 8), np.float32)})["out_sample"].shape == (2, 4, 8, 16)
    message = r"unet\.residual: expected float32 \[batch, 4, height/2, width/2\], got float32 \[2, 4, 8, 16\]"
    with pytest.raises(EngineError, match=message):
        parts.unet(feeds | {"residual": np.zeros((2, 4, 8, 16), np.float32)})
    with pytest.raises(EngineError, match=r"fed residual, but it takes sample, .* and optionally residual"):
        parts.unet({"residual": np.zeros((2, 4, 4, 8), np.float32)})


def test_it_goes_through_a_manifest_and_engines(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    components = dict(made.manifest.components)
    components["unet"] = dataclasses.replace(components["unet"], optional_inputs=(RESIDUAL,))
    write_bundle(made.folder, model=made.manifest.model, precision="fp32", components=components, provenance={})
    bundle = with_fake_engines(Bundle.open(made.folder))
    assert bundle.manifest.components["unet"] == components["unet"]
    assert all("height/2" not in profile for engine in bundle.manifest.engines for profile in engine.profiles)
    with Pipeline.open(bundle, backend="fake") as pipe:
        drawn(pipe, {2: 0.3}, (1, 2))


@pytest.mark.parametrize("dim", ["depth/2", "height/0", "height/", "/2", "height/2/2", "depth"])
def test_a_dimension_that_follows_from_none_is_a_fault(dim: str, parts: Parts) -> None:
    wrong = dataclasses.replace(RESIDUAL, shape=("batch", 4, dim, "width/2"))
    with pytest.raises(ValueError, match="dimension"):
        dataclasses.replace(parts.unet.component, optional_inputs=(wrong,))


def test_a_required_input_has_no_part_of_a_dimension(parts: Parts) -> None:
    component: ComponentSpec = parts.unet.component
    with pytest.raises(ValueError, match="tensor residual: dimension 'height/2' does not follow"):
        dataclasses.replace(component, inputs=(*component.inputs, RESIDUAL), optional_inputs=())


def test_a_part_is_rounded_up() -> None:
    assert [size_of(dim, {"height": 9}) for dim in (7, "height", "height/2", "height/4", "height/8")] == [7, 9, 5, 3, 2]
