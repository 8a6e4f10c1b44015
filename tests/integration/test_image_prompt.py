"""Image prompts give diffusers' images: IP-Adapters of each kind, one and two images, with scales."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_image_prompt
from integration.reference import Array, assert_same_picture, decoded_by, ours, psnr

from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import SettingError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.image_prompt import ImagePrompt
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.tasks.image_prompt import clip_pixels
from sdruntime.verification.inputs import patches

PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a red circle", "green", 5, 5, 4.0
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
MASKED = "two, masked"
# images, scale, guidance
CASES: dict[str, tuple[int, float, float]] = {
    "one": (1, 1.0, GUIDANCE),
    "two, scaled": (2, 0.6, GUIDANCE),
    "three, without guidance": (3, 0.8, 1.0),
    MASKED: (2, 0.9, GUIDANCE),
}
SIZES = ((96, 64), (40, 64), (32, 32))
CONTROL = patches((64, 64), 4)


@pytest.fixture(scope="module")
def pipe(sd1_image_prompt_bundle: Path, ready: Callable[[Path], Path]) -> Iterator[Pipeline]:
    with Pipeline.open(ready(sd1_image_prompt_bundle)) as opened:
        yield opened


def images(count: int) -> list[Array]:
    """Images of several sizes, none that of the image encoder's."""
    return [patches(SIZES[k], 30 + k) for k in range(count)]


def masks(count: int) -> list[Array]:
    """A mask for each image, of several sizes: they overlap, leave a part to the text alone, and have shades of gray."""
    drawn = [np.zeros((60, 90), np.uint8), np.zeros((32, 48), np.uint8), np.zeros((64, 64), np.uint8)]
    drawn[0][:40, :50] = 255
    drawn[1][12:, 20:] = np.linspace(0, 255, 28, dtype=np.uint8)
    drawn[2][:, 30:] = 200
    return drawn[:count]


def masked(count: int, scale: float = 0.9) -> ImagePrompt:
    return ImagePrompt(image=images(count), mask=masks(count), scale=scale)


def request_for(case: str, sampler: str = "ddim", **settings: Any) -> Request:
    count, scale, guidance = CASES[case]
    negative = NEGATIVE if guidance > 1 else None
    basic: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": guidance, "negative": negative, "sampler": sampler}
    image = masked(count, scale) if case == MASKED else ImagePrompt(image=images(count), scale=scale)
    return Request(prompt=PROMPT, **(basic | {"image_prompt": image} | settings))


def theirs(
    checkpoint: Path,
    adapter: Path,
    case: str,
    sampler: str,
    *,
    size: tuple[int, int] = (64, 64),
    xl: bool = False,
    controlnet: Path | None = None,
) -> tuple[Array, Array]:
    """(uint8 [H, W, 3], float32 [3, H, W]) of diffusers."""
    import diffusers
    import torch
    from PIL import Image
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    count, scale, guidance = CASES[case]
    torch.set_num_threads(1)
    side = tiny_image_prompt.SIDE
    encoder = CLIPVisionModelWithProjection.from_pretrained(adapter.parent / "image_encoder")
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
        parts: dict[str, Any] = {"image_encoder": encoder, "feature_extractor": processor}
        control: dict[str, Any] = {}
        if controlnet is not None:
            kind = diffusers.StableDiffusionControlNetPipeline
            parts["controlnet"] = diffusers.ControlNetModel.from_pretrained(controlnet, low_cpu_mem_usage=False)
            control = {"image": Image.fromarray(CONTROL), "controlnet_conditioning_scale": 0.7}
        reference = kind.from_pretrained(str(checkpoint), **parts, torch_dtype=torch.float32)
        reference.set_progress_bar_config(disable=True)
        reference.load_ip_adapter(
            str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None, low_cpu_mem_usage=False
        )
        reference.set_ip_adapter_scale(scale)
        if case == MASKED:
            processor = diffusers.image_processor.IPAdapterMaskProcessor()
            tensors = processor.preprocess([Image.fromarray(mask) for mask in masks(count)], height=size[1], width=size[0])
            control["cross_attention_kwargs"] = {"ip_adapter_masks": [tensors.transpose(0, 1)]}
        named, changes = SAMPLERS[sampler]
        reference.scheduler = getattr(diffusers, named).from_config(reference.scheduler.config, **changes)
        latents = reference(
            PROMPT,
            negative_prompt=NEGATIVE,
            **control,
            ip_adapter_image=[[Image.fromarray(image) for image in images(count)]],
            width=size[0],
            height=size[1],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).images
        return decoded_by(reference, latents)


def compare(
    pipe: Pipeline,
    checkpoint: Path,
    adapter: Path,
    case: str,
    sampler: str,
    *,
    size: tuple[int, int] | None = None,
    xl: bool = False,
) -> None:
    width, height = size or pipe.model.default_size[::-1]
    picture, decoded = ours(pipe, request_for(case, sampler, size=size))
    plain, _ = ours(pipe, request_for(case, sampler, size=size, image_prompt=None))
    assert np.abs(picture.astype(int) - plain).max() > 10
    expected, expected_decoded = theirs(checkpoint, adapter, case, sampler, size=(width, height), xl=xl)
    assert_same_picture(picture, expected, decoded, expected_decoded)


@pytest.mark.parametrize(
    "sampler", ["ddim", *(pytest.param(name, marks=pytest.mark.full) for name in SAMPLERS if name != "ddim")]
)
@pytest.mark.parametrize(
    "case", ["two, scaled", *(pytest.param(name, marks=pytest.mark.full) for name in CASES if name[:3] != "two")]
)
def test_the_image_is_diffusers(pipe: Pipeline, sd1_checkpoint: Path, sd1_ip_adapters: Path, case: str, sampler: str) -> None:
    compare(pipe, sd1_checkpoint, sd1_ip_adapters / "plain" / "adapter.safetensors", case, sampler)


@pytest.mark.parametrize("size", [(96, 64), pytest.param((64, 112), marks=pytest.mark.full)])
def test_masks_are_those_of_diffusers(pipe: Pipeline, sd1_checkpoint: Path, sd1_ip_adapters: Path, size: tuple[int, int]) -> None:
    adapter = sd1_ip_adapters / "plain" / "adapter.safetensors"
    compare(pipe, sd1_checkpoint, adapter, MASKED, "ddim", size=size)
    everywhere, together = (
        ours(pipe, request_for(MASKED, size=size, image_prompt=ImagePrompt(image=images(2), scale=0.9, mask=mask)))[1]
        for mask in ([np.full((8, 8), 255, np.uint8)] * 2, None)
    )
    assert psnr(everywhere, together) < 40  # each image has an attention of its own


@pytest.mark.parametrize("settings", [{}, {"hires": 1.5}, {"size": (88, 72), "hires": 2.0}])
def test_the_mask_of_one_image_everywhere_changes_nothing_and_nowhere_all(pipe: Pipeline, settings: dict[str, Any]) -> None:
    """Also in a second pass, and at sizes that the UNet's layers round up."""
    one, without = request_for("one", **settings), request_for("one", image_prompt=None, **settings)
    white, black = (
        request_for("one", image_prompt=ImagePrompt(image=images(1), mask=np.full((5, 9), value, np.uint8)), **settings)
        for value in (255, 0)
    )
    assert psnr(ours(pipe, white)[1], ours(pipe, one)[1]) > 100
    assert psnr(ours(pipe, black)[1], ours(pipe, without)[1]) > 100


@pytest.mark.full
@pytest.mark.parametrize("kind", ["plus", "full"])
def test_other_kinds_of_adapters(
    kind: tiny_image_prompt.AdapterKind,
    sd1_checkpoint: Path,
    sd1_ip_adapters: Path,
    export: Callable[..., Path],
    ready: Callable[[Path], Path],
) -> None:
    adapter = sd1_ip_adapters / kind / "adapter.safetensors"
    with Pipeline.open(ready(export(sd1_checkpoint, ip_adapter=str(adapter)))) as pipe:
        for sampler in SAMPLERS:
            for case in CASES:
                compare(pipe, sd1_checkpoint, adapter, case, sampler)


@pytest.mark.full
def test_xl(sdxl_checkpoint: Path, tmp_path: Path, export: Callable[..., Path], ready: Callable[[Path], Path]) -> None:
    adapter = tiny_image_prompt.write_ip_adapter(tmp_path, sdxl_checkpoint)
    with Pipeline.open(ready(export(sdxl_checkpoint, ip_adapter=str(adapter)))) as pipe:
        for sampler in SAMPLERS:
            for case in ("two, scaled", MASKED):
                compare(pipe, sdxl_checkpoint, adapter, case, sampler, xl=True)


@pytest.mark.full
def test_half_precision_is_audited_with_image_prompts(
    sd1_checkpoint: Path, sd1_ip_adapters: Path, export: Callable[..., Path], ready: Callable[[Path], Path]
) -> None:
    adapter = sd1_ip_adapters / "plus" / "adapter.safetensors"
    with Pipeline.open(ready(export(sd1_checkpoint, precision="fp16", ip_adapter=str(adapter)))) as pipe:
        _, decoded = ours(pipe, request_for("two, scaled"))
    assert psnr(decoded, theirs(sd1_checkpoint, adapter, "two, scaled", "ddim")[1]) > 50


@pytest.mark.full
def test_beside_a_controlnet(
    sd1_checkpoint: Path, sd1_ip_adapters: Path, sd1_controlnets: Path, export: Callable[..., Path], ready: Callable[[Path], Path]
) -> None:
    """The build checks the UNet with all of its optional inputs against PyTorch."""
    adapter, net = sd1_ip_adapters / "plain" / "adapter.safetensors", sd1_controlnets / "canny"
    bundle = export(sd1_checkpoint, ip_adapter=str(adapter), controlnets={"controlnet": str(net)}, verify=True)
    with Pipeline.open(ready(bundle)) as pipe:
        for case in ("one", "two, scaled"):
            steered = request_for(case, control=Control(image=CONTROL, scale=0.7))
            picture, decoded = ours(pipe, steered)
            expected, expected_decoded = theirs(sd1_checkpoint, adapter, case, "ddim", controlnet=net)
            assert_same_picture(picture, expected, decoded, expected_decoded)
            alone = ours(pipe, request_for(case))[1]
            controlled = ours(pipe, request_for(case, control=Control(image=CONTROL, scale=0.7), image_prompt=None))[1]
            for other in (alone, controlled):
                assert psnr(other, decoded) < 40


def test_a_mixed_batch_gives_the_images_that_each_gives_alone(pipe: Pipeline) -> None:
    cases: dict[str, dict[str, Any]] = {
        "two, scaled": {},
        "one": {"image_prompt": None, "seed": 6},
        "three, without guidance": {"seed": 7},
        MASKED: {"seed": 8},
    }
    requests = [request_for(case, **settings) for case, settings in cases.items()]
    together = pipe(requests).images
    for request, image in zip(requests, together, strict=True):
        alone = pipe(request).images[0]
        assert np.abs(alone.pixels.astype(int) - image.pixels).max() <= 1


@pytest.mark.filterwarnings("ignore:image_prompt has no effect at scale 0")
def test_without_an_image_prompt_and_at_scale_0_it_is_bit_equal_to_the_bundle_without_an_adapter(
    pipe: Pipeline, sd1_bundle: Path, ready: Callable[[Path], Path]
) -> None:
    absent = request_for("one", image_prompt=None)
    with Pipeline.open(ready(sd1_bundle)) as plain:
        _, expected = ours(plain, absent)
    for request in (absent, request_for("one", image_prompt=ImagePrompt(image=images(1), scale=0))):
        assert np.array_equal(ours(pipe, request)[1], expected)


def test_another_program_need_not_know_the_optional_inputs(sd1_image_prompt_bundle: Path, sd1_bundle: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    random, outputs = np.random.default_rng(0), []
    feeds = {
        "sample": random.standard_normal((3, 4, 6, 10)).astype(np.float32),
        "timestep": np.array([5, 400, 900], np.float32),
        "encoder_hidden_states": random.standard_normal((3, 77, 32)).astype(np.float32),
    }
    for bundle in (sd1_image_prompt_bundle, sd1_bundle):
        session = ort.InferenceSession(bundle / "unet" / "model.onnx", providers=["CPUExecutionProvider"])
        outputs += session.run(["out_sample"], feeds)
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_openvino_gives_the_same_image(pipe: Pipeline, sd1_image_prompt_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle = shutil.copytree(sd1_image_prompt_bundle, tmp_path / "bundle")
    for _ in build_engines(bundle, BuildRequest(backend="openvino", size="64x64", batch="1")):
        pass
    with Pipeline.open(bundle, backend="openvino") as other:
        for settings in ({}, {"image_prompt": None}):
            request = request_for("two, scaled", **settings)
            assert psnr(ours(pipe, request)[1], ours(other, request)[1]) > 90


@pytest.mark.parametrize(("size", "mean"), [((96, 64), 1e-6), ((32, 32), 1e-6), ((37, 91), 2e-3), ((20, 33), 2e-3)])
def test_an_image_is_prepared_as_by_transformers(size: tuple[int, int], mean: float) -> None:
    """Up to the rounding of Pillow 13, which resizes the columns of some images first."""
    processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="transformers 5")
    processor = processing.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = patches(size, 3)
    expected = processor(image, return_tensors="np").pixel_values[0]
    assert np.abs(clip_pixels(image, 32) - expected).mean() <= mean


def test_too_many_images_and_a_bundle_without_an_adapter_are_refused(
    pipe: Pipeline, sd1_bundle: Path, ready: Callable[[Path], Path]
) -> None:
    with pytest.raises(SettingError, match=r"image_prompt: got 5 images; this bundle's IP-Adapter takes at most 4"):
        pipe(PROMPT, image_prompt=ImagePrompt(image=images(1) * 5))
    with (
        Pipeline.open(ready(sd1_bundle)) as plain,
        pytest.raises(SettingError, match="no IP-Adapter: export it again with --ip-adapter FILE"),
    ):
        plain(PROMPT, image_prompt=ImagePrompt(image=images(1)))
