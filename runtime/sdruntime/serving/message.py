"""The messages of a host to the service, as records that check their fields."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sdruntime.adapters.lora import Lora
from sdruntime.arrays import Array
from sdruntime.bundle.records import record_from_json
from sdruntime.engines.choose import AUTO
from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.requests.control import CONTROL_NUMBERS, Control, ControlFit
from sdruntime.pipeline.requests.image_prompt import DEFAULT_SCALE, ImagePrompt
from sdruntime.pipeline.requests.request import DEFAULTS, HiresResize, MaskFill, Request
from sdruntime.pipeline.text.emphasis import Emphasis
from sdruntime.pipeline.text.wording import Syntax
from sdruntime.sampling.noise.image import Rng
from sdruntime.serving.batcher import QUEUE


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How to open a bundle; see EngineOptions and Batcher.

    `device`: as `cuda.device_index` parses it. `stream`: the handle of the caller's CUDA stream, on which all work is then done;
    TensorRT engines only. `refiner`: the path of a second bundle. `embeddings`: files, each FILE or NAME=FILE. `lora_dir`: the
    folder of the LoRAs that prompts name. `memory`: a limit in bytes of GPU memory; a bundle that needs more is refused with both
    numbers. `lora_memory`: bytes of the engines with LoRAs that stay open; null: those of two sets.
    """

    backend: str = AUTO
    device: int | str = 0
    threads: int = 0
    low_memory: bool = False
    memory: int | None = None
    stream: int | None = None
    queue: int = QUEUE
    running: int | None = None
    tile: int | str = "auto"
    measure: bool = True
    session: Mapping[str, str] = field(default_factory=dict)
    refiner: str | None = None
    embeddings: tuple[str, ...] = ()
    lora_dir: str | None = None
    lora_memory: int | None = None

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads {self.threads}: 0 or more")
        if self.lora_memory is not None and self.lora_memory < 0:
            raise ValueError(f"lora_memory {self.lora_memory}: 0 or more bytes, or null for two sets of LoRAs")
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"memory {self.memory}: at least 1 byte, or null for all that is free")


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Open a bundle."""

    op: Literal["open"]
    bundle: str
    options: OpenOptions = field(default_factory=OpenOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraMessage:
    """A Lora."""

    path: str
    scale: float = 1.0
    text_scale: float | None = None
    blocks: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """The images of a job: the start image, uint8 [H, W, 3], its mask and depth map, uint8 [H, W], those of ControlNets, those
    of an image prompt, and its masks, uint8 [H, W].
    """

    image: Array | None = None
    mask: Array | None = None
    depth: Array | None = None
    controls: tuple[Array, ...] = ()
    image_prompt: tuple[Array, ...] = ()
    image_prompt_mask: tuple[Array, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlMessage:
    """A Control. `size`: (width, height) of its image, whose rows are in the blob."""

    size: tuple[int, int]
    net: str | None = None
    scale: float = CONTROL_NUMBERS["scale"]
    start: float = CONTROL_NUMBERS["start"]
    end: float = CONTROL_NUMBERS["end"]
    fit: ControlFit = "resize"
    preprocess: Literal["canny", "gray", "color", "invert", "resize", "tile"] | None = None  # of those without a mask
    type: int | None = None
    low: float = CONTROL_NUMBERS["low"]
    high: float = CONTROL_NUMBERS["high"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMessage:
    """A Request without its image, mask and depth map.

    `width` and `height` in pixels, both or neither. `seed`, `variation_seed`: null for a random one.
    """

    prompt: str
    negative: str | None = None
    seed: int | None = None
    steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    sampler: str | None = None
    schedule: str | None = None
    guidance: float | tuple[float, ...] | None = None
    guidance_interval: tuple[float, float] = DEFAULTS["guidance_interval"]
    image_guidance: float = DEFAULTS["image_guidance"]
    rescale: float = DEFAULTS["rescale"]
    cfg_pp: bool = False
    width: int | None = None
    height: int | None = None
    strength: float = DEFAULTS["strength"]
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt_2: str | None = None
    negative_2: str | None = None
    prompt_syntax: Syntax = DEFAULTS["prompt_syntax"]
    emphasis: Emphasis = DEFAULTS["emphasis"]
    clip_skip: int = DEFAULTS["clip_skip"]
    rng: Rng = DEFAULTS["rng"]
    variation_seed: int | None = None
    variation_strength: float = DEFAULTS["variation_strength"]
    seed_resize: tuple[int, int] | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = DEFAULTS["crop"]
    target_size: tuple[int, int] | None = None
    mask_blur: float = DEFAULTS["mask_blur"]
    mask_padding: int | None = None
    mask_fill: MaskFill = DEFAULTS["mask_fill"]
    overlay: bool = False
    extend: tuple[int, int, int, int] = DEFAULTS["extend"]
    aesthetic_score: float = DEFAULTS["aesthetic_score"]
    negative_aesthetic_score: float = DEFAULTS["negative_aesthetic_score"]
    hires: float | None = None
    hires_strength: float = DEFAULTS["hires_strength"]
    hires_steps: int | None = None
    hires_resize: HiresResize = DEFAULTS["hires_resize"]
    refiner_at: float = DEFAULTS["refiner_at"]
    loras: tuple[LoraMessage, ...] = ()
    noise_level: int = DEFAULTS["noise_level"]
    guess_mode: bool = False
    image_prompt_scale: float = DEFAULT_SCALE

    def __post_init__(self) -> None:
        if (self.width is None) != (self.height is None):
            raise ValueError(f"width {self.width} and height {self.height}: give both or neither")

    def _variation_seed(self) -> int:
        if self.variation_seed is None and self.variation_strength:
            return secrets.randbelow(2**32)
        return self.variation_seed or 0

    def _image_prompt(self, images: Sequence[Array], masks: Sequence[Array]) -> ImagePrompt | None:
        if images:
            return ImagePrompt(image=list(images), mask=list(masks) or None, scale=self.image_prompt_scale)
        if masks:
            raise SettingError("image_prompt_mask has no effect without an image_prompt")
        if self.image_prompt_scale != DEFAULT_SCALE:
            raise SettingError(f"image_prompt_scale {self.image_prompt_scale:g} has no effect without an image_prompt")
        return None

    def request(self, images: Images, controls: Sequence[ControlMessage] = ()) -> Request:
        """Return the Request with these images. Raises SettingError."""
        return Request(
            prompt=self.prompt,
            negative=self.negative,
            seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
            steps=self.steps,
            sigmas=self.sigmas,
            sampler=self.sampler,
            schedule=self.schedule,
            guidance=self.guidance,
            guidance_interval=self.guidance_interval,
            image_guidance=self.image_guidance,
            rescale=self.rescale,
            cfg_pp=self.cfg_pp,
            size=None if self.width is None or self.height is None else (self.width, self.height),
            image=images.image,
            mask=images.mask,
            depth=images.depth,
            control=[
                Control(image=image, **{key.name: getattr(control, key.name) for key in fields(control) if key.name != "size"})
                for image, control in zip(images.controls, controls, strict=True)
            ],
            guess_mode=self.guess_mode,
            image_prompt=self._image_prompt(images.image_prompt, images.image_prompt_mask),
            strength=self.strength,
            options=self.options,
            prompt_2=self.prompt_2,
            negative_2=self.negative_2,
            prompt_syntax=self.prompt_syntax,
            emphasis=self.emphasis,
            clip_skip=self.clip_skip,
            rng=self.rng,
            variation_seed=self._variation_seed(),
            variation_strength=self.variation_strength,
            seed_resize=self.seed_resize,
            original_size=self.original_size,
            crop=self.crop,
            target_size=self.target_size,
            mask_blur=self.mask_blur,
            mask_padding=self.mask_padding,
            mask_fill=self.mask_fill,
            overlay=self.overlay,
            extend=self.extend,
            aesthetic_score=self.aesthetic_score,
            negative_aesthetic_score=self.negative_aesthetic_score,
            hires=self.hires,
            hires_strength=self.hires_strength,
            hires_steps=self.hires_steps,
            hires_resize=self.hires_resize,
            refiner_at=self.refiner_at,
            loras=[Lora(lora.path, lora.scale, lora.text_scale, lora.blocks) for lora in self.loras],
            noise_level=self.noise_level,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Submit a job.

    `image`: (width, height) of the start image, whose rows are the blob. `mask`: the blob goes on with a mask of that size, 8
    bits of gray for a pixel. `depth`: (width, height) of a depth map that follows in the blob, brighter where it is nearer.
    `controls`: images for ControlNets. `image_prompt`, `image_prompt_mask`: the (width, height) of each image of an image prompt,
    and of a mask for each, 8 bits of gray for a pixel. These end the blob in this order. `device_buffer`: the address of the
    caller's buffer of `device_buffer_size` bytes on the engines' GPU. The image's rows are also copied there on the engines'
    stream, after rounding to uint8 on the host; the copy is complete when "done" is sent.
    """

    op: Literal["submit"]
    job: int
    request: RequestMessage
    preview: bool = False
    png: bool = False
    image: tuple[int, int] | None = None
    mask: bool = False
    depth: tuple[int, int] | None = None
    controls: tuple[ControlMessage, ...] = ()
    image_prompt: tuple[tuple[int, int], ...] = ()
    image_prompt_mask: tuple[tuple[int, int], ...] = ()
    device_buffer: int | None = None
    device_buffer_size: int | None = None

    def __post_init__(self) -> None:
        if self.mask and self.image is None:
            raise ValueError("mask: it marks a part of an image: send the image too")
        if self.depth is not None and self.image is None:
            raise ValueError("depth: it is that of an image: send the image too")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Cancel a job."""

    op: Literal["cancel"]
    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """End a job after its current step, with the image so far; see ImageFuture.finish."""

    op: Literal["finish"]
    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Close the service."""

    op: Literal["close"]


OPERATIONS = {"open": Open, "submit": Submit, "cancel": Cancel, "finish": Finish, "close": Close}
Message = Open | Submit | Cancel | Finish | Close


def message_from_json(document: Any) -> Message:
    """Return the message of a JSON document. Raises SettingError with every fault of every field, UnknownName for its `op`."""
    op = document.get("op") if isinstance(document, dict) else None
    if not isinstance(op, str):
        raise SettingError('a message is an object with an "op"')
    if op not in OPERATIONS:
        raise UnknownName("op", op, OPERATIONS)
    faults: list[str] = []
    message: Message = record_from_json(OPERATIONS[op], document, where="", faults=faults)
    if faults:
        raise SettingError(f"{op}: {'; '.join(faults)}")
    return message
