"""Full-size components of random weights audited for fp16, and their fp16 graphs beside float32 in ONNX Runtime.

    python -m benchmarks.precision sd15 --folder DIR [--component unet] [--json benchmarks/results/precision.json]

The checkpoint (float32, every tensor differs), the float32 bundle and what its components are fed in three prompts of 512×512 are
made in DIR where they are not there yet, so that a run may do one component. Each measurement is a process of its own. Per
component: seconds and peak memory of the audit, its nodes in float32, and how far the written fp16 graph is from float32 on the
activations that the audit judges, with every value rounded, and on the first and the last of them in ONNX Runtime, which takes
out casts that meet.
`sd-turbo` has the networks of SD2.1. Needs 12 GB of disk.
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
from sdexport.precision.audit import judged
from sdexport.precision.probe import load_activations
from sdexport.trace.component import AUDIT, MODEL, PROBE, ComponentJob
from sdexport.trace.process import run_job
from sdruntime.system.events import finish
from sdruntime.system.process import module_command
from sdruntime.verification.metrics import Difference

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def prepared(model: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The checkpoint, the float32 bundle, and the activations, each where it is not there."""
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
    """The numbers of one component, whose fp16 graph goes with them."""
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
    """Seconds of each stage, and the peak of memory."""
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


def compare(reference: Path, made: Path) -> dict[str, Any]:
    """The worst of the outputs of the fp16 graph against those that float32 gave, in ONNX Runtime."""
    feeds, session, worst = judged(load_activations(reference).feeds)[::-1], session_of(made / MODEL), []
    feeds = feeds[:: max(1, len(feeds) - 1)]
    for feed in feeds:
        for output, expected in zip(session.run(None, dict(feed.arrays)), feed.outputs, strict=True):
            worst.append(Difference.of(output, expected, float(expected.max() - expected.min())))
    return {
        "shapes": {name: list(array.shape) for name, array in feeds[0].arrays.items()},
        "of": len(feeds),
        "cosine": round(min(each.cosine for each in worst), 8),
        "psnr": round(min(each.psnr for each in worst), 2),
        "max_abs": max(each.max_abs for each in worst),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints and bundles lie")
    parser.add_argument("--component", action="append", dest="components", choices=COMPONENTS, help="all where left out")
    parser.add_argument("--json", type=Path, help="add the numbers to this file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.json:
        with contextlib.suppress(FileNotFoundError):
            found = json.loads(options.json.read_text())
    row = found.setdefault(options.model, {})
    row |= dict(prepared(options.model, options.folder))
    for component in options.components or COMPONENTS:
        row[component] = audited(options.model, component, options.folder)
        print(json.dumps({component: row[component]}, indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compare"]:
        print(json.dumps(compare(*map(Path, sys.argv[2:]))))
    else:
        main()
