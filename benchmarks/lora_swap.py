"""Measure how long ONNX Runtime's UNet takes to change its LoRAs, and the memory of each set.

    python -m benchmarks.lora_swap --folder DIR [--rank 16] [--json FILE]      a random SD1.5 UNet of full size, exported there
    python -m benchmarks.lora_swap --folder DIR --bundle BUNDLE                a bundle that exists

The LoRAs are random and change every attention and feed-forward layer of the UNet. A swap is the time from the request to an open
engine with other weights: the changes are computed, and a session is made. Requires 12 GB of disk and 10 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sdruntime.adapters.lora import Lora
from sdruntime.arrays import Array
from sdruntime.backends.base.engine import EngineOptions
from sdruntime.backends.onnx_file.stored import weight_tensors
from sdruntime.bundle.dimensions import size_of
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.loras import Loras
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def random_lora(shapes: dict[str, tuple[int, ...]], rank: int, seed: int) -> dict[str, Array]:
    """Return a LoRA in kohya's format, float16."""
    random = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module != name and module.endswith(LAYERS):
            stem = "lora_unet_" + module.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = random.standard_normal((rank, shape[1])).astype(np.float16)
            tensors[f"{stem}.lora_up.weight"] = (0.01 * random.standard_normal((shape[0], rank))).astype(np.float16)
    return tensors


def memory() -> dict[str, int]:
    """Return this process's resident memory in bytes: all of it, and what is not a mapped file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {"resident": int(lines["VmRSS"].split()[0]) * 1024, "anonymous": int(lines["RssAnon"].split()[0]) * 1024}


def exported(folder: Path) -> Path:
    """Return a bundle of a full-size random SD1.5 UNet and small other parts, exported if it is not in the folder."""
    from benchmarks.export_full_size import write_checkpoint
    from sdexport.build.events import ExportOptions
    from sdexport.build.export import build

    bundle = folder / "bundle"
    if not (bundle / "manifest.json").exists():
        write_checkpoint(folder / "checkpoint", "sd15")
        for _ in build(str(folder / "checkpoint"), bundle, ExportOptions(verify=False, audit=False)):
            pass
        for _ in build_engines(bundle, BuildRequest(backend="onnxruntime", components=("unet",))):
            pass
        for _ in build_engines(bundle, BuildRequest(backend="onnxruntime", without=("unet",))):
            pass
    return bundle


def measured(bundle: Path, folder: Path, rank: int) -> dict[str, Any]:
    """Return the figures of a bundle."""
    with Pipeline.open(bundle, backend="onnxruntime", options=EngineOptions(measure=False)) as pipe:
        stored = weight_tensors(pipe.bundle, "unet")
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        files = []
        for seed in (1, 2):
            files.append(folder / f"lora-{seed}.safetensors")
            save_file(random_lora(shapes, rank, seed), files[-1])
        height, width = (side // pipe.model.vae_factor for side in pipe.model.default_size)
        weights = sum(pipe.bundle.manifest.files[path].size for path in pipe.bundle.manifest.components["unet"].files)
        report: dict[str, Any] = {"weights_bytes": weights, "lora_bytes": files[0].stat().st_size, "rank": rank, "states": []}

        loras = Loras(pipe.bundle)
        random = np.random.default_rng(0)
        dims = {"batch": 1, "height": height, "width": width, "sequence": 77}
        feeds = {
            tensor.name: random.standard_normal([size_of(dim, dims) for dim in tensor.shape]).astype(tensor.dtype)
            for tensor in pipe.bundle.manifest.components["unet"].inputs
        }

        def state(name: str, *used: Path) -> Array:
            adapters = loras.set_of(Request(prompt="", loras=[Lora(path) for path in used]))
            begun = time.perf_counter()
            engine = pipe.engine("unet", adapters=adapters, height=height, width=width)
            seconds = time.perf_counter() - begun
            report["states"].append({"state": name, "seconds": round(seconds, 2), **memory()})
            print(json.dumps(report["states"][-1]), flush=True)
            [output] = engine(feeds).values()
            return output

        state("opened")
        base, first = state("no LoRA"), state("A", files[0])
        state("B", files[1])
        state("A and B", *files)
        again, restored = state("A, again", files[0]), state("no LoRA, again")
    report["bit_equal"] = bool(np.array_equal(first, again) and np.array_equal(base, restored))
    report["largest_change"] = float(np.abs(first - base).max())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the export and the LoRAs")
    parser.add_argument("--bundle", type=Path, help="measure this bundle's UNet")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    report = measured(options.bundle or exported(options.folder), options.folder, options.rank)
    report |= {"schema": 1, "machine": platform.machine(), "processors": os.cpu_count()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in report.items() if key != "states"}))


if __name__ == "__main__":
    main()
