"""Settings of a request that have no effect beside its other settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdruntime.pipeline.requests.ranges import WHOLE
from sdruntime.pipeline.requests.request import DEFAULTS, Request


def unused_lines(requests: Sequence[Request]) -> list[str]:
    """Return one warning for each setting of the requests that has no effect."""
    unguided = [request for request in requests if not request.guided]
    text_only = [request for request in requests if request.pixels is None]
    unused = [("the negative prompt", request) for request in unguided if request.negative]
    unused += [("the second negative prompt", request) for request in unguided if request.negative_2]
    unused += [(f"rescale {request.rescale:g}", request) for request in unguided if request.rescale]
    unused += [("guidance_interval", request) for request in unguided if request.guidance_interval != WHOLE]
    lines = [f"{name} has no effect at guidance {max(request.guidances):g}: set guidance above 1" for name, request in unused]
    lines += [
        f"variation_seed {request.variation_seed} has no effect without variation_strength"
        for request in requests
        if request.variation_seed and not request.variation_strength
    ]
    lines += [
        f"strength {request.strength:g} has no effect without an image"
        for request in text_only
        if request.strength != DEFAULTS["strength"]
    ]
    lines += [f"fit {request.fit!r} has no effect without an image" for request in text_only if request.fit is not None]
    lines += [line for request in requests for line in _unused_of_a_mask(request)]
    lines += [
        f"{name} {getattr(request, name)} has no effect without hires"
        for request in requests
        for name in ("hires_strength", "hires_steps", "hires_resize")
        if request.hires is None and getattr(request, name) != DEFAULTS[name]
    ]
    lines += ["guess_mode has no effect without control" for request in requests if request.guess_mode and not request.controls]
    lines += [
        f"emphasis {request.emphasis!r} has no effect in the prompt syntax 'plain'"
        for request in requests
        if request.prompt_syntax == "plain" and request.emphasis != DEFAULTS["emphasis"]
    ]
    return list(dict.fromkeys(lines))


def _unused_of_a_mask(request: Request) -> Iterator[str]:
    if not request.inpaints:
        names = ("mask_blur", "mask_padding", "mask_fill", "overlay")
        idle = [name for name in names if getattr(request, name) != DEFAULTS[name]]
        yield from (f"{name} {getattr(request, name)!r} has no effect without a mask" for name in idle)
    elif request.strength == 1 and request.mask_fill != DEFAULTS["mask_fill"]:
        yield f"mask_fill {request.mask_fill!r} has no effect at strength 1: the masked part starts from noise"
    elif request.mask_padding is not None and request.overlay:
        yield "overlay has no effect with mask_padding, which always has one"
    if request.inpaints and request.mask_blur and not request.overlay and request.mask_padding is None:
        yield "mask_blur has little effect without overlay: the latents take a mask of black and white"
