"""Build and verify a checkpoint with real weights, and compare its images with diffusers.

    python -m benchmarks.real_check MODEL [--work FOLDER] [--rows FILE] [--steps 20] [--precision fp32 --precision fp16]
    python -m benchmarks.real_check --table       # rewrite the table of docs/verification.md from the rows

MODEL is a diffusers folder or a hub id. For each precision the steps of `STEPS` run in turn: 8 images are generated at the
model's own size, by ONNX Runtime (the best available target) and by diffusers in fp32, from the same noise. One row of JSON,
without paths, is added to reports/real-check.jsonl. Exit code 1 if a step failed or a limit was missed, else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from sdexport.bench.subject import machine_of
from sdexport.bench.timing import generate, text_of
from sdruntime.engines.choose import Machine
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.system.process import module_command
from sdruntime.verification.metrics import image_psnr, ssim
from sdruntime.verification.tolerance import TOLERANCES

SCHEMA = 1
ROWS = ROOT / "reports" / "real-check.jsonl"
PAGE = ROOT / "docs" / "verification.md"
BEGIN, END = "<!-- real-check: begin -->", "<!-- real-check: end -->"
NOBODY = "Nobody has run it on real weights yet."
# minimum over the prompts, against diffusers in fp32: PSNR in dB, and SSIM
FLOORS: Mapping[str, tuple[float, float]] = {
    name: (TOLERANCES[name].picture_psnr, TOLERANCES[name].ssim) for name in ("fp32", "fp16")
}
PROMPTS = (
    "a lighthouse in a storm, oil painting",
    "a red fox in snow, photograph",
    "portrait of an old sailor, studio light",
    "a bowl of oranges on a blue table",
    "a city street at night in the rain",
    "a castle on a hill, watercolour",
    "a small green robot reading a book",
    "mountains above a lake at dawn",
)


class Check:
    """The check of one model in one precision; each step adds to `results`."""

    def __init__(self, model: str, precision: str, work: Path, *, steps: int, prompts: Sequence[str]) -> None:
        self.model, self.precision, self.steps, self.prompts = model, precision, steps, prompts
        self.bundle = work / f"{Path(model).name}-{precision}"
        self.results: dict[str, Any] = {}

    def build(self) -> None:
        self._command("build", self.model, "-o", str(self.bundle), "--precision", self.precision, "--backend", "onnxruntime")
        from sdruntime.bundle.bundle import Bundle

        model = Bundle.open(self.bundle).manifest.model
        self.results |= {"name": model.name, "family": model.family, "size": list(model.default_size[::-1])}

    def audit(self) -> None:
        self._command("audit", str(self.bundle))

    def verify(self) -> None:
        self._command("verify", str(self.bundle))

    def pictures(self) -> None:
        """Compare images of the bundle with diffusers', one pipeline in memory at a time. Raises ValueError below a limit."""
        from sdexport.bench.diffusers import EAGER, Diffusers
        from sdexport.checkpoint.hub import locate

        with Pipeline.open(self.bundle) as pipe:
            size = pipe.model.default_size[::-1]
            requests = [Request(prompt=prompt, seed=k, steps=self.steps, size=size) for k, prompt in enumerate(self.prompts)]
            ours = [generate(pipe, [request], on_device=True)[0] for request in requests]
        checkpoint = locate(self.model, precision="fp32", allow_pickle=False).path
        with contextlib.closing(Diffusers(checkpoint, device="cpu", precision="fp32")) as rival:
            theirs = [rival.generate(EAGER, [request])[0] for request in requests]
        decibels = [round(image_psnr(a, b), 2) for a, b in zip(ours, theirs, strict=True)]
        similarity = [round(ssim(a, b), 5) for a, b in zip(ours, theirs, strict=True)]
        deviation = min(float(image.std()) for image in ours)
        self.results |= {"psnr": decibels, "ssim": similarity, "least_deviation": round(deviation, 2)}
        least_db, least_ssim = FLOORS[self.precision]
        if min(decibels) < least_db or min(similarity) < least_ssim:
            raise ValueError(f"PSNR {min(decibels)} dB, SSIM {min(similarity)}: expected at least {least_db} dB and {least_ssim}")

    def _command(self, *arguments: str) -> None:
        done = subprocess.run(module_command("sdexport", *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode:
            lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
            raise ValueError(
                f"sdexport {arguments[0]} failed with exit code {done.returncode}: {lines[-1] if lines else 'no message'}"
            )


STEPS: Sequence[tuple[str, Callable[[Check], None]]] = (
    ("build", Check.build),
    ("audit", Check.audit),
    ("verify", Check.verify),
    ("pictures", Check.pictures),
)
OPTIONAL = ("audit", "verify")  # if sdexport has the command


def commands() -> set[str]:
    from sdexport.cli.main import main as cli

    return set(cli.commands)


def check(model: str, precision: str, work: Path, *, steps: int, prompts: Sequence[str] = PROMPTS) -> dict[str, Any]:
    """Run the steps until one fails; return each one's result ("ok", "not there" or the error), its seconds and the figures."""
    run = Check(model, precision, work, steps=steps, prompts=prompts)
    results: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name, step in STEPS:
        if name in OPTIONAL and name not in commands():
            results[name] = "not there"
            continue
        begun = time.monotonic()
        try:
            step(run)
            results[name] = "ok"
        except Exception as error:  # reported in the row
            results[name] = text_of(error).replace(str(run.bundle), "BUNDLE").replace(model, "MODEL")
        seconds[name] = round(time.monotonic() - begun, 1)
        if results[name] != "ok":
            break
    return {"steps": results, "seconds": seconds, **run.results}


def row(model: str, checks: Mapping[str, Mapping[str, Any]], *, steps: int) -> dict[str, Any]:
    """Return a row of real-check.jsonl. `model`: a hub id, or a folder, of which only the name is kept."""
    from sdexport.trace.versions import versions

    name = Path(model).resolve().name if Path(model).exists() else model
    machine = machine_of(Machine.here())
    return {"schema": SCHEMA, "model": name, "sampler_steps": steps, "machine": machine, "versions": versions(), "checks": checks}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return NOBODY
    lines = ["| model | precision | size | prompts | PSNR, least | SSIM, least | steps | on, when |", "|---" * 8 + "|"]
    words = {"ok": "ok", "not there": "no"}
    for each in rows:
        for precision, found in each["checks"].items():
            size = "×".join(map(str, found.get("size", []))) or "–"
            decibels, alike = found.get("psnr", []), found.get("ssim", [])
            numbers = f"{len(decibels)} | {min(decibels):.1f} dB | {min(alike):.4f}" if decibels else "– | – | –"
            said = ", ".join(f"{name} {words.get(what, 'FAILED')}" for name, what in found["steps"].items())
            where = f"{each['machine']['processor']}, {each['machine']['measured']}"
            lines.append(f"| {each['model']} | {precision} | {size} | {numbers} | {said} | {where} |")
    return "\n".join(lines)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def with_table(readme: str, rows: Sequence[Mapping[str, Any]]) -> str:
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "real-check")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the eight")
    parser.add_argument("--precision", action="append", choices=list(FLOORS))
    parser.add_argument("--table", action="store_true", help="rewrite the table of docs/verification.md from the rows")
    options = parser.parse_args(arguments)
    failed = False
    if options.model:
        checks = {}
        for precision in options.precision or FLOORS:
            print(f"== {options.model}, {precision}", file=sys.stderr, flush=True)
            prompts = PROMPTS[: options.prompts]
            checks[precision] = check(options.model, precision, options.work, steps=options.steps, prompts=prompts)
            failed = failed or any(what not in ("ok", "not there") for what in checks[precision]["steps"].values())
        result = row(options.model, checks, steps=options.steps)
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        with options.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(table([result]))
    elif not options.table:
        parser.error("name a MODEL: a diffusers folder or a hub id")
    if options.table or (options.model and options.rows == ROWS):
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), rows_of(ROWS)), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
