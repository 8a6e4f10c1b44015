"""The command `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdexport.cli.following import run_with_progress
from sdexport.cli.reporting import shared, with_progress
from sdexport.merging.methods import METHODS
from sdruntime.cli.terminal import document
from sdruntime.errors import quoted

if TYPE_CHECKING:
    from sdruntime.cli.progress import Reporter


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="A B [C]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The new folder.")
@click.option(
    "--method",
    type=click.Choice([*METHODS]),
    default="weighted",
    show_default=True,
    help="weighted: (1-w)·A + w·B. slerp: the same along an arc. add-difference: A + w·(B-C).",
)
@click.option(
    "--weights",
    default="0.5",
    show_default=True,
    metavar="W[,PART=W…]",
    help="How much of B: a number, and others for parts: 0.5,vae=0,unet.up_blocks.1=0.8.",
)
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), help="Of the result, if not as A is stored.")
@click.option("--allow-pickle", is_flag=True, help="Also read weights from pickles (.ckpt, .pt, .bin). Nothing in them is run.")
@shared
@with_progress
def merge(
    models: tuple[str, ...],
    output: Path,
    method: Any,
    weights: str,
    precision: Any,
    allow_pickle: bool,
    as_json: bool,
    reporter: Reporter,
) -> None:
    """Merge two or three checkpoints of one architecture.

    The result is a diffusers folder with the configs of A.
    """
    from sdexport.merging.merge import MergeOptions
    from sdexport.merging.merge import merge as events
    from sdexport.merging.weights import weights_from

    options = MergeOptions(method=method, weights=weights_from(weights), precision=precision, allow_pickle=allow_pickle)
    result = run_with_progress(events(models, output, options), reporter)
    for part in result.unused:
        reporter.note(f"warning: no weight belongs to {part}")
    if as_json:
        document(folder=str(result.folder), written=result.written)
    else:
        reporter.print(f"{quoted(result.folder)}: {result.written:,} bytes of weights merged")
