"""Models and engines of the field from the checkpoint to the image, each against diffusers' own pipeline or ONNX Runtime."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.reference import psnr
from integration.test_fidelity_configs import a_tiny_vae, built, edit, opened, theirs

from sdruntime.backends.base.engine import EngineOptions
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.verification.inputs import patches

pytestmark = pytest.mark.full
PROMPT = "a small red circle on the left on a blue background"


def turbo(folder: Path) -> None:
    """SD-Turbo's schedule, and the inference parameters of a model card."""
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler", timestep_spacing="trailing")
    card = "---\ninference:\n  parameters: {num_inference_steps: 1, guidance_scale: 0.0}\n---\n"
    (folder / "README.md").write_text(card)


def test_a_turbo_model_takes_one_step_without_guidance(
    sd1_checkpoint: Path, ready: Callable[[Path], Path], tmp_path: Path, trace_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    folder, bundle = built(sd1_checkpoint, turbo, tmp_path, monkeypatch)
    with warnings.catch_warnings(), Pipeline.open(ready(bundle)) as pipe:
        warnings.simplefilter("ignore")  # of diffusers' own
        assert str(pipe.model.defaults) == "steps 1, guidance 0"
        stream = pipe.stream(PROMPT, seed=7)
        assert [(job.steps, len(job.rows)) for job in stream.jobs] == [(1, 1)]
        for _ in stream:
            pass
        reference = opened(folder, image=False)
        generator = torch.Generator().manual_seed(7)
        [expected] = reference(PROMPT, generator=generator, num_inference_steps=1, guidance_scale=0.0, output_type="np").images
        assert psnr(stream.result.pixels[0], (expected * 255).round().astype(np.uint8)) >= 60
        steps = theirs(reference, num_inference_steps=4)
        assert psnr(pipe(PROMPT, seed=7, steps=4, guidance=7.5, negative="green").pixels[0], steps) >= 60


def test_inpainting_with_a_tiny_vae(
    sd1_checkpoint: Path, ready: Callable[[Path], Path], tmp_path: Path, trace_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose encoder has no posterior, so that no noise is drawn for one."""
    import diffusers
    import torch
    from PIL import Image

    folder, bundle = built(sd1_checkpoint, a_tiny_vae, tmp_path, monkeypatch)
    with warnings.catch_warnings(), Pipeline.open(ready(bundle)) as pipe:
        warnings.simplefilter("ignore")
        reference = diffusers.StableDiffusionInpaintPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)
        reference.set_progress_bar_config(disable=True)
        height, width = pipe.model.default_size
        image, mask = patches((width, height), 3), np.zeros((height, width), np.uint8)
        mask[:, : width // 2] = 255
        for strength in (1.0, 0.6):
            [expected] = reference(
                PROMPT,
                image=Image.fromarray(image),
                mask_image=Image.fromarray(mask),
                height=height,
                width=width,
                strength=strength,
                num_inference_steps=6,
                guidance_scale=4.0,
                generator=torch.Generator().manual_seed(7),
                output_type="np",
            ).images
            found = pipe(PROMPT, image=image, mask=mask, strength=strength, seed=7, steps=6, guidance=4.0).pixels[0]
            assert psnr(found, (expected * 255).round().astype(np.uint8)) >= 60, strength


def test_openvino_at_odd_sizes(sd1_bundle: Path, ready: Callable[[Path], Path], tmp_path: Path) -> None:
    """Sizes that are multiples of 8 alone: text to image, image to image and inpainting give ONNX Runtime's images."""
    pytest.importorskip("openvino")
    folder = Path(shutil.copytree(sd1_bundle, tmp_path / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend="openvino", size="72x88")):
        pass
    width, height = 72, 88
    image, mask = patches((width, height), 3), np.zeros((height, width), np.uint8)
    mask[20:60, 8:50] = 255
    common: dict[str, Any] = {"seed": 7, "steps": 4, "sampler": "euler_a"}
    each: list[dict[str, Any]] = [{"size": (width, height)}, {"image": image}, {"image": image, "mask": mask}]
    with Pipeline.open(folder, backend="openvino") as ours, Pipeline.open(ready(sd1_bundle), backend="onnxruntime") as other:
        for more in each:
            found, expected = (pipe(PROMPT, **common, **more).pixels[0] for pipe in (ours, other))
            assert found.shape == (height, width, 3)
            assert expected.std() >= 10
            assert psnr(found, expected) >= 50, more.keys()


def test_tiles_at_odd_sizes(sd1_bundle: Path, ready: Callable[[Path], Path]) -> None:
    """Every step of 8 pixels: the tiles cover the image, and away from their edges it is that of the whole VAE."""
    folder = ready(sd1_bundle)
    with (
        Pipeline.open(folder, options=EngineOptions(threads=1, tile="off")) as whole,
        Pipeline.open(folder, options=EngineOptions(threads=1, tile=64)) as tiled,
    ):
        for size in ((72, 136), (104, 64), (200, 88)):
            image = patches(size, 4)
            given: dict[str, Any] = {"seed": 7, "steps": 2, "image": image, "strength": 0.5}
            found, expected = (pipe(PROMPT, **given).images[0] for pipe in (tiled, whole))
            assert found.size == expected.size == size
            assert ", VAE tile: 64, " in found.text()["parameters"] or ", VAE tile: 64x64, " in found.text()["parameters"]
            assert psnr(np.asarray(found.pixels), np.asarray(expected.pixels)) >= 20
