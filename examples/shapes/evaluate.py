"""Measure how often a checkpoint or a bundle follows held-out captions: python evaluate.py MODEL --json evaluation.json

MODEL is a diffusers folder, or a bundle (a folder with manifest.json). Prints the share of images for each attribute that `read`
finds to be right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draw
import numpy as np
from read import read
from sheet import sheet

BATCH = 50

Generator = Callable[[list[str], int], list[draw.Image]]  # captions, seed of the first -> images


def diffusers_generator(folder: Path, steps: int, guidance: float) -> Generator:
    """Return a function that generates images with diffusers."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def generate(captions: list[str], seed: int) -> list[draw.Image]:
        seeds = [torch.Generator().manual_seed(seed + k) for k in range(len(captions))]
        result = pipe(captions, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="np")
        return [np.rint(image * 255).astype(np.uint8) for image in result.images]

    return generate


def bundle_generator(folder: Path, steps: int, guidance: float) -> Generator:
    """Return a function that generates images with sdruntime."""
    from sdruntime.pipeline.pipeline import Pipeline

    def generate(captions: list[str], seed: int) -> list[draw.Image]:
        with Pipeline.open(folder) as pipe:
            return list(pipe(captions, seed=seed, steps=steps, guidance=guidance).pixels)

    return generate


def judge(scenes: list[draw.Scene], images: list[draw.Image]) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Return the share of images with each attribute right, and with all right; and the wrong attributes of each caption."""
    wrong: list[dict[str, str]] = []
    right = dict.fromkeys((*draw.Scene.__slots__, "all"), 0)
    for scene, image in zip(scenes, images, strict=True):
        reading = read(image)
        misses = {name: str(reading[name]) for name, value in draw.attributes(scene).items() if reading[name] != value}
        for name in draw.Scene.__slots__:
            right[name] += name not in misses
        right["all"] += not misses
        if misses:
            wrong.append({"caption": scene.caption, **misses})
    return {name: count / len(scenes) for name, count in right.items()}, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--captions", type=int, default=draw.HELD_OUT, help=f"how many of the {draw.HELD_OUT} held-out captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=7, help="seed of the first image; the others have the following seeds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first two dozen here")
    options = parser.parse_args()
    scenes = draw.split()[1][: options.captions]
    open_generator = bundle_generator if (options.model / "manifest.json").exists() else diffusers_generator
    generate = open_generator(options.model, options.steps, options.guidance)
    images: list[draw.Image] = []
    for first in range(0, len(scenes), BATCH):
        images += generate([scene.caption for scene in scenes[first : first + BATCH]], options.seed + first)
    right, wrong = judge(scenes, images)
    for name, share in right.items():
        print(f"{name:10} {share:7.1%}")
    settings = {"captions": len(scenes), "steps": options.steps, "guidance": options.guidance, "seed": options.seed}
    if options.json:
        report: dict[str, Any] = {"schema": 1, **settings, "right": right, "wrong": wrong}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.sheet:
        sheet(images[:24], [scene.caption for scene in scenes[:24]], columns=6).save(options.sheet)


if __name__ == "__main__":
    main()
