"""A checkpoint with unusual settings gives the image of diffusers' own pipeline, opened from the same folder."""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from generators import job_here
from integration.reference import psnr

import sdexport.build.export
import sdexport.trace.component
from sdruntime.errors import Unsupported
from sdruntime.pipeline.pipeline import Pipeline

SAMPLERS = {"ddim": "DDIMScheduler", "euler_a": "EulerAncestralDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
PROMPT, NEGATIVE = "a small red circle on the left on a blue background", "green"


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (document | changes).items() if value is not ...}))


def normed_latents(folder: Path) -> None:
    edit(folder / "vae" / "config.json", latents_mean=[-1.6, 1.1, 0.4, -0.9], latents_std=[8.4, 5.2, 3.6, 4.5], shift_factor=0.5)


def another_scheduler_and_old_settings(folder: Path) -> None:
    """The class is DDIM, of a file that PNDM wrote; what the pipelines change on opening; parts of other classes."""
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True, skip_prk_steps=...)
    edit(folder / "vae" / "config.json", _class_name="AutoencoderKLTuned", shift_factor=0.5)
    path = folder / "text_encoder" / "config.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({"architectures": ["CLIPModel"], "model_type": "clip", "text_config": text, "projection_dim": 32}))


def no_steps_offset_at_all(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=...)


def trajectory_consistency(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "TCDScheduler"])


def an_odd_unet(folder: Path) -> None:
    """Settings that the network follows: a projection of the text, another kernel, another embedding of the time, …"""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(11)
    config = UNet2DConditionModel.load_config(folder / "unet")
    odd = {
        "encoder_hid_dim": 32,
        "cross_attention_dim": 48,
        "conv_in_kernel": 5,
        "center_input_sample": True,
        "time_embedding_type": "fourier",
        "time_embedding_dim": 64,
        "freq_shift": 1,
        "resnet_time_scale_shift": "scale_shift",
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": [1, 2],
        "only_cross_attention": [True, False],
    }
    UNet2DConditionModel.from_config(config | odd).save_pretrained(folder / "unet")


def lists_in_a_unet(folder: Path) -> None:
    edit(folder / "unet" / "config.json", cross_attention_dim=[32, 32], attention_head_dim=[2, 2], center_input_sample=True)


def a_tiny_vae(folder: Path) -> None:
    """TAESD: scaling factor 1, and no posterior to draw from."""
    tiny.write_tiny_vae(folder / "vae")
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])


def an_asymmetric_vae(folder: Path) -> None:
    """Its decoder without an image and a mask, as the pipelines call it except when inpainting."""
    tiny.write_asymmetric_vae(folder / "vae")
    edit(folder / "model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"])


def segmind(folder: Path) -> None:
    tiny.prune(folder, "SSD-1B")


def koala_lightning(folder: Path) -> None:
    """With the schedule of distilled models (Turbo, Lightning, Hyper-SD): Euler over trailing timesteps."""
    tiny.prune(folder, "Koala-700M")
    edit(folder / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")


def playground(folder: Path) -> None:
    """EDM's preconditioning, and a VAE with a mean and a deviation for each channel."""
    normed_latents(folder)
    edit(folder / "model_index.json", scheduler=["diffusers", "EDMDPMSolverMultistepScheduler"])
    edm = {"num_train_timesteps": 1000, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras"}
    edm |= {
        "prediction_type": "epsilon",
        "rho": 7.0,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
    }
    edm |= {"_class_name": "EDMDPMSolverMultistepScheduler", "_diffusers_version": "0.27.0", "final_sigmas_type": "zero"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(edm))


def built(checkpoint: Path, spoil: Callable[[Path], None], place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The edited copy and its bundle, made without processes of their own."""
    monkeypatch.setattr(sdexport.build.export, "run_job", job_here)
    folder = Path(shutil.copytree(checkpoint, place / "checkpoint"))
    spoil(folder)
    for _ in sdexport.build.export.build(str(folder), place / "bundle", sdexport.build.events.ExportOptions(verify=False)):
        pass
    return folder, place / "bundle"


def opened(folder: Path, image: bool) -> Any:
    import diffusers
    import torch

    torch.set_num_threads(1)
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    name = name.replace("Pipeline", "Img2ImgPipeline") if image else name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, name).from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, **settings: Any) -> np.ndarray:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = pipe(
            PROMPT,
            generator=torch.Generator().manual_seed(7),
            guidance_scale=7.5,
            negative_prompt=NEGATIVE,
            output_type="np",
            **settings,
        ).images
    image: np.ndarray = (images[0] * 255).round().astype(np.uint8)
    return image


# models of the field that the checkpoints stand for: name, and the samplers that are compared beside their own
MODELS: dict[Callable[[Path], None], tuple[str, dict[str, str]]] = {
    segmind: ("SSD-1B", SAMPLERS),
    koala_lightning: ("Koala, Lightning", SAMPLERS),
    playground: ("Playground v2.5", {"edm_euler": "EDMEulerScheduler"}),
}


@pytest.mark.parametrize(
    ("kind", "spoil", "from_image"),
    [
        ("sdxl", normed_latents, True),
        ("sd1", another_scheduler_and_old_settings, True),
        ("sd1", no_steps_offset_at_all, False),
        ("sd1", trajectory_consistency, False),
        pytest.param("sd1", an_odd_unet, False, marks=pytest.mark.full),
        ("sd1", a_tiny_vae, True),
        pytest.param("sd1", an_asymmetric_vae, True, marks=pytest.mark.full),
        pytest.param("sd1", lists_in_a_unet, False, marks=pytest.mark.full),
        pytest.param("sdxl", segmind, False, marks=pytest.mark.full),
        pytest.param("sdxl", koala_lightning, False, marks=pytest.mark.full),
        pytest.param("sdxl", playground, False, marks=pytest.mark.full),
    ],
)
def test_the_image_is_that_of_diffusers_own_pipeline(
    kind: str,
    spoil: Callable[[Path], None],
    from_image: bool,
    request: pytest.FixtureRequest,
    ready: Callable[[Path], Path],
    tmp_path: Path,
    trace_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("diffusers", minversion="0.42")
    folder, bundle = built(request.getfixturevalue(f"{kind}_checkpoint"), spoil, tmp_path, monkeypatch)
    with Pipeline.open(ready(bundle)) as pipe:
        settings: dict[str, Any] = {"seed": 7, "steps": 6, "guidance": 7.5, "negative": NEGATIVE}
        (image,) = pipe(PROMPT, **settings).images
        reference = theirs(opened(folder, image=False), num_inference_steps=6)
        assert reference.std() >= 10, "the reference image is flat"
        assert psnr(np.asarray(image.pixels), reference) >= 60
        if spoil is an_asymmetric_vae:
            with pytest.raises(Unsupported, match=r"mask: the VAE is an AsymmetricAutoencoderKL"):
                pipe(PROMPT, image=reference, mask=reference[..., 0])
        for sampler, named in MODELS.get(spoil, ("", {}))[1].items():
            other = opened(folder, image=False)
            changes = {"clip_sample": False} if sampler == "ddim" else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of diffusers' own
                kind_of = getattr(importlib.import_module("diffusers"), named)
                other.scheduler = kind_of.from_config(other.scheduler.config, **changes)
            (image,) = pipe(PROMPT, **settings, sampler=sampler).images
            assert psnr(np.asarray(image.pixels), theirs(other, num_inference_steps=6)) >= 60, sampler
        if from_image:
            import PIL.Image

            (again,) = pipe(PROMPT, **settings, image=reference, strength=0.7).images
            start = PIL.Image.fromarray(reference)
            reference = theirs(opened(folder, image=True), num_inference_steps=6, image=start, strength=0.7)
            assert psnr(np.asarray(again.pixels), reference) >= 60
