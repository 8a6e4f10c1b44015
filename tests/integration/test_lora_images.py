"""Images with a LoRA, against diffusers with the same file loaded and fused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import loras
import numpy as np
import pytest
from integration.reference import Reference, assert_same_picture, ours

from sdruntime.adapters.lora import Lora
from sdruntime.backends.onnx_file.stored import weight_tensors
from sdruntime.pipeline.pipeline import Pipeline

pytest.importorskip("peft")
SETTINGS = {"steps": 3, "guidance": 5.0, "size": (64, 64), "sampler": "ddim"}


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.full)])
def test_images_equal_those_of_diffusers(
    kind: str, request: pytest.FixtureRequest, ready: Callable[[Path], Path], tmp_path: Path
) -> None:
    reference = Reference(request.getfixturevalue(f"{kind}_checkpoint"))
    with Pipeline.open(ready(request.getfixturevalue(f"{kind}_bundle"))) as pipe:
        names = [name for name in ("text_encoder", "text_encoder_2", "unet") if name in pipe.bundle.manifest.components]
        shapes = {name: {key: each.shape for key, each in weight_tensors(pipe.bundle, name).items()} for name in names}
        file = loras.write(tmp_path / "a.safetensors", loras.kohya(shapes, alpha=3.0))
        before = ours(pipe, "a cat", seed=3, **SETTINGS)
        changed = ours(pipe, "a cat", seed=3, loras=[Lora(file, 0.7)], **SETTINGS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference.pipe.load_lora_weights(file)
            reference.pipe.fuse_lora(lora_scale=0.7)
            reference.pipe.unload_lora_weights()
        theirs = reference.draw(
            "a cat",
            scheduler="DDIMScheduler",
            changes={"clip_sample": False},
            seed=3,
            num_inference_steps=3,
            guidance_scale=5.0,
            width=64,
            height=64,
        )
        assert_same_picture(changed[0], theirs[0], changed[1], theirs[1])
        assert not np.array_equal(before[0], changed[0])
        assert np.array_equal(ours(pipe, "a cat", seed=3, **SETTINGS)[1], before[1])
