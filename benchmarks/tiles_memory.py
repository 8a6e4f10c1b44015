"""Measure the time and the memory of decoding one image, whole or in tiles, in this process.

    python -m benchmarks.tiles_memory BUNDLE --side 1024 --tile off
    python -m benchmarks.tiles_memory BUNDLE --side 1024 --tile 512

The memory is the process's peak less its memory before: what the decoder's activations take. Requires Linux.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from sdruntime import EngineOptions, Pipeline
from sdruntime.system.process import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--side", type=int, default=1024, help="pixels (1024)")
    parser.add_argument("--tile", default="off", help="off, or pixels (off)")
    options = parser.parse_args()
    tile = int(options.tile) if options.tile.isdecimal() else options.tile
    with Pipeline.open(options.bundle, options=EngineOptions(threads=2, tile=tile, measure=False)) as pipe:
        side = options.side // pipe.model.vae_factor
        latents = np.random.default_rng(0).standard_normal((pipe.model.latent_channels, side, side)).astype(np.float32)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, begun = peak_memory(), time.perf_counter()
        pipe.decode([latents])
        seconds = time.perf_counter() - begun
        figures = {"side": options.side, "tile": options.tile, "gb": (peak_memory() - before) / 1e9, "seconds": seconds}
    print(json.dumps({name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}))


if __name__ == "__main__":
    main()
