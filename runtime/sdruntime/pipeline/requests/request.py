"""A request for one image, with all settings.

The command line, the service and the C library share the defaults and ranges.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np

from sdruntime.adapters.lora import Lora, loras_of
from sdruntime.arrays import Array
from sdruntime.bundle.model import Defaults
from sdruntime.errors import LibraryMissing, SettingError, UnknownName, shown
from sdruntime.pipeline.images.depth import depth_from
from sdruntime.pipeline.images.imagefile import FITS, Fit, ImageLike, gray_from, pixels_from
from sdruntime.pipeline.requests.control import Control, controls_of
from sdruntime.pipeline.requests.image_prompt import ImagePrompt, image_prompt_of
from sdruntime.pipeline.requests.keywords import check_names
from sdruntime.pipeline.requests.ranges import CORNER, NUMBERS, RANGES, SIDE, WHOLE, Range, guidance_of, interval_of, sigmas_of
from sdruntime.pipeline.text.emphasis import EMPHASES, Emphasis
from sdruntime.pipeline.text.wording import SYNTAXES, Syntax
from sdruntime.sampling.noise.image import RNGS, Rng
from sdruntime.sampling.samplers import resolve, resolve_schedule
from sdruntime.sampling.samplers.keys import check_options

CFG_PP = 0.6  # guidance of CFG++, as in its authors' code
MOST_IMAGES = 10_000  # of one call
MaskFill = Literal["original", "fill", "noise", "zeros"]
HiresResize = Literal["latent", "latent-bicubic", "latent-nearest", "latent-nearest-exact", "lanczos", "nearest"]
HIRES_RESIZES: tuple[HiresResize, ...] = get_args(HiresResize)
MASK_FILLS: tuple[MaskFill, ...] = ("original", "fill", "noise", "zeros")
CHOICES: Mapping[str, Sequence[str]] = {
    "prompt_syntax": SYNTAXES,
    "emphasis": EMPHASES,
    "mask_fill": MASK_FILLS,
    "hires_resize": HIRES_RESIZES,
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Request:
    """One image to generate. Raises SettingError for an invalid field, with its name, its value and what is allowed.

    Raises UnknownName for another field, with near names; for an argument of diffusers' pipelines the error has our name.

    `negative`: None for no negative prompt. `size`: (width, height) in pixels, None for the model's default. `sampler`: None for
    the checkpoint's. `sigmas`: noise levels from high to low, in place of `steps`; then omit `steps` or pass their number of
    steps. `image`, `strength` in (0, 1]: image to image, from a path, an array uint8 [H, W, 3], an Image or a Pillow image; its
    pixels are in `pixels`. `fit`: how to bring an image of another size to `size`, "resize" or "crop"; None refuses it. `mask`:
    the part of `image` to regenerate, white, in an image or array of the same size; its gray is in `mask_pixels`. `extend`:
    pixels to add to `image` (left, top, right, bottom), which are regenerated as if the mask covered them.
    `options`: the sampler's own settings, such as eta. `steps`, `guidance`: None for the model's own, which are 20 and 7.5 if its
    bundle says nothing else. `guidance`: 1 or less disables guidance and the negative prompt; a sequence has one number for each
    model call. `guidance_interval`: the part of the model calls with guidance, (start, end) from 0 to 1.
    `image_guidance`: how closely to follow `image`, for models that edit an image (InstructPix2Pix). `rescale`: guidance
    rescale φ in [0, 1], Lin et al. 2023, section 3.4. `cfg_pp`: CFG++ (arXiv 2406.08070), with samplers of one model output a
    step; `guidance` is then its λ in (0, 1], None for 0.6.

    Of a mask: `mask_blur`, the deviation of a Gaussian in pixels. `mask_padding`: generate only the masked part, at `size`: its
    box, enlarged by so many pixels and to the proportions of `size`; then resize it and paste it into the image. None generates
    the whole. `mask_fill`: what the masked part starts from, "original", "fill" (the colours around it), "noise" or "zeros" (of
    latents). `overlay`: put the pixels that the mask keeps back over the result, as `mask_padding` always does.

    `hires`: a second pass, image to image, at so many times the size, rounded down to a valid one. `hires_strength` is its
    strength, `hires_steps` its steps, None for `steps`. `hires_resize`: how to resize between the passes: the latents, or with
    "lanczos" and "nearest" the decoded image, which is encoded again.

    `refiner_at`: the share of the trained timesteps after which the pipeline's refiner goes on; 1 for never.

    `prompt_2`, `negative_2`: texts for the second text encoder of a model that has two, None for the same as for the first.
    `prompt_syntax`: "plain" takes all texts as they are and cuts them at the encoder's length. "a1111" reads the syntax of
    AUTOMATIC1111's web UI: emphasis, BREAK, prompt editing and alternation, in texts of any length. `emphasis`: how "a1111"
    applies weights, "original", "no-norm" or "ignore". `clip_skip`: how many layers of the text encoders to skip, counted from
    the one that the checkpoint uses, as in diffusers; "plain" skips none for the negative prompt.

    `rng`: whose noise a seed stands for, that of torch on the "cpu" or on "cuda". `variation_seed`, `variation_strength`: move
    the noise of the first latents from that of `seed` towards that of another seed, 0 to 1. `seed_resize`: put the noise of an
    image of this size, (width, height), in the middle of the first latents. All three are those of AUTOMATIC1111's web UI.

    `original_size`, `crop`, `target_size`: conditions of SDXL: the size of the image before it was cropped, the corner of that
    crop (left, top), and the size to aim at, (width, height) in pixels; None for the generated size. `aesthetic_score`,
    `negative_aesthetic_score`: conditions of SDXL's refiner in place of `target_size`, for the prompt and the negative prompt.

    `depth`: for models made for it, how near each part of `image` is: an array of numbers [H, W] of any size and scale, larger
    where it is nearer, or an image, brighter where it is nearer; as float32 it is in `depth_map`.

    `noise_level`: for models that enlarge an image: how much noise to add to it first.

    `control`: a Control, or several, for the ControlNets of the bundle; their effects add up. `guess_mode`: let them act on the
    prompt's side of the guidance alone, less in the outer layers, as in diffusers.

    `image_prompt`: an ImagePrompt, for the IP-Adapter of the bundle: images that it follows beside the text.
    """

    prompt: str
    negative: str | None = None
    seed: int = NUMBERS["seed"]
    steps: int | None = None
    sigmas: Sequence[float] | None = None
    sampler: str | None = None
    schedule: str | None = None
    guidance: float | Sequence[float] | None = None
    guidance_interval: tuple[float, float] = WHOLE
    image_guidance: float = NUMBERS["image_guidance"]
    rescale: float = NUMBERS["rescale"]
    cfg_pp: bool = False
    size: tuple[int, int] | None = None
    image: ImageLike | None = None
    mask: ImageLike | None = None
    fit: Fit | None = None
    strength: float = NUMBERS["strength"]
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt_2: str | None = None
    negative_2: str | None = None
    prompt_syntax: Syntax = "plain"
    emphasis: Emphasis = "original"
    clip_skip: int = NUMBERS["clip_skip"]
    rng: Rng = "cpu"
    variation_seed: int = NUMBERS["variation_seed"]
    variation_strength: float = NUMBERS["variation_strength"]
    seed_resize: tuple[int, int] | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    mask_blur: float = NUMBERS["mask_blur"]
    mask_padding: int | None = None
    mask_fill: MaskFill = "original"
    overlay: bool = False
    extend: tuple[int, int, int, int] = (0, 0, 0, 0)
    aesthetic_score: float = NUMBERS["aesthetic_score"]
    negative_aesthetic_score: float = NUMBERS["negative_aesthetic_score"]
    hires: float | None = NUMBERS["hires"]
    hires_strength: float = NUMBERS["hires_strength"]
    hires_steps: int | None = NUMBERS["hires_steps"]
    hires_resize: HiresResize = "latent"
    depth: ImageLike | Array | None = None
    refiner_at: float = NUMBERS["refiner_at"]
    loras: Sequence[Lora] = ()
    noise_level: int = NUMBERS["noise_level"]
    control: Control | Sequence[Control] = ()
    guess_mode: bool = False
    image_prompt: ImagePrompt | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative", "prompt_2", "negative_2", "sampler", "schedule"):
            text = getattr(self, name)
            if not isinstance(text, str) and (name == "prompt" or text is not None):
                raise SettingError(f"{name} {shown(text)}: expected text")
        for name, allowed in RANGES.items():
            if name != "guidance" and (getattr(self, name) is not None or (NUMBERS[name] is not None and name != "steps")):
                object.__setattr__(self, name, allowed.number(name, getattr(self, name)))
        if self.guidance is not None:
            object.__setattr__(self, "guidance", guidance_of(self.guidance))
        object.__setattr__(self, "guidance_interval", interval_of(self.guidance_interval))
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", sigmas_of(self.sigmas))
        for name in ("size", "seed_resize", "original_size", "target_size"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _pair(name, getattr(self, name), SIDE, ("width", "height")))
        object.__setattr__(self, "crop", _pair("crop", self.crop, CORNER, ("left", "top")))
        object.__setattr__(self, "extend", _whole_numbers("extend", self.extend, CORNER, ("left", "top", "right", "bottom")))
        if self.mask_padding is not None:
            object.__setattr__(self, "mask_padding", CORNER.number("mask_padding", self.mask_padding))
        for name in ("overlay", "cfg_pp", "guess_mode"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} {shown(getattr(self, name))}: expected True or False")
        if self.cfg_pp:
            self._check_cfg_pp()
        object.__setattr__(self, "control", controls_of(self.control))
        image_prompt_of(self.image_prompt)
        if self.sampler is not None:
            resolve(self.sampler)
        if self.schedule is not None:
            resolve_schedule(self.schedule)
        if not isinstance(self.options, Mapping):
            raise SettingError(f'options {shown(self.options)}: expected a mapping, such as {{"eta": 0.5}}')
        check_options(self.options)
        plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in self.options.items()}
        object.__setattr__(self, "options", plain)
        if self.fit is not None and self.fit not in FITS:
            raise UnknownName("fit", str(self.fit), FITS)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UnknownName(name, str(getattr(self, name)), known)
        if self.rng not in RNGS:
            raise SettingError(f"rng {shown(self.rng)}: expected one of {', '.join(RNGS)}")
        if self.image is not None:
            object.__setattr__(self, "image", pixels_from(self.image))
        if self.mask is not None:
            self._check_mask()
        self._check_canvas()
        if self.depth is not None:
            self._check_depth()
        object.__setattr__(self, "loras", loras_of(self.loras))

    def _check_cfg_pp(self) -> None:
        if self.guidance is not None and not 0 < max(self.guidances) <= 1:
            raise SettingError(
                f"guidance {max(self.guidances):g} with cfg_pp: CFG++ takes a guidance above 0, up to 1, such as {CFG_PP}"
            )
        if self.rescale:
            raise SettingError(f"rescale {self.rescale:g} with cfg_pp: it is for guidance above 1: omit one of them")

    def _check_depth(self) -> None:
        if self.pixels is None:
            raise SettingError("depth: it is that of an image: pass the image too, as image=… (--image)")
        if self.fit == "crop":
            raise SettingError("fit 'crop' with depth: only the image would be cropped: crop both yourself, and omit fit")
        object.__setattr__(self, "depth", depth_from(self.depth))

    def _check_mask(self) -> None:
        if self.pixels is None:
            raise SettingError("mask: it marks a part of an image: pass the image too, as image=… (--image)")
        try:
            mask = gray_from(self.mask)
        except (SettingError, LibraryMissing) as error:
            raise type(error)(f"mask: {str(error).removeprefix('image: ')}") from error
        ours, theirs = self.pixels.shape[:2], mask.shape
        if ours != theirs:
            raise SettingError(f"mask: it is {theirs[1]}x{theirs[0]}, and the image {ours[1]}x{ours[0]}: they must be equal")
        object.__setattr__(self, "mask", mask)

    def _check_canvas(self) -> None:
        if self.hires is not None and self.inpaints:
            raise SettingError(f"hires {self.hires:g} with a mask or an extension, which has one pass: omit one of them")
        if any(self.extend) and self.pixels is None:
            raise SettingError("extend: it adds to an image: pass the image too, as image=… (--image)")
        if self.mask_padding is not None and self.fit is not None:
            raise SettingError(
                f"fit {self.fit!r} with mask_padding {self.mask_padding}: only the masked part is resized then: omit fit"
            )

    def __repr__(self) -> str:
        """Return one line: the prompt, the seed, and each setting that is not the default."""
        parts = [short(self.prompt), f"seed {self.seed}"]
        for name, pixels in (("image", self.pixels), ("mask", self.mask_pixels), ("depth", self.depth_map)):
            if pixels is not None:
                parts.append("{2} {1}x{0}".format(*pixels.shape[:2], name))
        for setting in fields(self):
            value, default = getattr(self, setting.name), {} if setting.name == "options" else setting.default
            if setting.name not in ("prompt", "seed", "image", "mask", "depth") and value != default:
                parts.append(f"{setting.name} {short(value)}")
        return f"<Request {', '.join(parts)}>"

    @property
    def pixels(self) -> Array | None:
        """The pixels of the initial image, uint8 [H, W, 3], or None."""
        pixels: Array | None = self.image
        return pixels

    @property
    def mask_pixels(self) -> Array | None:
        """The mask, uint8 [H, W] from 0 (kept) to 255 (regenerated), or None."""
        mask: Array | None = self.mask
        return mask

    @property
    def depth_map(self) -> Array | None:
        """The depth map, float32 [H, W], larger where it is nearer, or None."""
        depth: Any = self.depth
        return None if depth is None else np.asarray(depth)

    @property
    def controls(self) -> tuple[Control, ...]:
        """The images for ControlNets."""
        controls: tuple[Control, ...] = self.control  # type: ignore[assignment]
        return controls

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(width, height) of the initial image with its extension, or None."""
        if self.pixels is None:
            return None
        height, width = self.pixels.shape[:2]
        left, top, right, bottom = self.extend
        return left + width + right, top + height + bottom

    @property
    def inpaints(self) -> bool:
        """Whether a part of an image is regenerated: under a mask, or around the image."""
        return self.mask is not None or any(self.extend)

    @property
    def guidances(self) -> tuple[float, ...]:
        """The guidance of each model call, or one for all of them."""
        guidance = NUMBERS["guidance"] if self.guidance is None else self.guidance
        return guidance if isinstance(guidance, tuple) else (guidance,)

    @property
    def guided(self) -> bool:
        return self.cfg_pp or max(self.guidances) > 1

    def completed(self, defaults: Defaults) -> Request:
        """Return the request with the model's defaults in place of None: steps, guidance and sampler."""
        steps = NUMBERS["steps"] if defaults.steps is None else defaults.steps
        guidance = NUMBERS["guidance"] if defaults.guidance is None else defaults.guidance
        if self.cfg_pp:
            guidance = CFG_PP
        resolved: dict[str, Any] = {
            "steps": steps if self.steps is None and self.sigmas is None else self.steps,
            "guidance": guidance if self.guidance is None else self.guidance,
            "sampler": defaults.sampler if self.sampler is None else self.sampler,
        }
        return self if all(getattr(self, name) == value for name, value in resolved.items()) else replace(self, **resolved)


_init_of_dataclass = Request.__init__


@functools.wraps(_init_of_dataclass)
def _init(self: Request, **settings: Any) -> None:
    check_names(settings, Request.__slots__)  # a TypeError would not say which name is meant
    _init_of_dataclass(self, **settings)


Request.__init__ = _init  # type: ignore[method-assign]
DEFAULTS: Mapping[str, Any] = {setting.name: setting.default for setting in fields(Request) if setting.default is not MISSING}


def _pair(name: str, value: Any, allowed: Range, parts: tuple[str, str]) -> tuple[int, int]:
    first, second = _whole_numbers(name, value, allowed, parts)
    return first, second


def _whole_numbers(name: str, value: Any, allowed: Range, parts: Sequence[str]) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else ()
    if len(numbers) != len(parts):
        raise SettingError(f"{name} {shown(value)}: expected ({', '.join(parts)}) in pixels")
    return tuple(allowed.number(f"{name}: {part}", number) for part, number in zip(parts, numbers, strict=True))


def requests_from(
    prompt: str | Request | Iterable[str | Request], *, count: int = 1, seed: int | None = None, **settings: Any
) -> list[Request]:
    """Return one Request per image: `count` for each prompt, in order. Image k has the seed `seed` + k, over all prompts.

    With `variation_strength`, all images have the seed `seed`, and image k has the variation seed `variation_seed` + k.
    `seed`, `variation_seed`: None for a random one. A Request among the prompts keeps its own seed and settings and counts as one
    image. Raises SettingError, also for settings that apply to no prompt because all prompts are Requests.
    """
    if not isinstance(prompt, str | Request | Iterable) or isinstance(prompt, bytes):
        raise SettingError(f"prompt: expected text, a Request or a list of them, got {type(prompt).__name__}")
    prompts = [prompt] if isinstance(prompt, str | Request) else list(prompt)
    if not prompts:
        raise SettingError("prompt: got an empty list; expected at least one prompt")
    for name, value in (("count", count), ("seed", 0 if seed is None else seed)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise SettingError(f"{name} {shown(value)}: expected a whole number")
    if not 1 <= count * len(prompts) <= MOST_IMAGES:
        limit = f"from 1 to {MOST_IMAGES:,} images in one call; make another call with another seed"
        raise SettingError(f"count {count} of {len(prompts)} prompt{'s' if len(prompts) != 1 else ''}: {limit}")
    check_names(settings, ["count", *(field.name for field in fields(Request) if field.name != "prompt")])
    unused = [*settings, *(["count"] if count != 1 else []), *(["seed"] if seed is not None else [])]
    if unused and all(isinstance(item, Request) for item in prompts):
        raise SettingError(f"{', '.join(unused)}: a Request has its own settings: set them there, or pass the prompt as text")
    if settings.get("image") is not None:
        settings["image"] = pixels_from(settings["image"])  # read a file once, whatever the count
    seed = secrets.randbelow(2**32) if seed is None else seed
    other_seed = settings.pop("variation_seed", None)
    varied = bool(settings.get("variation_strength"))
    if other_seed is None:
        other_seed = secrets.randbelow(2**32) if varied else NUMBERS["variation_seed"]
    requests: list[Request] = []
    for item in prompts:
        if isinstance(item, Request):
            requests.append(item)
            continue
        for _ in range(count):
            k = len(requests)
            seeds = (seed, other_seed + k) if varied else (seed + k, other_seed)
            requests.append(Request(prompt=item, seed=seeds[0], variation_seed=seeds[1], **settings))
    return requests


def short(value: object, width: int = 40) -> str:
    """Return the repr of `value`, cut to `width` characters."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 2]}…{text[-1]}"
