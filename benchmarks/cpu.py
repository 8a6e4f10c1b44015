"""Measure a full-size SD1.5 on the CPU: our backends, the same libraries on the plain export, and diffusers.

    python benchmarks/cpu.py FOLDER [--size 512] [--row NAME] [--column NAME] [--rounds 2] [--calls 2] [--output cpu.json]

What FOLDER lacks is created: a checkpoint of random weights (see benchmarks/gpu/checkpoint.py), its fp32 bundle, and for each
row a bundle with our engines (20 GB in all). Every number is measured in its own process. The rows alternate, A B A B, so that
drift affects all alike; the minimum of the rounds counts. `whole` is a cold start: from the start of the process to the first
denoised step of a guided image, then a decoded image, and the peak memory until then. An existing output file is added to.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.base.feeds import shape_of
from sdruntime.backends.ort.build import library as onnxruntime
from sdruntime.backends.ov.build import library as openvino
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.system import processor
from sdruntime.system.process import module_command

Call = Callable[[dict[str, Array]], object]
COMPONENTS = ("unet", "vae_decoder", "text_encoder")
WHOLE = "whole"
PROMPT = "a photograph of a lighthouse in a storm"
BF16 = {"inference_precision": "bf16"}
OURS: dict[str, tuple[str, dict[str, str]]] = {
    "sdruntime, onnxruntime": ("onnxruntime", {}),
    "sdruntime, openvino": ("openvino", {}),
    "sdruntime, openvino in bf16": ("openvino", BF16),
}
TORCH = {"diffusers, eager fp32": "float32", "diffusers, eager bf16": "bfloat16", "diffusers, torch.compile fp32": "float32"}


def our_bundle(options: argparse.Namespace, row: str) -> Path:
    """Return the bundle with the engines of a row: a copy of the plain bundle with linked files, built if it is missing."""
    name, settings = OURS[row]
    folder: Path = options.folder / f"{row.replace(', ', '-').replace(' ', '-')}-{options.size}"
    if not folder.exists():
        staging = folder.with_name(folder.name + ".part")
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(options.folder / "bundle", staging, copy_function=os.link)
        shape = {"size": f"{options.size}x{options.size}", "batch": "1"} if name == "openvino" else {}
        for _ in build_engines(staging, BuildRequest(backend=name, options=settings, **shape)):  # type: ignore[arg-type]
            pass
        staging.rename(folder)
    return folder


def ours(row: str, options: argparse.Namespace, component: str, dims: dict[str, int]) -> Call:
    bundle = Bundle.open(our_bundle(options, row))
    spec = next(spec for spec in bundle.manifest.engines if spec.component == component and spec.admits(**dims))
    call: Call = BACKENDS[OURS[row][0]].open_engine(bundle, spec, EngineOptions(threads=options.threads), Shared())
    return call


def plain_onnxruntime(options: argparse.Namespace, component: str, dims: dict[str, int]) -> Call:
    ort = onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = 3
    path = str(options.folder / "bundle" / component / "model.onnx")
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def plain_openvino(precision: str | None, options: argparse.Namespace, component: str, dims: dict[str, int]) -> Call:
    """Open a component with OpenVINO. `precision`: None for OpenVINO's default, which is bf16 if the CPU supports it."""
    core = openvino().Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": options.threads}
    settings |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    path = str(options.folder / "bundle" / component / "model.onnx")
    request = core.compile_model(path, "CPU", settings).create_infer_request()
    return lambda feeds: request.infer(feeds)


def diffusers(row: str, options: argparse.Namespace, component: str, dims: dict[str, int]) -> Call:
    import torch

    pipe = _diffusers_pipeline(row, options)
    kind = getattr(torch, TORCH[row])
    modules = {"unet": pipe.unet, "vae_decoder": pipe.vae.decode, "text_encoder": pipe.text_encoder}
    module = torch.compile(modules[component]) if "compile" in row else modules[component]

    def call(feeds: dict[str, Array]) -> object:
        tensors = [torch.from_numpy(array) for array in feeds.values()]
        with torch.inference_mode():
            return module(*(tensor.to(kind) if tensor.is_floating_point() else tensor for tensor in tensors))

    return call


def _diffusers_pipeline(row: str, options: argparse.Namespace) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(options.threads)
    return StableDiffusionPipeline.from_pretrained(
        str(options.folder / "checkpoint"), torch_dtype=getattr(torch, TORCH[row]), safety_checker=None, local_files_only=True
    )


ROWS: dict[str, Callable[..., Call]] = {
    **{row: functools.partial(ours, row) for row in OURS},
    "onnxruntime on the plain export": plain_onnxruntime,
    "OpenVINO on the plain export": functools.partial(plain_openvino, None),
    "OpenVINO on the plain export, f32": functools.partial(plain_openvino, "f32"),
    **{row: functools.partial(diffusers, row) for row in TORCH},
}
COLD = (
    *OURS,
    "diffusers, eager fp32",
    "diffusers, eager bf16",
)  # the rows that generate whole images without minutes of compiling


def feeds_of(bundle: Bundle, component: str, options: argparse.Namespace) -> tuple[dict[str, int], dict[str, Array]]:
    """Return dimensions and random inputs: two rows for a UNet or text encoder (guidance), one for a decoder."""
    factor, spec = bundle.manifest.model.vae_factor, bundle.manifest.components[component]
    cells = options.size // factor
    known = {
        "batch": 1 if component == "vae_decoder" else 2,
        "height": cells,
        "width": cells,
        "sequence": bundle.manifest.text_length,
    }
    dims = {name: known[name] for name in spec.dimensions}
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in spec.inputs:
        values = random.standard_normal(shape_of(tensor, dims, factor))
        whole = tensor.dtype != "float32" or tensor.name == "timestep"
        feeds[tensor.name] = (np.abs(100 * values) if whole else values).astype(tensor.dtype)
    return dims, feeds


class Memory:
    """Peak memory of this process: private memory (sampled every 50 ms), and memory including mapped files."""

    def __init__(self) -> None:
        self._own = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._own = max(self._own, self._of("RssAnon"))
            time.sleep(0.05)

    def _of(self, key: str) -> float:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[key].split()[0]) / 1e6

    def figures(self) -> dict[str, float]:
        return {"own_gb": self._own, "peak_gb": self._of("VmHWM")}


def run_component(row: str, component: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure opening a component and calling it, in this process."""
    memory = Memory()
    dims, feeds = feeds_of(Bundle.open(options.folder / "bundle"), component, options)
    begun = time.perf_counter()
    call = ROWS[row](options, component, dims)
    figures = {"open_s": time.perf_counter() - begun}
    clocks = []
    for _ in range(1 + options.calls):
        begun = time.perf_counter()
        call(feeds)
        clocks.append(time.perf_counter() - begun)
    return figures | {"first_s": clocks[0], "call_s": min(clocks[1:])} | memory.figures()


def run_whole(row: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure the time to the first denoised step, then decode it; in this process, which started at `options.begun`."""
    memory = Memory()
    if row in OURS:
        engines = EngineOptions(threads=options.threads)
        with Pipeline.open(our_bundle(options, row), backend=OURS[row][0], options=engines) as pipe:
            loop = pipe.stream(Request(prompt=PROMPT, size=(options.size, options.size)))
            next(iter(loop))
            first = time.time() - options.begun
            loop.close()
            image = loop.result.pixels[0]
    else:
        pipe, times = _diffusers_pipeline(row, options), []

        def stop(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            times.append(time.time() - options.begun)
            pipe._interrupt = True
            return kept

        pipe.set_progress_bar_config(disable=True)
        output = pipe(
            PROMPT,
            num_inference_steps=20,
            width=options.size,
            height=options.size,
            output_type="np",
            callback_on_step_end=stop,
        )
        first, image = times[0], output.images[0]
    if image.shape != (options.size, options.size, 3):
        raise SystemExit(f"{row}: an image of shape {image.shape}")
    return {"first_step_s": first} | memory.figures()


def prepare(options: argparse.Namespace) -> None:
    if not (options.folder / "checkpoint").exists():
        from benchmarks.gpu.checkpoint import write_checkpoint

        staging = options.folder / "checkpoint.part"
        shutil.rmtree(staging, ignore_errors=True)
        write_checkpoint(staging, "sd15")
        staging.rename(options.folder / "checkpoint")
    if not (options.folder / "bundle").exists():
        command = ["build", options.folder / "checkpoint", "-o", options.folder / "bundle", "--precision", "fp32", "--no-verify"]
        subprocess.run(module_command("sdexport", *map(str, command)), check=True)
    for row in options.rows:
        if row in OURS:
            our_bundle(options, row)


def in_own_process(row: str, column: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--one", row, column, "--begun", str(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def table(column: str, figures: dict[str, dict[str, float]]) -> str:
    names = {
        "open_s": "opening, s",
        "first_s": "first call, s",
        "call_s": "per call, s",
        "first_step_s": "to the first step, s",
        "own_gb": "peak private memory, GB",
        "peak_gb": "peak including mapped files, GB",
    }
    columns = [name for name in names if any(name in row for row in figures.values())]
    rows = [f"| {column} | {' | '.join(names[name] for name in columns)} |", "|---" * (1 + len(columns)) + "|"]
    rows += [f"| {row} | {' | '.join(f'{values[name]:.2f}' for name in columns)} |" for row, values in figures.items()]
    return "\n".join(rows)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    for name, default in (("size", 512), ("rounds", 2), ("calls", 2), ("threads", 2)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--row", action="append", dest="rows", choices=list(ROWS))
    arguments.add_argument("--column", action="append", dest="columns", choices=[*COMPONENTS, WHOLE])
    arguments.add_argument("--output", type=Path)
    arguments.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    options.rows = options.rows or list(ROWS)
    if options.one:
        row, column = options.one
        print(json.dumps(run_whole(row, options) if column == WHOLE else run_component(row, column, options)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    prepare(options)
    result: dict[str, Any] = {"sizes": {}}
    if options.output and options.output.exists():
        result = json.loads(options.output.read_text())
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "onnxruntime", "openvino", "torch", "diffusers")}
    result |= {"processor": f"{processor.name()} x{processor.cores()}", "python": platform.python_version(), "versions": versions}
    of_size = result["sizes"].setdefault(str(options.size), {})
    for column in options.columns or (*COMPONENTS, WHOLE):
        best: dict[str, dict[str, float]] = {}
        before = os.getloadavg()[0]
        for _ in range(options.rounds):
            for row in options.rows:
                if column == WHOLE and row not in COLD:
                    continue
                figures = in_own_process(row, column)
                best[row] = {key: round(min(value, best.get(row, figures)[key]), 3) for key, value in figures.items()}
                print(column, row, json.dumps(best[row]), file=sys.stderr, flush=True)
        settings = {name: getattr(options, name) for name in ("rounds", "calls", "threads")}
        of_size[column] = {**settings, "load_before": before, "rows": of_size.get(column, {}).get("rows", {}) | best}
        print(table(column, best), flush=True)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
