"""T2I-Adapters: from the images of a request to what is added inside the UNet's down blocks.

An adapter reads its image once, so its features are inputs of the job like those of a text, which change where it begins and ends
to act. Source: Mou et al. 2023 (arXiv 2302.08453); diffusers' StableDiffusionAdapterPipeline and its SDXL counterpart, whose
adapter_conditioning_factor is `end`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.interface import CONTROL_IMAGE, pixels_of_cell
from sdruntime.bundle.manifest import ComponentSpec
from sdruntime.bundle.roles import short_name
from sdruntime.engines.finite import checked_rows
from sdruntime.errors import SettingError
from sdruntime.pipeline.control import control_image, controls_of_kind
from sdruntime.pipeline.images.imagefile import gray_from
from sdruntime.pipeline.images.maps import INPAINT
from sdruntime.pipeline.images.pixels import to_uint8
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.request import Request

Features = dict[str, Array]  # float32 [C, h, w] by the name of the UNet's input


def check_adapters(request: Request, size: tuple[int, int], components: Mapping[str, ComponentSpec]) -> None:
    """Raises SettingError if a request's T2I-Adapters cannot act on an image of `size`, (width, height)."""
    for control, name in controls_of_kind("T2I-Adapter", request, components):
        if control.type is not None:
            raise SettingError(f"control: type {control.type}, but {name} reads images of one type: omit it")
        if control.preprocess == INPAINT:
            raise SettingError(f"control: preprocess {INPAINT} is for ControlNets, and {name} is a T2I-Adapter")
        cell = pixels_of_cell(components[name])
        if any(side % cell for side in size):
            raise SettingError(
                f"control: {short_name(name)} takes images whose sides are multiples of {cell}; {size[0]}x{size[1]} is generated"
            )


def features_by_step(
    request: Request,
    size: tuple[int, int],
    calls: int,
    components: Mapping[str, ComponentSpec],
    engine: Callable[..., Engine],
    folder: Path,
) -> dict[int, Features]:
    """Return what a request's T2I-Adapters add to the UNet in `calls` model calls of an image of `size`, (width, height).

    The keys are the calls from which on it changes, 0 first. Raises NotFinite.
    """
    used = controls_of_kind("T2I-Adapter", request, components)
    if not used:
        return {0: {}}
    features = [_features(control, name, size, components[name], engine, folder) for control, name in used]
    acting = [tuple(control.acts(call, calls) for control, _ in used) for call in range(calls)]
    changes = [0, *(call for call, (before, now) in enumerate(itertools.pairwise(acting), start=1) if before != now)]
    return {call: _sum(features, acting[call]) for call in changes}


def _features(
    control: Control, name: str, size: tuple[int, int], adapter: ComponentSpec, engine: Callable[..., Engine], folder: Path
) -> Features:
    """Return an adapter's features of its image, times the control's scale."""
    image = control_image(control, size)
    (channels,) = (tensor.shape[1] for tensor in adapter.inputs if tensor.name == CONTROL_IMAGE)
    if channels == 1:
        image = gray_from(to_uint8(2 * image - 1))[None].astype(np.float32) / np.float32(255)
    width, height = size
    run = engine(name, adapters=None, height=height, width=width)
    outputs = checked_rows(run, {CONTROL_IMAGE: image[None]}, lambda _: f"the image of {short_name(name)}", folder)
    return {tensor: values[0] * np.float32(control.scale) for tensor, values in outputs.items()}


def _sum(features: list[Features], acting: tuple[bool, ...]) -> Features:
    total: Features = {name: np.zeros_like(array) for name, array in features[0].items()}
    for own, acts in zip(features, acting, strict=True):
        for name, array in own.items():
            if acts:
                total[name] += array
    return total
