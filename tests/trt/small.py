"""A bundle made by hand whose images take a millisecond: each component is a few nodes, and the loop can stay on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from trt import networks

from sdexport.trace.sampler_step import write_step
from sdruntime.bundle.bundle import Bundle, write_bundle
from sdruntime.bundle.manifest import TensorSpec

_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
_WIDE = np.linspace(-1, 1, 8, dtype=np.float32)


RESIDUAL = TensorSpec(name="residual", dtype="float32", shape=("batch", 4, "height/2", "width/2"))


def small_bundle(folder: Path, *, residual: bool = False) -> Bundle:
    """`bundles.make_bundle` with networks that can be run, and the component `step`. Only the VAE's encoder is empty.

    `residual`: the UNet has an optional input, RESIDUAL, whose means it adds.
    """
    made = bundles.make_bundle(folder)
    components = dict(made.manifest.components) | {"step": write_step(folder)}
    networks.decoder(folder / "vae_decoder" / "model.onnx")
    _text_encoder(folder / "text_encoder" / "model.onnx")
    _unet(folder / "unet" / "model.onnx", RESIDUAL if residual else None)
    if residual:
        components["unet"] = dataclasses.replace(components["unet"], optional_inputs=(RESIDUAL,))
    write_bundle(folder, model=made.manifest.model, precision="fp32", components=components, provenance={"made": "by hand"})
    return Bundle.open(folder)


def _text_encoder(path: Path) -> None:
    """Each token as a small number, in eight sizes."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["tokens"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["tokens", "last"], ["column"]),
        helper.make_node("Mul", ["column", "wide"], ["last_hidden_state"]),
    ]
    _write(path, "text_encoder", nodes, last=np.array([2], np.int64), wide=_WIDE / 500)


def _unet(path: Path, residual: TensorSpec | None) -> None:
    """The text's mean, and a little of the latents and of the time."""
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["mean"]),  # [batch, 1, 1]
        helper.make_node("Unsqueeze", ["mean", "last"], ["text"]),
        helper.make_node("Mul", ["sample", "part"], ["some"]),
        helper.make_node("Add", ["some", "text"], ["noise"]),
        helper.make_node("Unsqueeze", ["timestep", "axes_of_time"], ["column"]),
        helper.make_node("Mul", ["column", "slow"], ["time"]),
        helper.make_node("Add", ["noise", "time"], ["out_sample" if residual is None else "plain"]),
    ]
    if residual is not None:
        nodes += [
            helper.make_node("ReduceMean", [residual.name, "sides"], ["more"]),
            helper.make_node("Add", ["plain", "more"], ["out_sample"]),
        ]
    _write(
        path,
        "unet",
        nodes,
        () if residual is None else (residual,),
        sides=np.array([2, 3], np.int64),
        axes=np.array([1, 2], np.int64),
        last=np.array([3], np.int64),
        axes_of_time=np.array([1, 2, 3], np.int64),
        part=np.array([0.5], np.float32),
        slow=np.array([1e-4], np.float32),
    )


def _write(path: Path, component: str, nodes: list[Any], more: Sequence[TensorSpec] = (), **weights: np.ndarray) -> None:
    inputs, outputs = bundles.TENSORS[component]
    initializers = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, component, list(map(_value, (*inputs, *more))), list(map(_value, outputs)), initializers)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def _value(spec: TensorSpec) -> Any:
    return helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], spec.shape)
