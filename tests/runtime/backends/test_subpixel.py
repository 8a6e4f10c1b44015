"""Upsampling and a convolution as four small convolutions: the same numbers, found where it is and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sdruntime.arrays import Array
from sdruntime.backends.ort.subpixel import split_upsampling

onnx = pytest.importorskip("onnx")
CHANNELS, MADE = 4, 6
Run = Callable[[bytes, Array], Array]
RESIZE: dict[str, Any] = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CONVOLUTION: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def upsampling(
    *,
    bias: bool = True,
    scales: tuple[float, ...] = (1, 1, 2, 2),
    outputs: tuple[str, ...] = ("y",),
    dtype: type[np.generic] = np.float32,
    resize: dict[str, Any] | None = None,
    **convolution: Any,
) -> bytes:
    """y = convolution(upsampled x), x [batch, 4, height, width]."""
    random, make, of = np.random.default_rng(0), onnx.helper, onnx.numpy_helper.from_array
    attributes = {"strides": [1, 1], "dilations": [1, 1], "group": 1, "auto_pad": "NOTSET"} | CONVOLUTION | convolution
    kernel = random.standard_normal((MADE, CHANNELS // attributes["group"], *attributes["kernel_shape"])).astype(dtype)
    constants = [of(kernel, "w"), of(np.array(scales, np.float32), "scales")]
    constants += [of(random.standard_normal(MADE).astype(dtype), "b")] if bias else []
    graph = make.make_graph(
        [
            make.make_node("Resize", ["x", "", "scales"], ["large"], **(RESIZE | (resize or {}))),
            make.make_node("Conv", ["large", "w", *(["b"] if bias else [])], ["y"], **attributes),
        ],
        "upsampling",
        [
            make.make_tensor_value_info(
                "x", make.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["batch", CHANNELS, "height", "width"]
            )
        ],
        [make.make_tensor_value_info(name, make.np_dtype_to_tensor_dtype(np.dtype(dtype)), None) for name in outputs],
        constants,
    )
    model: bytes = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10).SerializeToString()
    return model


def cropped(*, bias: bool = True, starts: tuple[int, int] = (0, 0), axes: tuple[int, int] = (2, 3)) -> bytes:
    """y = convolution(upsampled x, cropped to the size of the input "like")."""
    model, make = onnx.load_from_string(upsampling(bias=bias)), onnx.helper
    resize, conv = model.graph.node
    conv.input[0] = "cropped"
    crop = [
        make.make_node("Shape", ["like"], ["ends"], start=2, end=4),
        make.make_node("Slice", ["large", "starts", "ends", "axes", "steps"], ["cropped"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend([resize, *crop, conv])
    model.graph.input.append(make.make_tensor_value_info("like", onnx.TensorProto.FLOAT, [1, 1, "rows", "columns"]))
    for name, numbers in (("starts", starts), ("axes", axes), ("steps", (1, 1))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers, np.int64), name))
    return bytes(model.SerializeToString())


SIZES = [(2, 2), (4, 6), (3, 6), (4, 5), (3, 5), (1, 2), (1, 1), (9, 7)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_cropped_image_meets_the_padding_at_its_own_edge(bias: bool) -> None:
    plain = cropped(bias=bias)
    split = split_upsampling(memoryview(plain))
    assert b"DepthToSpace" in split
    assert split_upsampling(memoryview(split)) == split
    for height, width in SIZES:
        feeds = {"x": image(-(-height // 2), -(-width // 2)), "like": np.zeros((1, 1, height, width), np.float32)}
        expected = in_onnxruntime(plain, **feeds)
        assert expected.shape == (3, MADE, height, width)
        for made in (in_onnxruntime(split, **feeds), in_openvino(plain, **feeds)):
            assert np.abs(made - expected).max() < 1e-5 * np.abs(expected).max()


def test_another_crop_stays_as_it_is() -> None:
    for plain in (cropped(starts=(1, 0)), cropped(axes=(3, 2))):
        assert split_upsampling(memoryview(plain)) == plain


def in_onnxruntime(model: bytes, x: Array, **more: Array) -> Array:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    made: Array = session.run(["y"], {"x": x, **more})[0]
    return made


def in_openvino(model: bytes, x: Array, *, split: bool = True, **more: Array) -> Array:
    ov = pytest.importorskip("openvino")
    from sdruntime.backends.ov.subpixel import split_upsampling

    network = ov.Core().read_model(model, b"")
    assert split_upsampling(ov, network) == split if split else True
    compiled = ov.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made: Array = compiled({"x": x, **more})[0]
    return made


def image(height: int, width: int) -> Array:
    return np.random.default_rng(1).standard_normal((3, CHANNELS, height, width)).astype(np.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (5, 3)])
def test_the_numbers_are_those_of_the_two(bias: bool, height: int, width: int) -> None:
    plain, x = upsampling(bias=bias), image(height, width)
    split = split_upsampling(memoryview(plain))
    assert b"Resize" not in split
    assert b"DepthToSpace" in split
    expected = in_onnxruntime(plain, x)
    assert expected.shape == (3, MADE, 2 * height, 2 * width)
    for made in (in_onnxruntime(split, x), in_openvino(plain, x)):
        assert np.abs(made - expected).max() < 1e-5 * np.abs(expected).max()
    assert split_upsampling(memoryview(split)) == split


def test_by_hand_one_pixel_becomes_four_sums_of_a_kernels_weights() -> None:
    """Around a single pixel there are zeros: each of the four pixels made meets it with four of the nine weights."""
    model = onnx.load_from_string(upsampling(bias=False))
    kernel = onnx.numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == "w"))
    x = np.zeros((1, CHANNELS, 1, 1), np.float32)
    x[0, 0] = 1
    made = in_onnxruntime(split_upsampling(memoryview(model.SerializeToString())), x)
    for row in (0, 1):
        for column in (0, 1):
            seen = kernel[:, 0, 1 - row : 3 - row, 1 - column : 3 - column].sum((1, 2))
            assert np.allclose(made[0, :, row, column], seen, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"resize": {"mode": "linear"}},
        {"resize": {"coordinate_transformation_mode": "half_pixel"}},
        {"resize": {"nearest_mode": "ceil"}},
        {"scales": (1, 1, 3, 3)},
        {"scales": (1, 1, 2, 1)},
        {"pads": [0, 0, 0, 0]},
        {"pads": [0, 0, 1, 1]},
        {"strides": [2, 2]},
        {"dilations": [2, 2]},
        {"group": 2},
        {"kernel_shape": [1, 1], "pads": [0, 0, 0, 0]},
        {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]},
    ],
    ids=str,
)
def test_others_stay_as_they_are(other: dict[str, Any]) -> None:
    plain = upsampling(**other)
    assert split_upsampling(memoryview(plain)) == plain
    ov = pytest.importorskip("openvino")
    from sdruntime.backends.ov.subpixel import split_upsampling as split_in_openvino

    assert split_in_openvino(ov, ov.Core().read_model(plain, b"")) == 0


def test_what_else_reads_the_upsampled_image_still_does() -> None:
    plain, x = upsampling(outputs=("y", "large")), image(3, 2)
    split = split_upsampling(memoryview(plain))
    assert b"DepthToSpace" in split
    assert b"Resize" in split
    assert np.abs(in_onnxruntime(split, x) - in_onnxruntime(plain, x)).max() < 1e-5


def test_in_openvino_weights_keep_their_type() -> None:
    """A bundle of fp16 has weights of float16: those of an engine are too, each sum of them rounded once."""
    ov = pytest.importorskip("openvino")
    from sdruntime.backends.ov.subpixel import split_upsampling as split_in_openvino

    plain = upsampling(dtype=np.float16)
    network, x = ov.Core().read_model(plain, b""), image(4, 4).astype(np.float16)
    assert split_in_openvino(ov, network) == 1
    kernels = [node for node in network.get_ops() if node.get_type_name() == "Constant" and list(node.shape)[2:] == [2, 2]]
    assert [node.get_element_type().get_type_name() for node in kernels] == ["f16"] * 4
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    made = ov.Core().compile_model(network, "CPU", hint)({"x": x})[0]
    expected = ov.Core().compile_model(ov.Core().read_model(plain, b""), "CPU", hint)({"x": x})[0]
    assert np.abs(made.astype(np.float32) - expected.astype(np.float32)).max() < 4e-3 * np.abs(expected).max()
