"""A base model and a refiner in one call give the image of diffusers' two pipelines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.reference import assert_same_picture, ours
from integration.test_tasks import GUIDANCE, NEGATIVE, PROMPT, SAMPLERS, SEED, task_checkpoint

from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

STEPS = 7
SHORT = (("ddim", 0.8), ("euler_a", 0.5), ("heun", 0.5))  # the others in `make test-full`
PAIRS = [(sampler, at) for sampler in SAMPLERS for at in (0.8, 0.5)]
Both = tuple[Any, Any, Pipeline]


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
    sdxl_checkpoint: Path,
    sdxl_bundle: Path,
    exported_once: Callable[..., Path],
    ready: Callable[[Path], Path],
) -> Iterator[Both]:
    checkpoint = task_checkpoint(tmp_path_factory, "sdxl", "refining")
    with Opened(sdxl_checkpoint, checkpoint, ready(sdxl_bundle), ready(exported_once(checkpoint))) as parts:
        yield parts


class Opened:
    """Diffusers' two pipelines, and ours with both bundles."""

    def __init__(self, *places: Path) -> None:
        self._places = places

    def __enter__(self) -> Both:
        import diffusers
        import torch

        torch.set_num_threads(1)
        base, refiner, *bundles = self._places
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._pipe = Pipeline.open(bundles[0], refiner=bundles[1])
            names = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
            first, second = (
                getattr(diffusers, name).from_pretrained(str(place), torch_dtype=torch.float32)
                for name, place in zip(names, (base, refiner), strict=True)
            )
        for pipe in (first, second):
            pipe.set_progress_bar_config(disable=True)
        return first, second, self._pipe

    def __exit__(self, *_: object) -> None:
        self._pipe.close()


@pytest.mark.parametrize(
    ("sampler", "at"), [pytest.param(*pair, marks=() if pair in SHORT else pytest.mark.full) for pair in PAIRS]
)
def test_the_image_is_that_of_diffusers(both: Both, sampler: str, at: float) -> None:
    import diffusers
    import torch

    base, refiner, pipe = both
    named, changes = SAMPLERS[sampler]
    common: dict[str, Any] = {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    common |= {"output_type": "latent", "generator": torch.Generator().manual_seed(SEED)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for reference in (base, refiner):
            reference.scheduler = getattr(diffusers, named).from_config(reference.scheduler.config, **changes)
        first = base(PROMPT, denoising_end=at, **common).images
        latents = refiner(PROMPT, image=first, denoising_start=at, **common).images
        decoded = refiner.vae.decode(latents / refiner.vae.config.scaling_factor, return_dict=False)[0]
    expected = (refiner.image_processor.postprocess(decoded, output_type="np")[0] * 255).round().astype(np.uint8)
    options = {"skip_prk_steps": True} if sampler == "pndm" else {}
    request = Request(
        prompt=PROMPT,
        negative=NEGATIVE,
        seed=SEED,
        steps=STEPS,
        guidance=GUIDANCE,
        sampler=sampler,
        options=options,
        refiner_at=at,
    )
    picture, found = ours(pipe, request)
    assert_same_picture(picture, expected, found, decoded[0].numpy())


def test_the_refiner_has_its_own_conditions(both: Both) -> None:
    """Its score, its share of the texts, and none of what only the base has."""
    _, _, pipe = both
    common: dict[str, Any] = {"seed": SEED, "steps": 4, "sampler": "euler", "refiner_at": 0.5}
    plain = pipe(PROMPT, **common).pixels[0]
    assert not np.array_equal(plain, pipe(PROMPT, **common, aesthetic_score=2.0).pixels[0])
    assert not np.array_equal(plain, pipe(PROMPT, **common, target_size=(64, 128)).pixels[0])
    second = pipe(PROMPT, **common, prompt_2="a green square").pixels[0]
    assert not np.array_equal(plain, second)
