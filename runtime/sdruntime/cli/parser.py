"""The command line of sdruntime: its commands, their arguments and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from sdruntime import __version__
from sdruntime.cli.arguments import engines, generation, sampling
from sdruntime.cli.commands.build import build
from sdruntime.cli.commands.capi import capi
from sdruntime.cli.commands.generate import generate
from sdruntime.cli.commands.inspect import doctor, inspect
from sdruntime.cli.commands.lora import add_arguments as add_lora
from sdruntime.cli.commands.lora import lora
from sdruntime.cli.commands.png_info import add_arguments as add_png_info
from sdruntime.cli.commands.png_info import png_info
from sdruntime.cli.commands.sampling import samplers, table
from sdruntime.cli.commands.serve import add_arguments as add_serve
from sdruntime.cli.commands.serve import serve
from sdruntime.cli.commands.triton import add_arguments as add_triton
from sdruntime.cli.commands.triton import triton
from sdruntime.cli.commands.verify import verify
from sdruntime.cli.terminal import Parser
from sdruntime.serving.capi import add_arguments


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = Parser(prog="sdruntime", description="Run Stable Diffusion from a bundle, without PyTorch.")
    top.add_argument("--version", action="version", version=f"sdruntime {__version__}")
    shared(top, False)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], what: str, *, bundle: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(run=run)
        if bundle:
            sub.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder that sdexport build wrote")
        shared(sub, argparse.SUPPRESS)  # keeps options before the command
        return sub

    sub = command("build", build, "build engines from a bundle's ONNX models")
    sub.add_argument("--backend", help="tensorrt, tensorrt-rtx, onnxruntime or openvino")
    sub.add_argument("--stale", action="store_true", help="rebuild the engines that an upgrade of their library made unusable")
    sub.add_argument("--no-verify", action="store_true", help="do not check the engines against the reference outputs")
    sub.add_argument("--target", help="current, ampere+, sm86, …, cuda, cpu (the best of this machine)")
    sub.add_argument("--size", metavar="WxH", help="the sizes to build for: 512x512, or MIN:MAX, MIN:OPT:MAX, or a list A,B")
    sub.add_argument("--batch", metavar="N", help="images in one call: 4, or MIN:MAX, MIN:OPT:MAX, or a list 1,2,4")
    sub.add_argument(
        "--guidance", choices=["on", "off", "any"], help="for images with guidance (two rows each), without, or both"
    )
    sub.add_argument("--chunks", metavar="N", help="chunks of 75 tokens in a prompt: 1, or MIN:MAX, MIN:OPT:MAX")
    sub.add_argument("--component", action="append", default=[], dest="components", help="only this component; may be repeated")
    sub.add_argument("--without", action="append", default=[], metavar="COMPONENT", help="skip this component; may be repeated")
    library = "a setting of the engine library, such as optimization_level=5"
    sub.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=library)

    sub = command("generate", generate, "generate images")
    generation(sub)

    sub = command("serve", serve, "serve images over HTTP: OpenAI's API, jobs, metrics", bundle=False)
    add_serve(sub)
    engines(sub)

    add_triton(command("triton", triton, "write a model for NVIDIA Triton's model repository"))

    sub = command("table", table, "print a sampler's table of coefficients; with --json, in full precision", bundle=False)
    sub.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE")
    sub.add_argument("--config", type=Path, metavar="scheduler_config.json", help="use this file instead of a bundle")
    sub.add_argument("--steps", type=int, help="number of denoising steps (the model's own, or 20)")
    sub.add_argument("--strength", type=float, help="strength of an image-to-image request")
    sampling(sub)

    command("samplers", samplers, "list the samplers with all of their names", bundle=False)
    sub = command("inspect", inspect, "show the contents of a bundle, and which of its engines fit this machine")
    sub.add_argument("--check", action="store_true", help="read every file and check its hash")
    sub.add_argument("--stale", action="store_true", help="list only the engines that an upgrade of their library made unusable")
    add_lora(command("lora", lora, "show what a LoRA file holds, and for which model it was made", bundle=False))
    add_png_info(command("png-info", png_info, "show the settings in an image's file, ours or AUTOMATIC1111's", bundle=False))
    sub = command("verify", verify, "check a bundle and its engines against its reference outputs")
    sub.add_argument("--html", type=Path, metavar="FILE.html", help="also write a report with the images side by side")
    sub.add_argument("--device", type=int, default=0, help="which GPU (0)")
    sub.add_argument("--threads", type=int, default=0, help="CPU threads (0: the library decides)")
    sub = command("doctor", doctor, "show what this machine can build and run, and how to install the rest", bundle=False)
    sub.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="also check this bundle")
    add_arguments(command("capi", capi, "build the C library, and print the compiler options for it", bundle=False))
    return top


def shared(sub: argparse.ArgumentParser, default: object) -> None:
    """Add the options that may stand before or after the command."""
    sub.add_argument("--json", action="store_true", default=default, help="print one JSON document, also if the command fails")
    sub.add_argument("-q", "--quiet", action="store_true", default=default, help="hide progress")
