"""Run diffusers on the same checkpoint, eager and compiled, with the same noise, steps and scheduler as our pipelines.

This is the reference that a bundle is measured against.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdexport.bench.timing import Array
from sdruntime.bundle.manifest import Precision
from sdruntime.bundle.roles import role
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.noise.cpu import NoiseStream

EAGER, COMPILED = "diffusers eager", "diffusers torch.compile(max-autotune)"


def why_unavailable(device: str = "cuda") -> str:
    """Return why diffusers cannot run on this machine; empty if it can."""
    for name in ("torch", "diffusers", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return ""


def versions() -> Mapping[str, str]:
    """Return the versions of torch, diffusers and transformers, as far as they are installed."""
    import importlib.metadata as metadata

    installed = {}
    for name in ("torch", "diffusers", "transformers"):
        if importlib.util.find_spec(name) is not None:
            installed[name] = metadata.version(name)
    return installed


class Diffusers:
    """A checkpoint in its diffusers pipeline. `precision` defaults to float16 on a GPU and float32 on a CPU.

    The request sets the steps, guidance and size.
    """

    def __init__(self, checkpoint: Path, *, device: str = "cuda", precision: Precision | None = None) -> None:
        import diffusers
        import torch

        self._torch, self._device = torch, device
        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        self._dtype = dtypes[precision or ("fp16" if device == "cuda" else "fp32")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(checkpoint), torch_dtype=self._dtype, local_files_only=True)
        self._pipe = pipe.to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self._parts = {EAGER: (pipe.unet, pipe.vae.decode)}

    def compile(self, mode: str = "max-autotune") -> None:
        """Set up torch.compile as diffusers' speed guide does. Compilation itself happens at the first image of each shape."""
        compiled = self._torch.compile
        unet = compiled(self._pipe.unet, mode=mode, fullgraph=True)
        self._parts[COMPILED] = (unet, compiled(self._pipe.vae.decode, mode=mode, fullgraph=True))

    def unet(self, name: str) -> Any:
        return self._parts[name][0]

    def call(self, name: str, component: str, feeds: Mapping[str, Array]) -> None:
        """Call one component as a bundle does: copy its inputs to the device and wait for the result."""
        torch, (unet, decode), kind = self._torch, self._parts[name], role(component).kind
        with torch.inference_mode():
            inputs = {key: torch.from_numpy(array).to(self._device) for key, array in feeds.items()}
            cast = {key: value if kind == "text encoder" else value.to(self._dtype) for key, value in inputs.items()}
            if kind == "denoiser":
                added = {key: cast[key] for key in ("text_embeds", "time_ids") if key in cast}
                extra = {"added_cond_kwargs": added} if added else {}
                unet(cast["sample"], inputs["timestep"], encoder_hidden_states=cast["encoder_hidden_states"], **extra)
            elif kind == "VAE decoder":
                decode(cast["latent_sample"])
            else:
                getattr(self._pipe, component)(inputs["input_ids"], output_hidden_states=True)
            if self._device == "cuda":
                torch.cuda.synchronize()

    def generate(self, name: str, requests: list[Request]) -> list[Array]:
        """Return the images, uint8 [H, W, 3], of requests that differ only in their seeds."""
        first, pipe, torch = requests[0], self._pipe, self._torch
        pipe.unet, pipe.vae.decode = self._parts[name]
        side = pipe.unet.config.sample_size
        width, height = first.size or (side * pipe.vae_scale_factor,) * 2
        shape = (pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
        noise = np.stack([NoiseStream(request.seed).normal(shape) for request in requests])
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            images = pipe(
                [request.prompt for request in requests],
                num_inference_steps=first.steps,
                guidance_scale=first.guidance,
                latents=torch.from_numpy(noise).to(self._device, self._dtype),
                width=width,
                height=height,
                output_type="np",
            ).images
        return list((images * 255).round().astype(np.uint8))

    def first(self, name: str, requests: list[Request]) -> float:
        """Return the seconds of the first image, which include the compilation if the pipeline is compiled."""
        begun = time.perf_counter()
        self.generate(name, requests)
        return round(time.perf_counter() - begun, 2)

    def close(self) -> None:
        del self._pipe, self._parts
        if self._device == "cuda":
            self._torch.cuda.empty_cache()
