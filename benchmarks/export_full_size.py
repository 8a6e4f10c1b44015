"""Measure the export of a full-size UNet with random weights to fp16: time, peak memory, sizes; compare torch.onnx.export.

    python benchmarks/export_full_size.py sd15 [--folder DIR] [--json FILE]
    python benchmarks/export_full_size.py sdxl --ours-only

Each measurement runs in its own process. The weights are generated tensor by tensor, all different, so that none are shared. They
are stored as float32 for SD1.5 and as float16 for SDXL. The rival is torch.onnx.export of the same module, loaded in float16,
with the same inputs, opset and dynamic shapes. Requires 6 GB (SD1.5) or 11 GB (SDXL) of disk.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "layers_per_block": 2,
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
STORED = {"sd15": ("F32", np.float32), "sdxl": ("F16", np.float16)}


def write_checkpoint(folder: Path, kind: str) -> None:
    """Write a checkpoint with a full-size UNet; its other parts are the small ones of tests/tiny.py."""
    sys.path.insert(0, str(ROOT / "tests"))
    tiny = importlib.import_module("tiny")
    tiny.write_checkpoint(folder, "sdxl" if kind == "sdxl" else "sd1")
    (folder / "unet" / "config.json").write_text(json.dumps(CONFIGS[kind] | {"_class_name": "UNet2DConditionModel"}))
    if kind == "sdxl":
        path = folder / "text_encoder_2" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"projection_dim": 1280}))
    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", shapes(kind), kind)


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(CONFIGS[kind])
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def write_weights(path: Path, tensors: Mapping[str, tuple[int, ...]], kind: str) -> None:
    """Write a safetensors file of random numbers, with one tensor in memory at a time. `tensors`: name -> shape."""
    name_of, dtype = STORED[kind]
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": name_of, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            numbers = random.standard_normal(shape, dtype=np.float32)
            numbers *= 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
            file.write(np.ascontiguousarray(numbers, dtype=dtype).tobytes())


def ours(checkpoint: Path, out: Path) -> None:
    from sdexport.trace.component import ComponentJob
    from sdexport.trace.process import run_job
    from sdruntime.system.events import finish

    job = ComponentJob(checkpoint=str(checkpoint), component="unet", precision="fp16", allow_pickle=False, out=str(out))
    marks: dict[str, float] = {}
    start = time.perf_counter()
    peak = finish(run_job(job), lambda stage: marks.setdefault(stage.name, time.perf_counter() - start))
    print(json.dumps({"stages": marks, "peak": peak}))


def theirs(checkpoint: Path, out: Path) -> None:
    """Run torch.onnx.export on the module as a user would load it."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float16, low_cpu_mem_usage=False).eval()
    width = unet.config["cross_attention_dim"]
    inputs: dict[str, Any] = {
        "sample": torch.zeros(2, 4, 16, 16, dtype=torch.float16),
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.zeros(2, 77, width, dtype=torch.float16),
    }
    dims: dict[str, Any] = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "timestep": {0: "batch"},
        "encoder_hidden_states": {0: "batch", 1: "sequence"},
    }
    if unet.config.get("addition_embed_type"):
        added = {"text_embeds": torch.zeros(2, 1280, dtype=torch.float16), "time_ids": torch.zeros(2, 6, dtype=torch.float16)}
        inputs["added_cond_kwargs"] = added
        dims["added_cond_kwargs"] = {name: {0: "batch"} for name in added}
    torch.onnx.export(unet, (), str(out / "model.onnx"), kwargs=inputs, dynamic_shapes=dims, opset_version=20, dynamo=True)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def measured(part: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Measure `part`, "ours" or "theirs", in its own process with an empty cache."""
    out = folder / part
    out.mkdir()
    environment = os.environ | {"SDEXPORT_CACHE": str(folder / f"cache-{part}")}
    command = [sys.executable, __file__, "--part", part, str(checkpoint), str(out)]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return {"seconds": round(seconds, 1), **json.loads(done.stdout.strip().splitlines()[-1]), "files": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CONFIGS)
    parser.add_argument("--folder", type=Path, help="parent of the working folder (the system's temporary folder)")
    parser.add_argument("--ours-only", action="store_true", help="skip torch.onnx.export")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--part", "write", options.kind, str(folder / "checkpoint")], check=True)
        parts = ("ours",) if options.ours_only else ("ours", "theirs")
        results = {part: measured(part, folder / "checkpoint", folder) for part in parts}
    document = {"model": options.kind, "machine": f"{platform.machine()}, {os.cpu_count()} cores", **results}
    print(json.dumps(document, indent=1))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        _, _, part, *paths = sys.argv
        if part == "write":
            write_checkpoint(Path(paths[1]), paths[0])
        else:
            {"ours": ours, "theirs": theirs}[part](Path(paths[0]), Path(paths[1]))
    else:
        main()
