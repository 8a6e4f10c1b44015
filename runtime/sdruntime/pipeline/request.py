"""What is requested of a pipeline: one image, with all of its settings.

The defaults and ranges here are those of the command line, of the service and of the C library too.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.errors import SettingError, UnknownName, Unsupported, shown
from sdruntime.pipeline.images.imagefile import FITS, Fit, ImageLike, pixels_from
from sdruntime.pipeline.ranges import NUMBERS, RANGES, SIDE, sigmas_of
from sdruntime.sampling.samplers import resolve, resolve_schedule
from sdruntime.sampling.samplers.keys import check_options

MOST_IMAGES = 10_000  # of one call


# What diffusers' pipelines call what is a setting here.
DIFFUSERS: Mapping[str, str] = {
    "num_inference_steps": "steps=…",
    "guidance_scale": "guidance=…",
    "guidance_rescale": "rescale=…",
    "negative_prompt": "negative=…",
    "num_images_per_prompt": "count=…",
    "generator": "seed=…: image k has seed + k, and the noise of torch's CPU generator",
    "height": "size=(width, height)",
    "width": "size=(width, height)",
    "eta": 'options={"eta": …}',
    "scheduler": "sampler=…",
    "output_type": "image.pixels for an array, image.save(path) for a file",
    "callback_on_step_end": "a loop over pipe.stream(…)",
    "num_images": "count=…",
    "cfg_scale": "guidance=…",
    "denoising_strength": "strength=…",
    "init_image": "image=…",
}
# Settings of diffusers' pipelines that are not supported.
UNSUPPORTED = (
    *("latents", "timesteps", "prompt_2", "negative_prompt_2", "clip_skip", "cross_attention_kwargs", "return_dict"),
    *("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    *("mask_image", "control_image", "ip_adapter_image", "denoising_start", "denoising_end", "original_size", "target_size"),
)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Request:
    """One image. Every field is checked; raises SettingError with its name, its value and what belongs there.

    `negative` None: no negative prompt. `size` None: the model's own, (width, height) in pixels. `sampler` None: the
    checkpoint's. `sigmas`: noise levels from high to low in place of `steps`, which is then omitted or their number of steps.
    `image` and `strength` (0 to 1]: image to image; a path, an array uint8 [H, W, 3], an Image or a Pillow image,
    whose pixels are in `pixels`. `fit`: how an image of another size is brought to `size`, "resize" or "crop"; None refuses it.
    `options`: the sampler's own settings, such as eta. `guidance` of 1 or less disables the negative prompt. `rescale` 0 to 1:
    Lin et al. 2023, section 3.4.
    """

    prompt: str
    negative: str | None = None
    seed: int = NUMBERS["seed"]
    steps: int = NUMBERS["steps"]
    sigmas: Sequence[float] | None = None
    sampler: str | None = None
    schedule: str | None = None
    guidance: float = NUMBERS["guidance"]
    rescale: float = NUMBERS["rescale"]
    size: tuple[int, int] | None = None
    image: ImageLike | None = None
    fit: Fit | None = None
    strength: float = NUMBERS["strength"]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative", "sampler", "schedule"):
            text = getattr(self, name)
            if not isinstance(text, str) and (name == "prompt" or text is not None):
                raise SettingError(f"{name} {shown(text)}: expected text")
        for name, allowed in RANGES.items():
            object.__setattr__(self, name, allowed.number(name, getattr(self, name)))
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", sigmas_of(self.sigmas))
        if self.size is not None:
            object.__setattr__(self, "size", _sides(self.size))
        if self.sampler is not None:
            resolve(self.sampler)
        if self.schedule is not None:
            resolve_schedule(self.schedule)
        if not isinstance(self.options, Mapping):
            raise SettingError(f'options {shown(self.options)}: expected a mapping, such as {{"eta": 0.5}}')
        check_options(self.options)
        if self.fit is not None and self.fit not in FITS:
            raise UnknownName("fit", str(self.fit), FITS)
        if self.image is not None:
            object.__setattr__(self, "image", pixels_from(self.image))

    def __repr__(self) -> str:
        """One line: the prompt, the seed, and what is not the default."""
        parts = [short(self.prompt), f"seed {self.seed}"]
        if self.pixels is not None:
            parts.append("image {1}x{0}".format(*self.pixels.shape))
        for each in fields(self):
            value, default = getattr(self, each.name), {} if each.name == "options" else each.default
            if each.name not in ("prompt", "seed", "image") and value != default:
                parts.append(f"{each.name} {short(value)}")
        return f"<Request {', '.join(parts)}>"

    @property
    def pixels(self) -> Array | None:
        """Of the image to begin from: uint8 [H, W, 3]."""
        found: Array | None = self.image
        return found

    @property
    def guided(self) -> bool:
        return self.guidance > 1


DEFAULTS: Mapping[str, Any] = {each.name: each.default for each in fields(Request) if each.default is not MISSING}


def unused_lines(asked: Sequence[Request]) -> list[str]:
    """A line for each setting of the requests that has no effect."""
    unguided = [each for each in asked if not each.guided]
    without = [each for each in asked if each.pixels is None]
    found = [("the negative prompt", each) for each in unguided if each.negative]
    found += [(f"rescale {each.rescale:g}", each) for each in unguided if each.rescale]
    lines = [f"{what} has no effect at guidance {each.guidance:g}: it takes a guidance over 1" for what, each in found]
    lines += [
        f"strength {each.strength:g} has no effect without an image" for each in without if each.strength != DEFAULTS["strength"]
    ]
    lines += [f"fit {each.fit!r} has no effect without an image" for each in without if each.fit is not None]
    return list(dict.fromkeys(lines))


def _sides(size: Any) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence | np.ndarray) and not isinstance(size, str) else ()
    if len(sides) != 2:
        raise SettingError(f"size {shown(size)}: expected (width, height) in pixels")
    width, height = (SIDE.number(f"size: {name}", side) for name, side in zip(("width", "height"), sides, strict=True))
    return width, height


def requests(
    prompt: str | Request | Iterable[str | Request], *, count: int = 1, seed: int | None = None, **settings: Any
) -> list[Request]:
    """Return one Request per image: `count` for each prompt, in order. Image k of them all has the seed `seed` + k.

    `seed` None: a random one. A Request among the prompts stands for itself, with its own seed and settings; beside
    nothing but Requests other settings are refused. Raises SettingError.
    """
    if not isinstance(prompt, str | Request | Iterable) or isinstance(prompt, bytes):
        raise SettingError(f"prompt: expected text, a Request or a list of them, got {type(prompt).__name__}")
    prompts = [prompt] if isinstance(prompt, str | Request) else list(prompt)
    if not prompts:
        raise SettingError("no prompt was given")
    for name, value in (("count", count), ("seed", 0 if seed is None else seed)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise SettingError(f"{name} {shown(value)}: expected a whole number")
    if not 1 <= count * len(prompts) <= MOST_IMAGES:
        limit = f"from 1 to {MOST_IMAGES:,} images in one call; the next call goes on with another seed"
        raise SettingError(f"count {count} of {len(prompts)} prompt{'s' if len(prompts) != 1 else ''}: {limit}")
    check_names(settings)
    unused = [*settings, *(["count"] if count != 1 else []), *(["seed"] if seed is not None else [])]
    if unused and all(isinstance(each, Request) for each in prompts):
        raise SettingError(f"{', '.join(unused)}: a Request has its own settings: write them into it, or give its prompt instead")
    if settings.get("image") is not None:
        settings["image"] = pixels_from(settings["image"])  # a file is read once, whatever the count
    seed = secrets.randbelow(2**32) if seed is None else seed
    made: list[Request] = []
    for each in prompts:
        if isinstance(each, Request):
            made.append(each)
            continue
        for _ in range(count):
            made.append(Request(prompt=each, seed=seed + len(made), **settings))
    return made


def check_names(settings: Iterable[str]) -> None:
    """Raises UnknownName for a setting that no request has, with its name here where it is one of diffusers'."""
    known = [field.name for field in fields(Request) if field.name != "prompt"]
    for name in settings:
        if name in DIFFUSERS:
            raise SettingError(f"unknown setting {name!r}: write {DIFFUSERS[name]}")
        if name in UNSUPPORTED:
            raise Unsupported(f"setting {name!r} of diffusers is not supported")
        if name not in known:
            raise UnknownName("setting", name, ["count", *known])


def short(value: object, width: int = 40) -> str:
    """The repr of `value`, at most `width` characters of it."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 2]}…{text[-1]}"
