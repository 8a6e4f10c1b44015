"""The result of a verification, as lines of text and as JSON: a row for each output of each engine, and for each image."""

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
# titles and widths in the table of outputs
_CHECK_COLUMNS: Mapping[str, int] = {"case": 5, "output": 17, "max abs": 8, "relative": 8, "cosine": 9, "PSNR dB": 7}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One output of one engine in one case. Without a difference: an engine that was skipped or failed, with the reason."""

    component: str
    engine: str
    precision: str
    tolerance: str  # the limits: a key of `sdruntime.verification.tolerance.TOLERANCES`
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
    """One image of the whole pipeline. `drawn`: the generated image, `stored`: its reference, both uint8 [H, W, 3]."""

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
    """The report of a verification.

    `reference`: a text that names the reference. `limits`: the applied limits by precision. `date`: the time, ISO 8601 in UTC.
    `machine`: the processor, system and libraries that the numbers were measured on.
    """

    bundle: str
    model: str
    precision: str
    reference: str
    checks: tuple[Check, ...]
    pictures: tuple[ImageCheck, ...]
    limits: Mapping[str, Tolerance]
    date: str
    machine: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())

    @property
    def all(self) -> tuple[Check | ImageCheck, ...]:
        return (*self.checks, *self.pictures)

    @property
    def ran(self) -> int:
        """The number of checks that were not skipped."""
        return sum(check.status != "skip" for check in self.all)

    @property
    def passed(self) -> bool:
        return not self.faults()

    def faults(self) -> list[str]:
        """Return the failed checks with their reasons."""
        return [f"{check.title}: {check.reason}" for check in self.all if check.status == "fail"]

    @property
    def verdict(self) -> str:
        return "every check passed" if self.passed else f"{len(self.faults())} of {self.ran} checks failed"

    def document(self) -> dict[str, Any]:
        """Return the report for JSON, without the pixels."""
        pictures = [
            {
                field.name: getattr(check, field.name)
                for field in dataclasses.fields(check)
                if field.name not in ("drawn", "stored")
            }
            for check in self.pictures
        ]
        return {
            "bundle": self.bundle,
            "model": self.model,
            "precision": self.precision,
            "reference": self.reference,
            "made": self.date,
            "machine": dict(self.machine),
            "limits": {name: dataclasses.asdict(limit) for name, limit in self.limits.items()},
            "passed": self.passed,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "pictures": pictures,
            "notes": list(self.notes),
        }

    def lines(self, width: int = 80) -> Iterator[str]:
        """Yield lines for a terminal of `width` columns: a block for each engine, with a row for each of its outputs."""
        yield from _wrapped(f"{self.model}, {self.precision}: {self.bundle} against {self.reference}", width)
        yield from _wrapped(self.where, width)
        for name, limit in self.limits.items():
            yield from _wrapped(f"limits of {limit_name(name)}: {limit_text(limit)}", width)
        if any(check.difference for check in self.checks):
            yield ""
            yield from _row(list(_CHECK_COLUMNS), tuple(_CHECK_COLUMNS.values()), "", "", width)
        for (component, engine), group in itertools.groupby(self.checks, key=lambda check: (check.component, check.engine)):
            yield ""
            yield from _wrapped(f"{component}: {engine}", width)
            for check in group:
                yield from _row([*check_cells(check).values()], tuple(_CHECK_COLUMNS.values()), check.status, check.reason, width)
        for engines, images in itertools.groupby(self.pictures, key=lambda check: check.engines):
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
        """The time and the machine."""
        return f"{self.date} on {', '.join(self.machine.values())}"


def check_cells(check: Check) -> dict[str, str]:
    """Return the cells of a row by the titles of their columns."""
    difference = check.difference
    numbers = (
        ("", "", "", "")
        if difference is None
        else (
            f"{difference.max_abs:.2e}",
            f"{difference.relative:.2e}",
            f"{difference.cosine:.7f}",
            _decibels(difference.psnr),
        )
    )
    return dict(zip(_CHECK_COLUMNS, (check.case, check.output, *numbers), strict=True))


def image_cells(check: ImageCheck) -> dict[str, str]:
    """Return the cells of an image's row by the titles of their columns."""
    return {"PSNR dB": _decibels(check.psnr), "SSIM": "" if check.ssim is None else f"{check.ssim:.4f}"}


def verdict(status: Status, reason: str) -> str:
    """Return the status as text, with the reason if there is one."""
    word = {"pass": "pass", "fail": "FAIL", "skip": "not run"}[status]
    return f"{word}: {reason}" if reason else word


def limit_name(name: str) -> str:
    """Return the title of a key of TOLERANCES."""
    return "fp32 on a GPU (TF32)" if name == "tf32" else name


def limit_text(limit: Tolerance) -> str:
    """Return the limits of one precision as one line."""
    relative = f", largest error {limit.relative:g} of the largest value" if limit.relative < 1 else ""
    return (
        f"PSNR {limit.psnr:g} dB, cosine {limit.cosine:g}{relative}; images: PSNR {limit.picture_psnr:g} dB, SSIM {limit.ssim:g}"
    )


def _decibels(psnr: float | None) -> str:
    return "" if psnr is None else "equal" if psnr == EQUAL else f"{psnr:.1f}"


def _row(cells: list[str], widths: tuple[int, ...], status: Status | Literal[""], reason: str, width: int) -> Iterator[str]:
    """Yield a row with cells padded to `widths` and the status, then the reason on its own lines."""
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
