"""diffusers' own pipelines, generating what our bundle generates."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

Array = NDArray[Any]


def psnr(a: Array, b: Array) -> float:
    """In dB. uint8 images have a peak of 255, the decoder's floats one of 2. Equal arrays are infinitely alike."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    peak = 255.0 if a.dtype == np.uint8 else 2.0
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(peak**2 / error)


def assert_same_picture(ours: Array, theirs: Array, ours_float: Array, theirs_float: Array) -> None:
    assert theirs.std() >= 10, "the reference picture is flat"
    assert psnr(ours, theirs) >= 60, f"uint8 PSNR {psnr(ours, theirs):.1f} dB"
    assert psnr(ours_float, theirs_float) >= 90, f"float PSNR {psnr(ours_float, theirs_float):.1f} dB"


def ours(pipe: Pipeline, prompt: str | Request, **settings: Any) -> tuple[Array, Array]:
    """(uint8 [H, W, 3], float32 [3, H, W]): the image and the decoder's output of one request."""
    stream = pipe.stream(prompt, **settings)
    for _ in stream:
        pass
    (decoded,) = pipe.decode([job.run.x for job in stream.jobs])
    return stream.result.pixels[0], decoded


class Reference:
    """A checkpoint in diffusers, on the CPU in float32."""

    def __init__(self, checkpoint: Path) -> None:
        import diffusers
        import torch

        self._torch = torch
        torch.set_num_threads(1)  # tiny networks are quickest so
        config = diffusers.DiffusionPipeline.load_config(str(checkpoint))
        self.xl = "XL" in config["_class_name"]
        kind = "StableDiffusionXL" if self.xl else "StableDiffusion"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pipe = getattr(diffusers, f"{kind}Pipeline").from_pretrained(str(checkpoint), torch_dtype=torch.float32)
            self.pipe.set_progress_bar_config(disable=True)
            self.from_image = getattr(diffusers, f"{kind}Img2ImgPipeline")(**self.pipe.components)
            self.from_image.set_progress_bar_config(disable=True)
        self._schedulers = diffusers.schedulers
        self._config = dict(self.pipe.scheduler.config)

    def draw(
        self, prompt: str, *, scheduler: str, seed: int, changes: dict[str, Any] | None = None, **settings: Any
    ) -> tuple[Array, Array]:
        """(uint8 [H, W, 3], float32 [3, H, W]): the image and the decoder's output."""
        import PIL.Image

        kind = getattr(self._schedulers, scheduler)
        pipe = self.from_image if "image" in settings else self.pipe
        if "image" in settings:
            settings["image"] = PIL.Image.fromarray(settings["image"])
        generator = self._torch.Generator().manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.scheduler = kind.from_config(self._config, **(changes or {}))
            latents = pipe(prompt, generator=generator, output_type="latent", **settings).images
        with self._torch.no_grad():
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        picture = pipe.image_processor.postprocess(decoded, output_type="np")[0]
        return (picture * 255).round().astype(np.uint8), decoded[0].numpy()


def decoded_by(pipeline: Any, latents: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the image of latents by a pipeline of diffusers, uint8 [H, W, 3], and what its decoder returns, [3, H, W]."""
    import torch

    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    picture = pipeline.image_processor.postprocess(decoded, output_type="np")[0]
    return (picture * 255).round().astype(np.uint8), decoded[0].numpy()
