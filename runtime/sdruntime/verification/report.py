"""The result of a verification: a row for each output of each engine and for each image; as lines and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.verification.metrics import EQUAL, Difference
from sdruntime.verification.tolerance import Tolerance

Status = Literal["pass", "fail", "skip"]
# of the table of outputs: title and width
_CHECK_COLUMNS: Mapping[str, int] = {"case": 5, "output": 17, "max abs": 8, "relative": 8, "cosine": 9, "PSNR dB": 7}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One output of one engine in one case; or, without a difference, an engine that was not run, and why."""

    component: str
    engine: str
    precision: str
    tolerance: str  # the limits that apply: a key of `sdruntime.verification.tolerance.TOLERANCES`
    status: Status
    case: str = ""
    output: str = ""
    difference: Difference | None = None
    reason: str = ""

    @property
    def title(self) -> str:
        return " ".join(part for part in (self.component, self.engine, self.case, self.output) if part)

    @property
    def subject(self) -> str:
        """The engine, without the case and the output."""
        return f"{self.component} {self.engine}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageCheck:
    """One image of the whole pipeline. `drawn` and `stored`: uint8 [H, W, 3]."""

    engines: str
    status: Status
    prompt: str = ""
    psnr: float | None = None
    ssim: float | None = None
    reason: str = ""
    drawn: Pixels | None = None
    stored: Pixels | None = None

    @property
    def title(self) -> str:
        return f"pipeline {self.engines} {self.prompt!r}" if self.prompt else f"pipeline {self.engines}"

    @property
    def subject(self) -> str:
        return f"pipeline {self.engines}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`reference`: what the numbers were compared with, for a person. `limits`: those that were applied, by precision.

    `made`: the time, ISO 8601 in UTC. `machine`: processor, system, libraries: what the numbers were measured on.
    """

    bundle: str
    model: str
    precision: str
    reference: str
    checks: tuple[Check, ...]
    pictures: tuple[ImageCheck, ...]
    limits: Mapping[str, Tolerance]
    made: str
    machine: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())

    @property
    def all(self) -> tuple[Check | ImageCheck, ...]:
        return (*self.checks, *self.pictures)

    @property
    def ran(self) -> int:
        return sum(each.status != "skip" for each in self.all)

    @property
    def passed(self) -> bool:
        return not self.faults()

    def faults(self) -> list[str]:
        return [f"{each.title}: {each.reason}" for each in self.all if each.status == "fail"]

    @property
    def verdict(self) -> str:
        return "every check passed" if self.passed else f"{len(self.faults())} of {self.ran} checks failed"

    def document(self) -> dict[str, Any]:
        """Without the pixels, ready for JSON."""
        pictures = [
            {field.name: getattr(each, field.name) for field in dataclasses.fields(each) if field.name not in ("drawn", "stored")}
            for each in self.pictures
        ]
        return {
            "bundle": self.bundle,
            "model": self.model,
            "precision": self.precision,
            "reference": self.reference,
            "made": self.made,
            "machine": dict(self.machine),
            "limits": {name: dataclasses.asdict(limit) for name, limit in self.limits.items()},
            "passed": self.passed,
            "checks": [dataclasses.asdict(each) for each in self.checks],
            "pictures": pictures,
            "notes": list(self.notes),
        }

    def lines(self, width: int = 80) -> Iterator[str]:
        """For a terminal of `width` columns: a block for each engine, a row for each of its outputs."""
        yield from _wrapped(f"{self.model}, {self.precision}: {self.bundle} against {self.reference}", width)
        yield from _wrapped(self.where, width)
        for name, limit in self.limits.items():
            yield from _wrapped(f"limits of {limit_name(name)}: {limit_text(limit)}", width)
        if any(each.difference for each in self.checks):
            yield ""
            yield from _row(list(_CHECK_COLUMNS), tuple(_CHECK_COLUMNS.values()), "", "", width)
        for (component, engine), group in itertools.groupby(self.checks, key=lambda each: (each.component, each.engine)):
            yield ""
            yield from _wrapped(f"{component}: {engine}", width)
            for check in group:
                yield from _row([*check_cells(check).values()], tuple(_CHECK_COLUMNS.values()), check.status, check.reason, width)
        for engines, images in itertools.groupby(self.pictures, key=lambda each: each.engines):
            yield ""
            yield from _wrapped(f"images: {engines}", width)
            for image in images:
                prompt = textwrap.shorten(image.prompt, 44, placeholder="…")
                yield from _row([prompt, *image_cells(image).values()], (44, 6, 6), image.status, image.reason, width)
        yield ""
        yield from itertools.chain.from_iterable(_wrapped(note, width) for note in self.notes)
        yield self.verdict

    @property
    def where(self) -> str:
        return f"{self.made} on {', '.join(self.machine.values())}"


def check_cells(check: Check) -> dict[str, str]:
    """The cells of a row by the titles of their columns."""
    found = check.difference
    numbers = (
        ("", "", "", "")
        if found is None
        else (f"{found.max_abs:.2e}", f"{found.relative:.2e}", f"{found.cosine:.7f}", _decibels(found.psnr))
    )
    return dict(zip(_CHECK_COLUMNS, (check.case, check.output, *numbers), strict=True))


def image_cells(check: ImageCheck) -> dict[str, str]:
    return {"PSNR dB": _decibels(check.psnr), "SSIM": "" if check.ssim is None else f"{check.ssim:.4f}"}


def verdict(status: Status, reason: str) -> str:
    word = {"pass": "pass", "fail": "FAIL", "skip": "not run"}[status]
    return f"{word}: {reason}" if reason else word


def limit_name(name: str) -> str:
    return "fp32 on a GPU (TF32)" if name == "tf32" else name


def limit_text(limit: Tolerance) -> str:
    """The limits of one precision, in a line."""
    relative = f", largest error {limit.relative:g} of the largest value" if limit.relative < 1 else ""
    return (
        f"PSNR {limit.psnr:g} dB, cosine {limit.cosine:g}{relative}; images: PSNR {limit.picture_psnr:g} dB, SSIM {limit.ssim:g}"
    )


def _decibels(psnr: float | None) -> str:
    return "" if psnr is None else "equal" if psnr == EQUAL else f"{psnr:.1f}"


def _row(cells: list[str], widths: tuple[int, ...], status: Status | Literal[""], reason: str, width: int) -> Iterator[str]:
    """Cells that fit in columns of `widths`, and what was found; a longer reason stands on lines of its own."""
    padded = "  ".join(cell.ljust(least) for cell, least in zip(cells, widths, strict=True))
    if padded.strip():
        yield f"  {padded}  {verdict(status, '') if status else ''}".rstrip()
        if reason:
            yield from _wrapped(reason, width, indent=4)
    elif status:
        yield from _wrapped(verdict(status, reason), width, indent=2)


def _wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    pad = " " * indent
    return textwrap.wrap(text, width, initial_indent=pad, subsequent_indent=pad or "  ", break_on_hyphens=False)
