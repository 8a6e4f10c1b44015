"""What a request may set, and what its table may cost: one client must not take the memory that all of them share."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.requests.request import Request, requests_from
from sdruntime.pipeline.requests.unused import unused_lines
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.grids import FAMILY
from sdruntime.sampling.samplers import SAMPLERS
from sdruntime.sampling.samplers.keys import OPTIONS, TRAINING
from sdruntime.sampling.table import MOST_STEPS

CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 100_000,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_train_timesteps", 20_000),
        ("beta_start", 0.001),
        ("beta_end", 0.02),
        ("beta_schedule", "linear"),
        ("trained_betas", [0.1] * 1000),
        ("prediction_type", "sample"),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_a_request_cannot_change_how_the_model_was_trained(key: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"option {key}: .*scheduler_config.json"):
        Request(prompt="a cat", options={key: value})


@pytest.mark.parametrize("key", ["config", "steps", "sampler", "schedule", "strength", "self", "etha", "_class_name"])
def test_other_names_are_not_options(key: str) -> None:
    with pytest.raises(UnknownName, match=f"sampler option '{key}'"):
        Request(prompt="a cat", options={key: 1})


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (3, {}, "prompt: expected text, a Request or a list of them, got int"),
        (None, {}, "prompt: expected text"),
        (b"a cat", {}, "prompt: expected text, a Request or a list of them, got bytes"),
        (Request(prompt="a cat"), {"steps": 3}, "steps: a Request has its own settings"),
        ([Request(prompt="a cat")], {"count": 2, "seed": 1}, "count, seed: a Request has its own settings"),
        ("a cat", {"count": 1.5}, "count 1.5: expected a whole number"),
        ("a cat", {"count": "2"}, "count '2': expected a whole number"),
        ("a cat", {"seed": [1, 2]}, r"seed \[1, 2\]: expected a whole number"),
        ("a cat", {"seed": 1.0}, "seed 1.0: expected a whole number"),
        ("a cat", {"options": "eta=1"}, "options 'eta=1': expected a mapping"),
        ("a cat", {"mask_image": None}, "unknown setting 'mask_image': write mask=…"),
        ("a cat", {"negative_prompt_2": "x"}, "unknown setting 'negative_prompt_2': write negative_2=…"),
        ("a cat", {"prompt_2": 3}, "prompt_2 3: expected text"),
        ("a cat", {"prompt_syntax": "compel"}, "unknown prompt_syntax 'compel'"),
        ("a cat", {"emphasis": "No norm"}, "unknown emphasis 'No norm'"),
        ("a cat", {"latents": None}, "setting 'latents' of diffusers is not supported"),
    ],
)
def test_values_of_another_type_are_setting_errors(prompt: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        requests_from(prompt, **settings)


def test_prompts_come_from_any_iterable() -> None:
    assert [each.prompt for each in requests_from((text for text in ("a", "b")), seed=1)] == ["a", "b"]
    assert [each.seed for each in requests_from(["a", Request(prompt="b", seed=9)], seed=1)] == [1, 9]


def test_settings_of_an_image_without_one_are_reported() -> None:
    found = unused_lines([Request(prompt="a cat", strength=0.3, fit="crop"), Request(prompt="a cat")])
    assert found == ["strength 0.3 has no effect without an image", "fit 'crop' has no effect without an image"]


def test_settings_of_a_mask_without_one_are_reported() -> None:
    image, mask = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)
    settings: dict[str, Any] = {"mask_blur": 4, "mask_padding": 8, "mask_fill": "zeros", "overlay": True}
    assert unused_lines([Request(prompt="x", image=image, **settings)]) == [
        "mask_blur 4.0 has no effect without a mask",
        "mask_padding 8 has no effect without a mask",
        "mask_fill 'zeros' has no effect without a mask",
        "overlay True has no effect without a mask",
    ]
    assert unused_lines([Request(prompt="x", image=image, mask=mask, strength=1, mask_fill="noise")]) == [
        "mask_fill 'noise' has no effect at strength 1: the masked part starts from noise"
    ]
    assert unused_lines([Request(prompt="x", image=image, mask=mask, mask_padding=8, overlay=True)]) == [
        "overlay has no effect with mask_padding, which always has one"
    ]
    assert unused_lines([Request(prompt="x", image=image, mask=mask, mask_blur=3)]) == [
        "mask_blur has little effect without overlay: the latents take a mask of black and white"
    ]
    with pytest.raises(SettingError, match=r"fit 'crop' with mask_padding 8: only the masked part is resized then: omit fit"):
        Request(prompt="x", image=image, mask=mask, mask_padding=8, fit="crop")


def test_settings_of_texts_without_effect_are_reported() -> None:
    plain = Request(prompt="a (cat)", emphasis="ignore")
    unguided = Request(prompt="a cat", negative_2="x", guidance=1.0)
    assert unused_lines([plain, unguided]) == [
        "the second negative prompt has no effect at guidance 1: set guidance above 1",
        "emphasis 'ignore' has no effect in the prompt syntax 'plain'",
    ]


def test_a_seed_of_numpy_is_a_plain_number() -> None:
    assert repr(Request(prompt="a cat", seed=np.int64(4)).seed) == "4"  # type: ignore[arg-type]


def test_names_are_text() -> None:
    with pytest.raises(SettingError, match="option 3: the name must be text"):
        Request(prompt="a cat", options={3: 1, "eta": 1})  # type: ignore[dict-item]


def test_every_key_of_every_sampler_is_an_option_or_of_the_training() -> None:
    keys = {key for sampler in SAMPLERS.values() for key in sampler.reads}
    assert not OPTIONS & TRAINING
    assert keys - {"schedule", FAMILY} == OPTIONS | TRAINING


@pytest.mark.parametrize("steps", [MOST_STEPS + 1, 20_000, 10**30])
def test_steps_have_a_limit_whatever_the_model_was_trained_on(steps: int) -> None:
    with pytest.raises(SettingError, match="whole number from 1 to 1000"):
        compile_table(CONFIG, steps=steps)


def test_a_shorter_training_is_the_limit() -> None:
    with pytest.raises(SettingError, match="from 1 to 500"):
        compile_table(CONFIG | {"num_train_timesteps": 500}, steps=501)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_sde", "heun", "pndm", "lms"])
def test_the_largest_table_takes_few_bytes(sampler: str) -> None:
    """10,000 steps took 4.6 GB: each row without noise kept its whole vector of 6 numbers a step."""
    tracemalloc.start()
    try:
        compile_table(CONFIG | {"num_train_timesteps": 1000}, steps=MOST_STEPS, sampler=sampler)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6


def test_a_list_as_an_option_is_looked_up_once() -> None:
    class Counting(list[int]):
        looks = 0

        def __contains__(self, item: object) -> bool:
            Counting.looks += 1
            return super().__contains__(item)

    compile_table(CONFIG | {"num_train_timesteps": 1000}, steps=20, sampler="unipc", disable_corrector=Counting([0]))
    assert Counting.looks == 0
