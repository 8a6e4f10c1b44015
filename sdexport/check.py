"""The commands that hold a bundle to numbers: verify and bench."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdexport.command import shared, with_progress
from sdruntime.command import Failed, check_output, document
from sdruntime.progress import columns_of

if TYPE_CHECKING:
    from sdexport.bench import Measuring
    from sdruntime.progress import Progress


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Run this checkpoint, the bundle's own, in PyTorch beside it.")
@click.option("--bisect", "bisects", is_flag=True, help="Name the first node of each failing component that is too far off.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights of MODEL too. Only for one that you trust.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a report with the pictures side by side.")
@shared
@with_progress
def verify(
    bundle: Path, against: str | None, bisects: bool, allow_pickle: bool, html: Path | None, as_json: bool, shown: Progress
) -> None:
    """Hold BUNDLE, its ONNX and every engine that runs here, to its golden numbers."""
    if bisects and against is None:
        raise click.UsageError("--bisect compares with the graph of the checkpoint: name it with --against")
    if allow_pickle and against is None:
        raise click.UsageError("--allow-pickle is for the weights of a checkpoint: name it with --against")
    if html is not None:
        check_output(html, "--html")
    from sdexport.verify import first_nodes, reference_checkpoint, verify_against
    from sdruntime.bundle import Bundle
    from sdruntime.check import watched
    from sdruntime.errors import VerificationFailed
    from sdruntime.page import write_page
    from sdruntime.verify import report_of
    from sdruntime.verify import verify as checks

    opened = Bundle.open(bundle)
    if against is None:
        report = report_of(opened, watched(opened, checks(opened), shown))
    else:
        shown.show("read the checkpoint")
        checkpoint = reference_checkpoint(opened, against, allow_pickle=allow_pickle)
        checked = watched(opened, verify_against(opened, checkpoint), shown)
        report = report_of(opened, checked, reference=f"{against} in PyTorch")
        if bisects:
            shown.show("bisect")
            report = first_nodes(opened, checkpoint, report, allow_pickle=allow_pickle)
    if html is not None:
        write_page(report, html)
    if not as_json:
        shown.print("\n".join(report.lines(columns_of(sys.stdout))))
    if not report.passed:
        raise Failed(VerificationFailed(bundle, report.faults()), **report.document())
    if as_json:
        document(**report.document())


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="auto", show_default=True, help="Whose engines are measured.")
@click.option("--against", multiple=True, help="Beside them: torch, torch-bf16, torch-compile, or a backend; may be repeated.")
@click.option("--model", help="The checkpoint for torch, a folder or a hub id, where the bundle's own source is not to be found.")
@click.option("--rebuild", is_flag=True, help="Build the engines in a scratch copy, for these shapes, and time it.")
@click.option("--steps", default=20, show_default=True)
@click.option("--batch", default=1, show_default=True, help="Pictures of one call.")
@click.option("--size", help="WxH in pixels; the model's own if not given.")
@click.option("--guidance", default=7.5, show_default=True)
@click.option("--seconds", default=120.0, show_default=True, help="Time limit of the whole run, without building engines.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write the tables to this file.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also draw the ratios, as SVG, to this file.")
@shared
@with_progress
def bench(
    bundle: Path, size: str | None, markdown: Path | None, picture: Path | None, as_json: bool, shown: Progress, **options: Any
) -> None:
    """Measure a bundle beside what you would otherwise run: components, whole pictures, memory, cold start."""
    for path, option in ((markdown, "--markdown"), (picture, "--picture")):
        if path is not None:
            check_output(path, option)
    from sdexport.bench import Settings
    from sdexport.bench import bench as events
    from sdexport.chart import busy_warning, svg
    from sdexport.chart import markdown as lines
    from sdruntime.durable import replace_file
    from sdruntime.shapes import parse_size

    settings = Settings(
        size=parse_size(size) if size else None, **{name: options.pop(name) for name in ("steps", "batch", "guidance", "seconds")}
    )
    found = _measured(events(bundle, settings, **options), shown)
    if markdown:
        replace_file(markdown, ("\n".join(lines(found)) + "\n").encode())
    if picture:
        replace_file(picture, svg(found).encode())
    for warning in filter(None, (busy_warning(found), *found["warnings"])):
        shown.note(f"warning: {warning}")
    shown.print(json.dumps(found, indent=1, allow_nan=False) if as_json else "\n".join(lines(found)))


def _measured(events: Iterable[Measuring | dict[str, Any]], shown: Progress) -> dict[str, Any]:
    """Show a benchmark; returns its document."""
    for event in events:
        if isinstance(event, dict):
            return event
        shown.show("bench", event.what, done=event.done, total=event.total)
    raise AssertionError("a benchmark tells its end")
