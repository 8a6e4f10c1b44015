"""What a verification found, for each output of each engine and each picture; as lines, as JSON, as one HTML file."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdruntime.engine import Array
from sdruntime.errors import SettingError
from sdruntime.image import Image, png_from_image

Status = Literal["pass", "fail", "skip"]
EQUAL = 200.0  # dB: what stands for two arrays that are the same
_WINDOW = 8  # pixels of a side
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_AMPLIFIED = 8  # times, in the picture of a difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far an output is from its reference: `max_abs`, `relative` (against the reference's largest magnitude), the cosine of
    the angle between them, and `psnr` in dB with that magnitude as the peak (EQUAL at most)."""

    max_abs: float
    relative: float
    cosine: float
    psnr: float

    @classmethod
    def of(cls, ours: Array, reference: Array, largest: float) -> Difference:
        one, other = ours.reshape(-1).astype(np.float64), reference.reshape(-1).astype(np.float64)
        worst = float(np.abs(one - other).max())
        lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
        peak = largest or 1.0
        return cls(
            max_abs=worst,
            relative=worst / peak,
            cosine=min(float(one @ other) / lengths, 1.0) if lengths else float(worst == 0),
            psnr=_decibels(peak, float(np.mean((one - other) ** 2))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One output of one engine in one case; or, without a difference, an engine that was not run, and why."""

    component: str
    engine: str
    precision: str
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
class PictureCheck:
    """One picture of the whole pipeline. `drawn` and `stored`: uint8 [H, W, 3]."""

    engines: str
    status: Status
    prompt: str = ""
    psnr: float | None = None
    ssim: float | None = None
    reason: str = ""
    drawn: Image | None = None
    stored: Image | None = None

    @property
    def title(self) -> str:
        return f"pipeline {self.engines} {self.prompt!r}" if self.prompt else f"pipeline {self.engines}"

    @property
    def subject(self) -> str:
        return f"pipeline {self.engines}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`reference`: what the numbers were compared with, for a person."""

    bundle: str
    model: str
    precision: str
    reference: str
    checks: tuple[Check, ...]
    pictures: tuple[PictureCheck, ...]
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Check | PictureCheck, ...]:
        return (*self.checks, *self.pictures)

    @property
    def ran(self) -> int:
        return sum(each.status != "skip" for each in self.all)

    @property
    def passed(self) -> bool:
        return not self.faults()

    def faults(self) -> list[str]:
        return [f"{each.title}: {each.reason}" for each in self.all if each.status == "fail"]

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
            "passed": self.passed,
            "checks": [dataclasses.asdict(each) for each in self.checks],
            "pictures": pictures,
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """A table for a terminal."""
        yield f"{self.model}, {self.precision}: {self.bundle} against {self.reference}"
        head = ("component", "engine", "case", "output", "max abs", "relative", "cosine", "PSNR dB", "")
        yield from _table([head, *(row(each) for each in self.checks)])
        if self.pictures:
            yield from _table([("pipeline", "prompt", "PSNR dB", "SSIM", ""), *(picture_row(each) for each in self.pictures)])
        yield from self.notes


def row(check: Check) -> tuple[str, ...]:
    found = check.difference
    numbers = (
        ("", "", "", "")
        if found is None
        else (f"{found.max_abs:.2e}", f"{found.relative:.2e}", f"{found.cosine:.7f}", _shown(found.psnr))
    )
    return (check.component, check.engine, check.case, check.output, *numbers, _verdict(check.status, check.reason))


def picture_row(check: PictureCheck) -> tuple[str, ...]:
    ssim = "" if check.ssim is None else f"{check.ssim:.5f}"
    return (check.engines, check.prompt, _shown(check.psnr), ssim, _verdict(check.status, check.reason))


def picture_psnr(ours: Image, reference: Image) -> float:
    """In dB, of uint8 pictures, with 255 as the peak; EQUAL at most."""
    return _decibels(255.0, float(np.mean((ours.astype(np.float64) - reference) ** 2)))


def ssim(ours: Image, reference: Image) -> float:
    """Mean structural similarity of two uint8 pictures [H, W, 3], over all windows of 8×8 pixels of every channel.

    Wang, Bovik, Sheikh, Simoncelli 2004, equation 13, with K1 = 0.01, K2 = 0.03 and uniform windows, as in their section III-B.
    """
    x, y = ours.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _means(x), _means(y)
    var_x, var_y = _means(x * x) - mean_x**2, _means(y * y) - mean_y**2
    covariance = _means(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    likeness /= (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    return float(likeness.mean())


def _means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of every window of 8×8, from cumulative sums."""
    sums = np.zeros((values.shape[0] + 1, values.shape[1] + 1, *values.shape[2:]))
    sums[1:, 1:] = values.cumsum(axis=0).cumsum(axis=1)
    n = _WINDOW
    windows: NDArray[np.float64] = (sums[n:, n:] - sums[:-n, n:] - sums[n:, :-n] + sums[:-n, :-n]) / n**2
    return windows


def _decibels(peak: float, error: float) -> float:
    return EQUAL if error == 0 else min(10 * float(np.log10(peak**2 / error)), EQUAL)


def _shown(psnr: float | None) -> str:
    return "" if psnr is None else "equal" if psnr == EQUAL else f"{psnr:.1f}"


def _verdict(status: Status, reason: str) -> str:
    word = {"pass": "pass", "fail": "FAIL", "skip": "not run"}[status]
    return f"{word}: {reason}" if reason else word


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(each[column]) for each in rows) for column in range(len(rows[0]) - 1)]
    for each in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(each, widths, strict=False)), each[-1]]).rstrip()


# -- HTML

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0;width:100%}
th,td{padding:.25rem .6rem;text-align:left;border-bottom:1px solid #d8dee4}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.pass{color:#1a7f37}.fail{color:#cf222e;font-weight:600}.skip{color:#6e7781}
figure{display:inline-block;margin:0 1rem 1rem 0}img{width:256px;image-rendering:pixelated;border:1px solid #d8dee4;display:block}
figcaption{font-size:13px;color:#57606a}"""


def page(report: Report) -> str:
    """The report as one HTML file that needs nothing else: a table, and the pictures side by side with their difference."""
    verdict = "every check passed" if report.passed else f"{len(report.faults())} failed"
    title = f"{report.model}, {report.precision}: {verdict}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>',
        f'<h1 class="{"pass" if report.passed else "fail"}">{html.escape(title)}</h1>',
        f"<p>{html.escape(report.bundle)}, against {html.escape(report.reference)}</p>",
        "<h2>Components</h2>",
        _html_table(
            ("component", "engine", "case", "output", "max abs", "relative", "cosine", "PSNR dB", ""),
            ((each.status, row(each)) for each in report.checks),
            numbers=range(4, 8),
        ),
    ]
    if report.pictures:
        parts.append("<h2>Pictures</h2>")
        parts.append(
            _html_table(
                ("engines", "prompt", "PSNR dB", "SSIM", ""),
                ((each.status, picture_row(each)) for each in report.pictures),
                numbers=range(2, 4),
            )
        )
        parts += [_figures(each) for each in report.pictures if each.drawn is not None and each.stored is not None]
    parts += [f"<p>{html.escape(note)}</p>" for note in report.notes]
    return "\n".join([*parts, "</html>\n"])


def write_page(report: Report, path: Path) -> None:
    """`page`, written to `path`. Raises SettingError where that cannot be."""
    try:
        path.write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise SettingError(f"{path}: cannot be written: {error.strerror}") from error


def _html_table(head: tuple[str, ...], rows: Iterable[tuple[Status, tuple[str, ...]]], *, numbers: range) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for status, cells in rows:
        kinds = ["n" if column in numbers else "" for column in range(len(cells) - 1)] + [status]
        marked = zip(kinds, cells, strict=True)
        lines.append("<tr>" + "".join(f'<td class="{kind}">{html.escape(cell)}</td>' for kind, cell in marked) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _figures(check: PictureCheck) -> str:
    assert check.drawn is not None
    assert check.stored is not None
    apart = np.abs(check.drawn.astype(np.int16) - check.stored) * _AMPLIFIED
    pictures: Mapping[str, Image] = {
        "reference": check.stored,
        check.engines: check.drawn,
        f"difference, {_AMPLIFIED} times": np.minimum(apart, 255).astype(np.uint8),
    }
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png_from_image(image)).decode()}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, image in pictures.items()
    )
    return f"<h3>{html.escape(check.engines)}: {html.escape(check.prompt)}</h3><div>{figures}</div>"
