"""What the trainings of a LoRA and of a ControlNet for the shapes checkpoint share: its networks, their data and their loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import draw
import torch
from components import SCALING, scheduler
from diffusers import AutoencoderKL, UNet2DConditionModel
from train import random_timesteps, tensor, token_ids
from transformers import CLIPTextModel, CLIPTokenizer

ALPHAS: torch.Tensor = scheduler().alphas_cumprod


class Base:
    """The networks of the checkpoint in float32. None of their weights is trained."""

    def __init__(self, checkpoint: Path) -> None:
        self.vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32).requires_grad_(False)
        text = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
        self.text = torch.nn.Module.to(text, torch.float32).requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")

    def ids(self, captions: list[str]) -> torch.Tensor:
        return token_ids(self.tokenizer, captions)

    @torch.no_grad()
    def latents(self, images: list[draw.Image]) -> torch.Tensor:
        """Return the scaled latents of images, [n, 4, 8, 8]."""
        parts = torch.split(tensor(images), 64)
        return torch.cat([self.vae.encode(part).latent_dist.mode() * SCALING for part in parts])


def noise_loss(
    clean: torch.Tensor, random: torch.Generator, guess: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the weighted loss of `train_unet` for latents [n, 4, 8, 8]; `guess`: (noisy latents, timesteps) -> their noise."""
    count = len(clean)
    t = random_timesteps(count, random)
    alpha, sigma = ALPHAS[t].sqrt()[:, None, None, None], (1 - ALPHAS[t]).sqrt()[:, None, None, None]
    push = 4 * (torch.rand(count, 1, 1, 1, generator=random) - 0.4).clamp(min=0)
    noise = torch.randn(clean.shape, generator=random) + push * clean
    weight = (1 / ALPHAS[t]).clamp(max=10)
    loss: torch.Tensor = (weight * (guess(alpha * clean + sigma * noise, t) - noise).square().mean((1, 2, 3))).mean()
    return loss
