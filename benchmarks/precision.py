"""Measure the fp16 audit of full-size components with random weights, and compare their fp16 graphs with float32.

    python -m benchmarks.precision sd15 --folder DIR [--component unet] [--json benchmarks/results/precision.json]

The checkpoint (float32, every tensor differs), the float32 bundle and the activations of three prompts at 512×512 are created in
DIR if they are missing, so a run can do a single component. Each measurement runs in its own process. Per component: seconds and
peak memory of the audit, the nodes it keeps in float32, and the difference between the fp16 graph and float32: on the activations
that the audit judges, with every value rounded, and on the first and the last of them in ONNX Runtime, which removes adjacent
casts. `sd-turbo` has the networks of SD2.1. Requires 12 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.export_full_size import ROOT
from benchmarks.gpu.checkpoint import MODELS
from benchmarks.gpu.tasks import environment
from sdexport.build.events import ExportOptions
from sdexport.build.export import export
from sdexport.precision.activations import session_of
from sdexport.precision.audit import select_feeds
from sdexport.precision.probe import load_activations
from sdexport.trace.component import AUDIT, MODEL, PROBE, ComponentJob
from sdexport.trace.process import run_job
from sdruntime.system.events import finish
from sdruntime.system.process import module_command
from sdruntime.verification.metrics import Difference

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def prepared(model: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Create the checkpoint, the float32 bundle and the activations if they are missing; yield the figures of the probe."""
    checkpoint, bundle = folder / model, folder / f"{model}-fp32"
    if not checkpoint.exists():
        script = ROOT / "benchmarks" / "gpu" / "checkpoint.py"
        subprocess.run([sys.executable, str(script), model, str(checkpoint), "F32"], check=True, cwd=ROOT)
    if not bundle.exists():
        for _ in export(str(checkpoint), bundle, ExportOptions(verify=False)):
            pass
    if not (bundle / "unet" / "activations.json").exists():
        job = ComponentJob(checkpoint="", component=PROBE, precision="fp32", allow_pickle=False, out=str(bundle))
        seconds, peak = timed(job)
        yield "probe", {"seconds": seconds["probe"], "peak": peak}


def audited(model: str, component: str, folder: Path) -> dict[str, Any]:
    """Audit one component, write its fp16 graph, and return the figures."""
    out = folder / f"{model}-fp16" / component
    out.mkdir(parents=True, exist_ok=True)
    (out / AUDIT).unlink(missing_ok=True)
    job = ComponentJob(
        checkpoint=str(folder / model),
        component=component,
        precision="fp16",
        allow_pickle=False,
        out=str(out),
        reference=str(folder / f"{model}-fp32"),
    )
    seconds, peak = timed(job)
    audit = json.loads((out / AUDIT).read_text())
    command = module_command("benchmarks.precision", "--compare", str(folder / f"{model}-fp32" / component), str(out))
    compared = subprocess.run(command, check=True, env=environment(), stdout=subprocess.PIPE, text=True)
    return {
        "seconds": {stage: seconds[stage] for stage in ("audit", "confirm")},
        "peak": peak,
        "activations": audit["feeds"],
        "nodes": audit["nodes"],
        "in_float32": [f"{node['node']} ({node['op']}): {node['reason']}" for node in audit["kept"]],
        "largest": audit["largest"],
        "every_value_rounded": {"cosine": audit["cosine"], "psnr": audit["psnr"]},
        "onnxruntime": json.loads(compared.stdout),
    }


def timed(job: ComponentJob) -> tuple[dict[str, float], int]:
    """Run a job; return the seconds of each stage and the peak memory in bytes."""
    taken: dict[str, float] = {}
    name, begun = "", time.perf_counter()

    def end_stage(following: str) -> None:
        nonlocal name, begun
        now = time.perf_counter()
        if name:
            taken[name] = round(taken.get(name, 0.0) + now - begun, 1)
        name, begun = following, now

    peak = finish(run_job(job), lambda stage: end_stage(stage.name))
    end_stage("")
    return taken, peak


def compare(reference: Path, built: Path) -> dict[str, Any]:
    """Return the worst differences between the outputs of the fp16 graph `built` in ONNX Runtime and those of float32."""
    feeds, session, differences = select_feeds(load_activations(reference).feeds)[::-1], session_of(built / MODEL), []
    feeds = feeds[:: max(1, len(feeds) - 1)]
    for feed in feeds:
        for output, expected in zip(session.run(None, dict(feed.arrays)), feed.outputs, strict=True):
            differences.append(Difference.of(output, expected, float(expected.max() - expected.min())))
    return {
        "shapes": {name: list(array.shape) for name, array in feeds[0].arrays.items()},
        "of": len(feeds),
        "cosine": round(min(difference.cosine for difference in differences), 8),
        "psnr": round(min(difference.psnr for difference in differences), 2),
        "max_abs": max(difference.max_abs for difference in differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--folder", type=Path, required=True, help="folder of checkpoints and bundles")
    parser.add_argument("--component", action="append", dest="components", choices=COMPONENTS, help="(all)")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    document: dict[str, Any] = {}
    if options.json:
        with contextlib.suppress(FileNotFoundError):
            document = json.loads(options.json.read_text())
    row = document.setdefault(options.model, {})
    row |= dict(prepared(options.model, options.folder))
    for component in options.components or COMPONENTS:
        row[component] = audited(options.model, component, options.folder)
        print(json.dumps({component: row[component]}, indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compare"]:
        print(json.dumps(compare(*map(Path, sys.argv[2:]))))
    else:
        main()
