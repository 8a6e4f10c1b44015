"""Train a LoRA that teaches the shapes checkpoint another shape, a half disc: python train_lora.py -o adapters/u.safetensors

Half of the images show half discs, named "u", the others the checkpoint's own shapes, which must stay as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import draw
import numpy as np
import torch
from adapting import Base, noise_loss
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train import rate

UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
BATCH = 20
COPIES = 6  # images of each scene with a half disc; of the other scenes there are as many images in all


def train(base: Base, steps: int, rank: int) -> None:
    """Add a LoRA to the UNet and the text encoder, and train it."""
    torch.manual_seed(4)
    jitter = np.random.default_rng(4)
    new, others = draw.split((draw.U,))[0], draw.split()[0]
    rows = [scene for scene in new for _ in range(COPIES)]
    rows += [others[k] for k in jitter.permutation(len(others) * 2)[: len(rows)] % len(others)]
    clean = base.latents([draw.draw(scene, jitter) for scene in rows])
    ids, empty = base.ids([scene.caption for scene in rows]), base.ids([""])
    for network, targets in ((base.unet, UNET), (base.text, TEXT)):
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    parameters = [each for network in (base.unet, base.text) for each in network.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    random = torch.Generator().manual_seed(4)
    began, running = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, 2e-3, 20)
        chosen = torch.randint(len(rows), (BATCH,), generator=random)
        captions = torch.where(torch.rand(BATCH, 1, generator=random) < 0.15, empty, ids[chosen])
        states = base.text(captions)[0]

        def guess(noisy: torch.Tensor, t: torch.Tensor, states: torch.Tensor = states) -> torch.Tensor:
            estimate: torch.Tensor = base.unet(noisy, t, states).sample
            return estimate

        loss = noise_loss(clean[chosen], random, guess)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        running += loss.item()
        if (step + 1) % 50 == 0:
            print(f"lora {step + 1}/{steps} loss {running / 50:.4f} {time.monotonic() - began:.0f} s", flush=True)
            running = 0.0


def write(base: Base, out: Path) -> None:
    """Write the LoRA as diffusers does, in half precision, with the word that it knows in its metadata."""
    states = {name: get_peft_model_state_dict(network) for name, network in (("unet", base.unet), ("text", base.text))}
    halves = {name: {key: each.half() for key, each in state.items()} for name, state in states.items()}
    part = out.with_name(f"{out.stem}.part.safetensors")
    StableDiffusionPipeline.save_lora_weights(
        part.parent, unet_lora_layers=halves["unet"], text_encoder_lora_layers=halves["text"], weight_name=part.name
    )
    with safe_open(part, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    words = {"modelspec.title": "half discs for the shapes checkpoint", "modelspec.trigger_phrase": draw.U}
    save_file(load_file(part), out, metadata=metadata | words)
    part.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = Base(options.checkpoint)
    train(base, options.steps, options.rank)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write(base, options.output)
    print(json.dumps({"file": str(options.output), "bytes": options.output.stat().st_size}))


if __name__ == "__main__":
    main()
