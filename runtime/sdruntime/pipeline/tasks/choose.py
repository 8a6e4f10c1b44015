"""Choose the task of a request: by the UNet's own task, and by what the request gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdruntime.bundle.tasks import Task
from sdruntime.errors import SettingError
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.tasks import depth, inpainting, pix2pix, upscaling
from sdruntime.pipeline.tasks.start import Setting, Start, from_image, from_text
from sdruntime.sampling.job import Row


def task_start(request: Request, task: Task | None) -> Callable[[Setting], Start]:
    """Return the function that starts a request on a UNet with this task."""
    if task == "instruct_pix2pix":
        return pix2pix.edit
    if task == "inpainting":
        return inpainting.conditioned
    if task == "depth":
        return depth.guided_by_depth
    if task == "upscaling":
        return upscaling.enlarged
    if request.inpaints:
        return inpainting.keeping
    return from_text if request.pixels is None else from_image


def start_strength(request: Request, task: Task | None) -> float | None:
    """Return the strength with which the first latents follow from the request's image; None if they are pure noise."""
    inpaints = task == "inpainting" or request.inpaints
    if request.pixels is None or task in ("instruct_pix2pix", "upscaling") or (inpaints and inpainting.from_noise(request)):
        return None
    return request.strength


def check_task(request: Request, task: Task | None) -> None:
    """Raise SettingError if a request does not fit the UNet's task."""
    if task == "refining" and request.pixels is None:
        raise SettingError("this model refines an image: pass one as image=… (--image)")
    if task == "depth" and (request.pixels is None or request.depth is None):
        raise SettingError("this model changes an image and follows its depth: pass image=… and depth=… (--image, --depth)")
    if task != "depth" and request.depth is not None:
        raise SettingError("depth: only models made for it take a depth map: omit it")
    if task == "instruct_pix2pix" and request.pixels is None:
        raise SettingError("this model edits an image: pass one as image=… (--image)")
    if task == "upscaling" and request.pixels is None:
        raise SettingError("this model enlarges an image: pass one as image=… (--image)")
    if task in ("instruct_pix2pix", "depth", "upscaling") and request.inpaints:
        name = "extend" if request.mask is None else "mask"
        verb = "enlarges" if task == "upscaling" else "edits"
        raise SettingError(f"{name}: this model {verb} whole images: use an inpainting or a plain model, or omit it")


def rows_of(task: Task | None, texts: Sequence[Row], inputs: Row) -> tuple[Row, ...]:
    """Return the rows of a UNet call: those of the texts, each with the inputs that follow from the image.

    `texts`: (unconditional, conditional), or the conditional one alone. InstructPix2Pix with guidance has one row more, without
    the text and the image: an input that a row lacks is zeros.
    """
    rows = [{**text, **inputs} for text in texts]
    return (texts[0], *rows) if task == "instruct_pix2pix" and len(rows) > 1 else tuple(rows)
