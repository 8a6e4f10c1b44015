"""Engines with other weights: every backend that takes them makes the same of a LoRA, and the engine without is not touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import loras
import numpy as np
import pytest
from places import FIXTURE

from sdruntime.adapters.file import AdapterFile
from sdruntime.adapters.sets import AdapterSet, fit
from sdruntime.backends.onnx_file.stored import lending_weights, stored_as, weight_tensors
from sdruntime.backends.ov.replacing import replace_weights
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.adapted import MergedWeights
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.pipeline import Pipeline

pytest.importorskip("safetensors")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("both") / "bundle"))
    for name in ("onnxruntime", "openvino"):
        request = BuildRequest(backend=name, size="64x64", batch="1", guidance="on")
        for _ in build_engines(folder, request):
            pass
    return Bundle.open(folder)


def test_backends_agree_on_every_kind_of_weight(bundle: Bundle, tmp_path: Path) -> None:
    shapes = {"unet": {name: each.shape for name, each in weight_tensors(bundle, "unet").items()}}
    tensors = loras.full(shapes, wanted=loras.everything)
    norms = {name: shape for name, shape in shapes["unet"].items() if "norm" in name and name.endswith(".weight")}
    for name, shape in norms.items():
        stem = loras.kohya_stem("unet", name.removesuffix(".weight"), two=False)
        tensors |= {f"{stem}.w_norm": np.full(shape, 0.1), f"{stem}.b_norm": np.full(shape, 0.1)}
    file = AdapterFile.open(loras.write(tmp_path / "all.safetensors", tensors))
    adapters = AdapterSet.of([(fit(file, shapes, "model"), 0.7, 0.7)])
    assert adapters.weights("unet").keys() == shapes["unet"].keys()  # also the upsampling convolutions
    unet = bundle.manifest.components["unet"]
    random = np.random.default_rng(0)
    sizes = {"batch": 2, "height": 8, "width": 8, "sequence": 77}
    feeds = {
        tensor.name: random.standard_normal([sizes[d] if isinstance(d, str) else d for d in tensor.shape]).astype(np.float32)
        for tensor in unet.inputs
    }
    dims = {name: size for name, size in sizes.items() if name != "batch"}
    outputs = {}
    for backend in ("onnxruntime", "openvino"):
        with Pipeline.open(bundle, backend=backend) as pipe:
            plain = pipe.engines.engine("unet", rows=2, **dims)
            before = plain(feeds)["out_sample"].copy()
            changed = pipe.engines.engine("unet", rows=2, adapters=adapters, **dims)
            outputs[backend] = changed(feeds)["out_sample"].copy()
            assert np.array_equal(plain(feeds)["out_sample"], before)
            assert np.abs(outputs[backend] - before).max() > 0.1 * np.abs(before).max()
    ours, other = outputs.values()
    assert np.abs(ours - other).max() <= 1e-2 * np.abs(other).max()  # half precision


def test_openvino_names_weights_that_its_model_lacks(bundle: Bundle, tmp_path: Path) -> None:
    import openvino as ov

    shapes = {"unet": {name: each.shape for name, each in weight_tensors(bundle, "unet").items()}}
    file = AdapterFile.open(loras.write(tmp_path / "a.safetensors", loras.kohya(shapes)))
    merged = MergedWeights(bundle, "unet", AdapterSet.of([(fit(file, shapes, "model"), 1.0, 1.0)]))
    empty = ov.Model([ov.op.Result(ov.opset13.constant(np.ones(1)).output(0))], [], "empty")
    with pytest.raises(ValueError, match=r"weights are not in the engine under their names: down_blocks.* and \d+ more: build"):
        replace_weights(ov, empty, merged)


@pytest.mark.parametrize("kind", [1, 10, 16])
def test_numbers_as_they_are_stored(kind: int) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numbers = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    dtype = {1: np.float32, 10: np.float16, 16: ml_dtypes.bfloat16}[kind]
    stored = stored_as(numbers, kind, np.dtype(np.uint16) if kind == 16 else np.dtype(dtype))
    assert np.array_equal(stored.view(dtype), numbers.astype(dtype))
    if kind == 10:
        with pytest.raises(ValueError, match="beyond 65504"):
            stored_as(np.full(1, 1e6, np.float32), kind, np.dtype(np.float16))


def test_weights_are_read_as_float32(bundle: Bundle) -> None:
    with lending_weights(bundle, "unet") as read:
        weight = read("conv_in.weight")
    assert (weight.dtype, weight.shape) == (np.float32, weight_tensors(bundle, "unet")["conv_in.weight"].shape)
    assert weight.std() > 0
