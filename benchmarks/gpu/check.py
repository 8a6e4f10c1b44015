"""One backend on one bundle, from ONNX to pictures: does it build, open, draw the CPU's picture, and leave nothing behind?

`make gpu-test` asserts what is told here, and `make gpu-report` writes it down. The bundle is copied and never written to.
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
from sdruntime.pipeline.request import Request
from sdruntime.system.cuda import Cuda

FLOORS: Mapping[str, float] = {"fp32": 40.0, "fp16": 30.0}  # dB against the CPU's picture in fp32
LOOP_FLOOR = 50.0  # dB: the loop on the device against the loop in NumPy, on the same engines
MOST_LEFT = 16 << 20  # bytes that a pipeline may seem to leave on a GPU which others use too
FLAT = 10.0  # standard deviation of 255: below it a picture shows nothing
STAGES = ("missing", "loaded", "built", "opened", "drawn")
STEPS, CYCLES = 20, 3


def asked(prompt: str) -> dict[str, list[Request]]:
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
    """The pictures of `asked` by ONNX Runtime on the CPU, as a file of arrays: what every backend is held against."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        copy = copy_without_engines(bundle, Path(folder) / "bundle")
        for _ in build_engines(copy, BuildRequest(backend="onnxruntime", target="cpu")):
            pass
        with Pipeline.open(copy, backend="onnxruntime") as pipe:
            pictures = {name: np.stack(generate(pipe, each, on_device=False)) for name, each in asked(prompt).items()}
    path = place / f"reference-{bundle.name}.npz"
    np.savez(path, **pictures)  # type: ignore[arg-type]
    return path


def diffusers_pictures(job: Mapping[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Of "one" and "four", by diffusers in float32 on the same GPU, as the file `out`. Raises what diffusers raises."""
    with contextlib.closing(Diffusers(Path(job["checkpoint"]), device=job["device"], precision="fp32")) as rival:
        pictures = {name: np.stack(rival.generate(EAGER, asked(job["prompt"])[name])) for name in ("one", "four")}
    np.savez(job["out"], **pictures)  # type: ignore[arg-type]
    save({"out": job["out"]})


def check(job: Mapping[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Told: how far it came (`stage`), engines, PSNRs, the loop's costs, bytes left; a fault as `error`.

    `job`: bundle, backend, prompt, reference (a file of `cpu_pictures`), diffusers (of `diffusers_pictures`, or empty).
    """
    bundle = Path(job["bundle"])
    precision = Bundle.open(bundle).manifest.precision
    found = look(job["backend"], precision)
    told: dict[str, Any] = {"backend": found.name, "version": found.version, "target": found.target, "precision": precision}
    told |= {"listed": found.listed, "stage": "missing"}
    if found.missing:
        save(told | {"missing": found.missing})
        return
    told["stage"] = "loaded"
    save(told)
    if found.name == "onnxruntime":
        preload()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a runtime cache that cannot be kept is no fault here
        try:
            _built(copy_without_engines(bundle, Path(folder) / "bundle"), told, save)
            _drawn(Path(folder) / "bundle", job, told, save)
        except Exception as error:  # what the library said is what this is for
            told["error"] = text_of(error)
            save(told)


def _built(bundle: Path, told: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    told["built"] = {}
    static = BACKENDS[told["backend"]].static
    wanted = BuildRequest(
        backend=told["backend"],
        target=told["target"],
        batch="1:1:4" if static else None,
        guidance="any" if static else None,
    )
    for event in build_engines(bundle, wanted):
        if event.state == "done":
            told["built"][event.component] = {"seconds": round(event.seconds, 1), "bytes": event.size}
            save(told)
    told["stage"] = "built"
    save(told)


def _drawn(bundle: Path, job: Mapping[str, Any], told: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    on_device, wanted = BACKENDS[told["backend"]].loop is not None, asked(job["prompt"])
    with Cuda.open() as cuda:  # holds the context, so that what the libraries keep in it is counted once
        begun = time.perf_counter()
        with Pipeline.open(bundle, backend=told["backend"]) as pipe:
            told |= {"stage": "opened", "open_s": round(time.perf_counter() - begun, 3)}
            save(told)
            pictures = {name: generate(pipe, each, on_device=True) for name, each in wanted.items()}
            told["std"] = {name: round(float(min(image.std() for image in each)), 1) for name, each in pictures.items()}
            told["psnr"] = {name: psnr(pictures[name], list(each)) for name, each in _kept(job["reference"]).items()}
            if job["diffusers"]:
                told["psnr_diffusers"] = {
                    name: psnr(pictures[name], list(each)) for name, each in _kept(job["diffusers"]).items()
                }
            told["loops"] = {}
            if on_device:
                again = {name: generate(pipe, each, on_device=False) for name, each in wanted.items()}
                told["psnr_loop"] = {name: psnr(pictures[name], each) for name, each in again.items()}
            for device in (True, False) if on_device else (False,):
                steps = lambda n: [Request(prompt=job["prompt"], seed=7, steps=n, guidance=2.0)]  # noqa: E731
                told["loops"]["device" if device else "numpy"] = loop(pipe, steps, STEPS, on_device=device)
            save(told)
        before = cuda.free_memory()
        for _ in range(CYCLES):
            with Pipeline.open(bundle, backend=told["backend"]) as pipe:
                generate(pipe, wanted["one"], on_device=True)
        told |= {"left": before - cuda.free_memory(), "stage": "drawn"}
    save(told)


def _kept(path: str) -> dict[str, Array]:
    with np.load(path) as kept:
        return dict(kept)


def faults(told: Mapping[str, Any]) -> list[str]:
    """What of a check is not as it must be, each in words; empty where all is."""
    if "error" in told:
        return [f"{told.get('stage', 'missing')}, then: {told['error']}"]
    if told["stage"] != "drawn":
        return [told.get("missing") or f"it came no further than {told['stage']!r}"]
    floor = FLOORS.get(told["precision"], FLOORS["fp16"])
    found = [f"{name}: PSNR {each} dB against the CPU, below {floor}" for name, each in told["psnr"].items() if each < floor]
    found += [
        f"{name}: PSNR {each} dB against diffusers, below {floor}"
        for name, each in told.get("psnr_diffusers", {}).items()
        if each < floor
    ]
    found += [f"{name}: the picture is flat (deviation {each})" for name, each in told["std"].items() if each < FLAT]
    found += [
        f"{name}: PSNR {each} dB between the loop on the device and NumPy's, below {LOOP_FLOOR}"
        for name, each in told.get("psnr_loop", {}).items()
        if each < LOOP_FLOOR
    ]
    if told["loops"].get("device", {}).get("waits_per_step"):
        found.append(f"the host waits {told['loops']['device']['waits_per_step']} times a step")
    if told["left"] > MOST_LEFT:
        found.append(f"{told['left']:,} bytes were left on the GPU after {CYCLES} pipelines")
    return found
