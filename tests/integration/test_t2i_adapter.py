"""T2I-Adapters give diffusers' images: one and two of them, with scales, a part of the steps, and in every kind of UNet."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from integration.reference import Array, assert_same_picture, decoded_by, ours

from sdruntime.bundle.bundle import Bundle
from sdruntime.errors import SettingError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.request import Request
from sdruntime.verification.inputs import patches

pytestmark = pytest.mark.filterwarnings("ignore:control. the image of 96x64 is stretched")
PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a red circle", "green", 5, 6, 4.0
SCALE = 4.0  # at which an adapter of random weights shows
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}
# diffusers' SDXL pipeline counts the steps of Heun's method against its calls, so its adapters stop halfway
SHORT, LONG = ("ddim", "euler_a", "heun"), ("ddim", "euler_a", "dpmpp_2m")
# adapters and their scales, guidance
CASES: dict[str, tuple[dict[str, float], float]] = {
    "one": ({"pose": 0.8}, GUIDANCE),
    "one without guidance": ({"sketch": 1.0}, 1.0),
    "two": ({"pose": 0.6, "sketch": 0.9}, GUIDANCE),
}
THREE_LEVELS = {"block_out_channels": (32, 64, 64), "attention_head_dim": 4}
# a checkpoint of each kind of UNet: its kind, what is changed in the UNet, and what in the adapter
KINDS: dict[str, tuple[tiny.Kind, dict[str, Any], dict[str, Any]]] = {
    "light adapter": (
        "sd1",
        THREE_LEVELS
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        {"adapter_type": "light_adapter", "channels": [32, 64], "num_res_blocks": 2},
    ),
    "SDXL": ("sdxl", {}, {}),
    "SDXL, also in the middle": (
        "sdxl",
        THREE_LEVELS
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
        },
        {},
    ),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, sd1_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny.write_t2i_adapter(folder / "pose", sd1_checkpoint)
    tiny.write_t2i_adapter(folder / "sketch", sd1_checkpoint, seed=18, in_channels=1)
    return folder


@pytest.fixture(scope="module")
def bundle(sd1_checkpoint: Path, sd1_controlnets: Path, adapters: Path, export: Callable[..., Path]) -> Path:
    nets = {f"t2i_adapter_{name}": str(adapters / name) for name in ("pose", "sketch")}
    return export(sd1_checkpoint, controlnets=nets | {"controlnet_canny": str(sd1_controlnets / "canny")})


@pytest.fixture(scope="module")
def pipe(bundle: Path, ready: Callable[[Path], Path]) -> Iterator[Pipeline]:
    with Pipeline.open(ready(bundle)) as opened:
        yield opened


def image_of(name: str) -> Array:
    """A control image; that of `sketch` is gray, and of another size than the model's."""
    return np.repeat(patches((96, 64), 6)[..., :1], 3, axis=2) if name == "sketch" else patches((64, 64), 4)


def request_for(case: str, sampler: str, **settings: Any) -> Request:
    used, guidance = CASES[case]
    basic: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": guidance, "sampler": sampler}
    basic["negative"] = NEGATIVE if guidance > 1 else None
    basic["control"] = tuple(Control(image=image_of(name), net=name, scale=scale) for name, scale in used.items())
    return Request(prompt=PROMPT, **(basic | settings))


def theirs(
    checkpoint: Path, folders: list[Path], sampler: str, scales: list[float], guidance: float = GUIDANCE, **settings: Any
) -> tuple[Array, Array]:
    """(uint8 [H, W, 3], float32 [3, H, W]) of diffusers."""
    import diffusers
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    models = [diffusers.T2IAdapter.from_pretrained(folder, low_cpu_mem_usage=False) for folder in folders]
    several = len(models) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = diffusers.DiffusionPipeline.load_config(str(checkpoint))
        kind = getattr(diffusers, config["_class_name"].replace("Pipeline", "AdapterPipeline"))
        adapter = diffusers.MultiAdapter(models) if several else models[0]
        reference = kind.from_pretrained(str(checkpoint), adapter=adapter, torch_dtype=torch.float32)
        reference.set_progress_bar_config(disable=True)
        named, changes = SAMPLERS[sampler]
        reference.scheduler = getattr(diffusers, named).from_config(reference.scheduler.config, **changes)
        images = [Image.fromarray(image_of(folder.name)) for folder in folders]
        modes = ["L" if model.config.in_channels == 1 else "RGB" for model in models]
        images = [image.convert(mode) for image, mode in zip(images, modes, strict=True)]
        latents = reference(
            PROMPT,
            negative_prompt=NEGATIVE,
            image=images if several else images[0],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            adapter_conditioning_scale=scales if several else scales[0],
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            **({"width": 64, "height": 64} | settings),
        ).images
        return decoded_by(reference, latents)


@pytest.mark.parametrize("sampler", SHORT)
@pytest.mark.parametrize("case", CASES)
def test_the_image_is_diffusers(pipe: Pipeline, sd1_checkpoint: Path, adapters: Path, case: str, sampler: str) -> None:
    used, guidance = CASES[case]
    picture, decoded = ours(pipe, request_for(case, sampler))
    plain, _ = ours(pipe, request_for(case, sampler, control=()))
    assert np.abs(picture.astype(int) - plain).max() > 10
    expected = theirs(sd1_checkpoint, [adapters / name for name in used], sampler, [*used.values()], guidance)
    assert_same_picture(picture, expected[0], decoded, expected[1])


@pytest.mark.full
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_unet(name: str, tmp_path: Path, export: Callable[..., Path], ready: Callable[[Path], Path]) -> None:
    kind, unet, changes = KINDS[name]
    checkpoint = tiny.write_checkpoint(tmp_path / kind, kind)
    if unet:
        tiny.replace_unet(checkpoint, **unet)
    tiny.write_t2i_adapter(tmp_path / "pose", checkpoint, **changes)
    with Pipeline.open(ready(export(checkpoint, controlnets={"t2i_adapter": str(tmp_path / "pose")}))) as pipe:
        height, width = pipe.model.default_size
        for sampler in LONG:
            part = 0.5 if kind == "sdxl" else 1.0
            control = Control(image=image_of("pose"), scale=SCALE, end=part)
            picture, decoded = ours(pipe, request_for("one", sampler, control=control))
            plain, _ = ours(pipe, request_for("one", sampler, control=()))
            assert np.abs(picture.astype(int) - plain).max() > 2
            factor = {"adapter_conditioning_factor": part} if kind == "sdxl" else {}
            expected = theirs(checkpoint, [tmp_path / "pose"], sampler, [SCALE], width=width, height=height, **factor)
            assert_same_picture(picture, expected[0], decoded, expected[1])


def test_a_mixed_batch_gives_the_images_that_each_gives_alone(pipe: Pipeline) -> None:
    late = Control(image=image_of("pose"), net="pose", start=0.4)
    canny = Control(image=image_of("pose"), net="canny", scale=0.5)
    settings: list[dict[str, Any]] = [{}, {"seed": 8, "control": late}, {"seed": 6, "control": ()}, {"control": (late, canny)}]
    requests = [request_for("one", "ddim", **each) for each in settings]
    together = pipe(requests).images
    images = [pipe(request).images[0].pixels for request in requests]
    for alone, image in zip(images, together, strict=True):
        assert np.abs(alone.astype(int) - image.pixels).max() <= 1
    assert all(np.abs(images[0].astype(int) - other).max() > 10 for other in images[1:])


def test_without_an_adapter_the_image_is_bit_equal_to_that_of_the_plain_bundle(
    pipe: Pipeline, sd1_bundle: Path, ready: Callable[[Path], Path]
) -> None:
    request = request_for("one", "ddim", control=())
    with Pipeline.open(ready(sd1_bundle)) as plain:
        _, decoded = ours(plain, request)
    assert np.array_equal(decoded, ours(pipe, request)[1])


def test_the_engines_have_the_features_as_optional_inputs(bundle: Path) -> None:
    components = Bundle.open(bundle).manifest.components
    assert [tensor.name for tensor in components["t2i_adapter_pose"].outputs] == ["feature_0", "feature_1"]
    assert [tensor.shape for tensor in components["unet"].optional_inputs[:2]] == [
        ("batch", 32, "height", "width"),
        ("batch", 64, "height/2", "width/2"),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"net": "pose", "type": 2}, "type 2, but t2i_adapter_pose reads images of one type"),
        ({"net": "pose", "preprocess": "inpaint", "mask": np.zeros((64, 64), bool)}, "inpaint is for ControlNets"),
        ({}, r"which ControlNet\? Give its name as net \(net=\): pose, sketch, canny"),
    ],
)
def test_what_an_adapter_cannot_do(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pipe(PROMPT, control=Control(image=image_of("pose"), **settings))
