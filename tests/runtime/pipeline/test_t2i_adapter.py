"""T2I-Adapters: which image they read, how their features add up, and at which calls they change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdruntime.arrays import Array
from sdruntime.bundle.interface import CONTROL_IMAGE
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec, TensorSpec
from sdruntime.errors import SettingError
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.tasks.t2i_adapter import check_adapters, features_by_step

SIZE, CALLS = (32, 16), 10


def tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def adapter(channels: int) -> ComponentSpec:
    image = tensor(CONTROL_IMAGE, "batch", channels, "height", "width")
    return ComponentSpec(
        files=("a/model.onnx",), config="", inputs=(image,), outputs=(tensor("feature_0", "batch", 2, "height/8", "width/8"),)
    )


COMPONENTS = {"t2i_adapter_pose": adapter(3), "t2i_adapter_sketch": adapter(1)}


class Net:
    """An adapter whose feature is the mean of its image, and twice that."""

    def __init__(self, name: str) -> None:
        self.component = COMPONENTS[name]
        files = {"backend": "fake", "version": "1", "target": "cpu", "precision": "fp32", "files": ("engine",)}
        profile = dict.fromkeys(self.component.dimensions, (1, 1, 64))
        self.spec = EngineSpec(component=name, profiles=(profile,), **files)  # type: ignore[arg-type]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        image = feeds[CONTROL_IMAGE]
        assert image.shape == (1, self.component.inputs[0].shape[1], SIZE[1], SIZE[0])
        factors = np.array([1, 2], np.float32)[None, :, None, None]
        return {"feature_0": np.broadcast_to(image.mean() * factors, (1, 2, 2, 4)).astype(np.float32)}


def control(net: str, level: int, **settings: Any) -> Control:
    return Control(image=np.full((16, 32, 3), level, np.uint8), net=net, **settings)


def features(*controls: Control) -> dict[int, dict[str, Array]]:
    return features_by_step(Request(prompt="p", control=controls), SIZE, CALLS, COMPONENTS, lambda name, **_: Net(name), Path())


def test_features_change_where_an_adapter_begins_and_ends_to_act() -> None:
    steps = features(control("pose", 51, scale=0.5, end=0.5), control("sketch", 102, start=0.3, end=0.8))
    assert {step: round(float(values["feature_0"][0, 0, 0]), 5) for step, values in steps.items()} == {
        0: 0.1,
        3: 0.5,
        5: 0.4,
        8: 0.0,
    }
    assert all(np.allclose(values["feature_0"][1], 2 * values["feature_0"][0]) for values in steps.values())


def test_a_gray_adapter_reads_pillow_s_gray() -> None:
    image = np.zeros((16, 32, 3), np.uint8)
    image[..., 0] = 200
    [values] = features(Control(image=image, net="sketch")).values()
    assert values["feature_0"][0, 0, 0] == pytest.approx(60 / 255, abs=1e-6)  # 0.299 of the red


def test_a_request_without_adapters_has_no_features() -> None:
    assert features() == {0: {}}


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({}, (32, 20), "pose takes images whose sides are multiples of 8; 32x20 is generated"),
        ({"type": 1}, SIZE, "type 1, but t2i_adapter_pose reads images of one type: omit it"),
    ],
)
def test_what_an_adapter_refuses(settings: dict[str, Any], size: tuple[int, int], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_adapters(Request(prompt="p", control=control("pose", 0, **settings)), size, COMPONENTS)
