"""Exporting a full-size UNet with random weights to fp16: time, peak memory and bytes, beside torch.onnx.export alone.

    python benchmarks/export_full_size.py sd15 --work FOLDER [--output export-sd15.json]
    python benchmarks/export_full_size.py sdxl --work FOLDER --no-baseline

Each side runs in a process of its own, whose peak is the high-water mark of its resident memory. FOLDER takes two or three
times the weights (SD1.5: 6 GB, SDXL: 11 GB). No kept trace is used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sdexport.job import Job, Stage
from sdexport.process import run_apart

ROOT = Path(__file__).resolve().parents[1]
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CHECKPOINT = """
import sys
sys.path.insert(0, {tests!r})
import json, torch
from pathlib import Path
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tiny import write_checkpoint
folder = write_checkpoint(Path({folder!r}), {kind!r})
with torch.device("meta"):
    unet = UNet2DConditionModel(**json.loads({config!r}))
torch.manual_seed(0)
weights = {{name: torch.randn(tensor.shape, dtype=torch.float16) * 0.02 for name, tensor in unet.state_dict().items()}}
save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
unet.save_config(folder / "unet")
print(sum(tensor.numel() for tensor in weights.values()))
"""
BASELINE = """
import json, time, torch
from pathlib import Path
from diffusers import UNet2DConditionModel
from sdexport.process import peak_memory
begun = time.monotonic()
unet = UNet2DConditionModel.from_pretrained({unet!r}, torch_dtype=torch.float16).eval()
side, half = {side}, torch.float16
feeds = (torch.zeros(2, 4, side, side, dtype=half), torch.zeros(2, dtype=half), torch.zeros(2, 77, {text}, dtype=half))
sizes = {{0: "batch", 2: "height", 3: "width"}}
torch.onnx.export(unet, feeds, {out!r}, dynamo=True, opset_version=20, external_data=True,
                  dynamic_shapes=(sizes, {{0: "batch"}}, {{0: "batch"}}))
print(json.dumps({{"seconds": time.monotonic() - begun, "peak": peak_memory()}}))
"""


def script(code: str, **values: Any) -> str:
    """The last line that a process of its own prints when it runs `code`."""
    command = [sys.executable, "-c", code.format(**values)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip().splitlines()[-1]


def exported(checkpoint: Path, out: Path) -> dict[str, Any]:
    out.mkdir(parents=True)
    job = Job(checkpoint=str(checkpoint), component="unet", precision="fp16", allow_pickle=False, out=str(out))
    stages: dict[str, float] = {}
    begun, peak = time.monotonic(), 0
    for event in run_apart(job):
        if isinstance(event, Stage):
            stages.setdefault(event.name, time.monotonic() - begun)
        else:
            peak = event
    seconds = time.monotonic() - begun
    return {"seconds": seconds, "peak": peak, "bytes": size_of(out), "stages_begin": stages}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("family", choices=UNETS)
    arguments.add_argument("--work", type=Path, help="a folder with room (a temporary one)")
    arguments.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    config = UNETS[options.family]
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        os.environ["SDEXPORT_CACHE"] = str(Path(work) / "cache")
        checkpoint = Path(work) / "checkpoint"
        kind = "sdxl" if options.family == "sdxl" else "sd1"
        count = script(CHECKPOINT, tests=str(ROOT / "tests"), folder=str(checkpoint), kind=kind, config=json.dumps(config))
        result: dict[str, Any] = {
            "unet": options.family,
            "parameters": int(count),
            "sdexport": exported(checkpoint, Path(work) / "ours"),
        }
        if options.baseline:
            theirs = Path(work) / "theirs"
            theirs.mkdir()
            printed = script(
                BASELINE,
                unet=str(checkpoint / "unet"),
                side=config["sample_size"],
                text=config["cross_attention_dim"],
                out=str(theirs / "model.onnx"),
            )
            result["torch.onnx.export"] = json.loads(printed) | {"bytes": size_of(theirs)}
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
