"""The command line of sdruntime: it and `check` alone print (by `command`), and it picks the exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdruntime import __version__
from sdruntime.capi import add_arguments, answers
from sdruntime.check import build, verify
from sdruntime.command import Failed, Parser, UsageError, code_of, document, failure, print_any_text, reason_of, wants_json
from sdruntime.errors import SdruntimeError, SettingError, plain, quoted
from sdruntime.generate import generate, sampler_options
from sdruntime.progress import progress_on, wants_lines

if TYPE_CHECKING:
    from sdruntime.bundle import Bundle
    from sdruntime.choose import Machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 ok, 1 failed, 2 usage, 3 environment, 4 verification failed, 5 bundle or engine does not
    fit, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = wants_json(given)
    print_any_text()
    try:
        options = parser().parse_args(given)
        with (
            progress_on(quiet=options.quiet or (options.json and not wants_lines())) as options.progress,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, *_, **__: options.progress.note(f"warning: {message}")
            options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer has no reader
        return 128 + signal.SIGPIPE
    except Failed as failed:
        return fail(failed.error, as_json, **failed.fields)
    except (KeyboardInterrupt, SdruntimeError, MemoryError, OSError) as error:
        return fail(error, as_json)
    return 0


def fail(error: BaseException, as_json: bool, **fields: Any) -> int:
    """Tell of an error, for people and as the one document of --json; returns its exit code."""
    if isinstance(error, UsageError):
        print(error.usage, file=sys.stderr)
    reason = reason_of(error)
    print(reason if isinstance(error, KeyboardInterrupt) else f"error: {reason}", file=sys.stderr)
    if as_json:
        with contextlib.suppress(OSError):  # standard output itself may be what failed
            document(**fields, **failure(error))
            sys.stdout.flush()
    return code_of(error)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="sdruntime", description="Stable Diffusion on the device: images from a bundle.")
    top.add_argument("--version", action="version", version=f"sdruntime {__version__}")
    shared(top, False)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], what: str, *, bundle: bool = True
    ) -> argparse.ArgumentParser:
        each = commands.add_parser(name, help=what, description=what)
        each.set_defaults(run=run)
        if bundle:
            each.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder that sdexport build wrote")
        shared(each, argparse.SUPPRESS)  # which leaves what stood before the command
        return each

    each = command("build", build, "build engines from a bundle's ONNX, on and for this machine")
    each.add_argument("--backend", help="tensorrt, tensorrt-rtx, onnxruntime or openvino")
    each.add_argument("--stale", action="store_true", help="build again what an upgrade of a library left behind")
    each.add_argument("--no-verify", action="store_true", help="do not hold the engines to the bundle's golden numbers")
    each.add_argument("--target", help="current, ampere+, sm86, …, cuda, cpu; the best of this machine where left out")
    each.add_argument("--size", metavar="WxH", help="the sizes to build for: 512x512, or MIN:MAX, MIN:OPT:MAX, or a list A,B")
    each.add_argument("--batch", metavar="N", help="images in one call: 4, or MIN:MAX, MIN:OPT:MAX, or a list 1,2,4")
    each.add_argument("--guidance", choices=["on", "off", "any"], help="whether pictures are drawn with guidance (two rows each)")
    each.add_argument("--component", action="append", default=[], dest="components", help="only this one (may be repeated)")
    each.add_argument("--without", action="append", default=[], metavar="COMPONENT", help="all but this one (may be repeated)")
    library = "a setting of the library: optimization_level=5"
    each.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=library)

    each = command("generate", generate, "make pictures")
    each.add_argument("prompt", nargs="+", metavar="PROMPT")
    where = (
        "a .png, .jpg or .webp file; a folder; a pattern: 'out-{seed}.png', with {index} and {prompt} too; - for standard output"
    )
    each.add_argument("-o", "--output", required=True, metavar="FILE", help=where)
    each.add_argument("--overwrite", action="store_true", help="replace existing files")
    each.add_argument("--grid", action="store_true", help="write all images as one sheet")
    each.add_argument("--negative", metavar="PROMPT", help="what should not be there")
    each.add_argument("--image", type=Path, metavar="FILE", help="begin from this image: PNG, JPEG, WebP or BMP")
    each.add_argument("--fit", choices=["resize", "crop"], help="bring --image to the size (an image of another size is refused)")
    each.add_argument("--strength", type=float, help="how much of --image is changed, 0 to 1 (0.8)")
    each.add_argument("--steps", type=int, default=20, help="(20)")
    each.add_argument("--guidance", type=float, default=7.5, help="(7.5); 1 or less leaves the negative prompt out")
    each.add_argument("--rescale", type=float, default=0.0, help="guidance rescale, 0 to 1 (0)")
    each.add_argument("--seed", type=int, help="of the first picture; each further one has the next (random)")
    each.add_argument("--size", metavar="WxH", help="in pixels (the model's own)")
    each.add_argument("--count", type=int, default=1, help="pictures for each prompt (1)")
    each.add_argument("--backend", default="auto", help="(auto)")
    each.add_argument("--device", type=int, default=0, help="which GPU (0)")
    each.add_argument("--threads", type=int, default=0, help="of the CPU (0: the library decides)")
    each.add_argument("--session", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engines' library")
    each.add_argument("--no-measure", action="store_true", help="do not time the CPU's engines to find the quickest")
    each.add_argument("--low-memory", action="store_true", help="one component on the GPU at a time")
    each.add_argument("--vram-budget", metavar="SIZE", help="what of the GPU's memory may be used: 4G, 600M (all that is free)")
    sampling(each)

    each = command("table", table, "print a sampler's table of coefficients; with --json every number in full", bundle=False)
    each.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE")
    each.add_argument("--config", type=Path, metavar="scheduler_config.json", help="in place of a bundle")
    each.add_argument("--steps", type=int, default=20, help="(20)")
    each.add_argument("--strength", type=float, help="of an image-to-image start")
    sampling(each)

    command("samplers", samplers, "the samplers, by every name that they answer to", bundle=False)
    each = command("inspect", inspect, "what a bundle holds, and which of its engines fit this machine")
    each.add_argument("--check", action="store_true", help="read every file and check its hash")
    each.add_argument("--stale", action="store_true", help="only the engines that an upgrade of a library left behind")
    each = command("verify", verify, "hold a bundle and its engines to the golden numbers that it carries")
    each.add_argument("--html", type=Path, metavar="FILE.html", help="also write a report with the pictures side by side")
    each.add_argument("--device", type=int, default=0, help="which GPU (0)")
    each.add_argument("--threads", type=int, default=0, help="of the CPU (0: the library decides)")
    each = command("doctor", doctor, "what this machine can build and run, and what installs the rest", bundle=False)
    each.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="tell of this bundle too")
    add_arguments(command("capi", capi, "build the C library, whose sources are here, and tell a compiler of it", bundle=False))
    return top


def shared(each: argparse.ArgumentParser, default: object) -> None:
    """What may stand before and after the command."""
    each.add_argument("--json", action="store_true", default=default, help="print one JSON document, also of a failure")
    each.add_argument("-q", "--quiet", action="store_true", default=default, help="show no progress")


def sampling(each: argparse.ArgumentParser) -> None:
    each.add_argument("--sampler", help="a name of `sdruntime samplers` (the checkpoint's own)")
    each.add_argument("--schedule", help="karras, exponential, beta, … (the checkpoint's own)")
    each.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="a setting of the sampler, such as eta=0.5"
    )


def table(options: argparse.Namespace) -> None:
    import numpy as np

    from sdruntime.bundle import Bundle
    from sdruntime.record import read_json
    from sdruntime.samplers import meaning
    from sdruntime.samplers.keys import check_options
    from sdruntime.table import compile_table

    if (options.bundle is None) == (options.config is None):
        raise SettingError("table: give a BUNDLE or --config scheduler_config.json, and not both")
    if options.config is not None:
        try:
            config = read_json(options.config)
        except (OSError, ValueError) as error:
            raise SettingError(f"--config {options.config}: {plain(error)}") from error
    else:
        config = Bundle.open(options.bundle).read_json("scheduler/scheduler_config.json")
    given = sampler_options(options)
    check_options(given)
    named = {"sampler": options.sampler, "schedule": options.schedule, **given}
    made = compile_table(config, steps=options.steps, strength=options.strength, **named)
    if line := meaning(config, **named):
        options.progress.note(line)
    if options.json:
        document(table=json.loads(made.to_json()))
        return
    print("step        t      scale   coefficients of x | model outputs | noises, each from the newest back")
    for row in range(made.steps):
        parts = [" ".join(f"{value:+.6g}" for value in np.trim_zeros(part[row], "b")) for part in (made.X, made.M, made.N)]
        print(f"{row:4d} {made.t[row]:8.2f} {made.scale[row]:10.6f}   {' | '.join(parts)}")


def samplers(options: argparse.Namespace) -> None:
    from sdruntime.samplers import SAMPLERS

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "diffusers": each.diffusers,
            "settings": dict(each.implied),
            "a1111": list(each.a1111),
            "about": each.about,
        }
        for name, each in SAMPLERS.items()
    ]
    if options.json:
        document(samplers=rows)
        return
    width = max(map(len, SAMPLERS)) + 2
    for row in rows:
        print(f"{row['name']:<{width}}{row['about']}")
        if row["a1111"]:
            print(f"{'':{width}}also {', '.join(row['a1111'])}")
        if row["diffusers"]:
            fixed = ", ".join(f"{key} {json.dumps(value)}" for key, value in row["settings"].items())
            print(f"{'':{width}}diffusers: {row['diffusers']}{' with ' + fixed if fixed else ''}")


def inspect(options: argparse.Namespace) -> None:
    from sdruntime.bundle import Bundle, opening
    from sdruntime.choose import Machine
    from sdruntime.describe import bundle_document, bundle_lines

    bundle = opening(options.bundle, Bundle.checked) if options.check else Bundle.open(options.bundle)
    machine = Machine.here()
    if options.stale:
        inspect_stale(bundle, machine, as_json=options.json)
        return
    if options.json:
        document(**bundle_document(bundle, machine))
        return
    for line in bundle_lines(bundle, machine):
        print(line)


def inspect_stale(bundle: Bundle, machine: Machine, *, as_json: bool) -> None:
    from sdruntime.build import stale_engines
    from sdruntime.choose import misfit

    reasons = {engine.name: misfit(engine, machine) for engine in stale_engines(bundle)}
    if as_json:
        document(stale=[{"engine": name, "reason": reason} for name, reason in reasons.items()])
        return
    for name, reason in reasons.items():
        print(f"{name}: {reason}")
    print(f"build them again: sdruntime build {quoted(bundle.folder)} --stale" if reasons else "no engine is stale")


def doctor(options: argparse.Namespace) -> None:
    from sdruntime.bundle import Bundle
    from sdruntime.choose import Machine
    from sdruntime.describe import bundle_document, bundle_lines, machine_document, machine_lines

    machine = Machine.here()
    bundle = Bundle.open(options.bundle) if options.bundle else None
    found = machine_document(machine)
    if options.json:
        document(**found, bundle=bundle and bundle_document(bundle, machine))
        return
    for line in machine_lines(found):
        print(line)
    for line in bundle_lines(bundle, machine) if bundle else ():
        print(line)


def capi(options: argparse.Namespace) -> None:
    found = answers(options)
    if options.json:
        document(**found)
    else:
        print("\n".join(found.values()))


if __name__ == "__main__":
    sys.exit(main())
