"""The engine inspector's JSON, in the spellings of TensorRT 10 and 11."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdruntime.backends.trt.inspection import inspection_from_json


def layer(name: str, kind: str, types: dict[str, str], tactic: str = "") -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Outputs": [{"Name": "out", **types}], "TacticName": tactic}


def spelt(version: int, name: str) -> dict[str, str]:
    formats = {"half": "Half", "float": "Float"}
    if version < 11:
        return {"Format/Datatype": f"Channel major {formats[name]} format"}
    return {"Format": "Channel major", "Datatype": formats[name]}


@pytest.mark.parametrize("version", [10, 11])
def test_layers_in_float32_and_attentions_that_were_not_fused_are_told(version: int) -> None:
    half, single = spelt(version, "half"), spelt(version, "float")
    layers = [
        layer("conv_in", "CaskConvolution", half),
        layer("_gemm_mha_v2_0x1", "kgen", half),
        layer("__myl_Fc_1", "kgen", half, tactic="sm80_fmha_v2_flash"),
        layer("time_embedding", "gemm", single),
        layer("Reformatting CopyNode for Output", "Reformat", single),
        layer("weights", "Constant", single),
    ]
    found = inspection_from_json(json.dumps({"Layers": layers, "Bindings": []}), attentions=3)
    assert found.single == ("time_embedding",)
    assert found.fused == 2
    assert list(found.notes("unet")) == [
        "unet: 1 layers compute in float32: time_embedding",
        "unet: 2 of 3 attentions were fused: the others write their scores to memory, which is slow and large",
    ]


def test_an_engine_that_is_as_it_should_be_gives_no_note() -> None:
    layers = [layer("fused attention", "kgen", spelt(11, "half"))]
    assert list(inspection_from_json(json.dumps({"Layers": layers}), attentions=1).notes("unet")) == []


def test_an_engine_that_tells_names_only_says_nothing_of_types() -> None:
    found = inspection_from_json(json.dumps({"Layers": ["conv_in", "mha"]}), attentions=0)
    assert (found.single, found.fused) == ((), 0)
