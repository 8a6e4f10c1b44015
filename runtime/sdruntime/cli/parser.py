"""The command line of sdruntime: its commands, their arguments and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from sdruntime import __version__
from sdruntime.cli.build import build
from sdruntime.cli.capi import capi
from sdruntime.cli.generate import generate
from sdruntime.cli.inspect import doctor, inspect
from sdruntime.cli.sampling import samplers, table
from sdruntime.cli.terminal import Parser
from sdruntime.cli.verify import verify
from sdruntime.pipeline.request import DEFAULTS, RANGES
from sdruntime.serving.capi import add_arguments


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
    setting(each, "strength", "how much of --image is changed", otherwise=False)
    setting(each, "steps", "of the sampler")
    setting(each, "guidance", "how closely the prompt is followed; at 1 or less the negative prompt has no effect")
    setting(each, "rescale", "guidance rescale")
    each.add_argument("--seed", type=int, help="of the first image; each further one has the next (random)")
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


def setting(each: argparse.ArgumentParser, name: str, what: str, *, otherwise: bool = True) -> None:
    """A number of a Request: its range and default are told. `otherwise`: the default stands where it is left out, else None."""
    allowed, default = RANGES[name], DEFAULTS[name]
    described = f"{what}: {allowed} ({default:g})"
    number = int if allowed.whole else float
    each.add_argument(f"--{name}", type=number, default=default if otherwise else None, help=described)


def sampling(each: argparse.ArgumentParser) -> None:
    each.add_argument("--sampler", help="a name of `sdruntime samplers` (the checkpoint's own)")
    each.add_argument("--schedule", help="karras, exponential, beta, … (the checkpoint's own)")
    each.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="a setting of the sampler, such as eta=0.5"
    )
