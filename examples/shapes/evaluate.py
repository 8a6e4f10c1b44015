"""How often a checkpoint or a bundle draws what held-out captions say: python evaluate.py MODEL --json evaluation.json

MODEL is a diffusers folder, or a bundle (a folder with manifest.json). Prints one line a figure; `read` is the judge.
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

Drawer = Callable[[list[str], int], list[draw.Picture]]  # captions, seed of the first -> pictures


def diffusers_drawer(folder: Path, steps: int, guidance: float) -> Drawer:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def pictures(captions: list[str], seed: int) -> list[draw.Picture]:
        seeds = [torch.Generator().manual_seed(seed + k) for k in range(len(captions))]
        drawn = pipe(captions, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="np")
        return [np.rint(image * 255).astype(np.uint8) for image in drawn.images]

    return pictures


def bundle_drawer(folder: Path, steps: int, guidance: float) -> Drawer:
    from sdruntime.pipeline.pipeline import Pipeline

    def pictures(captions: list[str], seed: int) -> list[draw.Picture]:
        with Pipeline.open(folder) as pipe:
            return list(pipe(captions, seed=seed, steps=steps, guidance=guidance).pixels)

    return pictures


def judge(scenes: list[draw.Scene], pictures: list[draw.Picture]) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Share of pictures with each attribute right, and with all; and what was wrong, caption by caption."""
    wrong: list[dict[str, str]] = []
    right = dict.fromkeys((*draw.Scene.__slots__, "all"), 0)
    for scene, picture in zip(scenes, pictures, strict=True):
        found = read(picture)
        misses = {name: str(found[name]) for name, value in draw.attributes(scene).items() if found[name] != value}
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
    parser.add_argument("--seed", type=int, default=7, help="of the first picture; each next one has the next seed")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first two dozen here")
    given = parser.parse_args()
    scenes = draw.split()[1][: given.captions]
    drawer = bundle_drawer if (given.model / "manifest.json").exists() else diffusers_drawer
    pictures_of = drawer(given.model, given.steps, given.guidance)
    pictures: list[draw.Picture] = []
    for first in range(0, len(scenes), BATCH):
        pictures += pictures_of([scene.caption for scene in scenes[first : first + BATCH]], given.seed + first)
    right, wrong = judge(scenes, pictures)
    for name, share in right.items():
        print(f"{name:10} {share:7.1%}")
    settings = {"captions": len(scenes), "steps": given.steps, "guidance": given.guidance, "seed": given.seed}
    if given.json:
        report: dict[str, Any] = {"schema": 1, **settings, "right": right, "wrong": wrong}
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if given.sheet:
        sheet(pictures[:24], [scene.caption for scene in scenes[:24]], columns=6).save(given.sheet)


if __name__ == "__main__":
    main()
