"""Tensors of an ONNX file that are in another file: the weights of the main graph alone, in files that the manifest lists."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import FIXTURE

from sdruntime.backends.onnx_file.external import external_tensors, locations
from sdruntime.backends.onnx_file.wire import delimited
from sdruntime.bundle.bundle import Bundle, file_spec
from sdruntime.bundle.manifest import save_manifest
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import BundleError

onnx = pytest.importorskip("onnx")
DATA = "model.onnx.data"


def tensor(location: str = DATA, **entries: object) -> Any:
    made = onnx.TensorProto(name="outside", data_type=1, dims=[4], data_location=1)
    for key, value in ({"location": location, "offset": 0, "length": 16} | entries).items():
        made.external_data.add(key=key, value=str(value))
    return made


def constant(location: str = DATA) -> Any:
    node = onnx.helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor(location))
    return node


def graph(*nodes: Any, initializer: Any = ()) -> Any:
    return onnx.helper.make_graph(list(nodes), "g", [], [], initializer=list(initializer))


def model(*nodes: Any, **parts: Any) -> Any:
    return onnx.helper.make_model(graph(*nodes, **parts))


def in_a_list() -> Any:
    node = onnx.helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="values", type=onnx.AttributeProto.TENSORS).tensors.append(tensor())
    return model(node)


def in_a_branch() -> Any:
    return model(onnx.helper.make_node("If", ["x"], ["y"], then_branch=graph(initializer=[tensor()]), else_branch=graph()))


def in_a_branch_of_a_list() -> Any:
    node = onnx.helper.make_node("Odd", ["x"], ["y"])
    node.attribute.add(name="bodies", type=onnx.AttributeProto.GRAPHS).graphs.append(graph(constant()))
    return model(node)


def in_a_branch_of_a_branch() -> Any:
    inner = onnx.helper.make_node("If", ["x"], ["y"], then_branch=graph(constant()), else_branch=graph())
    return model(onnx.helper.make_node("If", ["x"], ["y"], then_branch=graph(inner), else_branch=graph()))


def in_a_function() -> Any:
    made = model()
    made.functions.append(onnx.helper.make_function("d", "f", [], ["c"], [constant()], [onnx.helper.make_opsetid("", 20)]))
    return made


def in_a_functions_default() -> Any:
    made = model()
    made.functions.append(onnx.helper.make_function("d", "f", [], [], [], [onnx.helper.make_opsetid("", 20)]))
    made.functions[0].attribute_proto.add(name="a", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor())
    return made


def in_a_sparse_tensors_values() -> Any:
    made = model()
    made.graph.sparse_initializer.add(dims=[9]).values.CopyFrom(tensor())
    return made


def in_a_sparse_tensors_indices() -> Any:
    made = model()
    made.graph.sparse_initializer.add(dims=[9]).indices.CopyFrom(tensor())
    return made


def in_a_sparse_constant() -> Any:
    node = onnx.helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.values.CopyFrom(tensor())
    return model(node)


def in_sparse_tensors() -> Any:
    node = onnx.helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="many", type=onnx.AttributeProto.SPARSE_TENSORS).sparse_tensors.add().values.CopyFrom(tensor())
    return model(node)


def in_the_training() -> Any:
    made = model()
    made.training_info.add().algorithm.initializer.append(tensor())
    return made


def in_a_constant() -> Any:
    return model(constant())


ELSEWHERE = (
    in_a_constant,
    in_a_list,
    in_a_branch,
    in_a_branch_of_a_list,
    in_a_branch_of_a_branch,
    in_a_function,
    in_a_functions_default,
    in_a_sparse_tensors_values,
    in_a_sparse_tensors_indices,
    in_a_sparse_constant,
    in_sparse_tensors,
    in_the_training,
)


def read(made: Any) -> Any:
    return external_tensors(memoryview(made if isinstance(made, bytes) else made.SerializeToString()), [DATA])


def test_weights_of_the_main_graph_are_read() -> None:
    (found,) = read(model(initializer=[tensor(offset=64)]))
    assert (found.name, found.location, found.offset, found.length, found.shape) == ("outside", DATA, 64, 16, (4,))
    assert read(model(initializer=[onnx.numpy_helper.from_array(np.ones(3, np.float32), "inside")])) == []


@pytest.mark.parametrize("made", ELSEWHERE)
def test_a_tensor_elsewhere_may_not_be_in_another_file(made: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="its bytes are in another file"):
        read(made())


@pytest.mark.parametrize(
    "location",
    ["", "other.data", "../model.onnx.data", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "./model.onnx.data", "model.onnx.data/"],
)
def test_a_file_that_is_not_listed_is_refused(location: str) -> None:
    with pytest.raises(ValueError, match="which the manifest does not list"):
        read(model(initializer=[tensor(location)]))


def test_a_place_that_is_not_told_is_refused() -> None:
    for made in (onnx.TensorProto(data_type=1, dims=[4], data_location=1), onnx.TensorProto(data_type=1, dims=[4])):
        made.external_data.add(key="offset", value="0")
        with pytest.raises(ValueError, match="refers to ''"):
            read(model(initializer=[made]))


@pytest.mark.parametrize("entries", [{"offset": -1}, {"length": "1e3"}, {"offset": "9" * 5000}, {"length": 17}, {"offset": "٣"}])
def test_numbers_that_are_none_are_refused(entries: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"is not a number of bytes|but its shape"):
        read(model(initializer=[tensor(**entries)]))


def test_a_tensor_of_many_axes_is_refused_before_they_are_multiplied() -> None:
    made = tensor()
    made.dims.extend([2**62] * 300_000)  # a product of 18.6 million bits, quadratic
    with pytest.raises(ValueError, match="300,001 axes, above 64"):
        external_tensors(memoryview(model(initializer=[made]).SerializeToString()), [DATA])


def test_a_second_graph_a_deep_one_and_a_long_key_hide_nothing() -> None:
    """Protobuf merges messages that stand twice."""
    hidden = model().SerializeToString() + in_a_constant().SerializeToString()
    with pytest.raises(ValueError, match="its bytes are in another file"):
        read(hidden)
    deep = b""
    for _ in range(60):  # a graph in an attribute of a node of a graph
        deep = delimited(1, delimited(5, delimited(6, deep)))
    with pytest.raises(ValueError, match="more than 40 nested messages"):
        read(delimited(7, deep))
    with pytest.raises(ValueError, match="not a protobuf message"):
        read(b"\xba\x80\x80\x80\x80\x01\x00")


def test_data_files_are_named_from_the_models_folder() -> None:
    files = ["unet/model.onnx", "unet/model.onnx.data", "unet/more/a.data", "vae/model.onnx.data"]
    assert locations(files) == {"model.onnx.data": "unet/model.onnx.data", "more/a.data": "unet/more/a.data"}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt-rtx"])
def test_no_library_sees_a_model_that_refers_elsewhere(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed, with its hash, and the file that it refers to lies in the current folder, where ONNX Runtime would look."""
    pytest.importorskip(backend.replace("-", "_"))
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "bundle"))
    bundle = Bundle.open(folder)
    path = bundle.manifest.components["text_encoder"].onnx
    made = onnx.load(folder / path, load_external_data=False)
    made.graph.node.insert(0, constant("here.data"))
    (folder / path).write_bytes(made.SerializeToString())
    files = {**bundle.manifest.files, path: file_spec(folder / path)}
    save_manifest(folder, dataclasses.replace(bundle.manifest, files=files))
    (tmp_path / "here.data").write_bytes(bytes(16))
    monkeypatch.chdir(tmp_path)
    before = [engine.name for engine in Bundle.open(folder).manifest.engines]
    with pytest.raises(BundleError, match=rf"{path}: tensor 'outside': its bytes are in another file \('here.data'\)"):
        list(build_engines(folder, BuildRequest(backend=backend, size="64x64", components=("text_encoder",))))
    assert [engine.name for engine in Bundle.open(folder).manifest.engines] == before


def test_weights_in_bfloat16_are_read_as_their_bits() -> None:
    weights = tensor(length=8)
    weights.data_type = onnx.TensorProto.BFLOAT16
    (found,) = external_tensors(memoryview(model(initializer=[weights]).SerializeToString()), {DATA: f"unet/{DATA}"})
    assert (found.kind, found.dtype, found.length) == (16, np.uint16, 8)
