"""Write noise.npz: what torch.randn draws on a CPU generator, by its vectorised and its plain code path.

    python tests/golden/make_noise.py

`seeds` and `sizes` give the draws: for each seed, one generator, consecutive calls of these sizes.
`vector` and `plain` hold [seed, all values one after the other]; of a size over 64 the first 32 and the last 32.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

SEEDS = [0, 7, 2**31 + 5, 2**32 + 7, 2**63 + 12345, 2**64 - 1]
# under 16 with a value left over, 16, not a multiple of 16, again a few (the left-over value is still there), and latents
SIZES = [1, 3, 2, 15, 16, 17, 5, 31, 32, 1, 4096 + 7, 4, 3, 4 * 64 * 64, 7]
HERE = Path(__file__).parent


def draw() -> np.ndarray:
    import torch

    rows = []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(size, generator=generator).numpy() for size in SIZES]
        rows.append(np.concatenate([part for values in draws for part in ends(values)]))
    return np.stack(rows)


def ends(values: np.ndarray) -> list[np.ndarray]:
    return [values] if values.size <= 64 else [values[:32], values[-32:]]


def draw_with(capability: str, path: Path) -> np.ndarray:
    """Draw in a process of its own: torch picks its code path once, when it is loaded."""
    subprocess.run([sys.executable, __file__, str(path)], env=os.environ | {"ATEN_CPU_CAPABILITY": capability}, check=True)
    values = np.load(path)
    path.unlink()
    return values


if __name__ == "__main__":
    if len(sys.argv) > 1:
        np.save(sys.argv[1], draw())
    else:
        drawn = {name: draw_with(way, HERE / f"{name}.npy") for name, way in {"vector": "avx2", "plain": "default"}.items()}
        np.savez_compressed(HERE / "noise.npz", seeds=np.array(SEEDS, np.uint64), sizes=np.array(SIZES), **drawn)
