"""The CPU at full size: our backends beside the libraries on the plain export and beside torch, each run in a process of its own.

    python benchmarks/cpu.py BUNDLE [--checkpoint FOLDER] [--size 256] [--rounds 2] [--calls 2] [--threads 2] [--output cpu.json]

BUNDLE is fp32 and has engines of both backends for the size (benchmarks/gpu/checkpoint.py writes random full-size checkpoints):

    sdruntime build BUNDLE --backend onnxruntime
    sdruntime build BUNDLE --backend openvino --size 256x256

The rows take turns, A B A B, so that drift cancels. On a busy machine the CPU seconds of a call say more than those of the clock.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdruntime.backends import backend
from sdruntime.bundle import Bundle
from sdruntime.engine import Array, EngineOptions, Shared, shape_of
from sdruntime.speed import processor

Call = Callable[[dict[str, Array]], object]
COMPONENTS = ("unet", "vae_decoder", "text_encoder")
BF16 = {"INFERENCE_PRECISION_HINT": "bf16"}


def ours(name: str, session: dict[str, str], bundle: Bundle, component: str, dims: dict[str, int], threads: int) -> Call:
    engines = [each for each in bundle.manifest.engines if each.component == component and each.backend == name]
    spec = next(each for each in engines if each.admits(**dims))
    options = EngineOptions(threads=threads, session=session)
    call: Call = backend(name, "engine").open_engine(bundle, spec, options, Shared())
    return call


def plain_onnxruntime(bundle: Bundle, component: str, dims: dict[str, int], threads: int) -> Call:
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    path = str(bundle.folder / bundle.manifest.components[component].onnx)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def plain_openvino(bundle: Bundle, component: str, dims: dict[str, int], threads: int) -> Call:
    core = backend("openvino", "build").library().Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    path = str(bundle.folder / bundle.manifest.components[component].onnx)
    request = core.compile_model(path, "CPU", settings).create_infer_request()
    return lambda feeds: request.infer(feeds)


def diffusers(bundle: Bundle, component: str, dims: dict[str, int], threads: int, checkpoint: Path) -> Call:
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(threads)
    unet = UNet2DConditionModel.from_pretrained(str(checkpoint / "unet"), torch_dtype=torch.float32).eval()

    def call(feeds: dict[str, Array]) -> object:
        with torch.no_grad():
            return unet(*(torch.from_numpy(feeds[name]) for name in ("sample", "timestep", "encoder_hidden_states")))

    return call


ROWS: dict[str, Callable[..., Call]] = {
    "sdruntime, onnxruntime": functools.partial(ours, "onnxruntime", {}),
    "onnxruntime on the plain export": plain_onnxruntime,
    "sdruntime, openvino": functools.partial(ours, "openvino", {}),
    "OpenVINO on the plain export": plain_openvino,
    "sdruntime, openvino, bf16": functools.partial(ours, "openvino", BF16),
}
COLUMNS = ("call_s", "call_cpu_s", "open_s", "open_cpu_s", "anonymous_gb", "peak_rss_gb")
DIFFUSERS = "diffusers, eager fp32"


def run_one(row: str, component: str, options: argparse.Namespace) -> dict[str, float]:
    """Open, then some calls; in this process."""
    bundle = Bundle.open(options.bundle)
    cells = options.size // bundle.manifest.model.vae_factor
    known = {"batch": 2 if component != "vae_decoder" else 1, "height": cells, "width": cells, "sequence": 77}
    dims = {name: known[name] for name in bundle.manifest.components[component].dimensions}
    feeds = {}
    for tensor in bundle.manifest.components[component].inputs:
        values = np.random.default_rng(0).standard_normal(shape_of(tensor, dims, bundle.manifest.model.vae_factor))
        feeds[tensor.name] = np.abs(100 * values).astype(tensor.dtype) if tensor.dtype != "float32" else values.astype(np.float32)
    clock, cpu = time.perf_counter(), time.process_time()
    at = (bundle, component, dims, options.threads)
    call = diffusers(*at, options.checkpoint) if row == DIFFUSERS else ROWS[row](*at)
    found = {"open_s": time.perf_counter() - clock, "open_cpu_s": time.process_time() - cpu}
    clocks, cpus = [], []
    for _ in range(1 + options.calls):
        clock, cpu = time.perf_counter(), time.process_time()
        call(feeds)
        clocks.append(time.perf_counter() - clock)
        cpus.append(time.process_time() - cpu)
    found |= {"call_s": min(clocks[1:]), "call_cpu_s": min(cpus[1:])}
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.count(":") == 1)
    kept = {"rss_gb": "VmRSS", "anonymous_gb": "RssAnon", "peak_rss_gb": "VmHWM"}
    return found | {name: int(status[key].split()[0]) / 1e6 for name, key in kept.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--checkpoint", type=Path, help="adds diffusers' own UNet")
    for name, default in (("size", 256), ("rounds", 2), ("calls", 2), ("threads", 2)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--component", action="append", dest="components", choices=COMPONENTS)
    arguments.add_argument("--output", type=Path)
    arguments.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.one:
        row, component = options.one
        print(json.dumps(run_one(row, component, options)))
        return
    result: dict[str, Any] = {
        "processor": processor().split(" fpu ")[0],
        "python": platform.python_version(),
        **{name: getattr(options, name) for name in ("size", "rounds", "calls", "threads")},
        "load": {"before": os.getloadavg()[0]},
        "components": {},
    }
    for component in options.components or COMPONENTS:
        rows = [*ROWS, *([DIFFUSERS] if options.checkpoint and component == "unet" else [])]
        best: dict[str, dict[str, float]] = {}
        for _ in range(options.rounds):
            for row in rows:
                command = [sys.executable, *sys.argv, "--one", row, component]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                best[row] = {key: round(min(value, best.get(row, found)[key]), 3) for key, value in found.items()}
                print(component, row, json.dumps(best[row]), file=sys.stderr, flush=True)
        result["components"][component] = best
        result["load"]["after"] = os.getloadavg()[0]
        print(f"| {component} | call, s | call, CPU s | open, s | open, CPU s | own memory after, GB | peak, GB |")
        print("|---" * 7 + "|")
        for row, each in best.items():
            parts = [each[key] for key in COLUMNS]
            print(f"| {row} | {' | '.join(f'{part:.2f}' for part in parts)} |", flush=True)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
