"""Compare images decoded in tiles with the same image decoded whole.

    python -m benchmarks.tiles examples/shapes/checkpoint/vae --side 320 --tile 64 --tile 128 --tile 192
    python -m benchmarks.tiles sd15 --side 320 --tile 128

The first argument is a folder of an AutoencoderKL, or `sd15`: SD 1.5's VAE with random weights, whose image is stretched to the
range of a real one. The network runs in PyTorch in float32. The image has shapes of `examples/shapes/draw.py` on a gray
background and is encoded whole. Layouts: `even`, ours; `diffusers`, whose last tiles are cut off; `not blended`, ours with hard
edges. Per tile, layout and overlap:

* `psnr`: of the tiled image against the whole one, in dB.
* `tone`: how far the mean of 16x16 pixels is from that of the whole image, in levels of 255: (root mean square, largest).
* `seams`: how much the difference from the whole image changes from one column (row) to the next where a tile begins or ends,
  divided by its change at the four before and after (medians, so that few shapes do not decide). 1: no edge there.
* `work`: decoded pixels per pixel of the image.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.pipeline.vae.tiles import Span, TiledEngine, even_spans

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "shapes"))


def diffusers_spans(side: int, tile: int, overlap: float) -> list[Span]:
    """Return the tiles of diffusers' AutoencoderKL, which cuts off the last ones at the end."""
    return [(start, min(start + tile, side)) for start in range(0, side, tile - int(tile * overlap))]


LAYOUTS = {"not blended": even_spans, "even": even_spans, "diffusers": diffusers_spans}
OVERLAPS = {"not blended": (0.25,), "even": (0.25, 0.5), "diffusers": (0.25, 0.5)}
BLOCK = 16  # pixels: the side of the blocks whose tone is compared


class Decoder:
    """A diffusers VAE's decoder as an engine that takes one image at a time."""

    spec = SimpleNamespace(profiles=({"batch": (1, 1, 1)},), admitting=lambda **dims: [0])
    component = None

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        import torch

        with torch.no_grad():
            return {"sample": self._vae.decode(torch.from_numpy(feeds["latent_sample"])).sample.numpy()}

    def close(self) -> None: ...


def load(name: str) -> Any:
    """Return the VAE of a folder, or SD 1.5's with random weights."""
    import torch
    from diffusers import AutoencoderKL

    if name != "sd15":
        return AutoencoderKL.from_pretrained(name, torch_dtype=torch.float32).eval()
    torch.manual_seed(0)
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    widths = [128, 256, 512, 512]
    return AutoencoderKL(
        block_out_channels=widths, down_block_types=down, up_block_types=up, layers_per_block=2, sample_size=512
    ).eval()


def picture(side: int) -> Array:
    """Return float32 [1, 3, side, side] in [-1, 1]: a shape every 64 pixels, on one background."""
    from draw import SIZE, draw, every_scene

    scenes = [scene for scene in every_scene() if scene.background == "gray"]
    rng, count = np.random.default_rng(1), -(-(side + SIZE) // SIZE)
    chosen = [[draw(scenes[k]) for k in rng.integers(len(scenes), size=count)] for _ in range(count)]
    pixels = np.concatenate([np.concatenate(row, axis=1) for row in chosen])
    pixels = pixels[23 : 23 + side, 41 : 41 + side]  # tiles do not end where shapes do
    image: Array = (pixels.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
    return np.ascontiguousarray(image)


def compare(tiled: Array, whole: Array, rows: Sequence[Span], columns: Sequence[Span], factor: int) -> dict[str, Any]:
    """Return the figures of one tiled image. The images are float, in levels of 255."""
    difference = tiled - whole
    side = tiled.shape[-1] // BLOCK * BLOCK
    blocks = difference[..., :side, :side].reshape(*difference.shape[:-2], side // BLOCK, BLOCK, side // BLOCK, BLOCK)
    tone = blocks.mean(axis=(-3, -1))
    edges = [[edge * factor for span in spans for edge in span if 0 < edge < spans[-1][1]] for spans in (rows, columns)]
    return {
        "psnr": round(10 * float(np.log10(255**2 / np.mean(difference**2))), 2),
        "tone": [round(float(np.sqrt(np.mean(tone**2))), 2), round(float(abs(tone).max()), 2)],
        "seams": round(seam_ratio(difference, edges), 3),
        "work": round(sum((a[1] - a[0]) * (b[1] - b[0]) for a in rows for b in columns) / (rows[-1][1] * columns[-1][1]), 2),
    }


def seam_ratio(image: Array, edges: Sequence[Sequence[int]]) -> float:
    """Return the median change between neighbouring pixels across the edges, divided by that nearby."""
    across, nearby = [], []
    for axis, places in zip((-2, -1), edges, strict=True):
        change = np.moveaxis(abs(np.diff(image, axis=axis)), axis, 0)
        for place in places:  # change[place - 1] is the one across it
            across.append(np.median(change[place - 1]))
            nearby.append(np.median(np.concatenate([change[place - 5 : place - 1], change[place : place + 4]])))
    return float(np.mean(across) / np.mean(nearby))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", help="folder of an AutoencoderKL, or sd15")
    parser.add_argument("--side", type=int, default=320, help="pixels (320)")
    parser.add_argument("--tile", type=int, action="append", required=True, dest="tiles", metavar="PIXELS")
    parser.add_argument("--images", type=Path, help="also write the images to this folder")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    import torch

    vae = load(options.vae)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(picture(options.side))).latent_dist.mean.numpy()
    if options.vae == "sd15":
        latents = latents / latents.std()
    decoder, cells = Decoder(vae), options.side // factor
    begun = time.perf_counter()
    whole = decoder({"latent_sample": latents})["sample"]
    print(f"whole: {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    low, high = (-1.0, 1.0) if options.vae != "sd15" else np.quantile(whole, (0.005, 0.995))

    def levels(image: Array) -> Array:
        scaled: Array = (np.clip(image, low, high) - low) / (high - low) * 255
        return scaled

    document: dict[str, Any] = {}
    for tile in options.tiles:
        for layout, spans in LAYOUTS.items():
            for overlap in OVERLAPS[layout]:
                rows = spans(cells, tile // factor, overlap)
                engine = TiledEngine(lambda **dims: cast(Engine, decoder), rows, rows, cell_out=factor)
                with contextlib.ExitStack() as stack:
                    if layout == "not blended":
                        stack.enter_context(mock.patch("sdruntime.pipeline.vae.tiles._fade"))
                    tiled = engine({"latent_sample": latents})["sample"]
                name = f"{tile} {layout} {overlap}"
                document[name] = compare(levels(tiled), levels(whole), rows, rows, factor)
                print(name, json.dumps(document[name]), flush=True)
                if options.images:
                    save(options.images / f"{name.replace(' ', '-')}.png", levels(tiled))
    if options.images:
        save(options.images / "whole.png", levels(whole))
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(known | {f"{options.vae} {options.side}": document}, indent=1) + "\n")


def save(path: Path, image: Array) -> None:
    import PIL.Image

    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image[0].transpose(1, 2, 0).round().astype(np.uint8)).save(path)


if __name__ == "__main__":
    main()
