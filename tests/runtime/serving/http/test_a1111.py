"""The API of AUTOMATIC1111's web UI: what its clients send, against the command line's image of the same settings."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server is an extra")
pytest.importorskip("starlette", reason="the server is an extra")
pytest.importorskip("PIL.Image", reason="the server is an extra")
from servers import WAIT, Answer, Server

from sdruntime.__main__ import main
from sdruntime.pipeline.images.png import image_from_png, png_from_image, text_from_png, write_png

pytestmark = pytest.mark.slow
# the fields that webuiapi sends with its defaults, which mean nothing here
USUAL: dict[str, Any] = {
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": False,
    "styles": [],
    "subseed": -1,
    "subseed_strength": 0.0,
    "seed_resize_from_h": 0,
    "seed_resize_from_w": 0,
    "eta": 1.0,
    "s_churn": 0,
    "s_noise": 1,
    "override_settings": {},
    "script_args": [],
    "script_name": None,
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
    "use_async": False,
}


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    started = Server(bundle, "--max-steps", "900")
    yield started
    started.stop()


def ask(server: Server, route: str, **fields: Any) -> Answer:
    settings = {"prompt": "a (cat:1.2)", "width": 64, "height": 64, "steps": 3, "seed": 11, "cfg_scale": 5.0}
    return server.post(f"/sdapi/v1/{route}", USUAL | settings | fields)


def files(answer: Answer) -> list[bytes]:
    assert answer.status == 200, answer.body
    return [base64.b64decode(text) for text in answer.json["images"]]


def drawn(bundle: Path, out: Path, *words: str) -> bytes:
    common = ["--backend", "fake", "--steps", "3", "--seed", "11", "--guidance", "5", "-o", str(out)]
    assert main(["generate", str(bundle), "a (cat:1.2)", *common, *words]) == 0
    return out.read_bytes()


def file(pixels: np.ndarray) -> str:
    return base64.b64encode(png_from_image(pixels)).decode()


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def half() -> np.ndarray:
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, 32:] = 255
    return mask


def test_txt2img_is_the_image_of_the_command_line(server: Server, bundle: Path, tmp_path: Path) -> None:
    answer = ask(server, "txt2img", negative_prompt="dog", sampler_name="Euler a", scheduler="Automatic", n_iter=2)
    images = files(answer)
    words = ["--size", "64x64", "--negative", "dog", "--sampler", "Euler a"]
    assert images[0] == drawn(bundle, tmp_path / "a.png", *words)
    info = json.loads(answer.json["info"])
    assert (info["seed"], info["all_seeds"], info["steps"], info["sampler_name"]) == (11, [11, 12], 3, "Euler a")
    assert info["infotexts"] == [text_from_png(image)["parameters"] for image in images]
    assert answer.json["parameters"]["sampler_name"] == "Euler a"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampler_name": "DPM++ 2M", "scheduler": "automatic"}, ["--sampler", "DPM++ 2M", "--schedule", "karras"]),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Exponential"}, ["--sampler", "DPM++ 2M", "--schedule", "exponential"]),
        ({"sampler_name": "DDIM", "eta": 0.5}, ["--sampler", "DDIM", "--option", "eta=0.5"]),
        ({"override_settings": {"CLIP_stop_at_last_layers": 1, "randn_source": "NV"}}, ["--rng", "cuda"]),
        ({"subseed": 5, "subseed_strength": 0.25}, ["--variation-seed", "5", "--variation-strength", "0.25"]),
        (
            {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent (bicubic)", "denoising_strength": 0.5},
            ["--hires", "2", "--hires-resize", "latent-bicubic", "--hires-strength", "0.5"],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_settings_mean_what_they_do_in_the_web_ui(
    server: Server, bundle: Path, tmp_path: Path, fields: dict[str, Any], words: list[str]
) -> None:
    [image] = files(ask(server, "txt2img", **fields))
    assert image == drawn(bundle, tmp_path / "a.png", "--size", "64x64", *words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"denoising_strength": 0.5}, ["--strength", "0.5"]),
        (
            {"mask": file(half()), "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False, "denoising_strength": 0.5},
            ["--mask", "{mask}", "--overlay", "--strength", "0.5"],
        ),
        (
            {"mask": file(255 - half()), "inpainting_mask_invert": 1, "inpainting_fill": 2, "inpaint_full_res_padding": 8},
            ["--mask", "{mask}", "--mask-blur", "4", "--mask-fill", "noise", "--mask-padding", "8", "--strength", "0.75"],
        ),
    ],
    ids=["image", "mask", "only masked"],
)
def test_img2img(server: Server, bundle: Path, tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    write_png(tmp_path / "start.png", noise())
    write_png(tmp_path / "mask.png", half())
    [image] = files(ask(server, "img2img", init_images=[f"data:image/png;base64,{file(noise())}"], **fields))
    words = [word.format(mask=tmp_path / "mask.png") for word in words]
    size = ["--size", "64x64"] if "--mask-padding" in words else []
    assert image == drawn(bundle, tmp_path / "a.png", "--image", str(tmp_path / "start.png"), *size, *words)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"restore_faces": True}, "restore_faces: not supported"),
        ({"tiling": True}, "tiling: not supported"),
        ({"script_name": "x/y/z plot"}, "script_name: not supported"),
        ({"alwayson_scripts": {"ADetailer": {"args": []}}}, "adetailer: not supported"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"module": "openpose", "image": "x"}]}}}, "module 'openpose'"),
        ({"sampler_name": "Nothing"}, "unknown sampler"),
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler 'R-ESRGAN 4x+'"),
        ({"width": "64"}, "width '64': expected a whole number"),
        ({"batch_size": 9}, "n 9: expected a whole number from 1 to 8"),
        ({"override_settings": {"randn_source": "x"}}, "randn_source 'x'"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "model 'other': this server has tiny"),
    ],
)
def test_what_would_be_another_image_is_refused(server: Server, fields: dict[str, Any], text: str) -> None:
    answer = ask(server, "txt2img", **fields)
    assert answer.status in (404, 422)
    assert text in answer.json["error"]["message"]
    assert ask(server, "img2img").code == "invalid_request"


def test_lists(server: Server) -> None:
    def names(path: str, key: str) -> list[str]:
        return [row[key] for row in server.get(f"/sdapi/v1/{path}").json]

    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(names("samplers", "name"))
    assert {"Karras", "SGM Uniform"} <= set(names("schedulers", "label"))
    assert names("sd-models", "title") == ["tiny"]
    assert {"None", "Lanczos", "Latent"} <= set(names("upscalers", "name"))
    for path in ("sd-vae", "loras", "embeddings", "cmd-flags", "scripts", "hypernetworks", "prompt-styles"):
        assert server.get(f"/sdapi/v1/{path}").status == 200
    options = server.get("/sdapi/v1/options").json
    assert options["sd_model_checkpoint"] == "tiny"
    assert server.post("/sdapi/v1/options", options).status == 200
    assert server.post("/sdapi/v1/options", {"sd_model_checkpoint": "other"}).status == 404


def test_png_info_and_resizing(server: Server) -> None:
    [image] = files(ask(server, "txt2img"))
    info = server.post("/sdapi/v1/png-info", {"image": base64.b64encode(image).decode()}).json
    assert info["info"] == text_from_png(image)["parameters"]
    assert (info["parameters"]["Seed"], info["parameters"]["Prompt"]) == ("11", "a (cat:1.2)")
    for upscaler, factor, shape in (("Lanczos", 1.5, (96, 96, 3)), ("Nearest", 2, (128, 128, 3)), ("None", 2, (64, 64, 3))):
        body = {"image": file(noise()), "upscaler_1": upscaler, "upscaling_resize": factor}
        larger = server.post("/sdapi/v1/extra-single-image", body).json["image"]
        assert image_from_png(base64.b64decode(larger)).shape == shape
    assert server.post("/sdapi/v1/extra-single-image", {"image": file(noise()), "upscaling_resize": 1e9}).status == 422


def test_progress_and_interrupt(server: Server) -> None:
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(ask(server, "txt2img", steps=900, width=512, height=512)))
    asking.start()
    deadline = time.monotonic() + WAIT
    while not (now := server.get("/sdapi/v1/progress").json)["state"]["sampling_step"]:
        assert time.monotonic() < deadline, now
    assert 0 < now["progress"] < 1
    assert (now["state"]["job_count"], now["state"]["sampling_steps"]) == (1, 900)
    assert server.ask("POST", "/sdapi/v1/interrupt").status == 200
    asking.join(WAIT)
    [image] = files(answers[0])
    assert image_from_png(image).shape == (512, 512, 3)
    assert server.get("/sdapi/v1/progress").json["state"]["job_count"] == 0
