"""The measurements that touch the GPU, each in a process of its own: what ends it, be it a crash of a library, ends nothing else.

A task is a function job, save -> None: `save(document)` keeps what is known so far, so that a task that is ended early has told
the rest. Texts of errors go into the document; a task raises only what nobody expected.
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
from sdruntime.pipeline.request import Request
from sdruntime.system.cuda import Cuda
from sdruntime.system.process import module_command

Job = Mapping[str, Any]
Save = Callable[[dict[str, Any]], None]
PROMPT = "a cat in the red and"
NUMPY_LOOP = "NumPy loop"
WHOLE = "whole loop as one graph"


def requests(case: Mapping[str, Any], seed: int = 0, *, count: int | None = None, steps: int | None = None) -> list[Request]:
    """The pictures of a case: the model's own size, scheduler and prompt, seeds from `seed` on."""
    count = case["batch"] if count is None else count
    return [Request(prompt=PROMPT, seed=seed + k, steps=steps or case["steps"], guidance=case["guidance"]) for k in range(count)]


def build(job: Job, save: Save) -> None:
    """The engines of one backend into the bundle; those that are there already stay."""
    told: dict[str, Any] = {"built": {}}
    if job["backend"] == "onnxruntime":
        preload()
    asked = BuildRequest(
        backend=job["backend"],
        target=job["target"],
        batch=job["batches"] if BACKENDS[job["backend"]].static else None,
        guidance=job["guidance"] if BACKENDS[job["backend"]].static else None,
        options=job["options"] if BACKENDS[job["backend"]].loop else {},
    )
    for event in build_engines(job["bundle"], asked):
        if event.state in ("done", "present"):
            seconds = {"seconds": round(event.seconds, 1), "bytes": event.size, "peak_memory": event.peak}
            told["built"][event.component] = seconds if event.state == "done" else {"present": True}
            save(told)


def alone(job: Job, save: Save) -> None:
    """One backend with the GPU to itself: opening, the first picture, memory, each component, both loops, what is left behind."""
    told: dict[str, Any] = {"components": {}, "loops": {}}
    case, guided = job["case"], job["case"]["guidance"] > 1
    preload_for(job["backend"])
    with Cuda.open() as cuda:  # holds the context, so that what the libraries keep in it is counted once
        before = cuda.free_memory()
        begun = time.perf_counter()
        with Pipeline.open(job["bundle"], backend=job["backend"]) as pipe:
            told["engine"] = described(pipe.engine("unet").spec)
            told["open_s"] = round(time.perf_counter() - begun, 3)
            begun = time.perf_counter()
            pictures = generate(pipe, requests(case), on_device=True)
            told["first_picture_s"] = round(time.perf_counter() - begun, 3)
            told |= {"size": [pictures[0].shape[1], pictures[0].shape[0]], "std": round(float(pictures[0].std()), 1)}
            told["memory"] = before - cuda.free_memory()
            save(told)
            if BACKENDS[job["backend"]].loop:
                told["psnr_numpy_loop"] = psnr(pictures, generate(pipe, requests(case), on_device=False))
            draw = functools.partial(generate, pipe, requests(case), on_device=True)
            told["pictures"] = {"a graph for a step": repeated(draw, seconds=job["seconds"])}
            for on_device in (True, False) if BACKENDS[job["backend"]].loop else (False,):
                name = "device" if on_device else "numpy"
                told["loops"][name] = loop(
                    pipe, lambda steps: requests(case, count=1, steps=steps), case["steps"], on_device=on_device
                )
                save(told)
            for component in pipe.bundle.manifest.components:
                if component in ("vae_encoder", STEP):
                    continue
                for batch in [1] if component.startswith("text") else job["batch_sizes"]:
                    if measured := one_component(pipe, component, batch, guided, job["seconds"]):
                        told["components"].setdefault(component, []).append(measured)
                        save(told)
            unet: dict[str, Any] = next(iter(told["components"].get("unet", [])), {})
            if "device" in unet:  # what a step takes besides the UNet on the device
                for each in told["loops"].values():
                    each["outside_unet_ms"] = round(each["wall_ms"] - unet["device"]["p50_ms"], 4)
        told["memory_after_close"] = before - cuda.free_memory()
        if BACKENDS[job["backend"]].loop:  # the same engines, the loop as one graph
            told["pictures"][WHOLE] = {}
            try:
                with Pipeline.open(job["bundle"], backend=job["backend"], options=EngineOptions(whole_loop=True)) as pipe:
                    draw = functools.partial(generate, pipe, requests(case), on_device=True)
                    told["psnr_whole_loop"] = min(psnr(pictures, draw()) for _ in range(2))
                    told["pictures"][WHOLE] = repeated(draw, seconds=job["seconds"])
            except Exception as error:
                told["pictures"][WHOLE] = {"error": text_of(error)}
    save(told)


def described(spec: EngineSpec) -> str:
    return f"{spec.backend} {spec.version} for {spec.target}, {spec.precision}: {spec.shapes}"


def one_component(pipe: Pipeline, name: str, batch: int, guided: bool, seconds: float) -> dict[str, Any] | None:
    """None where no profile of the engine takes so many pictures."""
    engine = pipe.engine(name)
    dims = dims_of(engine, pipe, batch=batch, guided=guided)
    return measure_component(engine, dims, pipe.model.vae_factor, seconds=seconds) if engine.spec.admits(**dims) else None


def cases(job: Job, save: Save) -> None:
    """Every backend that draws, and diffusers on the same weights, in turn: A B A B. Then eight jobs together and in a row."""
    told: dict[str, Any] = {"cases": [], "queue": {}, "notes": list(job["notes"])}
    until = time.monotonic() + job["budget"]
    with contextlib.ExitStack() as stack:
        pipes: dict[str, Pipeline] = {}
        for name in job["backends"]:
            preload_for(name)
            try:
                pipes[name] = stack.enter_context(Pipeline.open(job["bundle"], backend=name))
            except Exception as error:
                told["notes"].append(
                    f"{name} drew alone, but does not open beside {', '.join(pipes) or 'torch'}: {text_of(error)}"
                )
        rival = None
        if job["checkpoint"]:
            try:
                rival = stack.enter_context(contextlib.closing(Diffusers(Path(job["checkpoint"]), device=job["rival_device"])))
            except Exception as error:
                told["notes"].append(f"diffusers does not open the checkpoint: {text_of(error)}")
        for case in job["cases"]:
            told["cases"].append(one_case(case, pipes, rival, job, until))
            save(told)
        for name, pipe in pipes.items():
            if job["queue"]:
                told["queue"][name] = queue(pipe, job["cases"][0], job["queue"], job["seconds"], until)
                save(told)
        if rival is not None and job["compile"]:
            try:
                rival.compile()
                for index, case in enumerate(job["cases"]):
                    if time.monotonic() > until:
                        told["notes"].append("no time was left for torch.compile on every case")
                        break
                    first = rival.first(COMPILED, requests(case))  # the compiling
                    again = one_case(case, pipes, rival, job, until, compiled=True)
                    told["cases"][index] = again | {"compile_s": first}
                    save(told)
            except Exception as error:
                told["notes"].append(f"torch.compile failed: {text_of(error)}")
    save(told)


def one_case(
    case: Mapping[str, Any],
    pipes: Mapping[str, Pipeline],
    rival: Diffusers | None,
    job: Job,
    until: float,
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """The race of one case. The picture that the others are held against is diffusers' where it draws."""
    entries: dict[str, Any] = {}
    if rival is not None:
        for name in (EAGER, *([COMPILED] if compiled else [])):
            entries[name] = lambda seed, name=name: rival.generate(name, requests(case, seed))
    for name, pipe in pipes.items():
        entries[name] = lambda seed, pipe=pipe: generate(pipe, requests(case, seed), on_device=True)
        if BACKENDS[name].loop:
            entries[f"{name}, {NUMPY_LOOP}"] = lambda seed, pipe=pipe: generate(pipe, requests(case, seed), on_device=False)
    told = race(entries, seconds=job["seconds"], until=until)
    ratios = {
        name: {other: ratio(told[name], told[other]) for other in (EAGER, COMPILED, f"{name}, {NUMPY_LOOP}") if other in told}
        for name in pipes
    }
    return {**case, "contestants": told, "times_as_fast": ratios}


def queue(pipe: Pipeline, case: Mapping[str, Any], count: int, seconds: float, until: float) -> dict[str, Any]:
    """`count` pictures of one call against as many calls of one."""
    told = race(
        {
            "in a row": lambda seed: [
                image for k in range(count) for image in generate(pipe, requests(case, seed + k, count=1), on_device=True)
            ],
            "together": lambda seed: generate(pipe, requests(case, seed, count=count), on_device=True),
        },
        seconds=seconds,
        until=until,
    )
    return {"jobs": count, "steps": case["steps"], **told, "times_as_fast": ratio(told["together"], told["in a row"])}


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
    """What a task told, with an `error` where it failed, in a process of its own unless it is not to be `apart`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "told.json"
        error = _in_a_child(task, job, out, Path(folder) / "log.txt", limit) if apart else guarded(task, job, out)
        told: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return told | ({"error": error} if error else {})


def environment() -> dict[str, str]:
    """For a process of this tree, installed or not."""
    paths = [str(ROOT), str(ROOT / "runtime"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def guarded(task: str, job: Job, out: Path) -> str:
    """Run a task here; the text of what it raised."""

    def save(document: dict[str, Any]) -> None:
        staged = out.with_suffix(".part")
        staged.write_text(json.dumps(document), encoding="utf-8")
        staged.replace(out)

    try:
        TASKS[task](job, save)
    except Exception as error:  # told, and the rest goes on
        return text_of(error)
    return ""


def _in_a_child(task: str, job: Job, out: Path, log: Path, limit: float | None) -> str:
    command = module_command("benchmarks.gpu.tasks", task, json.dumps(dict(job)), str(out))
    with log.open("wb") as said:
        try:
            code = subprocess.run(
                command,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(),
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{task}: ended after {limit:.0f} s, the time that was left"
    failed = out.with_suffix(".error")
    if failed.exists():
        return failed.read_text(encoding="utf-8")
    if code:
        last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-3:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{task}: its process ended with {how}: {' | '.join(last) or 'it said nothing'}"
    return ""


if __name__ == "__main__":
    _, name, text, place = sys.argv
    if failure := guarded(name, json.loads(text), Path(place)):
        Path(place).with_suffix(".error").write_text(failure, encoding="utf-8")
        print(failure, file=sys.stderr)
    sys.stdout.flush()
    os._exit(0)  # large libraries take seconds to take themselves down, and may crash over it
