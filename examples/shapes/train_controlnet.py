"""Train a ControlNet for the shapes checkpoint: edges -> the shape at that place: python train_controlnet.py -o adapters/edges

The control image has the edges of a shape anywhere in the image; the words of the caption for its place are mostly wrong.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import draw
import numpy as np
import torch
from adapting import Base, noise_loss
from diffusers import ControlNetModel
from train import rate

from sdruntime.pipeline.images.maps import canny

BATCH = 32
COPIES = 5  # images of each scene
MARGIN = {"small": 11.0, "large": 17.0}  # least distance of a centre from the edges of the image, in pixels
EMBEDDING = (8, 16, 32, 64)  # channels of the control image's convolutions


def anywhere(scene: draw.Scene, random: np.random.Generator) -> tuple[draw.Scene, draw.Image]:
    """Return a scene with the words of any place, and its image with the shape anywhere."""
    margin = MARGIN[scene.size]
    x, y = random.uniform(margin, draw.SIZE - margin, 2)
    return replace(scene, place=str(random.choice(list(draw.PLACES)))), draw.draw(scene, random, (x, y))


def train(base: Base, steps: int) -> ControlNetModel:
    """Return a ControlNet trained on the scenes of the checkpoint's own training."""
    torch.manual_seed(5)
    jitter = np.random.default_rng(5)
    scenes, images = zip(*(anywhere(scene, jitter) for scene in draw.split()[0] for _ in range(COPIES)), strict=True)
    clean = base.latents(list(images))
    edges = torch.from_numpy(np.stack([canny(image) for image in images])).permute(0, 3, 1, 2)
    with torch.no_grad():
        states = torch.cat([base.text(part)[0] for part in torch.split(base.ids([scene.caption for scene in scenes]), 256)])
        empty = base.text(base.ids([""]))[0]
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=EMBEDDING).requires_grad_(True).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.99))
    random = torch.Generator().manual_seed(5)
    began, running = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, 1e-3, 30)
        chosen = torch.randint(len(clean), (BATCH,), generator=random)
        text = torch.where(torch.rand(BATCH, 1, 1, generator=random) < 0.25, empty, states[chosen])
        image = edges[chosen].float() / 255

        def guess(noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor = text, image: torch.Tensor = image) -> torch.Tensor:
            down, middle = net(noisy, t, text, image, return_dict=False)
            estimate: torch.Tensor = base.unet(
                noisy, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
            ).sample
            return estimate

        loss = noise_loss(clean[chosen], random, guess)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        running += loss.item()
        if (step + 1) % 50 == 0:
            print(f"controlnet {step + 1}/{steps} loss {running / 50:.4f} {time.monotonic() - began:.0f} s", flush=True)
            running = 0.0
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=900)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(Base(options.checkpoint), options.steps).half().save_pretrained(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
