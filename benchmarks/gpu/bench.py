"""Measure latencies on an NVIDIA GPU: components, whole images, host time, a queue of jobs; and diffusers in the same run.

    python -m benchmarks.gpu.bench [--models sd15,sd-turbo,sdxl] [--backends tensorrt,...] [--json FILE] [--minutes 9]
    python -m benchmarks.gpu.bench --models sd15 --bundle sd15=FOLDER --checkpoint sd15=FOLDER

Full-size checkpoints of random weights, their bundles and engines are created in --work and kept, so a second run only measures.
Without torch or diffusers, pass a bundle exported elsewhere with --bundle. The document is rewritten after each part. Exit codes:
0; 1 if something failed or a backend in REQUIRE did not run; 3 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT, gate, tasks
from benchmarks.gpu.backends import Loaded, gpu, look, slug, versions
from benchmarks.gpu.clean import cleaned
from benchmarks.gpu.table import lines
from sdexport.bench import diffusers as reference
from sdruntime.bundle.bundle import Bundle
from sdruntime.errors import BundleError
from sdruntime.system.process import module_command

SCHEMA = 1
# guidance, and (steps, images per call); each image at the model's own size, by its own scheduler
CASES: Mapping[str, tuple[float, tuple[tuple[int, int], ...]]] = {
    "sd15": (7.5, ((20, 1), (50, 1), (20, 4), (50, 4))),
    "sd-turbo": (1.0, ((1, 1), (1, 4))),
    "sdxl": (5.0, ((30, 1),)),
}
QUEUE = {"sd15": 8}  # jobs in one call, compared with as many in sequence


@dataclass(kw_only=True)
class Options:
    models: Sequence[str] = tuple(CASES)
    backends: Sequence[str] = gate.BACKENDS
    bundles: Mapping[str, Path] = field(default_factory=dict)
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    work: Path = ROOT / ".cache" / "gpu"
    seconds: float = 10.0  # for each contestant of a case, approximately
    minutes: float = 600.0  # nothing is started after these
    rivals: bool = True
    compiled: bool = True
    build: Mapping[str, str] = field(default_factory=dict)
    short: bool = False  # only the first case of each model
    apart: bool = True  # each task in its own process
    rival_device: str = "cuda"


class Bench:
    """One run of the benchmark. `document`: the results so far."""

    def __init__(self, options: Options, save: Callable[[dict[str, Any]], None]) -> None:
        self.options, self._save = options, save
        self._until = time.monotonic() + 60 * options.minutes
        self.found: dict[str, Loaded] = {name: look(name) for name in options.backends}
        why_not = reference.why_unavailable(options.rival_device) if options.rivals else "skipped (--no-diffusers)"
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "gpu": gpu(),
            "versions": {**versions(self.found), **reference.versions()},
            "backends": {
                name: {"target": each.target, "missing": each.missing, "listed": each.listed} for name, each in self.found.items()
            },
            "diffusers": why_not or "measured",
            "models": {},
        }
        self._rivals = not why_not
        self.save()

    @property
    def left(self) -> float:
        """Seconds until `minutes` have passed."""
        return self._until - time.monotonic()

    def save(self) -> None:
        self._save(cleaned(self.document))

    def task(self, name: str, **job: Any) -> dict[str, Any]:
        if self.left <= 0:
            return {"error": f"{name}: not started, as no time was left"}
        return tasks.run(name, job, apart=self.options.apart, limit=self.left)

    def run(self) -> None:
        for model in self.options.models:
            told: dict[str, Any] = {"backends": {}}
            self.document["models"][model] = told
            note(f"{model}: the bundle")
            try:
                bundle, checkpoint = self._prepared(model)
                told |= {"precision": Bundle.open(bundle).manifest.precision}
            except (subprocess.SubprocessError, OSError, BundleError, RuntimeError) as error:
                told["error"] = f"no bundle: {error}"
                self.save()
                continue
            self._model(model, bundle, checkpoint if self._rivals else None, told)

    def _model(self, model: str, bundle: Path, checkpoint: Path | None, told: dict[str, Any]) -> None:
        guidance, pairs = CASES[model]
        cases = [{"steps": steps, "batch": batch, "guidance": guidance} for steps, batch in pairs]
        batches = sorted({case["batch"] for case in cases})
        cases = cases[:1] if self.options.short else cases
        common = {"bundle": str(bundle), "batch_sizes": batches, "seconds": self.options.seconds / 10}
        alive = []
        for name, each in self.found.items():
            here = told["backends"][name] = {"missing": each.missing} if each.missing else {}
            if each.missing:
                continue
            note(f"{model}: {name} builds")
            here |= self.task(
                "build",
                **common,
                backend=name,
                target=each.target,
                batches=",".join(map(str, batches)),
                guidance="on" if guidance > 1 else "off",
                options=dict(self.options.build),
            )
            self.save()
            if "error" not in here:
                note(f"{model}: {name} alone")
                here |= self.task("alone", **common, backend=name, case=cases[0])
                self.save()
            if "first_picture_s" in here:
                alive.append(name)
        note(f"{model}: {', '.join(alive) or 'none'} and diffusers in turn" if checkpoint else f"{model}: {alive} in turn")
        if alive or checkpoint:
            told |= self.task(
                "cases",
                bundle=str(bundle),
                backends=alive,
                checkpoint=str(checkpoint or ""),
                rival_device=self.options.rival_device,
                compile=self.options.compiled,
                cases=cases,
                queue=QUEUE.get(model, 0),
                seconds=self.options.seconds,
                budget=max(self.left - 20, 0),
                notes=[],
            )
        self.save()

    def _prepared(self, model: str) -> tuple[Path, Path | None]:
        """Return (bundle, checkpoint): those of the options, those of an earlier run, or new ones."""
        checkpoint = self.options.checkpoints.get(model)
        if model in self.options.bundles:
            return self.options.bundles[model], checkpoint
        kept, bundle = self.options.work / "checkpoints" / model, self.options.work / f"{model}-fp16"
        if checkpoint is None:
            checkpoint = kept if (kept / "model_index.json").exists() else None
        if (bundle / "manifest.json").exists():
            return bundle, checkpoint
        if why_not := reference.why_unavailable(device="cpu"):
            raise RuntimeError(
                f"{why_not}, so no bundle can be exported here: export one elsewhere, and pass it with --bundle {model}="
            )
        if checkpoint is None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            checked(self.left, "benchmarks.gpu.checkpoint", model, str(kept))
            checkpoint = kept
        begun = time.monotonic()
        options = ("--precision", "fp16", "--no-verify", "--json")
        checked(self.left, "sdexport", "build", str(checkpoint), "-o", str(bundle), *options)
        self.document["models"][model]["export_s"] = round(time.monotonic() - begun, 1)
        return bundle, checkpoint


def checked(limit: float, module: str, *arguments: str) -> None:
    """Run a module of this tree. Raises RuntimeError with its last lines if it fails."""
    done = subprocess.run(
        module_command(module, *arguments),
        cwd=ROOT,
        env=tasks.environment(),
        capture_output=True,
        text=True,
        timeout=max(limit, 1),
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise RuntimeError(f"{' '.join(arguments[:2])} failed with exit code {done.returncode}: {' | '.join(last)}")


def failures(document: Mapping[str, Any]) -> list[str]:
    """Return every failure of a run. A library that is not installed, or does not list this GPU, is not a failure."""
    found, expected = [], [name for name, each in document["backends"].items() if each["listed"]]
    for model, told in document["models"].items():
        for name, each in told["backends"].items():
            found += [f"{model}, {name}, {way}: {e['error']}" for way, e in each.get("pictures", {}).items() if "error" in e]
        if "error" in told:
            found.append(f"{model}: {told['error']}")
        found += [
            f"{model}, {name}: {each['error']}" for name, each in told["backends"].items() if "error" in each and name in expected
        ]
        found += [f"{model}: {text}" for text in told.get("notes", [])]
        for case in told.get("cases", []):
            where = f"{model}, {case['steps']} steps, batch {case['batch']}"
            found += [f"{where}, {n}: {each['error']}" for n, each in case["contestants"].items() if "error" in each]
        for name, each in told.get("queue", {}).items():
            found += [f"{model}, {name}, queue: {e['error']}" for e in each.values() if isinstance(e, dict) and "error" in e]
    return found


def ran(document: Mapping[str, Any]) -> list[str]:
    """Return the backends that generated an image."""
    return [
        name
        for name in document["backends"]
        if any("first_picture_s" in told["backends"].get(name, {}) for told in document["models"].values())
    ]


def note(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def bench(options: Options, *, json_file: Path | None) -> int:
    def save(document: dict[str, Any]) -> None:
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    run = Bench(options, save)
    run.run()
    print("\n".join(lines(run.document)))
    wrong = failures(run.document)
    wrong += [
        f"REQUIRE: {name} did not run: {run.found[name].missing if name in run.found else 'not in --backends'}"
        for name in gate.not_run(ran(run.document))
    ]
    for text in wrong:
        print(f"FAILED {text}", file=sys.stderr)
    return gate.FAILED if wrong else gate.OK


def named(texts: Sequence[str]) -> dict[str, Path]:
    return {name: Path(place).resolve() for name, _, place in (text.partition("=") for text in texts)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES), help="of sd15, sd-turbo, sdxl (all)")
    parser.add_argument("--backends", default=",".join(gate.BACKENDS), help="of tensorrt, tensorrt-rtx, onnxruntime (all)")
    parser.add_argument("--bundle", action="append", default=[], metavar="MODEL=FOLDER", help="an fp16 bundle exported elsewhere")
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="MODEL=FOLDER", help="a diffusers folder: real weights"
    )
    parser.add_argument(
        "--work", type=Path, default=Options.work, help="where checkpoints, bundles and engines are kept (.cache/gpu)"
    )
    parser.add_argument("--json", type=Path, help="write the document here (benchmarks/results/gpu-NAME.json)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each contestant of a case, approximately (10)")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after these (600)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of TensorRT's builds")
    parser.add_argument("--no-diffusers", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile: max-autotune takes minutes per shape")
    parser.add_argument("--short", action="store_true", help="only the first case of each model")
    parsed = parser.parse_args(arguments)
    options = Options(
        models=parsed.models.split(","),
        backends=parsed.backends.split(","),
        bundles=named(parsed.bundle),
        checkpoints=named(parsed.checkpoint),
        work=parsed.work.resolve(),
        seconds=parsed.seconds,
        minutes=parsed.minutes,
        rivals=not parsed.no_diffusers,
        compiled=not parsed.no_compile,
        build=dict(text.split("=", 1) for text in parsed.option),
        short=parsed.short,
    )
    for kind, names, known in (("model", options.models, tuple(CASES)), ("backend", options.backends, gate.BACKENDS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{kind} {', '.join(unknown)}: known are {', '.join(known)}")

    def run() -> int:
        place = parsed.json or ROOT / "benchmarks" / "results" / f"gpu-{slug(str(gpu()['name']))}.json"
        return bench(options, json_file=place)

    return gate.passed(run)


if __name__ == "__main__":
    sys.exit(main())
