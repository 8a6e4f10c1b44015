"""The arguments of `generate`, in groups, and those of a sampler."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from sdruntime.pipeline.images.maps import PREPROCESSORS
from sdruntime.pipeline.requests.control import CONTROL_NUMBERS
from sdruntime.pipeline.requests.image_prompt import DEFAULT_SCALE
from sdruntime.pipeline.requests.ranges import NUMBERS, RANGES, SIGMA, SIGMAS, WHOLE
from sdruntime.pipeline.requests.request import HIRES_RESIZES, MASK_FILLS
from sdruntime.pipeline.text.emphasis import EMPHASES
from sdruntime.pipeline.text.wording import SYNTAXES
from sdruntime.pipeline.vae.preview import KINDS
from sdruntime.sampling.noise.image import RNGS

Arguments = argparse._ActionsContainer  # a parser, or a group of its arguments


def generation(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    parser.add_argument("prompt", nargs="+", metavar="PROMPT")
    for title, add in GROUPS.items():
        add(parser.add_argument_group(title))


def _text(sub: Arguments) -> None:
    """The texts, and how they are read."""
    sub.add_argument("--negative", metavar="PROMPT", help="what the image should not show")
    sub.add_argument("--prompt-2", metavar="PROMPT", help="text for a model's second text encoder (PROMPT)")
    sub.add_argument("--negative-2", metavar="PROMPT", help="negative text for the second text encoder (--negative)")
    reading = "how to read the texts: a1111 has (emphasis:1.2), BREAK, [a:b:0.5] and [a|b], and takes long texts (a1111)"
    sub.add_argument("--prompt-syntax", choices=SYNTAXES, default="a1111", help=reading)
    weighing = "how to apply weights: original restores each chunk's mean, no-norm does not (original)"
    sub.add_argument("--emphasis", choices=EMPHASES, default="original", help=weighing)
    setting(sub, "clip_skip", "layers of the text encoder to skip, as in diffusers")
    learned = "an embedding (textual inversion, .safetensors), used in texts by its name or as embedding:NAME; repeatable"
    sub.add_argument("--embedding", action="append", default=[], metavar="[NAME=]FILE", help=learned)


def _loras(sub: Arguments) -> None:
    """LoRAs and their kin."""
    file = "a .safetensors file and its strength (1), and another one in the text encoders; lbw: by block; may be repeated"
    sub.add_argument("--lora", action="append", default=[], dest="loras", metavar="FILE[:SCALE[:TEXT_SCALE]][:lbw=…]", help=file)
    named = "the folder of the files that prompts name: <lora:name:0.8>, or <lora:name:TEXT_SCALE:SCALE>"
    sub.add_argument("--lora-dir", type=Path, metavar="DIR", help=named)


def _output(sub: Arguments) -> None:
    """The files, and previews."""
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


def _image(sub: Arguments) -> None:
    """The size, and how the image is generated."""
    sub.add_argument("--count", type=int, default=1, help="images per prompt (1)")
    sub.add_argument("--size", metavar="WxH", help="size in pixels (the model's own)")
    sub.add_argument("--seed", type=int, help="seed of the first image; each further image uses the next one (random)")
    own = f"the model's own, or {NUMBERS['steps']}"
    sub.add_argument("--steps", type=int, help=f"number of denoising steps: {RANGES['steps']} ({own})")
    following = (
        "how closely to follow the prompt; at 1 or less, the negative prompt has no effect. A list has one number per step"
    )
    own = f"the model's own, or {NUMBERS['guidance']}"
    sub.add_argument("--guidance", type=guidance, metavar="G|G,G,…", help=f"{following}: {RANGES['guidance']} ({own})")
    limits = "guide only this part of the steps, from 0 to 1, such as 0.2,0.8 (0,1)"
    sub.add_argument("--guidance-interval", type=numbers, default=WHOLE, metavar="START,END", help=limits)
    setting(sub, "rescale", "guidance rescale")
    plus = "CFG++ (arXiv 2406.08070), of which --guidance is the λ, up to 1 (0.6): with ddim, euler, euler_a and the like"
    sub.add_argument("--cfg-pp", action="store_true", help=plus)


def _start(sub: Arguments) -> None:
    """Image to image, inpainting and editing."""
    sub.add_argument("--image", type=Path, metavar="FILE", help="start image: PNG, JPEG, WebP or BMP")
    sub.add_argument("--fit", choices=["resize", "crop"], help="how to bring --image to the size")
    setting(sub, "strength", "how much of --image is changed", otherwise=False)
    setting(sub, "image_guidance", "how closely to follow --image, for models that edit an image")
    nearer = "for models with depth: how near each part of --image is, brighter where it is nearer, in an image of any size"
    sub.add_argument("--depth", type=Path, metavar="FILE", help=nearer)
    setting(sub, "noise_level", "for models that enlarge --image: how much noise to add to it first")
    masked = "the part of --image to regenerate, white, in an image of its size"
    sub.add_argument("--mask", type=Path, metavar="FILE", help=masked)
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


def _second_pass(sub: Arguments) -> None:
    """A second pass at a larger size, or by a second model."""
    scale = f"a second pass, at SCALE times the size: {RANGES['hires']} (one pass)"
    sub.add_argument("--hires", type=float, metavar="SCALE", help=scale)
    setting(sub, "hires_strength", "how much the second pass changes")
    second = "steps of the second pass, of which its strength runs a part (--steps)"
    sub.add_argument("--hires-steps", type=int, metavar="N", help=second)
    between = "how to resize between the passes: the latents, or with lanczos and nearest the decoded image (latent)"
    sub.add_argument("--hires-resize", choices=HIRES_RESIZES, default="latent", help=between)
    goes_on = "the bundle of a second model that goes on with the image, such as SDXL's refiner"
    sub.add_argument("--refiner", type=Path, metavar="BUNDLE", help=goes_on)
    setting(sub, "refiner_at", "the share of the trained timesteps after which the refiner goes on")


def _noise(sub: Arguments) -> None:
    """What a seed stands for."""
    numbers_of = 'whose numbers a seed stands for: those of PyTorch on the CPU, or on CUDA, AUTOMATIC1111\'s RNG "NV" (cpu)'
    sub.add_argument("--rng", choices=RNGS, default="cpu", help=numbers_of)
    another = "with --variation-strength: the other seed; each further image uses the next one, with the same --seed (random)"
    sub.add_argument("--variation-seed", type=int, metavar="SEED", help=another)
    setting(sub, "variation_strength", "how far to move the first noise towards that of another seed")
    resized = "put the first noise of an image of this size in the middle, to keep its composition at another --size"
    sub.add_argument("--seed-resize", metavar="WxH", help=resized)


def _conditions(sub: Arguments) -> None:
    """Sizes and scores that a model of SDXL takes as inputs."""
    before = "the size that the image is said to have had before it was cropped (the size)"
    sub.add_argument("--original-size", metavar="WxH", help=before)
    sub.add_argument("--crop", metavar="LEFT,TOP", type=corner, default=(0, 0), help="the corner of that crop (0,0)")
    sub.add_argument("--target-size", metavar="WxH", help="the size that the image is said to have (the size)")
    setting(sub, "aesthetic_score", "for the refiner: the score that the image is said to have")
    setting(sub, "negative_aesthetic_score", "for the refiner: the score of what the image should not be like")


def engines(sub: Arguments) -> None:
    """What runs the model, and with how much memory."""
    sub.add_argument("--backend", default="auto", help="tensorrt, tensorrt-rtx, onnxruntime or openvino (auto)")
    sub.add_argument("--device", type=int, default=0, help="which GPU (0)")
    sub.add_argument("--threads", type=int, default=0, help="CPU threads (0: the library decides)")
    sub.add_argument("--session", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engine library")
    sub.add_argument("--no-measure", action="store_true", help="do not time CPU engines to find the fastest")
    sub.add_argument(
        "--low-memory", action="store_true", help="keep one component on the GPU at a time; on a CPU, fp16 weights as they are"
    )
    sub.add_argument("--vram-budget", metavar="SIZE", help="how much GPU memory to use: 4G, 600M (all that is free)")
    tiles = (
        "run the VAE on overlapping tiles: off, their side in pixels, or auto: if the image is too large for its engines (auto)"
    )
    sub.add_argument("--tile", default="auto", metavar="auto|off|PIXELS", help=tiles)


def setting(sub: Arguments, name: str, what: str, *, otherwise: bool = True) -> None:
    """Add a number of a Request, with its range and default in the help. `otherwise`: if omitted, it is the default, not None."""
    allowed, default = RANGES[name], NUMBERS[name]
    described = f"{what}: {allowed} ({default:g})"
    number, shown = (int, "N") if allowed.whole else (float, "X")
    option = f"--{name.replace('_', '-')}"
    sub.add_argument(option, type=number, metavar=shown, default=default if otherwise else None, help=described)


def sampling(sub: Arguments) -> None:
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


def _control(sub: Arguments) -> None:
    """Images for ControlNets."""
    what = (
        "an image for a ControlNet of the bundle; may be repeated. net: its name, if there are several; scale: how much it "
        "counts (1); start, end: the part of the steps, from 0 to 1; fit: resize, crop, or exact, which refuses another size "
        "(resize). A name before FILE makes the map from an image; low, high: thresholds of canny (100, 200); mask: a file that "
        "marks what to paint, of inpaint; type: the number of the image's type, for a ControlNet-Union"
    )
    form = (
        f"[{'|'.join(PREPROCESSORS)}:]FILE[,net=NAME][,scale=X][,start=X][,end=X][,fit=F][,low=X][,high=X][,mask=FILE][,type=N]"
    )
    sub.add_argument("--control", action="append", default=[], type=control, metavar=form, help=what)
    guessing = "let the ControlNets act on the prompt's side of the guidance alone, less in the outer layers"
    sub.add_argument("--guess-mode", action="store_true", help=guessing)


def _image_prompt(sub: Arguments) -> None:
    """Images for the IP-Adapter."""
    what = "an image that the bundle's IP-Adapter follows beside the text; may be repeated: the images count together"
    sub.add_argument("--image-prompt", action="append", default=[], metavar="FILE", help=what)
    where = "where the image is to count, white; once for each --image-prompt, in their order"
    sub.add_argument("--image-prompt-mask", action="append", default=[], metavar="FILE", help=where)
    sub.add_argument("--image-prompt-scale", type=float, metavar="X", help=f"how much they count ({DEFAULT_SCALE:g})")


def control(text: str) -> dict[str, str]:
    """Return the settings of a Control from "FILE,KEY=VALUE,…", where a preprocessor and a colon may be before FILE."""
    keys = ("net", *CONTROL_NUMBERS, "fit", "mask", "type")
    path, *rest = re.split(rf",(?=(?:{'|'.join(keys)})=)", text)
    settings = dict(part.split("=", 1) for part in rest)
    if not path or len(settings) < len(rest) or re.search(r",\w+=[^,]*$", path):
        known = ", ".join(f"{key}=…" for key in keys)
        raise argparse.ArgumentTypeError(f"{text!r}: expected FILE, then any of {known}, each once, after commas")
    for key in CONTROL_NUMBERS:
        if key in settings:
            try:
                float(settings[key])
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r}: {key} is not a number") from None
    if not settings.get("type", "0").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: type is not a whole number")
    before, colon, after = path.partition(":")
    if colon and after and before in PREPROCESSORS:
        return {"image": after, "preprocess": before, **settings}
    return {"image": path, **settings}


GROUPS = {
    "text": _text,
    "LoRA": _loras,
    "output": _output,
    "image": _image,
    "sampler": sampling,
    "start image": _start,
    "ControlNets": _control,
    "image prompt": _image_prompt,
    "second pass": _second_pass,
    "noise": _noise,
    "conditions of SDXL": _conditions,
    "engines": engines,
}
