"""A small bundle in whose UNet a fault can be planted, and the walk that is to find it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from trt.small import small_bundle

from sdexport.verification.walk import WalkJob
from sdruntime.bundle.bundle import Bundle, file_spec
from sdruntime.bundle.manifest import save_manifest
from sdruntime.verification.golden import Golden, cases_of, digest_of, sample_of, write_golden
from sdruntime.verification.tolerance import TOLERANCES

NODES = ["mean", "text", "some", "noise", "column", "time", "out_sample"]  # of the UNet, by their outputs
SHAPES = {"size": "64x64:64x64:192x192", "batch": "1:1:4", "guidance": "any"}  # of engines for it


def proved_bundle(folder: Path) -> Path:
    """The bundle made by hand with reference outputs of its UNet, whose numbers the walk does not read."""
    made = small_bundle(folder)
    case = next(each for each in cases_of(made.manifest, {"text_encoder": 500}) if each.component == "unet")
    array = np.zeros((case.dims["batch"], 4, case.dims["height"], case.dims["width"]), np.float32)
    golden = Golden(
        checkpoint="0" * 64,
        reference={},
        cases=(dataclasses.replace(case, outputs={"out_sample": digest_of(array)}),),
        drawings=(),
        tolerances=TOLERANCES,
    )
    return write_golden(made, golden, {case.key("out_sample"): sample_of(array, case.seed)}).folder


def walk_job(bundle: Path, reference: Path) -> WalkJob:
    engine = next(iter(Bundle.open(bundle).manifest.engines), None)
    return WalkJob(
        bundle=str(bundle),
        reference=str(reference),
        component="unet",
        case="small",
        engine=engine.name if engine else "",
        backend=engine.backend if engine else "",
    )


def scale(bundle: Path, weight: str, by: float) -> None:
    """Multiply a weight of the UNet."""
    path = bundle / "unet" / "model.onnx"
    model = onnx.load(str(path))
    tensor = next(each for each in model.graph.initializer if each.name == weight)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(by), weight))
    onnx.save(model, str(path))
    manifest = Bundle.open(bundle).manifest
    save_manifest(bundle, dataclasses.replace(manifest, files=dict(manifest.files) | {"unet/model.onnx": file_spec(path)}))
