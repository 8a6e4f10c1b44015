"""Train the shapes checkpoint from scratch on a CPU: python train.py --work WORK --out checkpoint

The stages are the autoencoder, the latents of the training images, the UNet with the text encoder, and the decoder again. Each
resumes from its state in WORK. No stage sees the held-out captions of draw.split.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import draw
import numpy as np
import torch
import vocabulary
from components import SCALING, autoencoder, scheduler, text_encoder, unet, write
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

IMAGES = 20_000
WORKERS = 2  # threads, each with a part of the batch: twice as fast as one batch on two OpenMP threads
VAE_BATCH, UNET_BATCH, CAPTIONS = 8, 32, 16  # per worker; CAPTIONS is the number of distinct captions
EVERY = 200  # steps between saved states


def images(scenes: list[draw.Scene], seed: int) -> Iterator[tuple[int, draw.Image]]:
    """Yield (index into scenes, jittered image) without end, each scene once per pass."""
    jitter = np.random.default_rng(seed)
    while True:
        for index in jitter.permutation(len(scenes)):
            yield int(index), draw.draw(scenes[index], jitter)


def harder(scenes: list[draw.Scene]) -> list[draw.Scene]:
    """Return the scenes with small ones three times and small crosses six times, which an autoencoder learns last."""
    small = [scene for scene in scenes if scene.size == "small"]
    return scenes + 2 * small + 3 * [scene for scene in small if scene.shape == "cross"]


def tensor(images: list[draw.Image]) -> torch.Tensor:
    """Return uint8 images as float32 [n, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Return the learning rate: linear warm-up, then a half cosine to a hundredth of the peak."""
    done = min(step / steps, 1)
    return peak * min((step + 1) / warm_up, 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def save(path: Path, state: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def descend(
    pool: ThreadPoolExecutor, optimiser: torch.optim.Optimizer, model: torch.nn.Module, parts: list[Callable[[], torch.Tensor]]
) -> float:
    """Take one optimiser step on the mean of the losses, each computed in its own thread; return that mean."""
    parameters = list(model.parameters())

    def gradient(loss_of: Callable[[], torch.Tensor]) -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = loss_of()
        return loss.item(), torch.autograd.grad(loss, parameters)

    losses, gradients = zip(*pool.map(gradient, parts), strict=True)
    for parameter, *parts_of_gradient in zip(parameters, *gradients, strict=True):
        parameter.grad = torch.stack(parts_of_gradient).mean(0)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    return float(sum(losses) / len(losses))


def difference(decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the mean of |error| + error², with five times the weight on the shape and its surroundings, a tenth of an image."""
    shape = ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    weight = 1 + 4 * torch.nn.functional.max_pool2d(shape, 9, 1, 4)
    error = decoded - x
    return (weight * (error.abs() + error.square())).mean()


def train_autoencoder(pool: ThreadPoolExecutor, scenes: list[draw.Scene], work: Path, steps: int) -> AutoencoderKL:
    """Train on L1 + MSE + 1e-4 of the mean KL, then rescale the latents to mean 0 and standard deviation 1 / SCALING."""
    vae, done = autoencoder(), work / "vae.pt"
    if done.exists():
        vae.load_state_dict(torch.load(done, weights_only=True))
        return vae.eval()
    torch.manual_seed(1)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    state, first = work / "vae-state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"]

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss: torch.Tensor = difference(decoded.float(), x) + 1e-4 * kl
        return loss

    source, began, running = images(harder(scenes), seed=1 + first), time.monotonic(), 0.0
    for step in range(first, steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, 1.5e-3, 50)
        batches = [tensor([next(source)[1] for _ in range(VAE_BATCH)]) for _ in range(WORKERS)]
        running += descend(pool, optimiser, vae, [partial(loss_of, x) for x in batches])
        if (step + 1) % 50 == 0:
            print(f"vae {step + 1}/{steps} loss {running / 50:.4f} {time.monotonic() - began:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % EVERY == 0:
            save(state, {"model": vae.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1})
    balanced = images(scenes, seed=0)
    standardise(vae.eval(), tensor([next(balanced)[1] for _ in range(1024)]))
    save(done, vae.state_dict())
    return vae


@torch.no_grad()
def standardise(vae: AutoencoderKL, x: torch.Tensor) -> None:
    """Rescale and shift the latents channel by channel through the two 1x1 convolutions; the decoded image stays the same."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(x, 128)])
    shift, scale = means.mean((0, 2, 3)), 1 / (SCALING * means.std((0, 2, 3)))
    quant, post = vae.quant_conv, vae.post_quant_conv
    mean, logvar = slice(0, 4), slice(4, 8)
    quant.weight[mean] *= scale[:, None, None, None]
    quant.bias[mean] = (quant.bias[mean] - shift) * scale
    quant.bias[logvar] += 2 * scale.log()
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight /= scale[None, :, None, None]


def latents(pool: ThreadPoolExecutor, vae: AutoencoderKL, scenes: list[draw.Scene], work: Path) -> dict[str, torch.Tensor]:
    """Return the scaled `latent` [n, 4, 8, 8] and the index `scene` [n], with every scene equally often."""
    done = work / "latents.pt"
    if not done.exists():
        count = IMAGES // len(scenes) * len(scenes)
        samples = list(itertools.islice(images(scenes, seed=2), count))

        @torch.no_grad()
        def encode(first: int) -> tuple[torch.Tensor, torch.Tensor]:
            rows, seen = zip(*samples[first : first + 64], strict=True)
            posterior = vae.encode(tensor(list(seen))).latent_dist
            return posterior.mode() * SCALING, torch.tensor(rows)

        parts = list(pool.map(encode, range(0, count, 64)))
        latent, scene = (torch.cat(column) for column in zip(*parts, strict=True))
        print(f"latents {tuple(latent.shape)} mean {latent.mean():.4f} std {latent.std():.4f}", flush=True)
        save(done, {"latent": latent, "scene": scene})
    loaded: dict[str, torch.Tensor] = torch.load(done, weights_only=True)
    return loaded


def polish(pool: ThreadPoolExecutor, vae: AutoencoderKL, scenes: list[draw.Scene], work: Path, steps: int) -> None:
    """Train the decoder alone on fixed latents, with a little noise like that left by the UNet."""
    done = work / "polished.pt"
    if done.exists():
        vae.load_state_dict(torch.load(done, weights_only=True))
        return
    decoder = torch.nn.ModuleList([vae.decoder, vae.post_quant_conv])
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.99))

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mode()
                z = z + 0.03 / SCALING * torch.randn(z.shape)
            decoded = vae.decode(z).sample
        return difference(decoded.float(), x)

    source, began, running = images(harder(scenes), seed=5), time.monotonic(), 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, 1.5e-3, 50)
        batches = [tensor([next(source)[1] for _ in range(VAE_BATCH)]) for _ in range(WORKERS)]
        running += descend(pool, optimiser, decoder, [partial(loss_of, x) for x in batches])
        if (step + 1) % 50 == 0:
            print(f"decoder {step + 1}/{steps} loss {running / 50:.4f} {time.monotonic() - began:.0f} s", flush=True)
            running = 0.0
    save(done, vae.state_dict())


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    ids = tokenizer(captions, padding="max_length", max_length=vocabulary.LENGTH, truncation=True).input_ids
    return torch.tensor(ids)


def train_unet(
    pool: ThreadPoolExecutor,
    vae: AutoencoderKL,
    vocab: dict[str, int],
    scenes: list[draw.Scene],
    work: Path,
    out: Path,
    steps: int,
) -> torch.nn.ModuleDict:
    """Train the UNet and the text encoder together on the noise-prediction loss; return their moving average."""
    data = latents(pool, vae, scenes, work)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    ids = token_ids(tokenizer, [scene.caption for scene in scenes] + [""])
    of_scene = [torch.nonzero(data["scene"] == row).squeeze(1) for row in range(len(scenes))]
    torch.manual_seed(3)
    model = torch.nn.ModuleDict({"unet": unet(), "text": text_encoder(vocab)})
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.99))
    state, first = work / "unet-state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"]
    alphas: torch.Tensor = scheduler().alphas_cumprod
    randoms = [torch.Generator().manual_seed(1000 * first + worker) for worker in range(WORKERS)]

    def loss_of(random: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(scenes), (CAPTIONS,), generator=random)
        count = UNET_BATCH // CAPTIONS
        rows = torch.cat([of_scene[row][torch.randint(len(of_scene[row]), (count,), generator=random)] for row in chosen])
        captions = torch.where(torch.rand(CAPTIONS, generator=random) < 0.25, len(scenes), chosen)  # len(scenes): no caption
        clean = data["latent"][rows]
        t = random_timesteps(UNET_BATCH, random)
        alpha, sigma = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        # Guidance pushes latents beyond the data. Six in ten samples have such a push, which the model learns to remove.
        push = 4 * (torch.rand(UNET_BATCH, 1, 1, 1, generator=random) - 0.4).clamp(min=0)
        noise = torch.randn(clean.shape, generator=random) + push * clean
        text = model["text"](ids[captions])[0].repeat_interleave(count, 0)
        guess = model["unet"](alpha * clean + sigma * noise, t, text, return_dict=False)[0]
        # Places are decided at noise levels with almost no signal, where the plain loss hardly depends on the clean image.
        weight = (1 / alphas[t]).clamp(max=10)
        loss: torch.Tensor = (weight * (guess - noise).square().mean((1, 2, 3))).mean()
        return loss

    began, running = time.monotonic(), 0.0
    for step in range(first, steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, 1e-3, 100)
        running += descend(pool, optimiser, model, [partial(loss_of, random) for random in randoms])
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - keep)
        if (step + 1) % 100 == 0:
            print(f"unet {step + 1}/{steps} loss {running / 100:.4f} {time.monotonic() - began:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % EVERY == 0:
            kept_state = {"model": model.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
            save(state, {**kept_state, "step": step + 1})
            write(vae, average, out)
    return average


def random_timesteps(count: int, random: torch.Generator) -> torch.Tensor:
    """Return random timesteps: half are uniform over the schedule, half over its noisy end."""
    u = torch.rand(count, generator=random)
    noisy = torch.arange(count) % 2 == 1
    return torch.where(noisy, 600 + 400 * u, 1000 * u).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for states, to resume from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--decoder-steps", type=int, default=4500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    scenes, held_out = draw.split()
    vocab = vocabulary.write_tokenizer(options.out / "tokenizer", draw.words())
    print(json.dumps({"train": len(scenes), "held out": len(held_out), "vocabulary": len(vocab)}), flush=True)
    with ThreadPoolExecutor(WORKERS, initializer=partial(torch.set_num_threads, 1)) as pool:
        vae = train_autoencoder(pool, scenes, options.work, options.vae_steps)
        average = train_unet(pool, vae, vocab, scenes, options.work, options.out, options.unet_steps)
        polish(pool, vae, scenes, options.work, options.decoder_steps)
    write(vae, average, options.out)


if __name__ == "__main__":
    main()
