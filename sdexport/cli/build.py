"""The command `build`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdexport.cli.following import run_with_progress
from sdexport.cli.reporting import overriding, shared, with_progress
from sdruntime.cli.terminal import document
from sdruntime.errors import quoted

if TYPE_CHECKING:
    from sdruntime.cli.progress import Reporter


@click.command()
@click.argument("model", required=False)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle: a folder. Replaces an existing bundle."
)
@click.option("--recipe", type=click.Path(path_type=Path), help="Build this recipe. MODEL replaces the recipe's model.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--backend", "backends", multiple=True, help="Also build engines for this library; may be repeated.")
@click.option("--target", help="What the engines are built for: current, ampere+, sm86, …, cuda, cpu.")
@click.option("--size", help="Image sizes of the engines: 512x512, or MIN:MAX, or MIN:OPT:MAX, or a list A,B.")
@click.option("--batch", help="Images per call of the engines: 4, or 1:4, or 1:2:4, or a list 1,2,4.")
@click.option(
    "--guidance", type=click.Choice(["on", "off", "any"]), help="Build engines for images with guidance, without, or both."
)
@overriding
@click.option("--chunks", help="Chunks of 75 tokens in a prompt that the engines take: 1, or 1:3, or 1:1:3.")
@click.option(
    "--defaults",
    metavar="KEY=VALUE,…",
    help="What images are made with by default: steps=4,guidance=1,sampler=euler_a,size=768x512.",
)
@click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Put this embedding (textual inversion, .safetensors) into the bundle, for texts with its name; may be repeated.",
)
@click.option("--no-audit", is_flag=True, help="Do not measure which nodes half precision would harm: faster, but unproven.")
@click.option("--allow-pickle", is_flag=True, help="Also read weights from pickles (.ckpt, .pt, .bin). Nothing in them is run.")
@click.option("--no-verify", is_flag=True, help="Skip the reference outputs and the check against PyTorch.")
@shared
@with_progress
def build(
    model: str | None,
    output: Path,
    recipe: Path | None,
    precision: Any,
    backends: tuple[str, ...],
    target: str | None,
    size: str | None,
    batch: str | None,
    guidance: Any,
    prediction_type: Any,
    config: str | None,
    vae: str | None,
    preview_vae: str | None,
    loras: tuple[str, ...],
    embeddings: tuple[str, ...],
    controlnets: tuple[str, ...],
    t2i_adapters: tuple[str, ...],
    ip_adapter: str | None,
    image_encoder: str | None,
    chunks: str | None,
    defaults: str | None,
    no_audit: bool,
    allow_pickle: bool,
    no_verify: bool,
    as_json: bool,
    reporter: Reporter,
) -> None:
    """Export MODEL to a bundle of ONNX models.

    MODEL is a diffusers folder, a single .safetensors or .ckpt file, or a Hugging Face model id.
    """
    if recipe is not None:
        _refuse_beside_a_recipe(click.get_current_context())
    elif not backends and (target or size or batch or guidance or chunks):
        raise click.UsageError("--target, --size, --batch, --guidance and --chunks apply to engines: add a --backend")
    if model is None and recipe is None:
        raise click.UsageError("give a MODEL, or a --recipe")
    if no_audit and recipe is None and precision == "fp32":
        reporter.note("warning: --no-audit has no effect: fp32 is not audited")
    from sdexport.build.events import ExportOptions
    from sdexport.build.export import build as events
    from sdexport.checkpoint.defaults import parsed
    from sdexport.checkpoint.overrides import named_controlnets
    from sdexport.recipes.recipe import read_recipe
    from sdexport.recipes.run import options_of
    from sdruntime.engines.building import BuildRequest

    shapes = {"size": size, "batch": batch, "guidance": guidance, "chunks": chunks}
    engines = tuple(BuildRequest(backend=name, target=target, **shapes) for name in backends)
    options = ExportOptions(
        precision=precision,
        engines=engines,
        allow_pickle=allow_pickle,
        prediction_type=prediction_type,
        config=config,
        vae=vae,
        defaults=parsed(defaults or ""),
        preview_vae=preview_vae,
        loras=loras,
        embeddings=embeddings,
        controlnets=named_controlnets(controlnets, t2i_adapters),
        ip_adapter=ip_adapter,
        image_encoder=image_encoder,
        audit=not no_audit,
        verify=not no_verify,
    )
    if recipe is not None:
        read = read_recipe(recipe) if model is None else read_recipe(recipe).of(model)
        options = options_of(read)
        options = dataclasses.replace(options, audit=options.audit and not no_audit, verify=options.verify and not no_verify)
        model = read.model
    assert model is not None
    result = run_with_progress(events(model, output, options), reporter)
    if as_json:
        document(
            bundle=str(result.folder),
            up_to_date=result.up_to_date,
            written=result.written,
            checks=result.checks,
            peak_memory=result.peak,
            changes=list(result.changes),
        )
        return
    for line in result.changes:
        reporter.note(f"note: {line}")
    if result.up_to_date:
        reporter.print(f"{result.folder} is up to date")
    else:
        reporter.print(f"{result.folder}: {result.written:,} bytes written, peak memory {result.peak / 1e9:.2f} GB")
        if result.checks:
            reporter.print(f"{result.checks} checks against PyTorch passed")
        elif options.verify:
            reason = "ONNX Runtime has no bf16 on CPUs" if options.precision == "bf16" else "pip install onnxruntime"
            command = f"sdruntime verify {quoted(result.folder)}"
            reporter.note(
                f"warning: the bundle could not be checked on this machine ({reason}): check it on the device with {command}"
            )


def _refuse_beside_a_recipe(context: click.Context) -> None:
    for option in context.command.params:
        name = option.name or ""
        on_command_line = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if on_command_line and name not in ("model", "output", "recipe", "no_audit", "no_verify", "as_json"):
            raise click.UsageError(f"{option.opts[0]} cannot be used with --recipe: change it in {context.params['recipe']}")
