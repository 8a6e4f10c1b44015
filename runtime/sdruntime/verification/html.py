"""A report as one self-contained HTML file: verdict, limits, tables, and images side by side with their difference."""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sdruntime.errors import SettingError
from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.pipeline.images.png import png_from_image
from sdruntime.system.durable import replace_file
from sdruntime.verification.report import ImageCheck, Report, Status, check_cells, image_cells, limit_name, verdict
from sdruntime.verification.tolerance import Tolerance

_AMPLIFIED = 8  # factor, in the image of a difference
_STYLE = """:root{color-scheme:light dark;--line:#d8dee4;--dim:#57606a;--good:#1a7f37;--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--line:#3d444d;--dim:#9198a1;--good:#3fb950;--bad:#f85149}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.25rem}h2{font-size:1.15rem;margin-top:2rem}
p{margin:.25rem 0;color:var(--dim)}
.table{overflow-x:auto}
table{border-collapse:collapse;margin:.5rem 0}
th,td{padding:.25rem 1rem .25rem 0;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
tbody th{padding-top:1rem}th span{font-weight:400;color:var(--dim)}
.n{text-align:right;font-variant-numeric:tabular-nums}.reason{white-space:normal}
.pass{color:var(--good)}.fail{color:var(--bad);font-weight:600}.skip{color:var(--dim)}
.images{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(14rem,100%),1fr));gap:1rem;max-width:56rem}
figure{margin:0}img{width:100%;image-rendering:pixelated;border:1px solid var(--line);display:block}
figcaption{font-size:13px;color:var(--dim)}"""


def page(report: Report) -> str:
    """Return the report as HTML."""
    title = f"{report.model}, {report.precision}: {report.verdict}"
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f'<h1 class="{"pass" if report.passed else "fail"}">{html.escape(title)}</h1>',
        f"<p>{html.escape(report.bundle)}, against {html.escape(report.reference)}</p>",
        f"<p>{html.escape(report.where)}</p>",
        *(f"<p>{html.escape(note)}</p>" for note in report.notes),
        "<h2>Limits</h2>",
        _table(
            ["precision"], ["PSNR dB", "cosine", "relative error", "image: PSNR dB", "image: SSIM"],
            [[_row([limit_name(name)], _limit_cells(limit)) for name, limit in report.limits.items()]],
        ),
        "<h2>Components</h2>",
    ]  # fmt: skip
    groups = []
    for (component, engine), checks in itertools.groupby(report.checks, key=lambda check: (check.component, check.engine)):
        rows = [_heading(component, engine)]
        for check in checks:
            case, output, *numbers = check_cells(check).values()
            rows += _judged(check.status, check.reason, [case, output], numbers)
        groups.append(rows)
    parts.append(_table(["", "case", "output"], ["max abs", "relative", "cosine", "PSNR dB"], groups))
    if report.pictures:
        parts.append("<h2>Images</h2>")
        groups = []
        for engines, images in itertools.groupby(report.pictures, key=lambda check: check.engines):
            rows = [_heading("images", engines)]
            for image in images:
                rows += _judged(image.status, image.reason, [image.prompt], list(image_cells(image).values()))
            groups.append(rows)
        parts.append(_table(["", "prompt"], ["PSNR dB", "SSIM"], groups))
        parts += [_figures(check) for check in report.pictures if check.drawn is not None and check.stored is not None]
    return "\n".join([*parts, "</html>\n"])


def write_page(report: Report, path: Path) -> None:
    """Write the report as HTML to `path`. Raises SettingError if it cannot be written."""
    try:
        replace_file(path, page(report).encode())
    except OSError as error:
        raise SettingError(f"{path}: cannot be written: {error.strerror}") from error


def _limit_cells(limit: Tolerance) -> list[str]:
    relative = f"{limit.relative:g}" if limit.relative < 1 else "–"
    return [f"{limit.psnr:g}", f"{limit.cosine:g}", relative, f"{limit.picture_psnr:g}", f"{limit.ssim:g}"]


def _table(words: Sequence[str], numbers: Sequence[str], groups: Iterable[Sequence[str]]) -> str:
    """Return a table. `words`, `numbers`: the titles of its columns of text and of numbers; `groups`: its rows, in groups."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in words)
    head += "".join(f'<th class="n">{html.escape(title)}</th>' for title in numbers)
    bodies = ["<tbody>" + "\n".join(rows) + "</tbody>" for rows in groups]
    return "\n".join([f'<div class="table"><table><thead><tr>{head}</tr></thead>', *bodies, "</table></div>"])


def _row(words: Sequence[str], numbers: Sequence[str], status: Status | None = None) -> str:
    cells = "" if status is None else f'<td class="{status}">{verdict(status, "")}</td>'
    cells += "".join(f"<td>{html.escape(cell)}</td>" for cell in words)
    return f"<tr>{cells}" + "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in numbers) + "</tr>"


def _judged(status: Status, reason: str, words: Sequence[str], numbers: Sequence[str]) -> Iterator[str]:
    """Yield the row of a check, and below it the reason if it did not pass."""
    yield _row(words, numbers, status)
    if reason:
        yield f'<tr><td></td><td class="{status} reason" colspan="9">{html.escape(reason)}</td></tr>'


def _heading(component: str, engine: str) -> str:
    return f'<tr><th colspan="9">{html.escape(component)} <span>{html.escape(engine)}</span></th></tr>'


def _figures(check: ImageCheck) -> str:
    """Return the reference image, the generated image and their amplified difference."""
    assert check.drawn is not None
    assert check.stored is not None
    difference = np.abs(check.drawn.astype(np.int16) - check.stored) * _AMPLIFIED
    images: Mapping[str, Pixels] = {
        "reference": check.stored,
        check.engines: check.drawn,
        f"difference, {_AMPLIFIED} times": np.minimum(difference, 255).astype(np.uint8),
    }
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png_from_image(image)).decode()}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, image in images.items()
    )
    return f'<h3>{html.escape(check.engines)}: {html.escape(check.prompt)}</h3><div class="images">{figures}</div>'
