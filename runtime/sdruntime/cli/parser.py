"""The command line of sdruntime: its commands, their arguments and their help."""

from __future__ import annotations

import argparse
import re
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
from sdruntime.pipeline.ranges import NUMBERS, RANGES, SIGMA, SIGMAS, WHOLE
from sdruntime.pipeline.request import HIRES_RESIZES, MASK_FILLS
from sdruntime.pipeline.text.emphasis import EMPHASES
from sdruntime.pipeline.text.wording import SYNTAXES
from sdruntime.pipeline.vae.preview import KINDS
from sdruntime.sampling.noise.image import RNGS
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
    sub.add_argument("prompt", nargs="+", metavar="PROMPT")
    where = (
        "a .png, .jpg or .webp file; a folder; a pattern: 'out-{seed}.png', with {index} and {prompt} too; - for standard output"
    )
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help=where)
    sub.add_argument("--overwrite", action="store_true", help="replace existing files")
    sub.add_argument("--grid", action="store_true", help="write all images as one sheet")
    shown = (
        "show the image while it is generated: linear is blurred and almost free, tiny is for bundles with a --preview-vae, "
        "full decodes it (the best that costs little)"
    )
    sub.add_argument("--preview", choices=KINDS, help=shown)
    into = "write previews to SEED-STEP.png in this folder, not to the terminal"
    sub.add_argument("--preview-dir", type=Path, metavar="DIR", help=into)
    sub.add_argument("--preview-every", type=int, metavar="STEPS", help="steps from one preview to the next (1)")
    sub.add_argument("--negative", metavar="PROMPT", help="what the image should not show")
    sub.add_argument("--prompt-2", metavar="PROMPT", help="text for a model's second text encoder (PROMPT)")
    sub.add_argument("--negative-2", metavar="PROMPT", help="negative text for the second text encoder (--negative)")
    reading = "how to read the texts: a1111 has (emphasis:1.2), BREAK, [a:b:0.5] and [a|b], and takes long texts (a1111)"
    sub.add_argument("--prompt-syntax", choices=SYNTAXES, default="a1111", help=reading)
    setting(sub, "clip_skip", "layers of the text encoder to skip, as in diffusers")
    weighing = "how to apply weights: original restores each chunk's mean, no-norm does not (original)"
    sub.add_argument("--emphasis", choices=EMPHASES, default="original", help=weighing)
    sub.add_argument("--image", type=Path, metavar="FILE", help="start image: PNG, JPEG, WebP or BMP")
    masked = "the part of --image to regenerate, white, in an image of its size"
    sub.add_argument("--mask", type=Path, metavar="FILE", help=masked)
    nearer = "for models with depth: how near each part of --image is, brighter where it is nearer, in an image of any size"
    sub.add_argument("--depth", type=Path, metavar="FILE", help=nearer)
    setting(sub, "mask_blur", "blur of the mask, in pixels")
    only = (
        "generate only the masked part, with this many pixels around it, at --size, and paste it into the image (the whole image)"
    )
    sub.add_argument("--mask-padding", type=int, metavar="PIXELS", help=only)
    starts = "what the masked part starts from; fill: the colours around it; noise and zeros are of latents (original)"
    sub.add_argument("--mask-fill", choices=MASK_FILLS, default="original", help=starts)
    sub.add_argument("--overlay", action="store_true", help="put the pixels that the mask keeps back over the result")
    sides = "pixels to add to --image and to generate there (0,0,0,0)"
    sub.add_argument("--extend", metavar="LEFT,TOP,RIGHT,BOTTOM", type=extension, default=(0, 0, 0, 0), help=sides)
    goes_on = "the bundle of a second model that goes on with the image, such as SDXL's refiner"
    sub.add_argument("--refiner", type=Path, metavar="BUNDLE", help=goes_on)
    setting(sub, "refiner_at", "the share of the trained timesteps after which the refiner goes on")
    scale = f"a second pass, at SCALE times the size: {RANGES['hires']} (one pass)"
    sub.add_argument("--hires", type=float, metavar="SCALE", help=scale)
    setting(sub, "hires_strength", "how much the second pass changes")
    second = "steps of the second pass, of which its strength runs a part (--steps)"
    sub.add_argument("--hires-steps", type=int, metavar="N", help=second)
    between = "how to resize between the passes: the latents, or with lanczos and nearest the decoded image (latent)"
    sub.add_argument("--hires-resize", choices=HIRES_RESIZES, default="latent", help=between)
    sub.add_argument("--fit", choices=["resize", "crop"], help="how to bring --image to the size")
    setting(sub, "strength", "how much of --image is changed", otherwise=False)
    own = f"the model's own, or {NUMBERS['steps']}"
    sub.add_argument("--steps", type=int, help=f"number of denoising steps: {RANGES['steps']} ({own})")
    following = (
        "how closely to follow the prompt; at 1 or less, the negative prompt has no effect. A list has one number per step"
    )
    own = f"the model's own, or {NUMBERS['guidance']}"
    sub.add_argument("--guidance", type=guidance, metavar="G|G,G,…", help=f"{following}: {RANGES['guidance']} ({own})")
    limits = "guide only this part of the steps, from 0 to 1, such as 0.2,0.8 (0,1)"
    sub.add_argument("--guidance-interval", type=numbers, default=WHOLE, metavar="START,END", help=limits)
    setting(sub, "image_guidance", "how closely to follow --image, for models that edit an image")
    setting(sub, "rescale", "guidance rescale")
    sub.add_argument("--seed", type=int, help="seed of the first image; each further image uses the next one (random)")
    numbers_of = 'whose numbers a seed stands for: those of PyTorch on the CPU, or on CUDA, AUTOMATIC1111\'s RNG "NV" (cpu)'
    sub.add_argument("--rng", choices=RNGS, default="cpu", help=numbers_of)
    another = "with --variation-strength: the other seed; each further image uses the next one, with the same --seed (random)"
    sub.add_argument("--variation-seed", type=int, metavar="SEED", help=another)
    setting(sub, "variation_strength", "how far to move the first noise towards that of another seed")
    resized = "put the first noise of an image of this size in the middle, to keep its composition at another --size"
    sub.add_argument("--seed-resize", metavar="WxH", help=resized)
    sub.add_argument("--size", metavar="WxH", help="size in pixels (the model's own)")
    before = "for SDXL: the size that the image is said to have had before it was cropped (the size)"
    sub.add_argument("--original-size", metavar="WxH", help=before)
    sub.add_argument("--crop", metavar="LEFT,TOP", type=corner, default=(0, 0), help="for SDXL: the corner of that crop (0,0)")
    sub.add_argument("--target-size", metavar="WxH", help="for SDXL: the size that the image is said to have (the size)")
    setting(sub, "aesthetic_score", "for SDXL's refiner: the score that the image is said to have")
    setting(sub, "negative_aesthetic_score", "for SDXL's refiner: the score of what the image should not be like")
    sub.add_argument("--count", type=int, default=1, help="images per prompt (1)")
    sub.add_argument("--backend", default="auto", help="tensorrt, tensorrt-rtx, onnxruntime or openvino (auto)")
    sub.add_argument("--device", type=int, default=0, help="which GPU (0)")
    sub.add_argument("--threads", type=int, default=0, help="CPU threads (0: the library decides)")
    sub.add_argument("--session", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engine library")
    sub.add_argument("--no-measure", action="store_true", help="do not time CPU engines to find the fastest")
    sub.add_argument("--low-memory", action="store_true", help="keep one component on the GPU at a time")
    tiles = (
        "run the VAE on overlapping tiles: off, their side in pixels, or auto: if the image is too large for its engines (auto)"
    )
    sub.add_argument("--tile", default="auto", metavar="auto|off|PIXELS", help=tiles)
    sub.add_argument("--vram-budget", metavar="SIZE", help="how much GPU memory to use: 4G, 600M (all that is free)")
    sampling(sub)

    sub = command("table", table, "print a sampler's table of coefficients; with --json, in full precision", bundle=False)
    sub.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE")
    sub.add_argument("--config", type=Path, metavar="scheduler_config.json", help="use this file instead of a bundle")
    sub.add_argument("--steps", type=int, default=20, help="number of denoising steps (20)")
    sub.add_argument("--strength", type=float, help="strength of an image-to-image request")
    sampling(sub)

    command("samplers", samplers, "list the samplers with all of their names", bundle=False)
    sub = command("inspect", inspect, "show the contents of a bundle, and which of its engines fit this machine")
    sub.add_argument("--check", action="store_true", help="read every file and check its hash")
    sub.add_argument("--stale", action="store_true", help="list only the engines that an upgrade of their library made unusable")
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


def setting(sub: argparse.ArgumentParser, name: str, what: str, *, otherwise: bool = True) -> None:
    """Add a number of a Request, with its range and default in the help. `otherwise`: if omitted, it is the default, not None."""
    allowed, default = RANGES[name], NUMBERS[name]
    described = f"{what}: {allowed} ({default:g})"
    number = int if allowed.whole else float
    sub.add_argument(f"--{name.replace('_', '-')}", type=number, default=default if otherwise else None, help=described)


def sampling(sub: argparse.ArgumentParser) -> None:
    """Add the options of a sampler."""
    sub.add_argument("--sampler", help="a name from `sdruntime samplers` (the checkpoint's own)")
    levels = f"noise levels from high to low in place of --steps: {SIGMAS} numbers from {SIGMA}, such as 14.6,6.5,2,0"
    sub.add_argument("--sigmas", type=numbers, metavar="S,S,…", help=levels)
    sub.add_argument("--schedule", help="karras, sgm_uniform, align_your_steps, … (the checkpoint's own)")
    sub.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="a setting of the sampler, such as eta=0.5"
    )


def corner(text: str) -> tuple[int, int]:
    """Return (left, top) from "LEFT,TOP"."""
    if not re.fullmatch(r"\d{1,5},\d{1,5}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: expected LEFT,TOP in pixels, such as 0,128")
    left, top = map(int, text.split(","))
    return left, top


def extension(text: str) -> tuple[int, ...]:
    """Return (left, top, right, bottom)."""
    if not re.fullmatch(r"\d{1,5}(,\d{1,5}){3}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: expected LEFT,TOP,RIGHT,BOTTOM in pixels, such as 128,0,128,0")
    return tuple(map(int, text.split(",")))


def guidance(text: str) -> float | list[float]:
    """Return a number, or a list of comma-separated ones."""
    values = numbers(text)
    return values if len(values) > 1 else values[0]


def numbers(text: str) -> list[float]:
    """Return comma-separated numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected comma-separated numbers, such as 14.6,6.5,0") from None
