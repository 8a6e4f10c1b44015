"""The command line: the only file of sdexport that prints or picks an exit code.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 usage, 3 environment,
5 a bundle that is not whole, 130 interrupted; the errors carry them.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdexport import __version__
from sdexport.errors import SdexportError
from sdruntime.errors import SdruntimeError

if TYPE_CHECKING:
    from sdexport.build import Built, Event

SCHEMA = 1
INTERRUPTED = 130


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into a message and an exit code."""

    @functools.wraps(command)
    def reporting(**options: Any) -> None:
        try:
            command(**options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer has no reader
            sys.exit(128 + signal.SIGPIPE)
        except (SdexportError, SdruntimeError) as error:
            _fail(f"error: {error}", error.exit_code)
        except MemoryError:
            _fail("error: out of memory: free some, or export on a larger machine", 3)
        except OSError as error:
            _fail(f"error: {error}", 3)

    return reporting


as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdexport")
def main() -> None:
    """Stable Diffusion out of PyTorch: a diffusers checkpoint becomes a bundle that sdruntime runs."""


@main.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle: a folder, replaced as a whole.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--backend", "backends", multiple=True, help="Also build engines for this library here; may be repeated.")
@click.option("--target", help="What the engines are for: current, ampere+, sm86, …, cuda, cpu.")
@click.option("--size", help="Pictures that the engines take: 512x512, or MIN:MAX, or MIN:OPT:MAX, or a list A,B.")
@click.option("--batch", help="Images in one call of the engines: 4, or 1:4, or 1:2:4, or a list 1,2,4.")
@click.option(
    "--guidance", type=click.Choice(["on", "off", "any"]), help="Whether the engines' pictures are drawn with guidance."
)
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights too. Only for a checkpoint that you trust.")
@as_json
@reported
def build(
    model: str,
    output: Path,
    precision: Any,
    backends: tuple[str, ...],
    target: str | None,
    size: str | None,
    batch: str | None,
    guidance: Any,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Export MODEL, a diffusers folder or a hub id, to a bundle."""
    if not backends and (target or size or batch or guidance):
        raise click.UsageError("--target, --size, --batch and --guidance are of engines: name a --backend too")
    from sdexport.build import Options
    from sdexport.build import build as events
    from sdruntime.build import Asked

    engines = tuple(Asked(backend=name, target=target, size=size, batch=batch, guidance=guidance) for name in backends)
    options = Options(precision=precision, engines=engines, allow_pickle=allow_pickle)
    built = _shown(events(model, output, options))
    if as_json:
        _document(bundle=str(built.folder), up_to_date=built.up_to_date, written=built.written, peak_memory=built.peak)
    elif built.up_to_date:
        click.echo(f"{built.folder} is up to date")
    else:
        click.echo(f"{built.folder}: {built.written:,} bytes written, peak memory {built.peak / 1e9:.2f} GB")


def _shown(events: Iterable[Event]) -> Built:
    """Follow a build on standard error, with rich; returns its end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from sdexport.build import Built
    from sdexport.build import Progress as Step

    columns = (TextColumn("{task.description:<16}"), TextColumn("{task.fields[stage]:<10}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}
        for event in events:
            if isinstance(event, Built):
                return event
            stage: str
            if isinstance(event, Step):
                name, stage, done, total = event.component, event.stage.name, event.stage.done, event.stage.total
            else:
                name, stage = event.event.engine, event.event.state
                done, total = (0, 0) if stage in ("begin", "stage") else (1, 1)
                if event.event.stage is not None:
                    stage, done, total = event.event.stage.name, event.event.stage.done, event.event.stage.total
            if name not in tasks:
                tasks[name] = progress.add_task(name, stage=stage, total=None)
            progress.update(tasks[name], stage=stage, completed=done, total=total or None)
    raise AssertionError("a build ends with Built")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@as_json
@reported
def inspect(bundle: Path, as_json: bool) -> None:
    """Tell what a bundle holds, and whether every byte of it is as it was written."""
    from sdruntime.bundle import Bundle
    from sdruntime.errors import BundleError
    from sdruntime.record import json_from_record

    opened = Bundle.open(bundle)
    if changed := opened.changed_files():
        raise BundleError(bundle, changed)
    manifest = opened.manifest
    if as_json:
        _document(manifest=json_from_record(manifest))
        return
    model, made = manifest.model, manifest.provenance
    click.echo(f"{model.name}: {model.family}, {model.prediction_type}, {manifest.precision}, license {model.license}")
    click.echo(f"from {made.get('source', 'unknown')}, {made.get('revision', 'no revision')}, {made.get('created', 'no date')}")
    click.echo(
        f"latents of {model.latent_channels} channels, 1/{model.vae_factor} of the picture's sides, times {model.scaling_factor}"
    )
    for name, component in manifest.components.items():
        size = sum(manifest.files[path].size for path in component.files)
        click.echo(f"{name}: {size:,} bytes")
        for arrow, tensors in (("<-", component.inputs), ("->", component.outputs)):
            for tensor in tensors:
                click.echo(f"  {arrow} {tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]")
    for engine in manifest.engines:
        click.echo(f"engine {engine.name}: {engine.backend} {engine.version}, {engine.target}")
    click.echo(f"{len(manifest.files)} files, {sum(file.size for file in manifest.files.values()):,} bytes, every hash is right")


@main.command()
@as_json
@reported
def doctor(as_json: bool) -> None:
    """Tell what this machine can export, and which engines it can build; for what is missing, the line that installs it."""
    import platform

    from sdexport.cache import cache_folder, versions
    from sdruntime.backends import BACKENDS, backend

    found = versions()
    engines = {name: backend(name, "engine").here(name) for name in BACKENDS if name != "fake"}
    missing = {name: f"pip install {name}" for name, version in found.items() if version == "missing"}
    missing |= {name: library.missing for name, library in engines.items() if library.version is None}
    folder = cache_folder()
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    if as_json:
        _document(
            python=platform.python_version(),
            machine=platform.machine(),
            libraries=found,
            engines={name: {"version": each.version, "targets": list(each.targets)} for name, each in engines.items()},
            missing=missing,
            cache={"folder": str(folder), "size": kept},
        )
        return
    click.echo(f"sdexport {__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name, version in found.items():
        click.echo(f"{name:<14}{version}")
    for name, library in engines.items():
        if library.version is not None:
            click.echo(f"{name:<14}{library.version}: builds engines for {', '.join(library.targets)}")
    for name, line in missing.items():
        click.echo(f"missing: {name}: {line}")
    click.echo(f"kept traces: {kept:,} bytes in {folder} (safe to remove)")


def _document(**fields: Any) -> None:
    click.echo(json.dumps({"schema": SCHEMA, **fields}, indent=1, allow_nan=False))


def _fail(message: str, code: int) -> None:
    click.echo(message, err=True)
    sys.exit(code)
