"""The passes of a request: one run of the UNet's steps, or with `hires` two, the second at a larger size."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdruntime.bundle.tasks import Task
from sdruntime.errors import SettingError
from sdruntime.pipeline.request import DEFAULTS, HiresResize, Request
from sdruntime.pipeline.tasks.choose import start_strength


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """`request`: what this pass generates, without `hires`. `strength`: that of its image or latents, None from noise.

    `resize`: how the result of the pass before reaches the size of this one; None for the first pass.
    """

    request: Request
    strength: float | None
    resize: HiresResize | None = None


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


def rounded_line(request: Request, size: tuple[int, int], reached: tuple[int, int]) -> str | None:
    """Return a line if the second pass is smaller than `hires` times `size`; None if it is not."""
    if request.hires is None:
        return None
    wanted = tuple(int(side * request.hires) for side in size)
    if wanted == reached:
        return None
    return "hires {:g}: the size is {}x{}, the next valid one below {}x{}".format(request.hires, *reached, *wanted)
