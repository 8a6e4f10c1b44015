"""A UNet's task follows from its inputs, and for a checkpoint from their number of channels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sdruntime.bundle.interface import interface_faults
from sdruntime.bundle.manifest import TensorSpec, load_manifest
from sdruntime.bundle.tasks import INPUTS, channels, task_for, task_of


def test_the_task_follows_from_the_inputs(small_bundle: Path) -> None:
    unet = load_manifest(small_bundle).components["unet"]

    def task(**shapes: int) -> str | None:
        more = [TensorSpec(name=name, dtype="float32", shape=("batch", count)) for name, count in shapes.items()]
        return task_of(dataclasses.replace(unet, inputs=(*unet.inputs, *more)))

    assert task() is task(mask=1) is task(time_ids=6) is None
    for named in INPUTS:
        assert task(**channels(named, 4)) == named
    assert task(time_ids=5) == "refining"


def test_the_task_of_a_checkpoint_follows_from_the_number_of_channels() -> None:
    assert [task_for(count, 4) for count in (4, 9, 8, 5)] == [None, "inpainting", "instruct_pix2pix", "depth"]
    assert task_for(33, 16) == "inpainting"
    with pytest.raises(ValueError, match="in_channels 6 with 4 latent channels is not one of 4"):
        task_for(6, 4)


def test_a_bundle_may_have_the_inputs_of_a_task_and_no_others(small_bundle: Path) -> None:
    manifest = load_manifest(small_bundle)
    unet = manifest.components["unet"]

    def faults(*names: str, count: int = 0) -> list[str]:
        known = channels("inpainting", manifest.model.latent_channels)
        more = [
            TensorSpec(name=name, dtype="float32", shape=("batch", count or known.get(name, 1), "height", "width"))
            for name in names
        ]
        changed = dataclasses.replace(unet, inputs=(*unet.inputs, *more))
        return list(interface_faults(dataclasses.replace(manifest, components={**manifest.components, "unet": changed})))

    assert faults() == faults("mask", "masked_image_latents") == []
    assert faults("mask") == ["unet.inputs: mask is not a tensor of the pipeline"]
    [mask, latents] = faults("mask", "masked_image_latents", count=2)
    assert mask.startswith("unet.inputs: mask is float32 [batch, 2, height, width], expected [batch, 1, height, width]")
    assert "masked_image_latents" in latents
