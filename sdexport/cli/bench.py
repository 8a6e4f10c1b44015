"""The command `bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdexport.cli.reporting import shared, with_progress
from sdruntime.cli.terminal import check_output

if TYPE_CHECKING:
    from sdruntime.cli.progress import Reporter


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="auto", show_default=True, help="The backend to measure.")
@click.option("--against", multiple=True, help="Compare with torch, torch-bf16, torch-compile or a backend; may be repeated.")
@click.option("--model", help="The checkpoint for torch, a folder or a model id, if the bundle's source cannot be found.")
@click.option("--rebuild", is_flag=True, help="Also time building the engines for these shapes, in a temporary copy.")
@click.option("--steps", default=20, show_default=True)
@click.option("--batch", default=1, show_default=True, help="Images per call.")
@click.option("--size", help="WxH in pixels; default: the model's own.")
@click.option("--guidance", default=7.5, show_default=True)
@click.option("--seconds", default=120.0, show_default=True, help="Time limit of the whole run, without building engines.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write the tables to this file.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also write a chart of the ratios to this file, as SVG.")
@shared
@with_progress
def bench(
    bundle: Path, size: str | None, markdown: Path | None, picture: Path | None, as_json: bool, reporter: Reporter, **options: Any
) -> None:
    """Benchmark a bundle, and compare it with diffusers.

    Measures components, whole images, memory and the cold start, also of other backends.
    """
    for path, option in ((markdown, "--markdown"), (picture, "--picture")):
        if path is not None:
            check_output(path, option)
    from sdexport.bench.bench import Settings
    from sdexport.bench.bench import bench as events
    from sdexport.bench.chart import busy_warning, svg
    from sdexport.bench.chart import markdown as lines
    from sdruntime.system.durable import replace_file
    from sdruntime.system.events import finish
    from sdruntime.system.sizes import parse_size

    settings = Settings(
        size=parse_size(size) if size else None, **{name: options.pop(name) for name in ("steps", "batch", "guidance", "seconds")}
    )
    document = finish(
        events(bundle, settings, **options), lambda event: reporter.show("bench", event.what, done=event.done, total=event.total)
    )
    if markdown:
        replace_file(markdown, ("\n".join(lines(document)) + "\n").encode())
    if picture:
        replace_file(picture, svg(document).encode())
    for warning in filter(None, (busy_warning(document), *document["warnings"])):
        reporter.note(f"warning: {warning}")
    reporter.print(json.dumps(document, indent=1, allow_nan=False) if as_json else "\n".join(lines(document)))
