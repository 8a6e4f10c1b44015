"""ControlNets give diffusers' images: one and two of them, with scales, a part of the steps, and guess mode."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from integration.reference import Array, assert_same_picture, decoded_by, ours, psnr
from single_files import controlnet_tensors

from sdruntime.bundle.manifest import load_manifest
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.request import Request
from sdruntime.verification.inputs import patches

pytestmark = pytest.mark.filterwarnings("ignore:control. the image of 96x64 is stretched")
PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a red circle", "green", 5, 6, 4.0
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
# controls as (net, scale, start, end), guess mode, guidance
CASES: dict[str, tuple[tuple[tuple[str, float, float, float], ...], bool, float]] = {
    "one": ((("canny", 1.0, 0.0, 1.0),), False, GUIDANCE),
    "scaled, in a part of the steps": ((("canny", 0.7, 0.2, 0.7),), False, GUIDANCE),
    "without guidance": ((("pose", 0.9, 0.0, 1.0),), False, 1.0),
    "guess mode": ((("canny", 0.8, 0.0, 1.0),), True, GUIDANCE),
    "two": ((("canny", 0.6, 0.0, 0.8), ("pose", 0.9, 0.3, 1.0)), False, GUIDANCE),
    "two in guess mode": ((("canny", 0.6, 0.0, 1.0), ("pose", 0.9, 0.0, 0.6)), True, GUIDANCE),
}
SHORT = ("two", "guess mode")  # with all samplers; the others in `make test-full`


@pytest.fixture(scope="module")
def pipe(sd1_control_bundle: Path, ready: Callable[[Path], Path]) -> Iterator[Pipeline]:
    with Pipeline.open(ready(sd1_control_bundle)) as opened:
        yield opened


def image_of(net: str) -> Array:
    """A control image, of another size than that of the model."""
    return patches({"canny": (96, 64), "pose": (64, 64)}[net], len(net))


def controls(case: str) -> tuple[Control, ...]:
    return tuple(
        Control(image=image_of(net), net=net, scale=scale, start=start, end=end) for net, scale, start, end in CASES[case][0]
    )


def request_for(case: str, sampler: str, **settings: Any) -> Request:
    _, guess, guidance = CASES[case]
    negative = NEGATIVE if guidance > 1 else None
    basic: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": guidance, "negative": negative, "sampler": sampler}
    basic |= {"control": controls(case), "guess_mode": guess}
    return Request(prompt=PROMPT, **(basic | settings))


def theirs(
    checkpoint: Path, nets: Path, case: str, sampler: str, *, size: tuple[int, int] = (64, 64), xl: bool = False
) -> tuple[Array, Array]:
    """(uint8 [H, W, 3], float32 [3, H, W]) of diffusers."""
    import diffusers
    import torch
    from PIL import Image

    used, guess, guidance = CASES[case]
    torch.set_num_threads(1)
    models = [diffusers.ControlNetModel.from_pretrained(nets / net, low_cpu_mem_usage=False) for net, *_ in used]
    several = len(models) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
        reference = kind.from_pretrained(str(checkpoint), controlnet=models if several else models[0], torch_dtype=torch.float32)
        reference.set_progress_bar_config(disable=True)
        named, changes = SAMPLERS[sampler]
        reference.scheduler = getattr(diffusers, named).from_config(reference.scheduler.config, **changes)
        images, scales, starts, ends = (
            list(column) for column in zip(*((image_of(net), *rest) for net, *rest in used), strict=True)
        )
        images = [Image.fromarray(image) for image in images]
        listed = (lambda values: values) if several else (lambda values: values[0])
        latents = reference(
            PROMPT,
            negative_prompt=NEGATIVE,
            image=listed(images),
            width=size[0],
            height=size[1],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            controlnet_conditioning_scale=listed(scales),
            control_guidance_start=starts,
            control_guidance_end=ends,
            guess_mode=guess,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).images
        return decoded_by(reference, latents)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("case", [case if case in SHORT else pytest.param(case, marks=pytest.mark.full) for case in CASES])
def test_the_image_is_diffusers(pipe: Pipeline, sd1_checkpoint: Path, sd1_controlnets: Path, case: str, sampler: str) -> None:
    picture, decoded = ours(pipe, request_for(case, sampler))
    plain, _ = ours(pipe, request_for(case, sampler, control=(), guess_mode=False))
    assert np.abs(picture.astype(int) - plain).max() > 10
    expected, expected_decoded = theirs(sd1_checkpoint, sd1_controlnets, case, sampler)
    assert_same_picture(picture, expected, decoded, expected_decoded)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:control. the image")
@pytest.mark.parametrize("kind", ["sdxl"])
def test_other_families_and_kinds_of_nets(
    kind: tiny.Kind,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    export: Callable[..., Path],
    ready: Callable[[Path], Path],
) -> None:
    """`canny` takes its channels in the order BGR, and the residuals of `pose` are means over the image."""
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    tiny.write_controlnet(tmp_path / "canny", checkpoint, controlnet_conditioning_channel_order="bgr")
    tiny.write_controlnet(tmp_path / "pose", checkpoint, seed=12, global_pool_conditions=True)
    bundle = export(checkpoint, controlnets={f"controlnet_{net}": str(tmp_path / net) for net in ("canny", "pose")})
    with Pipeline.open(ready(bundle)) as pipe:
        height, width = pipe.model.default_size
        for case in ("one", "without guidance"):
            picture, decoded = ours(pipe, request_for(case, "ddim"))
            plain, _ = ours(pipe, request_for(case, "ddim", control=()))
            assert np.abs(picture.astype(int) - plain).max() > 10
            expected = theirs(checkpoint, tmp_path, case, "ddim", size=(width, height), xl=kind == "sdxl")
            assert_same_picture(picture, expected[0], decoded, expected[1])


@pytest.mark.full
def test_a_single_file_gives_the_component_of_its_folder(
    pipe: Pipeline, sd1_checkpoint: Path, sd1_controlnets: Path, tmp_path: Path, export: Callable[..., Path]
) -> None:
    from safetensors.torch import save_file

    tensors = {f"control_model.{name}": tensor for name, tensor in controlnet_tensors(sd1_controlnets / "canny").items()}
    save_file(tensors, tmp_path / "canny.safetensors")
    manifest = load_manifest(export(sd1_checkpoint, controlnets={"controlnet_canny": str(tmp_path / "canny.safetensors")}))
    of_folder, of_file = (
        [each.files[path] for path in each.components["controlnet_canny"].files] for each in (pipe.bundle.manifest, manifest)
    )
    assert of_file == of_folder
    assert len(of_file) == 2


def test_a_mixed_batch_gives_the_images_that_each_gives_alone(pipe: Pipeline) -> None:
    cases = {"two": {}, "guess mode": {"seed": 8}, "one": {"control": (), "seed": 6}, "without guidance": {"seed": 7}}
    requests = [request_for(case, "ddim", **settings) for case, settings in cases.items()]
    together = pipe(requests).images
    for request, image in zip(requests, together, strict=True):
        alone = pipe(request).images[0]
        assert np.abs(alone.pixels.astype(int) - image.pixels).max() <= 1


def test_an_absent_control_is_bit_equal_to_the_bundle_without(
    pipe: Pipeline, sd1_bundle: Path, ready: Callable[[Path], Path]
) -> None:
    request = request_for("one", "ddim", control=())
    with Pipeline.open(ready(sd1_bundle)) as plain:
        _, decoded = ours(plain, request)
    _, controlled = ours(pipe, request)
    assert np.array_equal(decoded, controlled)


@pytest.mark.full
def test_openvino_gives_the_same_image(pipe: Pipeline, sd1_control_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle = shutil.copytree(sd1_control_bundle, tmp_path / "bundle")
    for _ in build_engines(bundle, BuildRequest(backend="openvino", size="64x64", batch="1")):
        pass
    with Pipeline.open(bundle, backend="openvino") as other:
        for settings in ({}, {"control": ()}):
            request = request_for("two", "ddim", **settings)
            assert psnr(ours(pipe, request)[1], ours(other, request)[1]) > 90


def test_the_net_must_be_one_of_the_bundle_s(pipe: Pipeline) -> None:
    image = image_of("canny")
    with pytest.raises(SettingError, match=r"which ControlNet\? Give its name as net .*canny, pose"):
        pipe(PROMPT, control=Control(image=image))
    with pytest.raises(UnknownName, match="canny"):
        pipe(PROMPT, control=Control(image=image, net="cany"))


def test_a_bundle_without_a_controlnet_says_how_to_add_one(sd1_bundle: Path, ready: Callable[[Path], Path]) -> None:
    with (
        Pipeline.open(ready(sd1_bundle)) as plain,
        pytest.raises(SettingError, match="no ControlNet and no T2I-Adapter: export it again with --controlnet"),
    ):
        plain(PROMPT, control=Control(image=image_of("canny")))
