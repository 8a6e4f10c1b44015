"""Measurements that use the GPU, each in its own process: a crash of a library does not end the run.

A task is a function (job, save) -> None. `save(document)` stores the results so far, so that they survive if the task is killed.
Expected errors are stored in the document as text; a task raises only unexpected ones.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.backends import preload
from benchmarks.gpu.check import check, diffusers_pictures
from benchmarks.gpu.measure import component as measure_component
from benchmarks.gpu.measure import loop
from sdexport.bench.diffusers import COMPILED, EAGER, Diffusers
from sdexport.bench.timing import dims_of, generate, psnr, race, ratio, repeated, text_of
from sdruntime.backends.base.engine import EngineOptions
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.system.cuda import Cuda
from sdruntime.system.process import module_command

Job = Mapping[str, Any]
Save = Callable[[dict[str, Any]], None]
PROMPT = "a cat in the red and"
NUMPY_LOOP = "NumPy loop"
WHOLE = "whole loop as one graph"


def requests(case: Mapping[str, Any], seed: int = 0, *, count: int | None = None, steps: int | None = None) -> list[Request]:
    """Return the requests of a case, with the model's own size and scheduler, and seeds from `seed` on."""
    count = case["batch"] if count is None else count
    return [Request(prompt=PROMPT, seed=seed + k, steps=steps or case["steps"], guidance=case["guidance"]) for k in range(count)]


def build(job: Job, save: Save) -> None:
    """Build the engines of one backend into the bundle, except those that exist."""
    results: dict[str, Any] = {"built": {}}
    if job["backend"] == "onnxruntime":
        preload()
    request = BuildRequest(
        backend=job["backend"],
        target=job["target"],
        batch=job["batches"] if BACKENDS[job["backend"]].static else None,
        guidance=job["guidance"] if BACKENDS[job["backend"]].static else None,
        options=job["options"] if BACKENDS[job["backend"]].loop else {},
    )
    for event in build_engines(job["bundle"], request):
        if event.state in ("done", "present"):
            seconds = {"seconds": round(event.seconds, 1), "bytes": event.size, "peak_memory": event.peak}
            results["built"][event.component] = seconds if event.state == "done" else {"present": True}
            save(results)


def alone(job: Job, save: Save) -> None:
    """Measure one backend alone on the GPU: opening, the first image, memory, each component, both loops, leaked memory."""
    results: dict[str, Any] = {"components": {}, "loops": {}}
    case, guided = job["case"], job["case"]["guidance"] > 1
    preload_for(job["backend"])
    with Cuda.open() as cuda:  # keeps the context open, so that memory the libraries keep in it is counted once
        before = cuda.free_memory()
        begun = time.perf_counter()
        with Pipeline.open(job["bundle"], backend=job["backend"]) as pipe:
            results["engine"] = described(pipe.engine("unet").spec)
            results["open_s"] = round(time.perf_counter() - begun, 3)
            begun = time.perf_counter()
            pictures = generate(pipe, requests(case), on_device=True)
            results["first_picture_s"] = round(time.perf_counter() - begun, 3)
            results |= {"size": [pictures[0].shape[1], pictures[0].shape[0]], "std": round(float(pictures[0].std()), 1)}
            results["memory"] = before - cuda.free_memory()
            save(results)
            if BACKENDS[job["backend"]].loop:
                results["psnr_numpy_loop"] = psnr(pictures, generate(pipe, requests(case), on_device=False))
            call = functools.partial(generate, pipe, requests(case), on_device=True)
            results["pictures"] = {"a graph for a step": repeated(call, seconds=job["seconds"])}
            for on_device in (True, False) if BACKENDS[job["backend"]].loop else (False,):
                name = "device" if on_device else "numpy"
                results["loops"][name] = loop(
                    pipe, lambda steps: requests(case, count=1, steps=steps), case["steps"], on_device=on_device
                )
                save(results)
            for component in pipe.bundle.manifest.components:
                if component in ("vae_encoder", STEP):
                    continue
                for batch in [1] if component.startswith("text") else job["batch_sizes"]:
                    if measured := one_component(pipe, component, batch, guided, job["seconds"]):
                        results["components"].setdefault(component, []).append(measured)
                        save(results)
            unet: dict[str, Any] = next(iter(results["components"].get("unet", [])), {})
            if "device" in unet:  # the time of a step outside the UNet
                for times in results["loops"].values():
                    times["outside_unet_ms"] = round(times["wall_ms"] - unet["device"]["p50_ms"], 4)
        results["memory_after_close"] = before - cuda.free_memory()
        if BACKENDS[job["backend"]].loop:  # with the same engines, the loop as one CUDA graph
            results["pictures"][WHOLE] = {}
            try:
                with Pipeline.open(job["bundle"], backend=job["backend"], options=EngineOptions(whole_loop=True)) as pipe:
                    call = functools.partial(generate, pipe, requests(case), on_device=True)
                    results["psnr_whole_loop"] = min(psnr(pictures, call()) for _ in range(2))
                    results["pictures"][WHOLE] = repeated(call, seconds=job["seconds"])
            except Exception as error:
                results["pictures"][WHOLE] = {"error": text_of(error)}
    save(results)


def described(spec: EngineSpec) -> str:
    return f"{spec.backend} {spec.version} for {spec.target}, {spec.precision}: {spec.shapes}"


def one_component(pipe: Pipeline, name: str, batch: int, guided: bool, seconds: float) -> dict[str, Any] | None:
    """Measure one component; return None if no profile of its engine supports the batch."""
    engine = pipe.engine(name)
    dims = dims_of(engine, pipe, batch=batch, guided=guided)
    return measure_component(engine, dims, pipe.model.vae_factor, seconds=seconds) if engine.spec.admits(**dims) else None


def cases(job: Job, save: Save) -> None:
    """Measure every working backend, and diffusers on the same weights, alternating A B A B; then the queue."""
    results: dict[str, Any] = {"cases": [], "queue": {}, "notes": list(job["notes"])}
    until = time.monotonic() + job["budget"]
    with contextlib.ExitStack() as stack:
        pipes: dict[str, Pipeline] = {}
        for name in job["backends"]:
            preload_for(name)
            try:
                pipes[name] = stack.enter_context(Pipeline.open(job["bundle"], backend=name))
            except Exception as error:
                results["notes"].append(
                    f"{name} ran alone, but does not open beside {', '.join(pipes) or 'torch'}: {text_of(error)}"
                )
        rival = None
        if job["checkpoint"]:
            try:
                rival = stack.enter_context(contextlib.closing(Diffusers(Path(job["checkpoint"]), device=job["rival_device"])))
            except Exception as error:
                results["notes"].append(f"diffusers does not open the checkpoint: {text_of(error)}")
        for case in job["cases"]:
            results["cases"].append(one_case(case, pipes, rival, job, until))
            save(results)
        for name, pipe in pipes.items():
            if job["queue"]:
                results["queue"][name] = queue(pipe, job["cases"][0], job["queue"], job["seconds"], until)
                save(results)
        if rival is not None and job["compile"]:
            try:
                rival.compile()
                for index, case in enumerate(job["cases"]):
                    if time.monotonic() > until:
                        results["notes"].append("no time was left for torch.compile on every case")
                        break
                    first = rival.first(COMPILED, requests(case))  # includes compiling
                    again = one_case(case, pipes, rival, job, until, compiled=True)
                    results["cases"][index] = again | {"compile_s": first}
                    save(results)
            except Exception as error:
                results["notes"].append(f"torch.compile failed: {text_of(error)}")
    save(results)


def one_case(
    case: Mapping[str, Any],
    pipes: Mapping[str, Pipeline],
    rival: Diffusers | None,
    job: Job,
    until: float,
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure the contestants of one case in turn. The reference image is diffusers', if it runs."""
    entries: dict[str, Any] = {}
    if rival is not None:
        for name in (EAGER, *([COMPILED] if compiled else [])):
            entries[name] = lambda seed, name=name: rival.generate(name, requests(case, seed))
    for name, pipe in pipes.items():
        entries[name] = lambda seed, pipe=pipe: generate(pipe, requests(case, seed), on_device=True)
        if BACKENDS[name].loop:
            entries[f"{name}, {NUMPY_LOOP}"] = lambda seed, pipe=pipe: generate(pipe, requests(case, seed), on_device=False)
    results = race(entries, seconds=job["seconds"], until=until)
    ratios = {
        name: {
            other: ratio(results[name], results[other])
            for other in (EAGER, COMPILED, f"{name}, {NUMPY_LOOP}")
            if other in results
        }
        for name in pipes
    }
    return {**case, "contestants": results, "times_as_fast": ratios}


def queue(pipe: Pipeline, case: Mapping[str, Any], count: int, seconds: float, until: float) -> dict[str, Any]:
    """Compare one call for `count` images with `count` calls for one image."""
    results = race(
        {
            "in a row": lambda seed: [
                image for k in range(count) for image in generate(pipe, requests(case, seed + k, count=1), on_device=True)
            ],
            "together": lambda seed: generate(pipe, requests(case, seed, count=count), on_device=True),
        },
        seconds=seconds,
        until=until,
    )
    return {"jobs": count, "steps": case["steps"], **results, "times_as_fast": ratio(results["together"], results["in a row"])}


def preload_for(name: str) -> None:
    if name == "onnxruntime":
        preload()


TASKS: Mapping[str, Callable[[Job, Save], None]] = {
    "build": build,
    "alone": alone,
    "cases": cases,
    "check": check,
    "diffusers_pictures": diffusers_pictures,
}


def run(task: str, job: Job, *, apart: bool = True, limit: float | None = None) -> dict[str, Any]:
    """Run a task; return its document, with `error` if it failed. `apart`: in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "document.json"
        error = _in_a_child(task, job, out, Path(folder) / "log.txt", limit) if apart else guarded(task, job, out)
        results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return results | ({"error": error} if error else {})


def environment() -> dict[str, str]:
    """Return the environment of a process that imports this tree, installed or not."""
    paths = [str(ROOT), str(ROOT / "runtime"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def guarded(task: str, job: Job, out: Path) -> str:
    """Run a task in this process; return the text of its exception, or ""."""

    def save(document: dict[str, Any]) -> None:
        staged = out.with_suffix(".part")
        staged.write_text(json.dumps(document), encoding="utf-8")
        staged.replace(out)

    try:
        TASKS[task](job, save)
    except Exception as error:  # reported, and the other tasks run
        return text_of(error)
    return ""


def _in_a_child(task: str, job: Job, out: Path, log: Path, limit: float | None) -> str:
    command = module_command("benchmarks.gpu.tasks", task, json.dumps(dict(job)), str(out))
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(),
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{task}: stopped after {limit:.0f} s, the time that was left"
    failed = out.with_suffix(".error")
    if failed.exists():
        return failed.read_text(encoding="utf-8")
    if code:
        last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-3:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{task}: its process ended with {how}: {' | '.join(last) or 'no output'}"
    return ""


if __name__ == "__main__":
    _, name, text, place = sys.argv
    if failure := guarded(name, json.loads(text), Path(place)):
        Path(place).with_suffix(".error").write_text(failure, encoding="utf-8")
        print(failure, file=sys.stderr)
    sys.stdout.flush()
    os._exit(0)  # large libraries take seconds to shut down, and may crash while they do
