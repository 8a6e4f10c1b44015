"""Readers of a bundle that nobody here wrote: diffusers' ONNX pipeline, and plain onnxruntime as the docs show it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.reference import Reference, psnr
from places import ROOT

from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.sampling.noise.cpu import NoiseStream

PROMPT = "a small red circle on the left on a blue background"


def test_diffusers_onnx_pipeline_draws_the_same_picture(shapes_bundle: Path) -> None:
    import diffusers

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*[Oo]nnx.*")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*deprecated.*")
        warnings.filterwarnings("ignore", category=UserWarning)
        pipe = diffusers.OnnxStableDiffusionPipeline.from_pretrained(
            str(shapes_bundle), safety_checker=None, feature_extractor=None
        )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    latents = NoiseStream(7).normal((1, 4, 8, 8))
    theirs = pipe(
        PROMPT, latents=latents, height=64, width=64, num_inference_steps=20, guidance_scale=7.5, output_type="np"
    ).images[0]
    with Pipeline.open(shapes_bundle) as ours:
        picture = ours(PROMPT, seed=7, sampler="ddim", options={"set_alpha_to_one": False}, size=(64, 64), steps=20).pixels[0]
    assert picture.std() >= 10
    assert psnr(picture, (theirs * 255).round().astype(np.uint8)) >= 50


def test_the_loop_of_the_docs_generates_the_same_image(shapes_checkpoint: Path, shapes_bundle: Path) -> None:
    text = (ROOT / "docs" / "plain-onnxruntime.md").read_text(encoding="utf-8")
    (code, *_) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "plain-onnxruntime.md", "exec"), names)
    reference = Reference(shapes_checkpoint)
    ids = [reference.pipe.tokenizer(prompt, padding="max_length", max_length=77).input_ids for prompt in (PROMPT, "")]
    decoded = names["generate"](shapes_bundle, *map(np.array, ids), NoiseStream(7).normal((1, 4, 8, 8)))[0]
    _, theirs = reference.draw(
        PROMPT,
        scheduler="DDIMScheduler",
        changes={"set_alpha_to_one": False, "clip_sample": False},
        seed=7,
        num_inference_steps=20,
        guidance_scale=7.5,
        height=64,
        width=64,
    )
    assert theirs.std() > 10 / 127.5
    assert psnr(decoded, theirs) >= 90


def test_the_python_of_the_readme_runs(shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(code.replace('"sd15"', repr(str(shapes_bundle))), "README.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"fox-{seed}.png" for seed in (7, 8, 9, 10))
