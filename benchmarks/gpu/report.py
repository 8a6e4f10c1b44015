"""Write reports/GPU-LIBRARY.json: the results of this project with one GPU and one library, for users to send.

    python -m benchmarks.gpu.report [--shapes BUNDLE ...] [--models sd15] [--bundle sd15=FOLDER] [--out reports]

One file for each installed backend: the check of `make gpu-test` on examples/shapes in fp32 and fp16, and the short form of
`make gpu-bench`. It contains the GPU's name, its driver and versions, but no path and no name of the machine or its user. Read
it before you send it. Exit codes: 0; 1 if something failed or a backend in REQUIRE did not run; 3 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT, gate, tasks
from benchmarks.gpu.backends import gpu, look, slug, versions
from benchmarks.gpu.bench import Bench, Options, note
from benchmarks.gpu.check import cpu_pictures, faults
from benchmarks.gpu.clean import cleaned
from sdexport.bench import diffusers as reference
from sdruntime.bundle.bundle import Bundle

SCHEMA = 1
SHAPES = ROOT / "examples" / "shapes" / "checkpoint"
PROMPT = "a small red circle on the left on a blue background"
_KEPT = """engine size open_s first_picture_s memory components loops pictures psnr_numpy_loop psnr_whole_loop built
    error""".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to report on. `shapes`: bundles of the shapes example, including fp32. `bench`: options of the short benchmark."""

    shapes: Sequence[Path]
    checkpoint: Path | None
    bench: Options
    prompt: str = PROMPT


def shapes_bundles(work: Path) -> list[Path]:
    """Return the bundles of the shapes example in fp32 and fp16; export missing ones. Raises RuntimeError if it cannot."""
    found = []
    for precision in ("fp32", "fp16"):
        bundle = work / f"shapes-{precision}"
        if not (bundle / "manifest.json").exists():
            if why_not := reference.why_unavailable(device="cpu"):
                raise RuntimeError(
                    f"{why_not}, so no bundle can be exported on this machine: export two elsewhere, and pass them with --shapes"
                )
            from sdexport.build.events import ExportOptions as Export
            from sdexport.build.export import build

            for _ in build(str(SHAPES), bundle, Export(precision=precision, verify=False)):
                pass
        found.append(bundle)
    return found


def reports(wanted: Wanted) -> dict[str, dict[str, Any]]:
    """Return a report for each backend, by name."""
    found = {name: look(name) for name in wanted.bench.backends}
    checks: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        fp32 = next(each for each in wanted.shapes if Bundle.open(each).manifest.precision == "fp32")
        note("the CPU's pictures")
        drawn, rival = cpu_pictures(fp32, place, wanted.prompt), ""
        why_not = reference.why_unavailable(wanted.bench.rival_device) if wanted.bench.rivals else "skipped"
        if not why_not and wanted.checkpoint is not None:
            out = str(place / "diffusers.npz")
            job = {"checkpoint": str(wanted.checkpoint), "prompt": wanted.prompt, "out": out}
            results = tasks.run("diffusers_pictures", job | {"device": wanted.bench.rival_device}, apart=wanted.bench.apart)
            rival, why_not = results.get("out", ""), results.get("error", "")
        for name in found:
            for bundle in wanted.shapes:
                note(f"{name}: {bundle.name}")
                job = {"bundle": str(bundle), "backend": name, "prompt": wanted.prompt, "reference": str(drawn)}
                results = tasks.run("check", job | {"diffusers": rival}, apart=wanted.bench.apart)
                checks[name].append(results | {"faults": faults(results) if "stage" in results else [results["error"]]})
    bench = Bench(replace(wanted.bench, short=True), lambda _: None) if wanted.bench.models else None
    if bench is not None:
        bench.run()
    return {
        name: cleaned(
            {
                "schema": SCHEMA,
                "created": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                "gpu": {key: value for key, value in gpu().items() if key != "free"},
                "library": {
                    "name": name,
                    "version": each.version,
                    "target": each.target,
                    "missing": each.missing,
                    "listed": each.listed,
                },
                "versions": {**versions({}), **reference.versions()},
                "diffusers": why_not or "generated the same images",
                "checks": checks[name],
                "benchmarks": {
                    model: _part(results, name) for model, results in (bench.document["models"] if bench else {}).items()
                },
            }
        )
        for name, each in found.items()
    }


def _part(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return one backend's part of a model's benchmark."""
    here = results["backends"].get(name, {})
    part: dict[str, Any] = {key: here[key] for key in _KEPT if key in here}
    if "error" in results:
        part["error"] = results["error"]
    for case in results.get("cases", []):
        mine = {
            key: one for key, one in case["contestants"].items() if key.partition(",")[0] == name or key.startswith("diffusers")
        }
        ratios = case["times_as_fast"].get(name, {})
        part.setdefault("cases", []).append({**case, "contestants": mine, "times_as_fast": ratios})
    if name in results.get("queue", {}):
        part["queue"] = results["queue"][name]
    return part


def status(report: Mapping[str, Any]) -> str:
    """Return "ran" if every check passed, "failed" if one did not, "missing" if the library is not installed."""
    if report["library"]["missing"]:
        return "missing"
    return "ran" if report["checks"] and not any(each["faults"] for each in report["checks"]) else "failed"


def file_name(report: Mapping[str, Any]) -> str:
    return f"{slug(report['gpu']['name'])}-{slug(report['library']['name'])}-{slug(report['library']['version'])}.json"


def write(by_backend: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write a file for each installed library; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for report in by_backend.values():
        if report["library"]["version"]:
            path = folder / file_name(report)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            paths.append(path)
    return paths


def print_summary(by_backend: Mapping[str, Mapping[str, Any]]) -> int:
    """Print the result of each backend; return the exit code."""
    states = {name: status(report) for name, report in by_backend.items()}
    for name, report in by_backend.items():
        worst = {each.get("precision", "?"): min(each.get("psnr", {}).values(), default=None) for each in report["checks"]}
        why = report["library"]["missing"] or f"PSNR against the CPU {worst}"
        print(f"{name} {report['library']['version']}: {states[name]}: {why}")
        for each in report["checks"]:
            for fault in each["faults"] if states[name] != "missing" else []:
                print(f"  {each.get('precision', '?')}: {fault}")
    lacking = gate.not_run([name for name, state in states.items() if state == "ran"])
    for name in lacking:
        print(f"FAILED REQUIRE: {name} did not run", file=sys.stderr)
    failed = [name for name, state in states.items() if state == "failed" and by_backend[name]["library"]["listed"]]
    return gate.FAILED if lacking or failed else gate.OK


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", action="append", type=Path, default=[], metavar="BUNDLE", help="of the shapes example, in fp32 and fp16"
    )
    parser.add_argument("--models", default="sd15", help="of the benchmark: sd15, sd-turbo, sdxl, or none (sd15)")
    parser.add_argument("--bundle", action="append", default=[], metavar="MODEL=FOLDER", help="an fp16 bundle exported elsewhere")
    parser.add_argument("--out", type=Path, default=ROOT / "reports", help="(reports)")
    parser.add_argument("--minutes", type=float, default=60.0, help="for the benchmark (60)")
    parsed = parser.parse_args(arguments)

    def run() -> int:
        from benchmarks.gpu.bench import named

        models = [name for name in parsed.models.split(",") if name != "none"]
        bench = Options(models=models, bundles=named(parsed.bundle), minutes=parsed.minutes, compiled=False)
        try:
            shapes = parsed.shapes or shapes_bundles(bench.work)
        except RuntimeError as error:
            print(f"the shapes example: {error}", file=sys.stderr)
            return gate.NO_GPU
        by_backend = reports(Wanted(shapes=[each.resolve() for each in shapes], checkpoint=SHAPES, bench=bench))
        for path in write(by_backend, parsed.out):
            print(f"wrote {path}: read it before you send it")
        return print_summary(by_backend)

    return gate.passed(run)


if __name__ == "__main__":
    sys.exit(main())
