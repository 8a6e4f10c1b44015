"""An embedding in a prompt gives diffusers' image with the same one loaded, without a rebuild."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from integration.reference import Reference, assert_same_picture, ours
from loras import write

from sdruntime.bundle.bundle import Bundle
from sdruntime.errors import BundleError
from sdruntime.pipeline.pipeline import Pipeline

PROMPT = "a <kitten> in the red"


@pytest.mark.parametrize("sampler", ["ddim", *(pytest.param(name, marks=pytest.mark.full) for name in ("euler_a", "dpmpp_2m"))])
def test_the_image_is_that_of_diffusers(
    sampler: str, sd1_checkpoint: Path, sd1_bundle: Path, ready: Callable[[Path], Path], tmp_path: Path
) -> None:
    reference = Reference(sd1_checkpoint)
    width = reference.pipe.text_encoder.config.hidden_size
    vectors = np.random.default_rng(5).standard_normal((2, width)).astype(np.float32)
    path = write(tmp_path / "kitten.safetensors", {"<kitten>": vectors})
    reference.pipe.load_textual_inversion(str(path))
    scheduler = {
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
        "euler_a": ("EulerAncestralDiscreteScheduler", {}),
        "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    }[sampler]
    with Pipeline.open(ready(sd1_bundle), embeddings=[path]) as pipe:
        drawn = ours(pipe, PROMPT, sampler=sampler, steps=6, seed=4)
        plain = ours(pipe, PROMPT.replace("<kitten>", "kitten"), sampler=sampler, steps=6, seed=4)
    theirs = reference.draw(
        PROMPT, scheduler=scheduler[0], changes=scheduler[1], seed=4, num_inference_steps=6, guidance_scale=7.5
    )
    assert_same_picture(drawn[0], theirs[0], drawn[1], theirs[1])
    assert np.abs(drawn[1] - plain[1]).max() > 0.01


@pytest.mark.full
def test_both_encoders_of_sdxl(sdxl_checkpoint: Path, sdxl_bundle: Path, ready: Callable[[Path], Path], tmp_path: Path) -> None:
    reference = Reference(sdxl_checkpoint)
    encoders = {"clip_l": (reference.pipe.text_encoder, reference.pipe.tokenizer)}
    encoders["clip_g"] = (reference.pipe.text_encoder_2, reference.pipe.tokenizer_2)
    random = np.random.default_rng(5)
    vectors = {
        key: random.standard_normal((2, encoder.config.hidden_size)).astype(np.float32) for key, (encoder, _) in encoders.items()
    }
    for key, (encoder, tokenizer) in encoders.items():
        saved = write(tmp_path / f"{key}.safetensors", {"<kitten>": vectors[key]})
        reference.pipe.load_textual_inversion(str(saved), text_encoder=encoder, tokenizer=tokenizer)
    path = write(tmp_path / "kitten.safetensors", vectors)
    with Pipeline.open(ready(sdxl_bundle), embeddings=[f"<kitten>={path}"]) as pipe:
        drawn = ours(pipe, PROMPT, sampler="ddim", steps=6, seed=4)
    changes = {"clip_sample": False}
    theirs = reference.draw(PROMPT, scheduler="DDIMScheduler", changes=changes, seed=4, num_inference_steps=6, guidance_scale=7.5)
    assert_same_picture(drawn[0], theirs[0], drawn[1], theirs[1])


@pytest.mark.full
def test_an_embedding_in_the_bundle(
    sd1_checkpoint: Path, export: Callable[..., Path], ready: Callable[[Path], Path], sd1_bundle: Path, tmp_path: Path
) -> None:
    width = int(Bundle.open(sd1_bundle).manifest.components["text_encoder"].outputs[0].shape[-1])
    vectors = np.random.default_rng(5).standard_normal((2, width)).astype(np.float32)
    path = write(tmp_path / "style.safetensors", {"emb_params": vectors})
    own = export(sd1_checkpoint, embeddings=(f"<kitten>={path}",))
    assert Bundle.open(own).manifest.provenance["options"]["embeddings"] == ["<kitten>"]
    settings = {"sampler": "ddim", "steps": 2, "seed": 4}
    place = ready(own)
    with Pipeline.open(place) as inside, Pipeline.open(ready(sd1_bundle), embeddings=[f"<kitten>={path}"]) as beside:
        assert np.array_equal(ours(inside, PROMPT, **settings)[1], ours(beside, PROMPT, **settings)[1])
    damaged = place / "embeddings" / "1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="hash"):
        Pipeline.open(place)
