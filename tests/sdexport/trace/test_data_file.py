"""Safetensors read by header, data files written one tensor at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdexport.checkpoint.weights.names import match_weights
from sdexport.checkpoint.weights.safetensors import read_header, with_scales
from sdexport.errors import ExportError, PrecisionError
from sdexport.precision.numbers import in_precision
from sdexport.trace.data_file import write_data
from sdruntime.adapters.safetensors import LONGEST_HEADER, MOST_TENSORS


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16), "c": np.ones((), np.float64)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_come_as_they_were_written(stored: Path) -> None:
    tensors = read_header(stored)
    np.testing.assert_array_equal(tensors["a"].read(), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert tensors["b"].read().dtype == np.float16
    assert tensors["c"].read().shape == ()


def test_bfloat16_is_read(tmp_path: Path) -> None:
    bits = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    path = raw(tmp_path / "w.safetensors", {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, bits.tobytes())
    np.testing.assert_array_equal(read_header(path)["x"].read().astype(np.float32), [1.5, -2.0])


@pytest.mark.parametrize("keep", [0, 5, 8, 20, -1])
def test_a_file_that_was_cut_off_is_told(stored: Path, keep: int) -> None:
    stored.write_bytes(stored.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"not a whole safetensors file|cut off|damaged"):
        read_header(stored)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"\xff\xfe",
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1]}},
        {"x": 3},
    ],
)
def test_a_damaged_header_is_told(tmp_path: Path, header: object) -> None:
    with pytest.raises(ValueError, match="damaged"):
        read_header(raw(tmp_path / "w.safetensors", header, b"\0" * 4))


def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_header(path)


def test_former_names_are_found(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    names = ["text_model.final.weight", "mid.attentions.0.query.weight", "mid.attentions.0.proj_attn.bias", "bare.weight"]
    save_file({name: np.zeros(2, np.float32) for name in names}, path)
    wanted = ["final.weight", "mid.attentions.0.to_q.weight", "mid.attentions.0.to_out.0.bias", "text_model.bare.weight"]
    found = match_weights(dict.fromkeys(wanted, (2,)), read_header(path), where="test")
    assert [tensor.offset for tensor in found.values()] == [read_header(path)[name].offset for name in names]


def test_every_weight_that_does_not_fit_is_named(stored: Path) -> None:
    with pytest.raises(ExportError) as caught:
        match_weights({"a": (3, 2), "b": (5,), "z": (1,)}, read_header(stored), where="unet")
    assert "a is [2, 3], but config.json requires [3, 2]" in str(caught.value)
    assert "z is missing" in str(caught.value)


def test_equal_weights_are_stored_once_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    large = np.arange(1 << 19, dtype=np.float32)
    save_file(
        {"one": np.ones(3, np.float32), "same": np.ones(3, np.float32), "large": large, "end": np.zeros(1, np.float32)}, path
    )
    weights = dict(sorted(read_header(path).items(), reverse=True))
    file = io.BytesIO()
    places = {name: place for name, place, _ in write_data(file, weights, dict.fromkeys(weights, "fp32"))}
    assert places["one"] == places["same"]
    assert places["large"].offset % 4096 == 0
    assert all(place.offset % 64 == 0 for place in places.values())
    written = np.frombuffer(file.getvalue()[places["large"].offset :][: places["large"].size], np.float32)
    np.testing.assert_array_equal(written, large)


def test_numbers_beyond_fp16_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(
        {"good": np.ones(3, np.float32), "bad": np.array([1, -7e4, 1e5], np.float32), "nan": np.array([np.nan], np.float32)}, path
    )
    weights = read_header(path)
    with pytest.raises(PrecisionError) as caught:
        list(write_data(io.BytesIO(), weights, dict.fromkeys(weights, "fp16")))
    assert len(caught.value.faults) == 2
    assert any(fault.startswith("bad: 2 of 3 numbers are beyond 65504 (the largest is 100000)") for fault in caught.value.faults)
    assert any(fault.startswith("nan: 1 of 1 numbers are not finite") for fault in caught.value.faults)


def test_rounding_is_to_the_nearest() -> None:
    numbers = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    half, fault = in_precision(numbers, "fp16")
    assert fault is None
    np.testing.assert_allclose(half.astype(np.float32), numbers, rtol=2**-11, atol=2**-25)
    brain, _ = in_precision(numbers, "bf16")
    np.testing.assert_allclose(brain.astype(np.float32), numbers, rtol=2**-8)


@pytest.mark.parametrize(
    ("dtype", "torch_name"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")], ids=["e4m3", "e5m2"]
)
def test_every_float8_value_is_read_as_torch_reads_it(tmp_path: Path, dtype: str, torch_name: str) -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    header = {"x": {"dtype": dtype, "shape": [256], "data_offsets": [0, 256]}}
    values = read_header(raw(tmp_path / "w.safetensors", header, codes.tobytes()))["x"].read()
    expected = torch.from_numpy(codes.copy()).view(getattr(torch, torch_name)).to(torch.float32).numpy()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32) & 0x7FC00000, expected.view(np.uint32) & 0x7FC00000)
    np.testing.assert_array_equal(values, expected)


def eight_bits(folder: Path, **companions: tuple[str, list[int], bytes]) -> Path:
    """A float8 weight `x.weight` of [1, 2, -1.5] beside other tensors (dtype, shape, data)."""
    entries = {"x.weight": ("F8_E4M3", [3], np.array([1, 2, -1.5], ml_dtypes.float8_e4m3fn).tobytes()), **companions}
    header, data = {}, b""
    for name, (dtype, shape, part) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    return raw(folder / "w.safetensors", header, data)


HALF = np.array(0.5, np.float32).tobytes()


@pytest.mark.parametrize("shape", [[], [1], [1, 1]])
def test_a_scale_weight_multiplies_its_float8_weight(tmp_path: Path, shape: list[int]) -> None:
    path = eight_bits(
        tmp_path,
        **{"x.scale_weight": ("F32", shape, HALF), "x.scale_input": ("F32", shape, HALF), "scaled_fp8": ("F8_E4M3", [0], b"")},
    )
    matched = match_weights({"x.weight": (3,)}, with_scales(read_header(path)), where="test")
    np.testing.assert_array_equal(matched["x.weight"].read(), np.array([0.5, 1, -0.75], np.float32))


@pytest.mark.parametrize(
    ("name", "companion"),
    [
        ("x.scale_weight", ("F32", [2], HALF * 2)),
        ("x.scale_weight", ("U8", [], b"\1")),
        ("y.scale_weight", ("F32", [], HALF)),
        ("x.weight_scale", ("F32", [], HALF)),
        ("x.weight_scale_inv", ("F32", [1], HALF)),
    ],
)
def test_a_scale_of_another_layout_is_refused_by_name(tmp_path: Path, name: str, companion: tuple[str, list[int], bytes]) -> None:
    path = eight_bits(tmp_path, **{name: companion})
    with pytest.raises(ValueError, match=rf"{name}.*supported"):
        with_scales(read_header(path))


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E8M0", "F8_E4M3FNUZ"])
def test_a_quantised_file_is_whole_and_not_supported(tmp_path: Path, dtype: str) -> None:
    path = raw(tmp_path / "w.safetensors", {"x": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4)
    with pytest.raises(ExportError, match=f"x is stored as {dtype}: quantised weights are not supported"):
        match_weights({"x": (4,)}, read_header(path), where="unet")


def entry(first: object, last: object, shape: object = (1,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({"x": entry(0, 4), "y": entry(0, 4)}, "y: overlaps"),
        ({"x": entry(0, 4), "y": entry(2, 6)}, "y: overlaps"),
        ({"x": entry(0, 4), "y": entry(8, 12)}, "y: leaves a gap"),
        ({"x": entry(4, 8)}, "x: leaves a gap"),
        (b'{"x": 1, "x": 2}', "'x' appears twice"),
        ({"x": entry(0.0, 4.0)}, "data_offsets"),
        ({"x": entry(0, 4, [1.0])}, "shape"),
        ({"x": entry(0, 4, [float("inf")])}, "shape"),
        ({"x": entry(0, 4, [True])}, "shape"),
        ({"x": entry(0, 4, [-1, -1])}, "shape"),
        ({"x": entry(0, 4, [1] * 9)}, "shape"),
        ({"x": entry(0, 0, [1 << 60, 0])}, "shape"),
        ({"x": entry(0, 4, "1")}, "shape"),
        ({"x": entry(0, 4, [1], ["F32"])}, "dtype"),
        ({"x": entry(0, 4) | {"more": 1}}, "expected dtype, shape and data_offsets"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"x":' * 100_000, "nested too deeply"),
        (b'{"x": {"dtype": "F32", "shape": [' + b"1" * 5000 + b'], "data_offsets": [0, 4]}}', "damaged"),
    ],
)
def test_a_hostile_header_is_told(tmp_path: Path, header: object, named: str) -> None:
    with pytest.raises(ValueError, match=f"damaged.*{named}|{named}"):
        read_header(raw(tmp_path / "w.safetensors", header, b"\0" * 12))


def test_more_tensors_than_any_network_has_are_not_read(tmp_path: Path) -> None:
    header = {f"x{k}": entry(0, 0, [0]) for k in range(MOST_TENSORS + 1)}
    with pytest.raises(ValueError, match="50,001 tensors, more than the 50,000 that are read"):
        read_header(raw(tmp_path / "w.safetensors", header))
    path = raw(tmp_path / "long.safetensors", b" " * (LONGEST_HEADER + 1))
    with pytest.raises(ValueError, match="more than the 16,777,216 that are read"):
        read_header(path)
