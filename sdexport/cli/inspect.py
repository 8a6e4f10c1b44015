"""The commands `inspect` and `doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from sdexport import __version__
from sdexport.cli.reporting import shared
from sdruntime.cli.terminal import document


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--precision", is_flag=True, help="List the nodes kept in float32, with reasons and numbers.")
@shared
def inspect(bundle: Path, precision: bool, as_json: bool, quiet: bool) -> None:
    """Show the contents of a bundle, and check the hash of every file."""
    from sdruntime.bundle.bundle import Bundle
    from sdruntime.bundle.records import json_from_record
    from sdruntime.errors import BundleError, printable

    opened = Bundle.open(bundle)
    if changed := opened.changed_files():
        raise BundleError(bundle, changed)
    manifest = opened.manifest
    if precision:
        from sdexport.precision.describe import audit_document, audit_lines

        if as_json:
            document(**audit_document(manifest))
        else:
            click.echo(printable("\n".join(audit_lines(manifest))))
        return
    if as_json:
        document(manifest=json_from_record(manifest))
        return

    def echo(line: str) -> None:
        click.echo(printable(line))

    model, origin = manifest.model, manifest.provenance
    echo(f"{model.name}: {model.family}, {model.prediction_type}, {manifest.precision}, license {model.license}")
    if str(model.defaults):
        echo(f"defaults: {model.defaults}")
    echo(f"from {origin.get('source', 'unknown')}, {origin.get('revision', 'no revision')}, {origin.get('created', 'no date')}")
    echo(f"latents of {model.latent_channels} channels, 1/{model.vae_factor} of the image's sides, times {model.scaling_factor}")
    for name, component in manifest.components.items():
        size = sum(manifest.files[path].size for path in component.files)
        echo(f"{name}: {size:,} bytes")
        for arrow, tensors in (("<-", component.inputs), ("->", component.outputs)):
            for tensor in tensors:
                echo(f"  {arrow} {tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]")
    for engine in manifest.engines:
        echo(f"engine {engine.name}: {engine.backend} {engine.version}, {engine.target}")
    echo(f"{len(manifest.files)} files, {sum(file.size for file in manifest.files.values()):,} bytes, every hash is right")


@click.command()
@shared
def doctor(as_json: bool, quiet: bool) -> None:
    """Show what this machine can export and build.

    It also shows how to install what is missing.
    """
    import platform

    from sdexport.trace.cache import cache_folder
    from sdexport.trace.versions import versions
    from sdruntime.backends.registry import BACKENDS, OFFERED

    libraries = versions()
    engines = {name: BACKENDS[name].here() for name in OFFERED}
    missing = {name: f"pip install {name}" for name, version in libraries.items() if version == "missing"}
    missing |= {name: library.missing for name, library in engines.items() if library.version is None}
    folder = cache_folder()
    cached = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    if as_json:
        document(
            python=platform.python_version(),
            machine=platform.machine(),
            libraries=libraries,
            engines={name: {"version": engine.version, "targets": list(engine.targets)} for name, engine in engines.items()},
            missing=missing,
            cache={"folder": str(folder), "size": cached},
        )
        return
    click.echo(f"sdexport {__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name, version in libraries.items():
        click.echo(f"{name:<14}{version}")
    for name, library in engines.items():
        if library.version is not None:
            click.echo(f"{name:<14}{library.version}: builds engines for {', '.join(library.targets)}")
    for name, line in missing.items():
        click.echo(f"missing: {name}: {line}")
    click.echo(f"cached traces: {cached:,} bytes in {folder} (safe to remove)")
