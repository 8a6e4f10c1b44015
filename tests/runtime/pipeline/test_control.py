"""ControlNets beside a UNet: what a request gives them, which rows they act on, and how their residuals add up."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdruntime.arrays import Array
from sdruntime.bundle.interface import CONTROL_IMAGE, CONTROL_SCALES, CONTROL_TYPE
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec, TensorSpec
from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.control import component_of, control_inputs, residuals, stretched_lines
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.request import Request

CALLS = 4
IMAGE = np.full((16, 16, 3), 51, np.uint8)


def tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


LATENTS = (tensor("sample", "batch", 4, "height", "width"), tensor("timestep", "batch"))
RESIDUALS = (tensor("down_block_0", "batch", 2, "height", "width"), tensor("mid_block", "batch", 3, "height/2", "width/2"))
OUT = (tensor("out_sample", "batch", 4, "height", "width"),)
UNET = ComponentSpec(files=("unet/model.onnx",), config="", inputs=LATENTS, outputs=OUT, optional_inputs=RESIDUALS)


def component(*outputs: TensorSpec, types: int | None = None) -> ComponentSpec:
    own = [tensor(CONTROL_IMAGE, "batch", 3, "height*8", "width*8"), tensor(CONTROL_SCALES, "batch", 2)]
    own += [] if types is None else [tensor(CONTROL_TYPE, "batch", types)]
    return ComponentSpec(files=("net/model.onnx",), config="", inputs=(*LATENTS, *own), outputs=outputs)


PLAIN, POOLED = component(*RESIDUALS), component(*(tensor(each.name, *each.shape[:2], 1, 1) for each in RESIDUALS))
COMPONENTS = {"unet": UNET, "controlnet_canny": PLAIN, "controlnet_shuffle": POOLED}


class Net:
    """A ControlNet whose residuals are its image's mean and its row's timestep, times their factors."""

    def __init__(self, spec: ComponentSpec) -> None:
        profile = dict.fromkeys(spec.dimensions, (1, 1, 64))
        files = {"backend": "fake", "version": "1", "target": "cpu", "precision": "fp32", "files": ("engine",)}
        self.component, self.rows = spec, list[int]()
        self.spec = EngineSpec(component="controlnet", profiles=(profile,), **files)  # type: ignore[arg-type]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        assert set(feeds) == {spec.name for spec in self.component.inputs}
        count, _, height, width = feeds["sample"].shape
        self.rows.append(count)
        values = feeds[CONTROL_IMAGE].mean(axis=(1, 2, 3)) + feeds["timestep"]
        sides = {2: (height, width), 3: (height // 2, width // 2)}
        return {
            spec.name: np.broadcast_to(
                (values * feeds[CONTROL_SCALES][:, k])[:, None, None, None],
                (count, int(spec.shape[1]), *((1, 1) if spec.shape[2] == 1 else sides[int(spec.shape[1])])),
            ).astype(np.float32)
            for k, spec in enumerate(self.component.outputs)
        }


def request(*controls: Control, **settings: Any) -> Request:
    return Request(prompt="", control=controls, **settings)


def added(rows: list[tuple[Any, list[int]]], count: int) -> tuple[dict[str, Array], dict[str, Net]]:
    nets = {name: Net(spec) for name, spec in COMPONENTS.items() if name != "unet"}
    feeds = {"sample": np.zeros((count, 4, 2, 4), np.float32), "timestep": np.arange(count, dtype=np.float32)}
    return residuals(rows, feeds, UNET, nets.__getitem__, str, None), nets  # type: ignore[arg-type]


def job(*controls: Control, step: int = 0, **settings: Any) -> Any:
    inputs = control_inputs(request(*controls, **settings), (16, 16), CALLS, COMPONENTS)
    return SimpleNamespace(controls=inputs, run=SimpleNamespace(step=step))


def test_factors_follow_scale_window_and_guess_mode() -> None:
    control = Control(image=IMAGE, net="canny", scale=0.5, start=0.25, end=0.75)
    (plain,) = control_inputs(request(control), (16, 16), CALLS, COMPONENTS)
    assert plain.factors.tolist() == [[0, 0], [0.5, 0.5], [0.5, 0.5], [0, 0]]
    assert not plain.conditional_only
    np.testing.assert_allclose(plain.image, 0.2, rtol=1e-6)
    (guessed,) = control_inputs(request(control, guess_mode=True), (16, 16), CALLS, COMPONENTS)
    np.testing.assert_allclose(guessed.factors[1], [0.05, 0.5], rtol=1e-6)
    assert guessed.conditional_only
    (pooled,) = control_inputs(request(Control(image=IMAGE, net="shuffle"), guess_mode=True), (16, 16), CALLS, COMPONENTS)
    assert pooled.factors.tolist() == [[1, 1]] * CALLS  # as diffusers: pooled residuals are not weighed by their place
    assert pooled.conditional_only


def test_residuals_of_several_jobs_and_nets_add_up_and_other_rows_are_zeros() -> None:
    both = job(Control(image=IMAGE, net="canny"), Control(image=IMAGE, net="shuffle", scale=2.0))
    twice = job(Control(image=IMAGE, net="canny"), Control(image=IMAGE, net="canny", scale=3.0))
    none = job()
    total, nets = added([(both, [0, 2]), (twice, [1, 3]), (none, [4])], 5)
    assert nets["controlnet_canny"].rows == [6]  # both rows of both jobs, once more for the second image
    assert nets["controlnet_shuffle"].rows == [1]
    expected = np.array([0.2, 4 * 1.2, 2.2 + 2 * 2.2, 4 * 3.2, 0], np.float32)
    assert {name: array.shape for name, array in total.items()} == {"down_block_0": (5, 2, 2, 4), "mid_block": (5, 3, 1, 2)}
    for array in total.values():
        np.testing.assert_allclose(array, np.broadcast_to(expected[:, None, None, None], array.shape), rtol=1e-6)


def test_without_an_acting_control_nothing_is_called() -> None:
    late = job(Control(image=IMAGE, net="canny", start=0.5))
    total, nets = added([(late, [0, 1]), (job(), [2])], 3)
    assert total == {}
    assert nets["controlnet_canny"].rows == []


def test_an_image_is_resized_or_cropped_and_a_stretched_one_is_named() -> None:
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 8:24] = 255
    for fit, mean in (("resize", 0.5), ("crop", 1.0)):
        control = Control(image=image, net="canny", fit=fit)  # type: ignore[arg-type]
        (made,) = control_inputs(request(control), (16, 16), CALLS, COMPONENTS)
        assert made.image.shape == (3, 16, 16)
        assert abs(float(made.image.mean()) - mean) < 0.02
    lines = list(stretched_lines(request(Control(image=image), Control(image=IMAGE)), (16, 16)))
    assert lines == ["control: the image of 32x16 is stretched to 16x16: fit crop keeps its proportions"]


def test_a_union_needs_the_type_of_the_image() -> None:
    components = COMPONENTS | {"controlnet_union": component(*RESIDUALS, types=3)}

    def inputs(**settings: Any) -> Any:
        (made,) = control_inputs(request(Control(image=IMAGE, **settings)), (16, 16), CALLS, components)
        return made

    assert inputs(net="union", type=2).type.tolist() == [0, 0, 1]
    assert inputs(net="canny").type is None
    with pytest.raises(SettingError, match=r"control: controlnet_union needs the type of the image: give it as type, 0 to 2"):
        inputs(net="union")
    with pytest.raises(SettingError, match="control: controlnet_union has no type 3: give it as type, 0 to 2"):
        inputs(net="union", type=3)
    with pytest.raises(SettingError, match="control: type 1, but controlnet_canny reads images of one type: omit it"):
        inputs(net="canny", type=1)


def test_an_exact_fit_refuses_another_size() -> None:
    control_inputs(request(Control(image=IMAGE, net="canny", fit="exact")), (16, 16), CALLS, COMPONENTS)
    with pytest.raises(SettingError, match="control: the image is 16x16, but 24x16 is generated, and fit is exact"):
        control_inputs(request(Control(image=IMAGE, net="canny", fit="exact")), (24, 16), CALLS, COMPONENTS)


def test_maps_are_made_at_the_size_that_is_generated() -> None:
    """Of an inpainting net, the masked pixels are -1 at that size, as diffusers' make_inpaint_condition has them."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 35
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255

    def pixels(**settings: Any) -> Array:
        control = Control(image=image, net="canny", **settings)
        (made,) = control_inputs(request(control), (16, 16), CALLS, COMPONENTS)
        return made.image

    plain = pixels()
    assert np.array_equal(pixels(preprocess="tile"), plain)
    assert np.array_equal(pixels(preprocess="resize"), plain)
    painted = pixels(preprocess="inpaint", mask=mask)
    assert (painted[:, :, 8:] == -1).all()
    assert np.array_equal(painted[:, :, :8], plain[:, :, :8])
    assert not pixels(preprocess="canny").any()
    assert pixels(preprocess="canny", low=10, high=20).any()


def test_the_name_of_a_net_may_be_omitted_if_it_is_the_only_one() -> None:
    assert component_of(Control(image=IMAGE), {"controlnet": PLAIN}) == "controlnet"
    assert component_of(Control(image=IMAGE, net="canny"), COMPONENTS) == "controlnet_canny"
    with pytest.raises(SettingError, match=r"which ControlNet\? Give its name as net \(net=\): canny, shuffle"):
        component_of(Control(image=IMAGE), COMPONENTS)
    with pytest.raises(UnknownName, match="canny"):
        component_of(Control(image=IMAGE, net="cany"), COMPONENTS)
    with pytest.raises(
        SettingError, match="no ControlNet and no T2I-Adapter: export it again with --controlnet MODEL or --t2i-adapter MODEL"
    ):
        component_of(Control(image=IMAGE), {"unet": UNET})
