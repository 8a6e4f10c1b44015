"""What is asked of a pipeline: one picture, with all of its settings."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdruntime.engine import Array
from sdruntime.errors import SettingError
from sdruntime.samplers.keys import check_options

LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One picture. Raises SettingError for a value out of range.

    `negative` None: no negative prompt. `size` None: the model's own, (width, height) in pixels. `sampler` None: the
    checkpoint's. `image` (uint8 [H, W, 3]) and `strength` (0 to 1]: image to image. `options`: the sampler's own settings,
    such as eta. `guidance` of 1 or less leaves the negative prompt out. `rescale` 0 to 1: Lin et al. 2023, section 3.4.
    """

    prompt: str
    negative: str | None = None
    seed: int = 0
    steps: int = 20
    sampler: str | None = None
    schedule: str | None = None
    guidance: float = 7.5
    rescale: float = 0.0
    size: tuple[int, int] | None = None
    image: Array | None = None
    strength: float = 0.8
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative"):
            text = getattr(self, name)
            if not isinstance(text, str) and not (name == "negative" and text is None):
                raise SettingError(f"{name}: text belongs here, not {type(text).__name__}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise SettingError(f"seed {self.seed} is outside 0 to {LARGEST_SEED}")
        if not math.isfinite(self.guidance):
            raise SettingError(f"guidance {self.guidance} is not a finite number")
        if not 0 <= self.rescale <= 1:
            raise SettingError(f"rescale {self.rescale} is outside 0 to 1")
        if not 0 < self.strength <= 1:
            raise SettingError(f"strength {self.strength} is outside 0 (excluded) to 1")
        check_options(self.options)
        if self.image is not None and (self.image.dtype != "uint8" or self.image.ndim != 3 or self.image.shape[2] != 3):
            raise SettingError(f"image: uint8 [height, width, 3] belongs here, not {self.image.dtype} {list(self.image.shape)}")

    @property
    def guided(self) -> bool:
        return self.guidance > 1


def requests(
    prompt: str | Request | Sequence[str | Request], *, count: int = 1, seed: int | None = None, **settings: Any
) -> list[Request]:
    """One Request a picture: `count` for each prompt, in order. Picture k of them all has the seed `seed` + k.

    `seed` None: a random one. A Request among the prompts stands for itself, with its own seed and settings. Raises SettingError.
    """
    prompts = [prompt] if isinstance(prompt, str | Request) else list(prompt)
    if not prompts:
        raise SettingError("no prompt was given")
    if count < 1:
        raise SettingError(f"count {count}: at least 1 picture a prompt")
    seed = secrets.randbelow(2**32) if seed is None else seed
    made: list[Request] = []
    for each in prompts:
        if isinstance(each, Request):
            made.append(each)
            continue
        for _ in range(count):
            made.append(Request(prompt=each, seed=seed + len(made), **settings))
    return made
