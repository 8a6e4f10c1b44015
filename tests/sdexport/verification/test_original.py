"""The reference images of a build are those of diffusers' own pipeline, and cost the memory of one network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.errors import ExportError
from sdexport.families.components import components
from sdexport.verification.original import original_images
from sdruntime.verification.golden import ReferenceImage

pytest.importorskip("diffusers")

DRAWINGS = tuple(
    ReferenceImage(prompt=prompt, negative="blurred", seed=seed, steps=3, guidance=5.0, size=(16, 16))
    for prompt, seed in (("a red cat", 3), ("an old map of an island", 2**40))
)


class Lender:
    """Networks with their weights, of which it counts the loads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.loads = checkpoint, list[str]()
        self.table = {component.name: component for component in components(checkpoint)}
        self.kept: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        from sdexport.verification.golden import _module

        if name not in self.kept:
            self.loads.append(name)
            if not name.startswith("text_encoder"):
                self.kept.clear()
            self.kept[name] = _module(self.checkpoint, self.table[name])
        return self.kept[name]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_images_are_those_of_the_pipeline_opened_whole(kind: str, request: pytest.FixtureRequest) -> None:
    import diffusers
    import torch

    folder = request.getfixturevalue(f"{kind}_checkpoint")
    checkpoint = read_checkpoint(folder, name="tiny")
    lend = Lender(checkpoint)
    found = original_images(checkpoint, DRAWINGS, lend)
    texts = ["text_encoder", "text_encoder_2"] if kind == "sdxl" else ["text_encoder"]
    assert lend.loads == [*texts, "unet", "vae_decoder"], "each network is read once"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, checkpoint.index["_class_name"]).from_pretrained(str(folder), torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        for drawing, image in zip(DRAWINGS, found, strict=True):
            (whole,) = pipe(
                drawing.prompt,
                negative_prompt=drawing.negative,
                num_inference_steps=3,
                guidance_scale=5.0,
                width=16,
                height=16,
                generator=torch.Generator().manual_seed(drawing.seed),
                output_type="np",
            ).images
            assert np.abs(image.astype(int) - (whole * 255).round().astype(int)).max() <= 1


def test_the_networks_that_are_not_lent_take_no_memory(sd1_checkpoint: Path) -> None:
    from sdexport.verification.original import _hollow_networks

    for name, module in _hollow_networks(read_checkpoint(sd1_checkpoint, name="tiny"), lambda name: None).items():
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in module.parameters()}
        assert sum(storages.values()) == 4, name


def test_a_checkpoint_that_diffusers_cannot_run_is_told(sd1_checkpoint: Path) -> None:
    checkpoint = read_checkpoint(sd1_checkpoint, name="tiny")
    drawing = ReferenceImage(prompt="x", negative="", seed=1, steps=3, guidance=5.0, size=(12, 12))  # diffusers takes eights
    with pytest.raises(ExportError, match=r"diffusers' StableDiffusionPipeline cannot generate .* divisible by 8"):
        original_images(checkpoint, [drawing], Lender(checkpoint))
