"""Measure how often a checkpoint or a bundle follows held-out captions: python evaluate.py MODEL --json evaluation.json

MODEL is a diffusers folder, or a bundle (a folder with manifest.json). Prints the share of images for each attribute that `read`
finds to be right. With a bundle, --lora adds captions of its own shape, and --edges measures the bundle's ControlNet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import draw
import numpy as np
from read import ink_of, read
from sheet import sheet

BATCH = 50
NEAR = 3.0  # largest distance in pixels between the centre of a shape and that of its edges

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


def bundle_generator(folder: Path, steps: int, guidance: float, lora: Path | None = None) -> Generator:
    """Return a function that generates images with sdruntime."""
    from sdruntime import Lora, Pipeline

    loras = [] if lora is None else [Lora(lora)]

    def generate(captions: list[str], seed: int) -> list[draw.Image]:
        with Pipeline.open(folder) as pipe:
            return list(pipe(captions, seed=seed, steps=steps, guidance=guidance, loras=loras).pixels)

    return generate


@dataclass(frozen=True, slots=True)
class Placed:
    """A scene whose shape is at a place that its caption does not name; `edges`: those of its image."""

    scene: draw.Scene
    x: float
    y: float
    edges: draw.Image


def placed_scenes(count: int, seed: int = 1) -> list[Placed]:
    """Return held-out scenes with a shape anywhere in the image and captions with the words of any place."""
    from sdruntime.pipeline.images.maps import canny

    random = np.random.default_rng(seed)
    placed = []
    for scene in draw.split()[1][:count]:
        margin = draw.RADII[scene.size] + 2
        x, y = random.uniform(margin, draw.SIZE - margin, 2)
        worded = replace(scene, place=str(random.choice(list(draw.PLACES))))
        placed.append(Placed(worded, float(x), float(y), canny(draw.draw(scene, at=(x, y)))))
    return placed


def controlled(folder: Path, placed: list[Placed], steps: int, guidance: float, seed: int) -> list[draw.Image]:
    """Return the images of a bundle's ControlNet for scenes."""
    from sdruntime import Control, Pipeline, Request

    requests = [
        Request(prompt=each.scene.caption, control=[Control(image=each.edges)], seed=seed + k, steps=steps, guidance=guidance)
        for k, each in enumerate(placed)
    ]
    with Pipeline.open(folder) as pipe:
        return [image for k in range(0, len(requests), BATCH) for image in pipe(requests[k : k + BATCH]).pixels]


def judge_placed(placed: list[Placed], images: list[draw.Image]) -> dict[str, float]:
    """Return the share of images with the shape where the edges are ("place"), with each other attribute right, and with all."""
    right = dict.fromkeys((*draw.Scene.__slots__, "all"), 0)
    for each, image in zip(placed, images, strict=True):
        ink, reading = ink_of(image), read(image)
        good = {name: reading[name] == value for name, value in draw.attributes(each.scene).items()}
        good["place"] = ink is not None and float(np.hypot(ink.x - each.x, ink.y - each.y)) <= NEAR
        for name, value in good.items():
            right[name] += value
        right["all"] += all(good.values())
    return {name: count / len(placed) for name, count in right.items()}


def judge(
    scenes: list[draw.Scene], images: list[draw.Image], shapes: tuple[str, ...] = draw.SHAPES
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Return the share of images with each attribute right, and with all right; and the wrong attributes of each caption.

    `shapes`: those that the images may show.
    """
    wrong: list[dict[str, str]] = []
    right = dict.fromkeys((*draw.Scene.__slots__, "all"), 0)
    for scene, image in zip(scenes, images, strict=True):
        reading = read(image, shapes)
        misses = {name: str(reading[name]) for name, value in draw.attributes(scene).items() if reading[name] != value}
        for name in draw.Scene.__slots__:
            right[name] += name not in misses
        right["all"] += not misses
        if misses:
            wrong.append({"caption": scene.caption, **misses})
    return {name: count / len(scenes) for name, count in right.items()}, wrong


def generated(generate: Generator, scenes: list[draw.Scene], seed: int) -> list[draw.Image]:
    """Return the image of each scene's caption."""
    images: list[draw.Image] = []
    for first in range(0, len(scenes), BATCH):
        images += generate([scene.caption for scene in scenes[first : first + BATCH]], seed + first)
    return images


def show(title: str, right: dict[str, float]) -> None:
    """Print a table of shares."""
    print(title)
    for name, share in right.items():
        print(f"  {name:10} {share:7.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--captions", type=int, default=draw.HELD_OUT, help=f"how many of the {draw.HELD_OUT} held-out captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=7, help="seed of the first image; the others have the following seeds")
    parser.add_argument("--lora", type=Path, help="use this LoRA of a bundle, and measure its own shape too")
    parser.add_argument("--edges", action="store_true", help="measure a bundle's ControlNet: shapes at the places of their edges")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first two dozen here")
    options = parser.parse_args()
    bundle = (options.model / "manifest.json").exists()
    if not bundle and (options.lora or options.edges):
        parser.error("--lora and --edges take a bundle")
    if options.edges:
        placed = placed_scenes(options.captions)
        images = controlled(options.model, placed, options.steps, options.guidance, options.seed)
        show("at the edges", judge_placed(placed, images))
        return
    common = options.model, options.steps, options.guidance
    generate = bundle_generator(*common, options.lora) if bundle else diffusers_generator(*common)
    scenes = draw.split()[1][: options.captions]
    images = generated(generate, scenes, options.seed)
    right, wrong = judge(scenes, images, (*draw.SHAPES, draw.U) if options.lora else draw.SHAPES)
    show("held-out captions", right)
    if options.lora:
        own = draw.split((draw.U,))[1][: options.captions]
        show("half discs", judge(own, generated(generate, own, options.seed), (*draw.SHAPES, draw.U))[0])
    settings = {"captions": len(scenes), "steps": options.steps, "guidance": options.guidance, "seed": options.seed}
    if options.json:
        report: dict[str, Any] = {"schema": 1, **settings, "right": right, "wrong": wrong}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.sheet:
        sheet(images[:24], [scene.caption for scene in scenes[:24]], columns=6).save(options.sheet)


if __name__ == "__main__":
    main()
