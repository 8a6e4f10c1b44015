"""metadata/write.py: what a reader to AUTOMATIC1111's rules finds in an image, and that it generates the same image again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SCHEDULER
from infotext import read_infotext

from sdruntime import __version__
from sdruntime.__main__ import main
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.pipeline.images.png import write_png
from sdruntime.pipeline.metadata.write import Origin, image_hash, parameters
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.image_prompt import ImagePrompt
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.samplers import SAMPLERS

pytest.importorskip("PIL.Image", reason="Pillow reads and writes the other formats")
import PIL.Image

UNET = EngineSpec(
    component="unet",
    backend="openvino",
    version="2026.4.0",
    target="cpu",
    precision="bf16",
    files=("engines/unet.xml",),
    profiles=({},),
)
# of the web UI 1.10: what its own list of samplers has
WEB_UI = """DPM++ 2M|DPM++ SDE|DPM++ 2M SDE|DPM++ 2M SDE Heun|DPM++ 2S a|DPM++ 3M SDE|Euler a|Euler|LMS|Heun|DPM2|DPM2 a
|DDIM|PLMS|UniPC|LCM|Restart""".replace("\n", "").split("|")
SCHEDULE_TYPES = """Automatic|Uniform|Karras|Exponential|Polyexponential|SGM Uniform|Simple|Normal|DDIM|Beta""".split("|")


def read(request: Request, config: dict[str, Any] | None = None, model: str = "v1-5") -> dict[str, str]:
    origin = Origin.of(request, SCHEDULER | (config or {}), model, UNET)
    return read_infotext(parameters(request, (512, 768), origin))


def test_every_setting_is_read_as_it_was_given() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    options = {"eta": 0.25, "set_alpha_to_one": True}
    request = Request(
        prompt="a cat: one, two\nin 'snow' \"now\"",
        negative="dog, blurry\nlow quality: yes",
        seed=2**64 - 1,
        steps=31,
        guidance=7.1234567891,
        rescale=0.7,
        image=pixels,
        strength=0.55,
        options=options,
    )
    found = read(request, model='a "b", c: d')
    assert json.loads(found.pop("Sampler options")) == {"set_alpha_to_one": True}
    assert found == {
        "Prompt": request.prompt,
        "Negative prompt": request.negative,
        "Steps": "31",
        "Sampler": "DDIM",
        "Schedule type": "Automatic",
        "CFG scale": "7.1234567891",
        "Seed": "18446744073709551615",
        "Size-1": "512",
        "Size-2": "768",
        "Model": 'a "b", c: d',
        "Denoising strength": "0.55",
        "Init image hash": hashlib.md5(pixels.tobytes()).hexdigest(),
        "Eta DDIM": "0.25",
        "CFG Rescale": "0.7",
        "RNG": "CPU",
        "Timestep spacing": "leading",
        "Backend": "openvino 2026.4.0 cpu",
        "Precision": "bf16",
        "Version": f"sdruntime {__version__}",
        "Clip skip": "1",
        "Hires upscaler": "None",
    }


def test_the_images_of_an_image_prompt_are_named_by_their_hashes() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    found = read(Request(prompt="", image_prompt=ImagePrompt(image=[pixels, pixels[:1]], scale=0.6)))
    hashes = [hashlib.md5(each.tobytes()).hexdigest() for each in (pixels, pixels[:1])]
    assert found["Image prompt"] == f"Scale: 0.6, Image hash: {hashes[0]}, Image hash: {hashes[1]}"
    masked = read(Request(prompt="", image_prompt=ImagePrompt(image=pixels, mask=pixels[..., 0])))
    mask = hashlib.md5(pixels[..., 0].tobytes()).hexdigest()
    assert masked["Image prompt"] == f"Scale: 1, Image hash: {hashes[0]}, Mask hash: {mask}"


def test_what_was_not_set_is_not_written() -> None:
    found = read(Request(prompt="", guidance=7.0))
    assert found["Prompt"] == found["Negative prompt"] == ""
    assert found["CFG scale"] == "7"
    assert not found.keys() & {"Eta", "Eta DDIM", "CFG Rescale", "Sampler options", "Denoising strength", "Init image hash"}


@pytest.mark.parametrize(
    ("given", "sampler", "schedule"),
    [
        ({"sampler": "dpmpp_2m"}, "DPM++ 2M", "DDIM"),
        ({"sampler": "DPM++ 2M Karras"}, "DPM++ 2M", "Karras"),
        ({"sampler": "k_euler_a"}, "Euler a", "DDIM"),
        ({"sampler": "EulerDiscreteScheduler", "schedule": "karras"}, "Euler", "Karras"),
        ({"sampler": "DPMSolverMultistepScheduler", "options": {"algorithm_type": "sde-dpmsolver++"}}, "DPM++ 2M SDE", "DDIM"),
        ({"sampler": "dpmpp_2m", "options": {"solver_order": 3}}, "dpmpp_3m", "DDIM"),
        ({"sampler": "unipc"}, "UniPC", "Automatic"),
        ({"sampler": "unipc", "schedule": "beta"}, "UniPC", "Beta"),
        ({"sampler": "euler", "schedule": "sgm_uniform"}, "Euler", "SGM Uniform"),
        ({"sampler": "euler", "schedule": "ddim_uniform"}, "Euler", "DDIM"),
        ({"sampler": "dpmpp_2m", "schedule": "AYS"}, "DPM++ 2M", "Align Your Steps"),
        ({"sampler": "plms"}, "PLMS", "Automatic"),
        ({"sampler": "deis"}, "deis", "DDIM"),
    ],
)
def test_samplers_and_schedules_have_the_web_ui_s_names(given: dict[str, Any], sampler: str, schedule: str) -> None:
    found = read(Request(prompt="x", **given), {"timestep_spacing": "leading"})
    assert (found["Sampler"], found["Schedule type"]) == (sampler, schedule)


def test_own_sigmas_stand_in_the_place_of_steps_and_schedule() -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "use_karras_sigmas": True}
    found = read(Request(prompt="x", sigmas=[14.6, 2, 0.125]), config)
    assert (found["Steps"], found["Schedule type"], found["Sigmas"]) == ("2", "Automatic", "14.6, 2, 0.125")
    assert "Timestep spacing" not in found


@pytest.mark.parametrize(
    ("config", "sampler", "schedule"),
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "PLMS", "Automatic"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}, "Euler", "Uniform"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "Euler", "Simple"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "DPM++ 2M", "Karras"),
    ],
)
def test_the_checkpoint_s_own_sampler_is_named_too(config: dict[str, Any], sampler: str, schedule: str) -> None:
    found = read(Request(prompt="x"), config)
    assert (found["Sampler"], found["Schedule type"]) == (sampler, schedule)


def test_settings_of_the_texts() -> None:
    settings: dict[str, Any] = {"prompt_syntax": "a1111", "emphasis": "no-norm", "prompt_2": "a, b", "negative_2": "c"}
    found = read(Request(prompt="x", negative="y", clip_skip=1, **settings), {})
    told = {"Clip skip": "2", "Emphasis": "No norm", "Prompt syntax": "a1111", "Prompt 2": "a, b", "Negative prompt 2": "c"}
    assert told.items() <= found.items()
    for request in (Request(prompt="x"), Request(prompt="x", prompt_syntax="a1111")):
        plain = read(request, {})
        assert plain["Clip skip"] == "1"  # the web UI's default
        assert not {"Emphasis", "Prompt 2", "Negative prompt 2"} & plain.keys()
        assert plain.get("Prompt syntax", "plain") == request.prompt_syntax


def test_settings_of_the_noise_have_the_web_ui_s_names() -> None:
    settings: dict[str, Any] = {"rng": "cuda", "variation_seed": 99, "seed_resize": (512, 384)}
    found = read(Request(prompt="x", seed=7, variation_strength=0.25, **settings), {})
    told = {"Seed": "7", "Variation seed": "99", "Variation seed strength": "0.25", "RNG": "NV"}
    assert (told | {"Seed resize from-1": "512", "Seed resize from-2": "384"}).items() <= found.items()
    without = read(Request(prompt="x", variation_seed=99), {})
    assert not {"Variation seed", "Variation seed strength", "Seed resize from-1"} & without.keys()
    assert without["RNG"] == "CPU"


def test_settings_of_a_mask() -> None:
    image, mask = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8)
    settings: dict[str, Any] = {"mask_blur": 4, "mask_padding": 32, "mask_fill": "noise", "extend": (64, 0, 0, 128)}
    found = read(Request(prompt="x", image=image, mask=mask, **settings), {})
    told = {"Mask blur": "4", "Inpaint area": "Only masked", "Masked area padding": "32", "Masked content": "latent noise"}
    assert (told | {"Extend": "64,0,0,128", "Mask hash": image_hash(mask)}).items() <= found.items()
    assert read(Request(prompt="x", image=image, mask=mask, overlay=True), {})["Overlay"] == "True"
    plain = read(Request(prompt="x", image=image, mask=mask), {})
    assert not (told.keys() | {"Extend", "Overlay"}) & plain.keys()


def control_from(value: str, pixels: np.ndarray, mask: np.ndarray | None) -> Control:
    """Return the Control of a "ControlNet N" value, read as the web UI's extension reads it: pairs between commas."""
    pairs = dict(pair.split(": ", 1) for pair in value.split(", "))
    settings: dict[str, Any] = {
        "scale": float(pairs["Weight"]),
        "start": float(pairs["Guidance Start"]),
        "end": float(pairs["Guidance End"]),
        "net": None if pairs["Model"] == "None" else pairs["Model"],
        "preprocess": None if pairs["Module"] == "none" else pairs["Module"],
        "fit": {"Just Resize": "resize", "Crop and Resize": "crop"}[pairs["Resize Mode"]],
    }
    if "Control Type" in pairs:
        settings["type"] = int(pairs["Control Type"])
    if "Threshold A" in pairs:
        settings |= {"low": float(pairs["Threshold A"]), "high": float(pairs["Threshold B"])}
    assert pairs["Image hash"] == image_hash(pixels)
    assert pairs.get("Mask hash") == (None if mask is None else image_hash(mask))
    return Control(image=pixels, mask=mask, **settings)


def test_settings_of_controlnets_have_the_names_of_the_web_ui_s_extension() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    mask = np.arange(24, dtype=np.uint8).reshape(4, 6)
    controls = [
        Control(image=pixels),
        Control(image=pixels, net="edges", preprocess="canny", low=60, high=120.5, scale=0.75, start=0.125, end=0.9, fit="crop"),
        Control(image=pixels, net="paint", preprocess="inpaint", mask=mask, type=7),
    ]
    request = Request(prompt="", control=controls, guess_mode=True)
    values = read(request)
    assert values["Guess mode"] == "True"
    assert values["ControlNet 1"].startswith(
        "Module: canny, Model: edges, Weight: 0.75, Resize Mode: Crop and Resize, Threshold A: 60, Threshold B: 120.5, "
        "Guidance Start: 0.125, Guidance End: 0.9, Image hash: "
    )
    masks = (None, None, mask)
    again = [control_from(values[f"ControlNet {number}"], pixels, masks[number]) for number in range(3)]
    assert read(Request(prompt="", control=again, guess_mode=True)) == values
    assert "Guess mode" not in read(Request(prompt="", guess_mode=True))


def test_settings_of_two_passes_have_the_web_ui_s_names() -> None:
    found = read(Request(prompt="x", hires=1.5, hires_steps=7, hires_strength=0.6, hires_resize="latent-bicubic"), {})
    told = {"Hires upscale": "1.5", "Hires steps": "7", "Hires upscaler": "Latent (bicubic)", "Denoising strength": "0.6"}
    assert told.items() <= found.items()
    image = np.zeros((64, 64, 3), np.uint8)
    both = read(Request(prompt="x", image=image, strength=0.5, hires=2, hires_strength=0.6), {})
    assert (both["Denoising strength"], both["Hires denoising strength"], both["Hires upscaler"]) == ("0.5", "0.6", "Latent")
    assert not {"Hires upscale", "Hires steps"} & read(Request(prompt="x"), {}).keys()


def test_every_sampler_has_a_name_that_its_own_request_resolves_to() -> None:
    for name, row in SAMPLERS.items():
        config = {"flow": {"prediction_type": "flow_prediction"}, "edm": {"_class_name": "EDMEulerScheduler"}}.get(
            name.split("_")[0], {}
        )
        found = read(Request(prompt="x", sampler=name), config)
        assert found["Sampler"] in WEB_UI if row.a1111 else found["Sampler"] == name
        assert found["Schedule type"] in SCHEDULE_TYPES


def test_the_hash_of_a_start_image_is_of_its_rows_of_rgb() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert image_hash(pixels[:, ::-1]) == hashlib.md5(np.ascontiguousarray(pixels[:, ::-1]).tobytes()).hexdigest()


# ---- the whole way: an image, what it says, and the command made of that


def again(found: dict[str, str]) -> list[str]:
    """The arguments of `sdruntime generate` that an image's settings say."""
    arguments = [
        found["Prompt"],
        "--steps",
        found["Steps"],
        "--sampler",
        found["Sampler"],
        "--guidance",
        found.get("Guidance", found["CFG scale"]),
    ]
    arguments += ["--seed", found["Seed"], "--size", f"{found['Size-1']}x{found['Size-2']}"]
    optional = {
        "--negative": "Negative prompt",
        "--rescale": "CFG Rescale",
        "--guidance-interval": "Guidance interval",
        "--strength": "Denoising strength",
        "--sigmas": "Sigmas",
        "--prompt-2": "Prompt 2",
        "--negative-2": "Negative prompt 2",
        "--variation-seed": "Variation seed",
        "--variation-strength": "Variation seed strength",
        "--mask-blur": "Mask blur",
        "--mask-padding": "Masked area padding",
        "--extend": "Extend",
        "--hires": "Hires upscale",
        "--hires-steps": "Hires steps",
        "--hires-strength": "Hires denoising strength",
    }
    arguments += ["--rng", {"CPU": "cpu", "NV": "cuda"}[found["RNG"]]]
    if "Seed resize from-1" in found:
        arguments += ["--seed-resize", f"{found['Seed resize from-1']}x{found['Seed resize from-2']}"]
    if "Hires upscale" in found:
        upscalers = {"Latent": "latent", "Latent (bicubic)": "latent-bicubic", "Lanczos": "lanczos"}
        arguments += ["--hires-resize", upscalers[found["Hires upscaler"]]]
        if "Init image hash" not in found:
            optional["--hires-strength"] = optional.pop("--strength")
    fills = {"fill": "fill", "latent noise": "noise", "latent nothing": "zeros"}
    arguments += ["--mask-fill", fills.get(found.get("Masked content", ""), "original")]
    arguments += ["--overlay"] if "Overlay" in found else []
    arguments += ["--cfg-pp"] if "CFG PP" in found else []
    arguments += ["--clip-skip", str(int(found.get("Clip skip", "1")) - 1)]
    arguments += ["--prompt-syntax", found.get("Prompt syntax", "plain")]
    arguments += ["--emphasis", {"No norm": "no-norm", "Ignore": "ignore"}.get(found.get("Emphasis", ""), "original")]
    arguments += [part for flag, key in optional.items() if found.get(key) for part in (flag, found[key])]
    if "Timestep spacing" not in found and found["Schedule type"] != "Automatic":
        arguments += ["--schedule", found.get("Schedule", found["Schedule type"])]
    options = json.loads(found.get("Sampler options", "{}"))
    for key in found.keys() & {"Eta", "Eta DDIM"}:
        options["eta"] = float(found[key])
    return arguments + [part for key, value in options.items() for part in ("--option", f"{key}={json.dumps(value)}")]


@pytest.mark.parametrize(
    "given",
    [
        ["--sampler", "ddim", "--option", "eta=0.8"],
        ["--sampler", "DPM++ 2M Karras", "--rescale", "0.7", "--guidance", "9.125", "--negative", "a, b"],
        ["--sampler", "dpmpp_2m", "--option", "solver_order=3", "--option", "euler_at_final=true"],
        ["--sampler", "euler", "--schedule", "sgm_uniform"],
        ["--negative", "[x|(y)]", "--emphasis", "no-norm"],
        ["--negative", "(x:1.5) [y:2]", "--prompt-syntax", "plain"],
        ["--sampler", "euler", "--schedule", "lu"],
        ["--steps", "3", "--guidance", "2.5,7,1", "--sampler", "euler"],
        ["--guidance-interval", "0.2,0.75", "--sampler", "euler"],
        ["--cfg-pp", "--guidance", "0.7", "--sampler", "euler_a", "--negative", "a dog"],
        ["--sampler", "euler", "--schedule", "gits"],
        ["--variation-seed", "5", "--variation-strength", "0.3", "--rng", "cuda", "--sampler", "euler_a"],
        ["--seed-resize", "32x96"],
        ["--image", "start.png", "--strength", "0.6", "--sampler", "Euler a"],
        ["--sampler", "euler", "--sigmas", "14.6,6.5,2.25,0.7000000000000001,0"],
        ["--sampler", "DPM++ 2M", "--sigmas", "10,2,0.5,0.1,1e-3", "--image", "start.png", "--strength", "0.75"],
        ["--image", "start.png", "--mask", "mask.png", "--mask-blur", "1.5", "--mask-fill", "noise", "--overlay"],
        ["--image", "start.png", "--mask", "mask.png", "--mask-padding", "3", "--mask-fill", "fill"],
        ["--hires", "2", "--size", "64x64", "--hires-steps", "6", "--hires-strength", "0.6", "--hires-resize", "latent-bicubic"],
        ["--hires", "1.5", "--hires-resize", "lanczos", "--image", "start.png", "--strength", "0.6"],
        ["--image", "start.png", "--extend", "0,64,0,0", "--strength", "1"],
    ],
    ids=" ".join,
)
def test_the_settings_of_an_image_generate_it_again(given: list[str], small_bundle: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    write_png(start, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = tmp_path / "mask.png"
    write_png(mask, np.pad(np.full((30, 20, 3), 255, np.uint8), ((10, 24), (4, 40), (0, 0))))
    given = [str(tmp_path / part) if part in ("start.png", "mask.png") else part for part in given]
    images = [tmp_path / "first.png", tmp_path / "second.png"]
    common = ["generate", str(small_bundle), "--steps", "4", "--no-measure", "-o"]
    assert main([*common, str(images[0]), "the (red:1.4) [cat:dog:0.5]", *given, "--seed", "11"]) == 0
    with PIL.Image.open(images[0]) as image:
        found = read_infotext(str(image.info["parameters"]))
    start_image = ["--image", str(start)] if "Init image hash" in found else []
    start_image += ["--mask", str(mask)] if "Mask hash" in found else []
    assert main([*common, str(images[1]), *again(found), *start_image]) == 0
    first, second = (np.asarray(PIL.Image.open(path)) for path in images)
    assert first.std() >= 10
    np.testing.assert_array_equal(first, second)
