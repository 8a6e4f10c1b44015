"""The command `verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdexport.cli.reporting import overriding, shared, with_progress
from sdruntime.cli.progress import columns_of
from sdruntime.cli.terminal import Failed, check_output, document

if TYPE_CHECKING:
    from sdruntime.cli.progress import Reporter


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Compare with this checkpoint, the bundle's own, run in PyTorch.")
@click.option(
    "--bisect",
    "bisects",
    is_flag=True,
    help="For each ONNX and TensorRT engine that fails, find the first node that is too far off.",
)
@overriding
@click.option("--allow-pickle", is_flag=True, help="Also read weights from pickles (.ckpt, .pt, .bin). Nothing in them is run.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a report with the images side by side.")
@shared
@with_progress
def verify(
    bundle: Path,
    against: str | None,
    bisects: bool,
    prediction_type: Any,
    config: str | None,
    vae: str | None,
    preview_vae: str | None,
    loras: tuple[str, ...],
    controlnets: tuple[str, ...],
    t2i_adapters: tuple[str, ...],
    ip_adapter: str | None,
    image_encoder: str | None,
    allow_pickle: bool,
    html: Path | None,
    as_json: bool,
    reporter: Reporter,
) -> None:
    """Check BUNDLE against its reference outputs.

    Checks its ONNX and every engine that this machine can run.
    """
    if bisects and against is None:
        raise click.UsageError("--bisect compares with the checkpoint: add --against")
    if allow_pickle and against is None:
        raise click.UsageError("--allow-pickle is for the weights of a checkpoint: add --against")
    replaced = {"--prediction-type": prediction_type, "--config": config, "--vae": vae, "--preview-vae": preview_vae}
    replaced |= {"--lora": ", ".join(loras), "--controlnet": ", ".join(controlnets), "--t2i-adapter": ", ".join(t2i_adapters)}
    replaced |= {"--ip-adapter": ip_adapter, "--image-encoder": image_encoder}
    for option, value in replaced.items():
        if value and against is None:
            raise click.UsageError(f"{option} is for the checkpoint: add --against")
    if html is not None:
        check_output(html, "--html")
    from sdexport.checkpoint.overrides import named_controlnets
    from sdexport.verification.verify import first_nodes, reference_checkpoint, verify_against
    from sdruntime.bundle.bundle import Bundle
    from sdruntime.cli.commands.verify import with_progress
    from sdruntime.errors import VerificationFailed
    from sdruntime.system.events import finish
    from sdruntime.verification.html import write_page
    from sdruntime.verification.verify import report_of
    from sdruntime.verification.verify import verify as checks

    opened = Bundle.open(bundle)
    if against is None:
        report = report_of(opened, with_progress(opened, checks(opened), reporter))
    else:
        reporter.show("read the checkpoint")
        checkpoint = reference_checkpoint(
            opened,
            against,
            allow_pickle=allow_pickle,
            prediction_type=prediction_type,
            config=config,
            vae=vae,
            preview_vae=preview_vae,
            loras=loras,
            controlnets=named_controlnets(controlnets, t2i_adapters),
            ip_adapter=ip_adapter,
            image_encoder=image_encoder,
        )
        checked = with_progress(opened, verify_against(opened, checkpoint), reporter)
        report = report_of(opened, checked, reference=f"{against} in PyTorch")
        if bisects:
            walk = first_nodes(opened, checkpoint, report, allow_pickle=allow_pickle)
            report = finish(walk, lambda stage: reporter.show("bisect", stage.name, done=stage.done, total=stage.total))
    if html is not None:
        write_page(report, html)
    if not as_json:
        reporter.print("\n".join(report.lines(columns_of(sys.stdout))))
    if not report.passed:
        raise Failed(VerificationFailed(bundle, report.faults()), **report.document())
    if as_json:
        document(**report.document())
