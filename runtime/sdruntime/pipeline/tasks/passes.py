"""The passes of a request: one run of the UNet's steps, or two: with `hires` at a larger size, with a refiner by its UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sdruntime.bundle.model import ModelSpec
from sdruntime.bundle.tasks import Task
from sdruntime.errors import SettingError
from sdruntime.pipeline.images.resampling import Kernel as PixelKernel
from sdruntime.pipeline.requests.request import DEFAULTS, HiresResize, Request
from sdruntime.pipeline.tasks.choose import start_strength
from sdruntime.pipeline.vae.resize import Kernel as LatentKernel

LATENT_KERNELS: Mapping[HiresResize | None, LatentKernel] = {
    "latent": "bilinear",
    "latent-bicubic": "bicubic",
    "latent-nearest": "nearest",
    "latent-nearest-exact": "nearest-exact",
}
PIXEL_KERNELS: Mapping[HiresResize | None, PixelKernel] = {"lanczos": "lanczos", "nearest": "nearest"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """`request`: what this pass generates, without `hires`. `strength`: that of its image or latents, None from noise.

    `resize`: how the result of the pass before reaches the size of this one; None for the first pass. `part`: of the trained
    timesteps, as in `compile_table`. `refines`: whether the refiner runs it, from the latents of the pass before as they are.
    """

    request: Request
    strength: float | None
    resize: HiresResize | None = None
    part: tuple[float, float] | None = None
    refines: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """A pass among those of its request: it makes `calls` model calls.

    A refiner and the pass that it finishes make one run of `all` calls, of which `before` precede this pass; other passes are
    runs of their own. `passed`: the calls of the runs before.
    """

    step: Pass
    passed: int
    before: int
    calls: int
    all: int


def placed(steps: Sequence[Pass], counts: Sequence[int]) -> list[Place]:
    """Return the places of passes that make so many model calls."""
    places = []
    for k, step in enumerate(steps):
        first = k - step.refines
        last = k + (k + 1 < len(steps) and steps[k + 1].refines)
        places.append(
            Place(
                step=step,
                passed=sum(counts[:first]),
                before=sum(counts[first:k]),
                calls=counts[k],
                all=sum(counts[first : last + 1]),
            )
        )
    return places


def passes_of(request: Request, task: Task | None, size: tuple[int, int], multiple: int) -> tuple[Pass, ...]:
    """Return the passes of a request whose first one generates `size`, (width, height).

    The sides of the second one are rounded down to `multiple`, as AUTOMATIC1111's web UI does. Raises SettingError.
    """
    if request.hires is None:
        return (Pass(request=request, strength=start_strength(request, task)),)
    if task is not None:
        raise SettingError(f"hires: this model is for {task.replace('_', ' ')}, which has one pass: omit hires")
    width, height = (int(side * request.hires) // multiple * multiple for side in size)
    if (width, height) == size or width < size[0] or height < size[1]:
        raise SettingError(
            f"hires {request.hires:g}: {size[0]}x{size[1]} stays {width}x{height}, as both sides are multiples of {multiple}: "
            "use a larger scale"
        )
    first = replace(request, **{name: DEFAULTS[name] for name in DEFAULTS if name.startswith("hires")})
    second = replace(
        first,
        image=None,
        fit=None,
        strength=request.hires_strength,
        size=(width, height),
        steps=request.hires_steps or request.steps,
    )
    return (
        Pass(request=first, strength=start_strength(first, task)),
        Pass(request=second, strength=request.hires_strength, resize=request.hires_resize),
    )


def refined(passes: Sequence[Pass], task: Task | None, size: tuple[int, int]) -> tuple[Pass, ...]:
    """Return passes, of which a refiner finishes the last one, of this size, from `refiner_at` on. Raises SettingError.

    Of two passes that is the second one, as in AUTOMATIC1111's web UI. What a mask keeps is put back after the refiner's steps
    too.
    """
    *before, last = passes
    request, own = last.request, {name: DEFAULTS[name] for name in ("aesthetic_score", "negative_aesthetic_score")}
    if request.inpaints and task == "inpainting":
        raise SettingError(
            "a mask with a refiner: this model takes the mask as an input, which a refiner does not: set refiner_at to 1 "
            "(--refiner-at), or open the bundle without one"
        )
    base = replace(request, **own)
    second = replace(
        request,
        prompt=request.prompt if request.prompt_2 is None else request.prompt_2,
        negative=request.negative if request.negative_2 is None else request.negative_2,
        prompt_2=None,
        negative_2=None,
        target_size=None,
        size=size,
        image=None,
        mask=None,
        mask_padding=None,
        extend=DEFAULTS["extend"],
        depth=None,
        fit=None,
        strength=DEFAULTS["strength"],
    )
    return (
        *(replace(step, request=replace(step.request, **own)) for step in before),
        Pass(request=base, strength=last.strength, resize=last.resize, part=(0.0, request.refiner_at)),
        Pass(request=second, strength=None, part=(request.refiner_at, 1.0), refines=True),
    )


def check_refiner(base: ModelSpec, refiner: ModelSpec) -> None:
    """Raise SettingError if a refiner cannot go on with the latents of a model."""
    ours, theirs = (
        f"{model.latent_channels} channels of {model.vae_factor}x{model.vae_factor} pixels" for model in (base, refiner)
    )
    if ours != theirs:
        raise SettingError(
            f"refiner {refiner.name}: its latents have {theirs}, those of {base.name} {ours}: use a refiner of the same family"
        )


def rounded_line(request: Request, size: tuple[int, int], reached: tuple[int, int]) -> str | None:
    """Return a line if the second pass is smaller than `hires` times `size`; None if it is not."""
    if request.hires is None:
        return None
    wanted = tuple(int(side * request.hires) for side in size)
    if wanted == reached:
        return None
    return "hires {:g}: the size is {}x{}, the next valid one below {}x{}".format(request.hires, *reached, *wanted)
