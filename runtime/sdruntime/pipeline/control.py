"""ControlNets: from the images of a request to what is added to the UNet's inputs in each model call.

Source: diffusers' StableDiffusionControlNetPipeline and ControlNetModel, also for guess mode and pooled residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.dimensions import size_of
from sdruntime.bundle.interface import CONTROL_IMAGE, CONTROL_SCALES, CONTROL_TYPE, control_types, is_pooled, residuals_of
from sdruntime.bundle.manifest import ComponentSpec
from sdruntime.bundle.roles import of_kind, role, short_name
from sdruntime.engines.finite import checked_rows
from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.images.maps import CANNY, PREPROCESSORS, canny, marked
from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.pipeline.images.resampling import resample
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.control import ControlInput
from sdruntime.sampling.job import Job

Components = Mapping[str, ComponentSpec]


def component_of(control: Control, components: Components) -> str:
    """Return the component of a control's ControlNet or T2I-Adapter. Raises SettingError and UnknownName."""
    nets = {short_name(name): name for name in of_kind(components, "ControlNet", "T2I-Adapter")}
    if not nets:
        advice = "export it again with --controlnet MODEL or --t2i-adapter MODEL"
        raise SettingError(f"control: the bundle has no ControlNet and no T2I-Adapter: {advice}")
    if control.net is None:
        if len(nets) > 1:
            raise SettingError(f"control: which ControlNet? Give its name as net (net=): {', '.join(nets)}")
        return next(iter(nets.values()))
    if control.net not in nets:
        raise UnknownName("ControlNet", control.net, nets)
    return nets[control.net]


def control_inputs(request: Request, size: tuple[int, int], calls: int, components: Components) -> tuple[ControlInput, ...]:
    """Return the inputs of a request's ControlNets for an image of `size`, (width, height), in so many model calls."""
    inputs = []
    for control, name in controls_of_kind("ControlNet", request, components):
        types = _checked_type(control, name, components[name])
        count, pooled = len(components[name].outputs), is_pooled(components[name])
        weights = np.logspace(-1, 0, count) if request.guess_mode and not pooled else np.ones(count)
        acts = np.array([control.acts(call, calls) for call in range(calls)])
        inputs.append(
            ControlInput(
                component=name,
                image=control_image(control, size),
                factors=(acts[:, None] * weights * control.scale).astype(np.float32),
                conditional_only=request.guess_mode or pooled,
                type=None if types is None else np.eye(types, dtype=np.float32)[control.type],
            )
        )
    return tuple(inputs)


def controls_of_kind(
    kind: Literal["ControlNet", "T2I-Adapter"], request: Request, components: Components
) -> list[tuple[Control, str]]:
    """Return the controls of a request that networks of this kind read, and their components."""
    named = [(control, component_of(control, components)) for control in request.controls]
    return [(control, name) for control, name in named if role(name).kind == kind]


def _checked_type(control: Control, name: str, net: ComponentSpec) -> int | None:
    """Return how many types of images a control's net reads, None if it reads one. Raises SettingError."""
    types = control_types(net)
    if types is None and control.type is not None:
        raise SettingError(f"control: type {control.type}, but {name} reads images of one type: omit it")
    if types is not None and (control.type is None or control.type >= types):
        what = "needs the type of the image" if control.type is None else f"has no type {control.type}"
        raise SettingError(f"control: {name} {what}: give it as type, 0 to {types - 1} (diffusers' control_mode)")
    return types


def sums_on_host(request: Request, components: Components) -> bool:
    """Return whether the residuals of a request's ControlNets are more than outputs of one that can be inputs of the UNet."""
    used = controls_of_kind("ControlNet", request, components)
    return len(used) > 1 or any(is_pooled(components[name]) for _, name in used)


def control_image(control: Control, size: tuple[int, int]) -> Array:
    """Return a control's image at `size`, float32 [3, H, W] in [0, 1], or -1 where it is masked, resized by Lanczos."""
    part = _fitted(control, control.pixels, size)
    if control.preprocess == CANNY:
        part = canny(part, control.low, control.high)
    elif control.preprocess is not None:
        part = PREPROCESSORS[control.preprocess](part)
    image: Array = np.ascontiguousarray(part.transpose(2, 0, 1)).astype(np.float32) / np.float32(255)
    if control.mask is not None:
        image = marked(image, _fitted(control, np.repeat(control.mask[..., None], 3, axis=2), size)[..., 0])
    return image


def _fitted(control: Control, pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Return pixels of a control at `size`. Raises SettingError for another size if the control allows none."""
    height, width = pixels.shape[:2]
    if control.fit == "exact" and (width, height) != size:
        wanted = f"{size[0]}x{size[1]}"
        raise SettingError(
            f"control: the image is {width}x{height}, but {wanted} is generated, and fit is exact: use crop or resize"
        )
    wide, high = size
    if control.fit == "crop":
        wider = size[0] / size[1] > width / height
        wide, high = (wide, height * wide // width) if wider else (width * high // height, high)
    resized = resample(pixels, (wide, high), "lanczos")
    left, top = wide // 2 - size[0] // 2, high // 2 - size[1] // 2
    return resized[top : top + size[1], left : left + size[0]]


def stretched_lines(request: Request, size: tuple[int, int]) -> Iterator[str]:
    """Yield a line for each control image whose proportions change."""
    for control in request.controls:
        height, width = control.pixels.shape[:2]
        if control.fit == "resize" and abs(width * size[1] / (height * size[0]) - 1) > 0.01:
            yield f"control: the image of {width}x{height} is stretched to {size[0]}x{size[1]}: fit crop keeps its proportions"


def guess_lines(request: Request, components: Components) -> Iterator[str]:
    """Yield a line if guess_mode has no ControlNet to act on."""
    if request.guess_mode and not controls_of_kind("ControlNet", request, components):
        yield "guess_mode has no effect on a T2I-Adapter"


def residuals(
    rows: Sequence[tuple[Job, Sequence[int]]],
    feeds: Mapping[str, Array],
    unet: ComponentSpec,
    engine: Callable[[str], Engine],
    describe: Callable[[int], str],
    bundle: Path | None,
) -> dict[str, Array]:
    """Return the UNet's optional inputs for the next model call of some jobs: the sums of their ControlNets' residuals.

    `rows`: each job, and the rows of `feeds` that it has in this call, the conditional one last. Empty if none is under control.
    Raises NotFinite.
    """
    uses: dict[str, list[tuple[int, ControlInput, Array]]] = {}  # by component: row, control, factors
    for job, indices in rows:
        for control in job.controls:
            factors = control.factors[job.run.step]
            if factors.any():
                chosen = indices[-1:] if control.conditional_only else indices
                uses.setdefault(control.component, []).extend((index, control, factors) for index in chosen)
    if not uses:
        return {}
    count, _, height, width = feeds["sample"].shape
    dims = {"batch": count, "height": height, "width": width}
    total = {tensor.name: np.zeros([size_of(dim, dims) for dim in tensor.shape], np.float32) for tensor in residuals_of(unet)}
    for name, entries in uses.items():
        net, at = engine(name), [row for row, _, _ in entries]
        own = {
            CONTROL_IMAGE: np.stack([control.image for _, control, _ in entries]),
            CONTROL_SCALES: np.stack([factors for _, _, factors in entries]),
        }
        if types := [control.type for _, control, _ in entries if control.type is not None]:
            own[CONTROL_TYPE] = np.stack(types)
        inputs = {
            tensor.name: own[tensor.name] if tensor.name in own else feeds[tensor.name][at] for tensor in net.component.inputs
        }
        outputs = checked_rows(net, inputs, lambda row, at=at: describe(at[row]), bundle)  # type: ignore[misc]
        for tensor, values in total.items():
            for row, residual in zip(at, outputs[tensor], strict=True):
                values[row] += residual
    return total
