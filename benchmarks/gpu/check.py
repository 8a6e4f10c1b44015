"""Check one backend on one bundle: build and open engines, compare images with the CPU's, and look for leaked GPU memory.

`make gpu-test` asserts the results, `make gpu-report` writes them to a report. The bundle is copied, never written to.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.backends import look, preload
from benchmarks.gpu.measure import loop
from sdexport.bench.diffusers import EAGER, Diffusers
from sdexport.bench.subject import copy_without_engines
from sdexport.bench.timing import Array, generate, psnr, text_of
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.system.cuda import Cuda

FLOORS: Mapping[str, float] = {"fp32": 40.0, "fp16": 30.0}  # dB against the CPU's image in fp32
LOOP_FLOOR = 50.0  # dB: the loop on the device against the loop in NumPy, on the same engines
MOST_LEFT = 16 << 20  # bytes: tolerance for leaked memory, as other processes may use the GPU
FLAT = 10.0  # standard deviation, of 255, below which an image is a failure
STAGES = ("missing", "loaded", "built", "opened", "drawn")
STEPS, CYCLES = 20, 3


def check_requests(prompt: str) -> dict[str, list[Request]]:
    """Return the requests by name: one image, a batch, jobs with different steps, samplers and guidance, image to image."""
    gray = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    return {
        "one": [Request(prompt=prompt, seed=7, steps=STEPS, guidance=2.0)],
        "four": [Request(prompt=prompt, seed=seed, steps=STEPS, guidance=2.0) for seed in range(4)],
        "unlike": [
            Request(prompt=prompt, seed=1, steps=8, guidance=2.0, sampler="euler_a"),
            Request(prompt=prompt, seed=2, steps=12, guidance=1.0, sampler="dpmpp_2m"),
            Request(prompt=prompt, negative="green", seed=3, steps=10, guidance=3.0, sampler="unipc"),
        ],
        "image": [Request(prompt=prompt, seed=5, steps=12, guidance=2.0, image=gray, strength=0.7)],
    }


def cpu_pictures(bundle: Path, place: Path, prompt: str) -> Path:
    """Generate the images of `check_requests` by ONNX Runtime on the CPU, the reference for every backend; return their file."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        copy = copy_without_engines(bundle, Path(folder) / "bundle")
        for _ in build_engines(copy, BuildRequest(backend="onnxruntime", target="cpu")):
            pass
        with Pipeline.open(copy, backend="onnxruntime") as pipe:
            pictures = {name: np.stack(generate(pipe, each, on_device=False)) for name, each in check_requests(prompt).items()}
    path = place / f"reference-{bundle.name}.npz"
    np.savez(path, **pictures)  # type: ignore[arg-type]
    return path


def diffusers_pictures(job: Mapping[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Generate "one" and "four" by diffusers in float32 on the same GPU, into the file `out`. Raises what diffusers raises."""
    with contextlib.closing(Diffusers(Path(job["checkpoint"]), device=job["device"], precision="fp32")) as rival:
        pictures = {name: np.stack(rival.generate(EAGER, check_requests(job["prompt"])[name])) for name in ("one", "four")}
    np.savez(job["out"], **pictures)  # type: ignore[arg-type]
    save({"out": job["out"]})


def check(job: Mapping[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Run the check; save the `stage` it reached, engines, PSNRs, loop times, leaked bytes, and an exception as `error`.

    `job`: bundle, backend, prompt, reference (a file of `cpu_pictures`), diffusers (of `diffusers_pictures`, or empty).
    """
    bundle = Path(job["bundle"])
    precision = Bundle.open(bundle).manifest.precision
    found = look(job["backend"], precision)
    results: dict[str, Any] = {"backend": found.name, "version": found.version, "target": found.target, "precision": precision}
    results |= {"listed": found.listed, "stage": "missing"}
    if found.missing:
        save(results | {"missing": found.missing})
        return
    results["stage"] = "loaded"
    save(results)
    if found.name == "onnxruntime":
        preload()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a runtime cache that cannot be stored is not a failure
        try:
            _build(copy_without_engines(bundle, Path(folder) / "bundle"), results, save)
            _generate_and_measure(Path(folder) / "bundle", job, results, save)
        except Exception as error:  # the report needs the library's message
            results["error"] = text_of(error)
            save(results)


def _build(bundle: Path, results: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    results["built"] = {}
    static = BACKENDS[results["backend"]].static
    request = BuildRequest(
        backend=results["backend"],
        target=results["target"],
        batch="1:1:4" if static else None,
        guidance="any" if static else None,
    )
    for event in build_engines(bundle, request):
        if event.state == "done":
            results["built"][event.component] = {"seconds": round(event.seconds, 1), "bytes": event.size}
            save(results)
    results["stage"] = "built"
    save(results)


def _generate_and_measure(
    bundle: Path, job: Mapping[str, Any], results: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> None:
    on_device, requests = BACKENDS[results["backend"]].loop is not None, check_requests(job["prompt"])
    with Cuda.open() as cuda:  # keeps the context open, so that memory the libraries keep in it is counted once
        begun = time.perf_counter()
        with Pipeline.open(bundle, backend=results["backend"]) as pipe:
            results |= {"stage": "opened", "open_s": round(time.perf_counter() - begun, 3)}
            save(results)
            pictures = {name: generate(pipe, each, on_device=True) for name, each in requests.items()}
            results["std"] = {name: round(float(min(image.std() for image in each)), 1) for name, each in pictures.items()}
            results["psnr"] = {name: psnr(pictures[name], list(each)) for name, each in _load(job["reference"]).items()}
            if job["diffusers"]:
                results["psnr_diffusers"] = {
                    name: psnr(pictures[name], list(each)) for name, each in _load(job["diffusers"]).items()
                }
            results["loops"] = {}
            if on_device:
                again = {name: generate(pipe, each, on_device=False) for name, each in requests.items()}
                results["psnr_loop"] = {name: psnr(pictures[name], each) for name, each in again.items()}
            for device in (True, False) if on_device else (False,):
                steps = lambda n: [Request(prompt=job["prompt"], seed=7, steps=n, guidance=2.0)]  # noqa: E731
                results["loops"]["device" if device else "numpy"] = loop(pipe, steps, STEPS, on_device=device)
            save(results)
        before = cuda.free_memory()
        for _ in range(CYCLES):
            with Pipeline.open(bundle, backend=results["backend"]) as pipe:
                generate(pipe, requests["one"], on_device=True)
        results |= {"left": before - cuda.free_memory(), "stage": "drawn"}
    save(results)


def _load(path: str) -> dict[str, Array]:
    with np.load(path) as arrays:
        return dict(arrays)


def faults(results: Mapping[str, Any]) -> list[str]:
    """Return the faults of a check, [] if it passed."""
    if "error" in results:
        return [f"{results.get('stage', 'missing')}, then: {results['error']}"]
    if results["stage"] != "drawn":
        return [results.get("missing") or f"stopped after the stage {results['stage']!r}"]
    floor = FLOORS.get(results["precision"], FLOORS["fp16"])
    found = [f"{name}: PSNR {each} dB against the CPU, below {floor}" for name, each in results["psnr"].items() if each < floor]
    found += [
        f"{name}: PSNR {each} dB against diffusers, below {floor}"
        for name, each in results.get("psnr_diffusers", {}).items()
        if each < floor
    ]
    found += [f"{name}: the image is flat (standard deviation {each})" for name, each in results["std"].items() if each < FLAT]
    found += [
        f"{name}: PSNR {each} dB between the loop on the device and NumPy's, below {LOOP_FLOOR}"
        for name, each in results.get("psnr_loop", {}).items()
        if each < LOOP_FLOOR
    ]
    if results["loops"].get("device", {}).get("waits_per_step"):
        found.append(f"the host waits {results['loops']['device']['waits_per_step']} times per step")
    if results["left"] > MOST_LEFT:
        found.append(f"{results['left']:,} bytes leaked on the GPU after {CYCLES} pipelines")
    return found
