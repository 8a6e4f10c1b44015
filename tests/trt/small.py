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
from sdruntime.bundle.manifest import ComponentSpec, TensorSpec

_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
_WIDE = np.linspace(-1, 1, 8, dtype=np.float32)


RESIDUAL = TensorSpec(name="residual", dtype="float32", shape=("batch", 4, "height/2", "width/2"))
RESIDUALS = tuple(dataclasses.replace(RESIDUAL, name=name) for name in ("down_block_0", "mid_block"))
CONTROL = (
    TensorSpec(name="controlnet_cond", dtype="float32", shape=("batch", 3, "height*8", "width*8")),
    TensorSpec(name="conditioning_scale", dtype="float32", shape=("batch", len(RESIDUALS))),
)
TYPE = TensorSpec(name="control_type", dtype="float32", shape=("batch", 2))
UNION = "controlnet_union"


def small_bundle(folder: Path, *, residual: bool = False, controlnets: Sequence[str] = ()) -> Bundle:
    """`bundles.make_bundle` with networks that can be run, and the component `step`. Only the VAE's encoder is empty.

    `residual`: the UNet has an optional input, RESIDUAL, whose means it adds. `controlnets`: components that make
    RESIDUALS for it; UNION reads two types of images.
    """
    residuals = RESIDUALS if controlnets else (RESIDUAL,) if residual else ()
    made = bundles.make_bundle(folder)
    components = dict(made.manifest.components) | {"step": write_step(folder)}
    networks.decoder(folder / "vae_decoder" / "model.onnx")
    _text_encoder(folder / "text_encoder" / "model.onnx")
    _unet(folder / "unet" / "model.onnx", residuals)
    components["unet"] = dataclasses.replace(components["unet"], optional_inputs=residuals)
    for number, name in enumerate(controlnets):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        control = (*CONTROL, TYPE) if name == UNION else CONTROL
        _controlnet(folder / name / "model.onnx", 0.2 + number / 10, control)
        components[name] = ComponentSpec(
            files=(f"{name}/model.onnx",),
            config=f"{name}/config.json",
            inputs=(*bundles.TENSORS["unet"][0], *control),
            outputs=RESIDUALS,
        )
    write_bundle(folder, model=made.manifest.model, precision="fp32", components=components, provenance={"made": "by hand"})
    return Bundle.open(folder)


def _text_encoder(path: Path) -> None:
    """Each token as a small number, in eight sizes."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["tokens"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["tokens", "last"], ["column"]),
        helper.make_node("Mul", ["column", "wide"], ["last_hidden_state"]),
    ]
    _write(path, *bundles.TENSORS["text_encoder"], nodes, last=np.array([2], np.int64), wide=_WIDE / 500)


def _unet(path: Path, residuals: Sequence[TensorSpec]) -> None:
    """The text's mean, and a little of the latents and of the time."""
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["mean"]),  # [batch, 1, 1]
        helper.make_node("Unsqueeze", ["mean", "last"], ["text"]),
        helper.make_node("Mul", ["sample", "part"], ["some"]),
        helper.make_node("Add", ["some", "text"], ["noise"]),
        helper.make_node("Unsqueeze", ["timestep", "axes_of_time"], ["column"]),
        helper.make_node("Mul", ["column", "slow"], ["time"]),
        helper.make_node("Add", ["noise", "time"], ["with_0" if residuals else "out_sample"]),
    ]
    for number, residual in enumerate(residuals, start=1):
        total = "out_sample" if number == len(residuals) else f"with_{number}"
        nodes += [
            helper.make_node("ReduceMean", [residual.name, "sides"], [f"more_{number}"]),
            helper.make_node("Add", [f"with_{number - 1}", f"more_{number}"], [total]),
        ]
    _write(
        path,
        (*bundles.TENSORS["unet"][0], *residuals),
        bundles.TENSORS["unet"][1],
        nodes,
        sides=np.array([2, 3], np.int64),
        axes=np.array([1, 2], np.int64),
        last=np.array([3], np.int64),
        axes_of_time=np.array([1, 2, 3], np.int64),
        part=np.array([0.5], np.float32),
        slow=np.array([1e-4], np.float32),
    )


def _controlnet(path: Path, part: float, control: Sequence[TensorSpec]) -> None:
    """A part of the latents and of the text's mean, and the control image, in half the size and times the scales."""
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["mean"]),
        helper.make_node("Unsqueeze", ["mean", "last"], ["text"]),
        helper.make_node("Mul", ["sample", "part"], ["some"]),
        helper.make_node("Add", ["some", "text"], ["both"]),
        helper.make_node("AveragePool", ["both"], ["half"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("AveragePool", ["controlnet_cond"], ["cells"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("ReduceMean", ["cells", "channel"], ["light"]),
        helper.make_node("Add", ["half", "light"], ["lit" if TYPE in control else "made"]),
        helper.make_node("Split", ["conditioning_scale"], ["first", "second"], axis=1, num_outputs=2),
    ]
    if TYPE in control:
        nodes += [
            helper.make_node("MatMul", [TYPE.name, "of_types"], ["of_type"]),
            helper.make_node("Unsqueeze", ["of_type", "sides"], ["strength"]),
            helper.make_node("Mul", ["lit", "strength"], ["made"]),
        ]
    for scale, residual in zip(("first", "second"), RESIDUALS, strict=True):
        nodes += [
            helper.make_node("Unsqueeze", [scale, "sides"], [f"of_{residual.name}"]),
            helper.make_node("Mul", ["made", f"of_{residual.name}"], [residual.name]),
        ]
    _write(
        path,
        (*bundles.TENSORS["unet"][0], *control),
        RESIDUALS,
        nodes,
        axes=np.array([1, 2], np.int64),
        last=np.array([3], np.int64),
        part=np.array([part], np.float32),
        of_types=np.array([[0.5], [-1.5]], np.float32),
        channel=np.array([1], np.int64),
        sides=np.array([2, 3], np.int64),
    )


def _write(
    path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], nodes: list[Any], **weights: np.ndarray
) -> None:
    initializers = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, path.parent.name, list(map(_value, inputs)), list(map(_value, outputs)), initializers)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def _value(spec: TensorSpec) -> Any:
    return helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], spec.shape)
