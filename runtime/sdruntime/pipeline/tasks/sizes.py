"""The sizes of what a request generates, in latent cells and in pixels."""

from __future__ import annotations

from sdruntime.bundle.model import ModelSpec
from sdruntime.bundle.tasks import Task
from sdruntime.errors import SettingError
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.tasks import upscaling

HOW_TO_FIT = 'resize it, or pass fit "resize" or "crop" (--fit)'
Shape = tuple[int, int, int]  # (channels, height, width) of latents


def latent_shape(request: Request, model: ModelSpec, task: Task | None) -> Shape:
    """Return the shape of a request's latents in its first pass. Raises SettingError for an unsupported size."""
    if task == "upscaling":
        return upscaling.latent_shape(request, model)
    width, height = request.size or model.usual_size[::-1]
    part = request.inpaints and request.mask_padding is not None  # the image may have any size
    image = f"the {'extended ' if any(request.extend) else ''}image is"
    if request.image_size is not None and request.fit is None and not part:
        width, height = request.image_size
        if request.size not in (None, (width, height)):
            raise SettingError(f"{image} {width}x{height}, the size {request.size[0]}x{request.size[1]}: {HOW_TO_FIT}")
    multiple, factor = model.step, model.vae_factor
    if width < 1 or height < 1 or width % multiple or height % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        from_image = request.pixels is not None and not part
        size = f"{image} {width}x{height}" if from_image else f"size {width}x{height}"
        fix = f"; {HOW_TO_FIT}" if from_image else ""
        again = "" if model.size_step else f"; export the bundle again for multiples of {factor}"
        raise SettingError(f"{size}: both sides must be multiples of {multiple}, such as {near[0]}x{near[1]}{fix}{again}")
    return model.latent_channels, height // factor, width // factor


def pixels_of(shape: Shape, model: ModelSpec) -> tuple[int, int]:
    """Return (width, height) in pixels of latents."""
    _, height, width = shape
    return width * model.vae_factor, height * model.vae_factor


def cells_of(name: str, size: tuple[int, int], model: ModelSpec) -> tuple[int, int]:
    """Return (height, width) in latent cells of the setting `name`, (width, height) in pixels. Raises SettingError."""
    width, height = size
    factor = model.vae_factor
    if width % factor or height % factor:
        near = "x".join(str(max(factor, round(side / factor) * factor)) for side in (width, height))
        raise SettingError(f"{name} {width}x{height}: both sides must be multiples of {factor}, such as {near}")
    return height // factor, width // factor
