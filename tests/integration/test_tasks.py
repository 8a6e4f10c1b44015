"""Inpainting and editing give diffusers' images, with UNets made for them and with plain ones."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from integration.reference import Array, assert_same_picture, ours, psnr
from once import once

from sdruntime.errors import SettingError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.verification.inputs import patches

ROWS = (  # UNet's task, kind of checkpoint, diffusers' pipeline
    ("inpainting", "sd1", "StableDiffusionInpaintPipeline"),
    ("", "sd1", "StableDiffusionInpaintPipeline"),
    ("instruct_pix2pix", "sd1", "StableDiffusionInstructPix2PixPipeline"),
    ("refining", "sdxl", "StableDiffusionXLImg2ImgPipeline"),
)
MORE_ROWS = (  # in `make test-full`
    ("depth", "sd1", "StableDiffusionDepth2ImgPipeline"),
    ("upscaling", "sd2_v", "StableDiffusionUpscalePipeline"),
    ("inpainting", "sdxl", "StableDiffusionXLInpaintPipeline"),
    ("", "sd2_v", "StableDiffusionInpaintPipeline"),
    ("", "sdxl", "StableDiffusionXLInpaintPipeline"),
    ("instruct_pix2pix", "sdxl", "StableDiffusionXLInstructPix2PixPipeline"),
)
DISTILLED = ("lcm", "sd1", "LatentConsistencyModelPipeline")
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
SHORT = (("ddim", 1.0), ("euler_a", 0.6), ("heun", 0.6))  # the others in `make test-full`
# components that the pipelines are given, though a depth map replaces them
UNUSED: dict[str, dict[str, Any]] = {"depth": {"depth_estimator": None, "feature_extractor": None}}
VERIFIED_APART = ("refining", "depth", "upscaling")  # tasks whose reference images are made in `make test-full`
WHOLE = ("instruct_pix2pix", "refining", "depth", "upscaling")  # tasks of the whole image
LONG = "a red circle BREAK green BREAK a cat"  # three chunks
PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a red circle", "green", 5, 6, 4.0


@pytest.fixture(
    scope="module",
    params=[*ROWS, *(pytest.param(row, marks=pytest.mark.full) for row in MORE_ROWS)],
    ids=lambda row: f"{row[0] or 'plain'}-{row[1]}",
)
def both(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    exported_once: Callable[..., Path],
    ready: Callable[[Path], Path],
) -> Iterator[tuple[Any, Pipeline]]:
    import diffusers
    import torch

    task, kind, named = request.param
    torch.set_num_threads(1)
    if task:
        checkpoint = task_checkpoint(tmp_path_factory, kind, task)
        # with reference images: the build compares with diffusers too, at full strength
        bundle = exported_once(checkpoint, **({} if task in VERIFIED_APART else {"verify": True}))
    else:
        checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
        bundle = request.getfixturevalue(f"{kind}_bundle")
    with warnings.catch_warnings(), Pipeline.open(ready(bundle)) as pipe:
        warnings.simplefilter("ignore")
        reference = getattr(diffusers, named).from_pretrained(str(checkpoint), torch_dtype=torch.float32, **UNUSED.get(task, {}))
        reference.set_progress_bar_config(disable=True)
        yield reference, pipe


def task_checkpoint(factory: pytest.TempPathFactory, kind: tiny.Kind, task: str) -> Path:
    write = lambda folder: tiny.write_task_checkpoint(folder, kind, task)  # noqa: E731
    return once(factory, f"checkpoints/tiny-{task}-{kind}", write)


def inputs(pipe: Pipeline) -> tuple[Array, Array]:
    """An image and a soft mask at the model's size."""
    height, width = (side // (pipe.model.vae_factor if pipe.task == "upscaling" else 1) for side in pipe.model.default_size)
    image = patches((width, height), 3)
    rows, columns = np.mgrid[:height, :width]
    mask = np.clip(255 * (columns + 0.5 * rows) / width, 0, 255).astype(np.uint8)
    return image, mask


def depth(pipe: Pipeline) -> dict[str, Array]:
    """A depth map of another size and scale, for a model that takes one."""
    return {"depth": np.random.default_rng(4).normal(3, 20, (29, 43)).astype(np.float32)} if pipe.task == "depth" else {}


def theirs(reference: Any, pipe: Pipeline, sampler: str, **settings: Any) -> tuple[Array, Array]:
    """(uint8 [H, W, 3], float32 [3, H, W]) of diffusers."""
    import diffusers
    import torch
    from PIL import Image

    image, mask = inputs(pipe)
    named, changes = SAMPLERS[sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.scheduler = getattr(diffusers, named).from_config(reference.scheduler.config, **changes)
    arguments: dict[str, Any] = {"image": Image.fromarray(image), "mask_image": Image.fromarray(mask)}
    if pipe.task == "depth":
        arguments["depth_map"] = torch.from_numpy(depth(pipe)["depth"])[None]
    arguments |= {"negative_prompt": NEGATIVE, "height": image.shape[0], "width": image.shape[1], "strength": 1.0}
    known = inspect.signature(reference.__call__).parameters
    arguments = {name: value for name, value in (arguments | settings).items() if name in known}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        latents = reference(
            PROMPT,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            **arguments,
        ).images
        decoded = reference.vae.decode(latents / reference.vae.config.scaling_factor, return_dict=False)[0]
    picture = reference.image_processor.postprocess(decoded, output_type="np")[0]
    return (picture * 255).round().astype(np.uint8), decoded[0].numpy()


def ours_request(pipe: Pipeline, sampler: str, **settings: Any) -> Request:
    image, mask = inputs(pipe)
    given: dict[str, Any] = {"image": image, **depth(pipe)} if pipe.task in WHOLE else {"image": image, "mask": mask}
    if pipe.task == "upscaling":
        settings.pop("strength", None)  # it starts from noise
    options = {"skip_prk_steps": True} if sampler == "pndm" else {}  # as SAMPLERS has it for diffusers
    common: dict[str, Any] = {"prompt": PROMPT, "negative": NEGATIVE, "seed": SEED, "steps": STEPS, "options": options}
    return Request(sampler=sampler, **common, **given, **settings)


@pytest.mark.parametrize(
    ("sampler", "strength"),
    [pytest.param(*pair, marks=() if pair in SHORT else pytest.mark.full) for pair in itertools.product(SAMPLERS, (1.0, 0.6))],
)
def test_images_are_those_of_diffusers(both: tuple[Any, Pipeline], sampler: str, strength: float) -> None:
    reference, pipe = both
    if pipe.task in ("instruct_pix2pix", "upscaling") and strength < 1:
        pytest.skip("starts from noise, whatever the strength")
    picture, decoded = ours(pipe, ours_request(pipe, sampler, strength=strength, guidance=GUIDANCE))
    expected, expected_float = theirs(reference, pipe, sampler, strength=strength, guidance_scale=GUIDANCE)
    assert_same_picture(picture, expected, decoded, expected_float)


def test_a_mixed_batch_gives_the_images_that_each_gives_alone(both: tuple[Any, Pipeline]) -> None:
    _, pipe = both
    image, mask = inputs(pipe)
    common: dict[str, Any] = {"prompt": PROMPT, "steps": 3, "sampler": "ddim"}
    requests = [
        ours_request(pipe, "euler_a", strength=0.6, guidance=GUIDANCE),
        dataclasses.replace(ours_request(pipe, "heun", strength=1.0), guidance=1.0, negative=None),
        Request(**common, seed=2, image=image, **depth(pipe)),
        Request(**common | {"prompt": LONG}, seed=6, image=image, prompt_syntax="a1111", **depth(pipe)),
    ]
    if pipe.task in (None, "inpainting"):
        requests.append(Request(**common, seed=7, image=image, mask=mask, mask_padding=4, mask_fill="noise"))
    if pipe.task == "refining":
        requests.append(Request(**common, seed=3, image=image, mask=mask, aesthetic_score=9))
    if pipe.task is None:
        requests += [Request(**common, seed=3), Request(**common, seed=4, image=image, mask=255 - mask)]
        requests.append(Request(**common, seed=8, hires=2))
    together = pipe(requests)
    for request, picture in zip(requests, together.images, strict=True):
        assert psnr(picture.pixels, pipe(request).images[0].pixels) >= 80, request  # a call of more rows may round differently


def test_inpainting_keeps_what_the_mask_does_not_cover(both: tuple[Any, Pipeline]) -> None:
    """The kept latents are those of the image exactly; of a UNet that takes a mask only this is known: the mask matters."""
    _, pipe = both
    if pipe.task in WHOLE:
        pytest.skip("has no mask")
    image, mask = inputs(pipe)
    stream = pipe.stream(ours_request(pipe, "ddim"))
    for _ in stream:
        pass
    latents = stream.jobs[0].run.x
    same: dict[str, Any] = {"prompt": PROMPT, "negative": NEGATIVE, "seed": SEED, "steps": STEPS, "sampler": "ddim"}
    other = pipe.stream(Request(**same, image=image, mask=255 - mask))
    for _ in other:
        pass
    assert not np.array_equal(latents, other.jobs[0].run.x)
    if pipe.task is None:
        kept = stream.jobs[0].kept
        assert kept is not None
        outside = np.broadcast_to(kept.mask == 0, latents.shape)
        assert 0.2 < outside.mean() < 0.8
        assert np.array_equal(latents[outside], kept.image[outside])


PARTS = ((16, 24, 40, 60), (60, 3, 100, 20), (1, 70, 14, 79))  # of a 144x80 image: inside, at the top, in a corner


@pytest.mark.parametrize("part", [PARTS[0], *(pytest.param(part, marks=pytest.mark.full) for part in PARTS[1:])])
def test_only_the_masked_part_is_generated_as_diffusers_does(both: tuple[Any, Pipeline], part: tuple[int, ...]) -> None:
    """padding_mask_crop: the same crop, and the same paste, with a blurred mask too."""
    import diffusers
    import torch
    from PIL import Image

    from sdruntime.pipeline.images.blur import gaussian

    reference, pipe = both
    if pipe.task in WHOLE:
        pytest.skip("has no mask")
    height, width = pipe.model.default_size
    image, mask = patches((144, 80), 5), np.zeros((80, 144), np.uint8)
    mask[part[1] : part[3], part[0] : part[2]] = 255
    reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config, clip_sample=False)
    [expected] = reference(
        PROMPT,
        image=Image.fromarray(image),
        mask_image=Image.fromarray(gaussian(mask, 2)),
        padding_mask_crop=8,
        height=height,
        width=width,
        strength=0.6,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
    ).images
    common: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "sampler": "ddim", "strength": 0.6}
    [found] = pipe(PROMPT, image=image, mask=mask, mask_blur=2, mask_padding=8, **common).pixels
    assert found.shape == image.shape
    assert psnr(found, np.asarray(expected)) >= 60
    assert np.array_equal(found[gaussian(mask, 2) == 0], image[gaussian(mask, 2) == 0])
    assert not np.array_equal(found[mask == 255], image[mask == 255])


def test_an_overlay_is_that_of_diffusers(both: tuple[Any, Pipeline]) -> None:
    from PIL import Image

    reference, pipe = both
    if pipe.task in WHOLE:
        pytest.skip("has no mask")
    image, mask = inputs(pipe)
    plain, laid = (pipe(dataclasses.replace(ours_request(pipe, "ddim"), overlay=over)).pixels[0] for over in (False, True))
    parts = (Image.fromarray(array) for array in (mask, image, plain))
    assert np.array_equal(laid, np.asarray(reference.image_processor.apply_overlay(*parts)))
    assert np.array_equal(laid[mask == 0], image[mask == 0])
    assert not np.array_equal(plain[mask == 0], image[mask == 0]), "the VAE changes what the latents keep"


def test_what_the_masked_part_starts_from(both: tuple[Any, Pipeline]) -> None:
    """The latents of the start, from those of the original: x = a·image + b·noise."""
    _, pipe = both
    if pipe.task in WHOLE:
        pytest.skip("has no mask")
    starts = {}
    for fill in ("original", "fill", "noise", "zeros"):
        [job] = pipe.jobs([dataclasses.replace(ours_request(pipe, "ddim", strength=0.6), mask_fill=fill)])
        starts[fill] = job.run.x.copy()
    a, b = job.run.table.start
    mask = (job.rows[0]["mask"] if job.kept is None else job.kept.mask)[0] > 0
    noise = starts["zeros"] / b
    np.testing.assert_allclose(starts["noise"][:, mask], (a + b) * noise[:, mask], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(starts["zeros"][:, ~mask], starts["noise"][:, ~mask], rtol=1e-5, atol=1e-6)
    assert np.abs(starts["fill"] - starts["original"])[:, mask].mean() > 0.01
    image = starts["original"][:, mask] / a - b / a * noise[:, mask]
    assert np.abs(image).max() > 0.1


def test_a_mask_and_an_extension_of_the_same_area_are_the_same(both: tuple[Any, Pipeline]) -> None:
    _, pipe = both
    if pipe.task in ("instruct_pix2pix", "depth"):
        with pytest.raises(SettingError, match="extend: this model edits whole images"):
            pipe("make it red", image=inputs(pipe)[0], extend=(0, 0, 64, 0), **depth(pipe))
        return
    image, mask = inputs(pipe)
    height, width = mask.shape
    part, hole = image[:, : width // 2], mask[:, : width // 2]
    whole = np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), mode="edge")
    common: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "steps": 3, "sampler": "ddim", "strength": 0.8}
    extended = [
        Request(**common, image=part, extend=(0, 0, width - part.shape[1], 0)),
        Request(**common, image=part, mask=hole, extend=(0, 0, width - part.shape[1], 0)),
    ]
    padded = [np.pad(gray, ((0, 0), (0, width - part.shape[1])), constant_values=255) for gray in (0 * hole, hole)]
    masked = [Request(**common, image=whole, mask=gray) for gray in padded]
    for one, other in zip(extended, masked, strict=True):
        assert np.array_equal(pipe(one).pixels[0], pipe(other).pixels[0])
        assert pipe.image_size(one) == (width, height)


@pytest.mark.parametrize("resize", ["latent", "lanczos"])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun", pytest.param("dpmpp_2m", marks=pytest.mark.full)])
def test_a_second_pass_is_image_to_image_of_diffusers(both: tuple[Any, Pipeline], sampler: str, resize: Any) -> None:
    """Of our first pass: of its latents, resized by torch, or of its image, resized by Pillow."""
    import diffusers
    import torch
    from PIL import Image

    reference, pipe = both
    if pipe.task is not None:
        with pytest.raises(SettingError, match=r"hires: this model is for .*, which has one pass: omit hires"):
            pipe(dataclasses.replace(ours_request(pipe, sampler), mask=None, hires=2))
        return
    kind = "StableDiffusionXL" if "XL" in type(reference).__name__ else "StableDiffusion"
    from_image = getattr(diffusers, f"{kind}Img2ImgPipeline")(
        **{name: part for name, part in reference.components.items() if name not in ("mask_processor",)}
    )
    from_image.set_progress_bar_config(disable=True)
    named, changes = SAMPLERS[sampler]
    common: dict[str, Any] = {"negative": NEGATIVE, "seed": SEED, "steps": 4, "guidance": GUIDANCE, "sampler": sampler}
    first = pipe.stream(PROMPT, **common)
    for _ in first:
        pass
    height, width = (2 * side for side in pipe.model.default_size)
    if resize == "latent":
        latents, factor = torch.from_numpy(first.jobs[0].run.x)[None], pipe.model.vae_factor
        start = torch.nn.functional.interpolate(latents, size=(height // factor, width // factor), mode="bilinear")
    else:
        start = Image.fromarray(first.result.pixels[0]).resize((width, height), Image.Resampling.LANCZOS)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        from_image.scheduler = getattr(diffusers, named).from_config(reference.scheduler.config, **changes)
        generator = torch.Generator().manual_seed(SEED)
        settings: dict[str, Any] = {"strength": 0.7, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        latents = from_image(
            PROMPT, image=start, negative_prompt=NEGATIVE, generator=generator, output_type="latent", **settings
        ).images
        decoded = reference.vae.decode(latents / reference.vae.config.scaling_factor, return_dict=False)[0]
    expected = (reference.image_processor.postprocess(decoded, output_type="np")[0] * 255).round().astype(np.uint8)
    request = Request(prompt=PROMPT, **common, hires=2, hires_steps=STEPS, hires_resize=resize)
    picture, found = ours(pipe, request)
    assert_same_picture(picture, expected, found, decoded[0].numpy())


def test_an_inpainting_model_generates_whole_images_too(both: tuple[Any, Pipeline]) -> None:
    """As diffusers does with a mask that covers everything."""
    _, pipe = both
    if pipe.task != "inpainting":
        pytest.skip("of inpainting models")
    height, width = pipe.model.default_size
    everything: dict[str, Any] = {"image": np.full((height, width, 3), 9, np.uint8), "mask": np.ones((height, width), bool)}
    masked = pipe(PROMPT, seed=1, steps=3, strength=1.0, **everything)
    assert np.array_equal(pipe(PROMPT, seed=1, steps=3).pixels, masked.pixels)


def test_a_request_that_does_not_fit_the_model_is_refused(both: tuple[Any, Pipeline]) -> None:
    _, pipe = both
    image, mask = inputs(pipe)
    if pipe.task == "depth":
        with pytest.raises(SettingError, match=r"this model changes an image and follows its depth: pass image=… and depth=… "):
            pipe("a red circle", image=image)
        with pytest.raises(SettingError, match="depth: it is 7 everywhere: the model needs near and far"):
            pipe("a red circle", image=image, depth=np.full((4, 4), 7))
        return
    with pytest.raises(SettingError, match="depth: only models made for it take a depth map"):
        pipe("a red circle", image=image, depth=mask)
    if pipe.task == "upscaling":
        with pytest.raises(SettingError, match=r"this model enlarges an image: pass one as image=… \(--image\)"):
            pipe("a red circle")
        with pytest.raises(SettingError, match="mask: this model enlarges whole images"):
            pipe("a red circle", image=image, mask=mask)
    if pipe.task != "instruct_pix2pix":
        return
    with pytest.raises(SettingError, match=r"this model edits an image: pass one as image=… \(--image\)"):
        pipe("make it red")
    with pytest.raises(SettingError, match="mask: this model edits whole images"):
        pipe("make it red", image=image, mask=mask)


@pytest.mark.full
@pytest.mark.parametrize("task", VERIFIED_APART)
def test_a_build_compares_with_diffusers(
    task: str, tmp_path_factory: pytest.TempPathFactory, exported_once: Callable[..., Path]
) -> None:
    checkpoint = task_checkpoint(tmp_path_factory, tiny.ONE_KIND.get(task, "sd1"), task)
    assert (exported_once(checkpoint, verify=True) / "golden" / "numbers.npz").exists()


def test_the_refiner_follows_its_score_and_sizes(both: tuple[Any, Pipeline]) -> None:
    """diffusers' negative row takes the corner (0, 0), whatever the crop."""
    reference, pipe = both
    if pipe.task != "refining":
        with pytest.raises(SettingError, match="aesthetic_score: only SDXL's refiner takes it: omit it"):
            pipe(dataclasses.replace(ours_request(pipe, "ddim"), aesthetic_score=7.0))
        return
    plain = ours_request(pipe, "euler", strength=0.6, guidance=GUIDANCE)
    said: dict[str, Any] = {"original_size": (100, 70), "crop": (30, 20), "aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}
    sizes = {
        "original_size": (70, 100),
        "crops_coords_top_left": (20, 30),
        "aesthetic_score": 9.0,
        "negative_aesthetic_score": 1.0,
    }
    picture, decoded = ours(pipe, dataclasses.replace(plain, **said))
    expected, expected_float = theirs(reference, pipe, "euler", strength=0.6, guidance_scale=GUIDANCE, **sizes)
    assert_same_picture(picture, expected, decoded, expected_float)
    for name, value in said.items():
        assert not np.array_equal(pipe(plain).pixels, pipe(dataclasses.replace(plain, **{name: value})).pixels), name
    image = pipe(dataclasses.replace(plain, aesthetic_score=9)).images[0]
    assert ", Aesthetic score: 9, Negative aesthetic score: 2.5, " in image.text()["parameters"]
    with pytest.raises(SettingError, match=r"target_size: .* \(SDXL's refiner takes aesthetic_score instead\)"):
        pipe(dataclasses.replace(plain, target_size=(16, 16)))
    with pytest.raises(SettingError, match=r"this model refines an image: pass one as image=… \(--image\)"):
        pipe("a red circle")


@pytest.mark.full
def test_a_latent_consistency_model_takes_the_guidance_as_an_input(
    tmp_path_factory: pytest.TempPathFactory, exported_once: Callable[..., Path], ready: Callable[[Path], Path]
) -> None:
    import diffusers
    import torch

    task, kind, named = DISTILLED
    checkpoint = task_checkpoint(tmp_path_factory, kind, task)
    with warnings.catch_warnings(), Pipeline.open(ready(exported_once(checkpoint, verify=True))) as pipe:
        warnings.simplefilter("ignore")
        reference = getattr(diffusers, named).from_pretrained(str(checkpoint), torch_dtype=torch.float32)
        reference.set_progress_bar_config(disable=True)
        images = []
        for guidance in (1.0, 8.5):
            generator = torch.Generator().manual_seed(SEED)
            settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "np"}
            [theirs] = reference(PROMPT, generator=generator, **settings).images
            stream = pipe.stream(PROMPT, seed=SEED, steps=4, guidance=guidance)
            assert [len(job.rows) for job in stream.jobs] == [1]
            for _ in stream:
                pass
            images.append(stream.result.images[0].pixels)
            assert psnr(images[-1], (theirs * 255).round().astype(np.uint8)) >= 60
        assert not np.array_equal(*images)
        assert str(pipe.model.defaults) == "steps 4, guidance 8.5"  # those of diffusers' pipeline for it
        np.testing.assert_array_equal(pipe(PROMPT, seed=SEED).images[0].pixels, images[-1])
        with pytest.raises(SettingError, match="guidance: this model takes one guidance as an input: pass a number, not a list"):
            pipe(PROMPT, steps=2, guidance=[2.0, 3.0])
        with pytest.warns(UserWarning, match="the negative prompt has no effect: the model takes the guidance as an input"):
            pipe(PROMPT, negative="green", steps=1, guidance=2.0)
