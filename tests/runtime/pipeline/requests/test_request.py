"""One schema for a request: what each field takes, and that all that speak of it have the same defaults and ranges."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdruntime import Pipeline, Request, SettingError, UnknownName
from sdruntime.bundle.model import Defaults
from sdruntime.cli.parser import parser
from sdruntime.pipeline.requests.ranges import NUMBERS, RANGES
from sdruntime.pipeline.requests.request import DEFAULTS
from sdruntime.sampling.compile import compile_table
from sdruntime.serving.message import RequestMessage

WRONG: list[tuple[str, Any, str]] = [
    ("steps", 0, "steps 0 is outside 1 to 1,000"),
    ("steps", 1001, "steps 1001 is outside 1 to 1,000"),
    ("steps", True, "steps True: expected a whole number from 1 to 1,000"),
    ("steps", "20", "steps '20': expected a whole number"),
    ("steps", 20.0, "steps 20.0: expected a whole number"),
    ("guidance", "7", "guidance '7': expected a number"),
    ("guidance", [7.0, 101.0], r"guidance\[1\] 101.0 is outside 0 to 100"),
    ("guidance", [], "guidance: got a list of 0 numbers; expected one for each model call"),
    ("guidance_interval", 0.5, r"guidance_interval 0.5: expected \(start, end\), shares of the steps from 0 to 1"),
    ("guidance_interval", (0.1, 0.5, 1.0), r"guidance_interval \(0.1, 0.5, 1.0\): expected \(start, end\)"),
    ("guidance_interval", (0.0, 1.5), "guidance_interval: end 1.5 is outside 0 to 1"),
    ("guidance_interval", (0.5, 0.5), "guidance_interval: start 0.5 is not below end 0.5"),
    ("seed", -1, "seed -1 is outside 0 to 18,446,744,073,709,551,615"),
    ("seed", 2**64, "seed 18446744073709551616 is outside"),
    ("seed", np.bool_(True), "seed .*: expected a whole number"),
    ("guidance", math.nan, "guidance nan is outside 0 to 100"),
    ("guidance", math.inf, "guidance inf is outside 0 to 100"),
    ("guidance", 10**400, "guidance 1000.* is outside 0 to 100"),
    ("guidance", "7.5", "guidance '7.5': expected a number from 0 to 100"),
    ("guidance", False, "guidance False: expected a number"),
    ("image_guidance", 0.5, "image_guidance 0.5 is outside 1 to 100"),
    ("mask", np.zeros((2, 2), np.uint8), r"mask: it marks a part of an image: pass the image too, as image=… \(--image\)"),
    ("cfg_pp", 1, "cfg_pp 1: expected True or False"),
    ("rescale", -0.1, "rescale -0.1 is outside 0 to 1"),
    ("strength", 0, r"strength 0 is outside 0 \(excluded\) to 1"),
    ("strength", 1.5, "strength 1.5 is outside"),
    ("sigmas", "14.6,0", "sigmas '14.6,0': expected a list of noise levels from high to low"),
    ("sigmas", 14.6, "sigmas 14.6: expected a list"),
    ("sigmas", np.ones((1, 2)), "sigmas .*: expected a list"),
    ("sigmas", [], "sigmas: got 0 noise levels; expected 1 to 1,001"),
    ("sigmas", range(2_000, 0, -1), "sigmas: got 2,000 noise levels; expected 1 to 1,001"),
    ("sigmas", [14.6, "1"], r"sigmas\[1\] '1': expected a number from 0 to 1,000,000"),
    ("sigmas", [True, False], r"sigmas\[0\] True: expected a number"),
    ("sigmas", [math.inf, 1], r"sigmas\[0\] inf is outside 0 to 1,000,000"),
    ("sigmas", [14.6, math.nan], r"sigmas\[1\] nan is outside"),
    ("sigmas", [14.6, -0.1], r"sigmas\[1\] -0.1 is outside"),
    ("sigmas", [14.6, 2, 2.0, 0], r"sigmas\[2\] 2.0: expected less than the level before it, 2.0"),
    ("sigmas", [1, 1 - 1e-9], r"sigmas\[1\] 0.999999999: expected less"),  # in float32 they are equal
    ("size", 512, r"size 512: expected \(width, height\) in pixels"),
    ("size", "512x512", r"size '512x512': expected \(width, height\)"),
    ("size", (512,), r"size \(512,\): expected \(width, height\)"),
    ("size", (512, 0), "size: height 0 is outside 1 to 16,384"),
    ("size", (1 << 20, 512), "size: width 1048576 is outside 1 to 16,384"),
    ("size", (512.0, 512), "size: width 512.0: expected a whole number"),
    ("rng", "gpu", "rng 'gpu': expected one of cpu, cuda"),
    ("variation_seed", -1, "variation_seed -1 is outside 0 to 18,446,744,073,709,551,615"),
    ("variation_strength", 1.5, "variation_strength 1.5 is outside 0 to 1"),
    ("seed_resize", (512,), r"seed_resize \(512,\): expected \(width, height\)"),
    ("original_size", (0, 5), "original_size: width 0 is outside 1 to 16,384"),
    ("target_size", 7, r"target_size 7: expected \(width, height\) in pixels"),
    ("crop", (-1, 0), "crop: left -1 is outside 0 to 16,384"),
    ("crop", None, r"crop None: expected \(left, top\) in pixels"),
    ("mask_blur", 65, "mask_blur 65 is outside 0 to 64"),
    ("mask_padding", -1, "mask_padding -1 is outside 0 to 16,384"),
    ("mask_padding", 0.5, "mask_padding 0.5: expected a whole number"),
    ("mask_fill", "latent noise", "unknown mask_fill 'latent noise'"),
    ("overlay", 1, "overlay 1: expected True or False"),
    ("extend", (64, 0), r"extend \(64, 0\): expected \(left, top, right, bottom\) in pixels"),
    ("extend", (0, 0, -8, 0), "extend: right -8 is outside 0 to 16,384"),
    ("extend", (0, 0, 8, 0), r"extend: it adds to an image: pass the image too, as image=… \(--image\)"),
    ("hires", 1, r"hires 1 is outside 1 \(excluded\) to 8"),
    ("hires", "2", r"hires '2': expected a number from 1 \(excluded\) to 8"),
    ("hires_steps", 0, "hires_steps 0 is outside 1 to 1,000"),
    ("hires_strength", 0, r"hires_strength 0 is outside 0 \(excluded\) to 1"),
    ("hires_strength", None, "hires_strength None: expected a number"),
    ("hires_resize", "Latent", "unknown hires_resize 'Latent'"),
    ("refiner_at", 0, r"refiner_at 0 is outside 0 \(excluded\) to 1"),
    ("prompt", None, "prompt None: expected text"),
    ("negative", 3, "negative 3: expected text"),
    ("sampler", 3, "sampler 3: expected text"),
    ("sampler", "eulr", "unknown sampler 'eulr': did you mean"),
    ("schedule", "karas", "unknown schedule 'karas': did you mean karras"),
    ("fit", "stretch", "unknown fit 'stretch'"),
    ("options", {"num_train_timesteps": 5}, "option num_train_timesteps: the model was trained"),
    ("options", {"eta": float("nan")}, "option eta: expected a number, got NaN"),
    ("guidence", 3, "unknown setting 'guidence': did you mean guidance"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_value_is_named_when_the_request_is_made(name: str, value: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        Request(**{"prompt": "a cat", name: value})
    assert isinstance(caught.value, UnknownName) == message.startswith("unknown")


def test_diffusers_names_are_answered_with_ours() -> None:
    for name, ours in (("num_inference_steps", "steps=…"), ("guidance_scale", "guidance=…"), ("generator", "seed=…")):
        with pytest.raises(SettingError, match=f"unknown setting '{name}': write {ours}"):
            Request(prompt="a cat", **{name: 1})  # type: ignore[arg-type]
    assert copy.copy(Request(prompt="a cat", steps=3)) == pickle.loads(pickle.dumps(Request(prompt="a cat", steps=3)))
    with pytest.raises(SettingError, match="unknown setting 'guidance_scale'"):
        dataclasses.replace(Request(prompt="a cat"), guidance_scale=3)  # type: ignore[call-arg]
    with pytest.raises(SettingError, match=r"count: a Request is one image: pass the prompt as text, with count=…"):
        Request(prompt="a cat", count=2)  # type: ignore[call-arg]
    assert list(inspect.signature(Request).parameters) == list(Request.__slots__)  # for help() and editors


def test_numbers_of_numpy_become_those_of_python() -> None:
    made = Request(
        prompt="a cat",
        seed=np.uint64(2**64 - 1),
        steps=np.int16(3),
        guidance=np.float32(7.5),
        rescale=np.float16(0.5),
        strength=np.int64(1),
        size=np.array([512, 768]),  # type: ignore[arg-type]
        sigmas=np.array([14.5, 2, 0], np.float32),  # type: ignore[arg-type]
        options={"eta": np.float32(0.5), "order": np.int64(2), "lower_order_final": np.bool_(True), "solver_type": "heun"},
    )
    assert repr(made.options) == "{'eta': 0.5, 'order': 2, 'lower_order_final': True, 'solver_type': 'heun'}"
    assert made.sigmas == (14.5, 2.0, 0.0)
    assert {type(sigma) for sigma in made.sigmas} == {float}
    values = [made.seed, made.steps, made.guidance, made.rescale, made.strength, *(made.size or ())]
    assert values == [2**64 - 1, 3, 7.5, 0.5, 1.0, 512, 768]
    assert [type(value) for value in values] == [int, int, float, float, float, int, int]


def test_the_ends_of_each_range_belong_to_it() -> None:
    for name, allowed in RANGES.items():
        for value in (allowed.low + (0.001 if allowed.above else 0), allowed.high):
            assert getattr(Request(**{"prompt": "a cat", name: value}), name) == value


def test_the_command_line_has_its_defaults_and_tells_its_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    given = vars(parser().parse_args(["generate", "bundle", "a cat", "-o", "out.png"]))
    for name in ("steps", "sigmas", "guidance", "image_guidance", "mask", "rescale", "negative", "sampler", "schedule", "fit"):
        assert given[name] == DEFAULTS[name]
    for name in (
        "mask_blur",
        "mask_padding",
        "mask_fill",
        "overlay",
        "extend",
        "hires",
        "hires_strength",
        "hires_steps",
        "hires_resize",
    ):
        assert given[name] == DEFAULTS[name]
    with pytest.raises(SystemExit):
        parser().parse_args(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert given["prompt_syntax"] == "a1111"
    assert [given[name] for name in ("emphasis", "prompt_2", "negative_2", "clip_skip")] == ["original", None, None, 0]
    for name in ("steps", "guidance", "image_guidance", "rescale", "strength", "mask_blur"):
        own = "the model's own, or " if name in ("steps", "guidance") else ""
        assert f"{RANGES[name]} ({own}{NUMBERS[name]:g})" in told


def test_the_service_has_its_defaults() -> None:
    shared = set(RequestMessage.__dataclass_fields__) & set(DEFAULTS) - {"seed", "variation_seed"}
    assert {"prompt_2", "negative_2", "prompt_syntax", "emphasis", "clip_skip"} <= shared
    assert {"mask_blur", "mask_padding", "mask_fill", "overlay", "extend"} <= shared
    assert {"refiner_at", "hires", "hires_strength", "hires_steps", "hires_resize"} <= shared
    assert {"steps", "guidance", "image_guidance", "rescale", "strength", "negative", "sampler", "schedule", "sigmas"} <= shared
    assert {name: getattr(RequestMessage(prompt="a cat"), name) for name in shared} == {name: DEFAULTS[name] for name in shared}


IMAGE = np.zeros((4, 6, 3), np.uint8)


def test_a_mask_is_gray_of_the_image_s_size() -> None:
    columns = np.tile(np.arange(6, dtype=np.uint8), (4, 1))
    assert Request(prompt="", image=IMAGE, mask=columns).mask_pixels is columns
    found = Request(prompt="", image=IMAGE, mask=columns > 2).mask_pixels
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 255, 255, 255]] * 4
    colours = np.zeros((4, 6, 3), np.uint8)
    colours[:, 0], colours[:, 1], colours[:, 2], colours[:, 3] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)
    request = Request(prompt="", image=IMAGE, mask=colours)
    assert request.mask_pixels is not None
    assert request.mask_pixels[0].tolist() == [76, 150, 29, 9, 0, 0], "as Pillow converts to L"
    assert repr(request) == "<Request '', seed 0, image 6x4, mask 6x4>"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((4, 5), np.uint8), "mask: it is 5x4, and the image 6x4: they must be equal"),
        (np.zeros((4, 6), np.float32), r"mask: expected uint8 \[height, width, 3\], got float32 \[4, 6\]"),
        (3, "mask: expected a path, an array or a Pillow image, got int"),
        ("missing.png", "mask: missing.png: cannot be read"),
    ],
)
def test_a_wrong_mask_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Request(prompt="", image=IMAGE, mask=mask)


def test_cfg_plus_plus_has_a_guidance_of_its_own(small_bundle: Path) -> None:
    assert Request(prompt="x", cfg_pp=True).completed(Defaults(guidance=5.0)).guidance == 0.6
    assert Request(prompt="x", cfg_pp=True, guidance=0.3).completed(Defaults(guidance=5.0)).guidance == 0.3
    assert Request(prompt="x", cfg_pp=True, guidance=0.3).guided
    with pytest.raises(SettingError, match=r"guidance 7\.5 with cfg_pp: CFG\+\+ takes a guidance above 0, up to 1"):
        Request(prompt="x", cfg_pp=True, guidance=7.5)
    with pytest.raises(SettingError, match=r"rescale 0\.5 with cfg_pp"):
        Request(prompt="x", cfg_pp=True, rescale=0.5)
    given: dict[str, Any] = {"seed": 1, "size": (64, 64), "steps": 4}
    with Pipeline.open(small_bundle) as pipe:
        with pytest.raises(SettingError, match="cfg_pp with dpmpp_2m: its steps read outputs of earlier ones"):
            pipe("a cat", sampler="dpmpp_2m", cfg_pp=True, **given)
        [image] = pipe("a cat", sampler="euler", cfg_pp=True, **given).pixels
        assert (image != pipe("a cat", sampler="euler", guidance=0.6, **given).pixels[0]).any()
        ratios = compile_table(pipe.bundle.read_json("scheduler/scheduler_config.json"), steps=4, sampler="euler").levels[:, 1]
        weights = [0.6 * s / (s - t) for s, t in pairwise([*ratios, 0.0])]
        assert weights[-1] == 0.6
        stream = pipe.stream("a cat", sampler="euler", cfg_pp=True, **given)
        np.testing.assert_allclose(stream.jobs[0].guidances, weights, rtol=1e-6)
