"""Measure the build of TensorRT-RTX engines without a GPU: time, peak memory and size of each full-size component.

    python benchmarks/tensorrt_rtx.py sd15 [--folder DIR] [--json FILE]
    python benchmarks/tensorrt_rtx.py sdxl --component unet

The weights are random float16 numbers, all different. The export is `sdexport build --precision fp16` with an empty cache of
traces; the engines are built by `sdruntime build --backend tensorrt-rtx` at the model's own size, for one image with guidance.
Requires 6 GB (SD1.5) or 20 GB (SDXL) of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run_json(*command: str | Path, environment: dict[str, str]) -> tuple[dict[str, Any], float]:
    """Run a command; return the JSON that it prints and its seconds."""
    from sdruntime.system.process import module_command

    begun = time.perf_counter()
    done = subprocess.run(
        module_command(*map(str, command)), env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document, round(time.perf_counter() - begun, 1)


def measured(model: str, folder: Path, target: str, components: list[str]) -> dict[str, Any]:
    from benchmarks.gpu.checkpoint import write_checkpoint

    checkpoint, bundle = write_checkpoint(folder / "checkpoint", model), folder / "bundle"
    environment = {"SDEXPORT_CACHE": str(folder / "cache"), "SDRUNTIME_CACHE": str(folder / "cache")}
    export, exported = run_json(
        *("sdexport", "build", str(checkpoint), "-o", str(bundle), "--precision", "fp16"),
        *("--no-audit", "--no-verify", "--json"),
        environment=environment,
    )
    only = [part for name in components for part in ("--component", name)]
    command = ("build", str(bundle), "--backend", "tensorrt-rtx", "--target", target, *only, "--json")
    engines, built = run_json("sdruntime", *command, environment=environment)
    return {
        "export": {"seconds": exported, "peak_memory": export["peak_memory"], "bytes": export["written"]},
        "engines": {engine.pop("component"): engine for engine in engines["engines"]},
        "engines_seconds": built,
        "seconds": round(exported + built, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("sd15", "sd-turbo", "sdxl"))
    parser.add_argument("--target", default="ampere+")
    parser.add_argument("--component", action="append", default=[], help="build only this component's engines (may be repeated)")
    parser.add_argument("--folder", type=Path, help="parent of the working folder (the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        figures = measured(options.model, Path(name), options.target, options.component)
    document = {"model": options.model, "machine": f"{platform.machine()}, {os.cpu_count()} cores", **figures}
    print(json.dumps(document, indent=1))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
