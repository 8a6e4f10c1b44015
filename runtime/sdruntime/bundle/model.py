"""What the pipeline needs to know of a checkpoint: sizes, the scale of its latents, defaults, how to preview it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdruntime.bundle.limits import LARGEST_SIDE, MODEL, MOST_GUIDANCE, NOISE_LEVELS
from sdruntime.errors import SettingError
from sdruntime.sampling.samplers import resolve
from sdruntime.sampling.table import MOST_STEPS

Family = Literal["sd1", "sd2", "sdxl"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPreview:
    """Colours of a latent cell without the VAE: colour = weights · latents + bias, in [-1, 1].

    `weights`: for red, green and blue, a number per latent channel. `psnr`: dB against the VAE's images, averaged over each cell.
    """

    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]
    psnr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the model's authors generate images with, for requests that do not say otherwise; None: nothing is known.

    `size`: (width, height) in pixels, in place of the model's `default_size`.
    """

    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps {self.steps} is outside 1 to {MOST_STEPS:,}")
        if self.guidance is not None and not 0 <= self.guidance <= MOST_GUIDANCE:
            raise ValueError(f"guidance {self.guidance:g} is outside 0 to {MOST_GUIDANCE}")
        if self.size is not None and not all(1 <= side <= LARGEST_SIDE for side in self.size):
            raise ValueError(f"size {self.size[0]}x{self.size[1]} is outside 1 to {LARGEST_SIDE:,} pixels")
        if self.sampler is not None:
            try:
                resolve(self.sampler)
            except SettingError as error:
                raise ValueError(str(error)) from error

    def __str__(self) -> str:
        """Return what is known as text: "steps 4, guidance 1, size 768x512"."""
        guidance = None if self.guidance is None else f"{self.guidance:g}"
        size = None if self.size is None else "{}x{}".format(*self.size)
        known = {"steps": self.steps, "guidance": guidance, "sampler": self.sampler, "size": size}
        return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


NO_DEFAULTS = Defaults()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The properties of the checkpoint that the pipeline needs. Sizes are in pixels, (height, width)."""

    name: str
    family: Family
    prediction_type: PredictionType
    scaling_factor: float  # latents = (posterior - shift_factor) * scaling_factor
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()  # per channel; with latents_std: latents = (posterior - mean) * scaling_factor / std
    latents_std: tuple[float, ...] = ()
    latent_channels: int = 4
    vae_factor: int = 8  # pixels per latent cell
    size_multiple: int = 64  # pixels: the VAE's factor times the UNet's downsampling
    size_step: int | None = None  # pixels: sizes must be multiples of it; None: of size_multiple, for a UNet that cannot crop
    default_size: tuple[int, int] = (512, 512)
    defaults: Defaults = NO_DEFAULTS
    pad_token: str = "<|endoftext|>"
    zero_empty_negative: bool = False  # SDXL base: no negative prompt means zeros, not the empty text's embedding
    max_noise_level: int | None = None  # of an upscaling model: of the noise in the image to enlarge
    masked_decoder: bool = False  # the decoder should also take an image and a mask, which is not supported: no inpainting
    license: str = "unknown"  # an SPDX identifier, or the id on the model card
    prompts: tuple[str, ...] = ()  # example prompts from the model card
    preview: LinearPreview | None = None

    def __post_init__(self) -> None:
        for name in ("scaling_factor", "latent_channels", "vae_factor", "size_multiple"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers for {self.latent_channels} latent channels")
        if bool(self.latents_mean) != bool(self.latents_std) or any(std <= 0 for std in self.latents_std):
            raise ValueError("latents_mean and latents_std belong together, and latents_std is positive")
        if any(abs(mean) > 1e6 for mean in self.latents_mean) or not all(1e-6 <= std <= 1e6 for std in self.latents_std):
            raise ValueError("latents_mean is outside -1e6 to 1e6, or latents_std outside 1e-6 to 1e6")
        for name, least, most in MODEL:
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name):g} is outside {least:g} to {most:g}")
        if self.max_noise_level is not None and not 0 <= self.max_noise_level < NOISE_LEVELS:
            raise ValueError(f"max_noise_level {self.max_noise_level} is outside 0 to {NOISE_LEVELS - 1}")
        if self.preview is not None:
            shape = [*map(len, self.preview.weights), len(self.preview.bias)]
            if shape != [*[self.latent_channels] * 3, 3]:
                raise ValueError(f"preview: expected 3 colours of {self.latent_channels} weights, and 3 numbers as bias")
        if self.size_multiple % self.vae_factor:
            raise ValueError(f"size_multiple {self.size_multiple} is not a multiple of vae_factor {self.vae_factor}")
        if self.size_step is not None and (self.size_step < 1 or self.size_step % self.vae_factor):
            raise ValueError(f"size_step {self.size_step} is not a multiple of vae_factor {self.vae_factor}")
        if any(side < 1 or side % self.step for side in self.default_size):
            raise ValueError(f"default_size {self.default_size} is not a multiple of {self.step}")
        if self.defaults.size is not None and any(side % self.step for side in self.defaults.size):
            raise ValueError(f"defaults: size {self.defaults.size[0]}x{self.defaults.size[1]} is not a multiple of {self.step}")
        if max(self.default_size) > LARGEST_SIDE:
            raise ValueError(f"default_size {self.default_size}: a side is above {LARGEST_SIDE:,} pixels")

    @property
    def usual_size(self) -> tuple[int, int]:
        """(height, width) of an image whose request leaves the size open."""
        return self.defaults.size[::-1] if self.defaults.size else self.default_size

    @property
    def step(self) -> int:
        """What sizes must be multiples of, in pixels."""
        return self.size_step or self.size_multiple
