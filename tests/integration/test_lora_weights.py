"""The weights that LoRA files make, against those of diffusers' load_lora_weights and fuse_lora.

Nothing is exported. diffusers needs peft for LoRAs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loras
import numpy as np
import pytest

from sdruntime.adapters.file import AdapterFile
from sdruntime.adapters.names import original_names
from sdruntime.adapters.sets import AdapterSet, fit

pytest.importorskip("diffusers")
pytest.importorskip("peft")
NETWORKS = ("text_encoder", "text_encoder_2", "unet")
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


def convolutions(module: str, shape: tuple[int, ...]) -> bool:
    return any(part in module for part in ("proj_in", "proj_out", "resnets", "samplers", "ff.net", "fc1", "conv_in", "conv_out"))


def original(shapes: Shapes) -> loras.Tensors:
    """kohya's files of SDXL: the blocks of the UNet are numbered as in the original code."""
    names = original_names(shapes["unet"])
    renamed = {}
    for key, values in loras.kohya(shapes).items():
        stem, dot, ending = key.partition(".")
        module = next((name for name in names if stem == loras.kohya_stem("unet", name, two=True)), None)
        renamed[f"lora_unet_{names[module].replace('.', '_')}{dot}{ending}" if module else key] = values
    return renamed


FORMATS: Mapping[str, Callable[[Shapes], tuple[loras.Tensors, dict[str, str]]]] = {
    "kohya": lambda shapes: (loras.kohya(shapes, alpha=3.0), {}),
    "kohya, no alpha": lambda shapes: (loras.kohya(shapes, alpha=None), {}),
    "kohya, numbered": lambda shapes: (original(shapes), {}),
    "LoCon": lambda shapes: (loras.kohya(shapes, wanted=convolutions), {}),
    "peft": lambda shapes: (loras.peft(shapes), {}),
    "peft, alpha": lambda shapes: (loras.peft(shapes), loras.peft_metadata(shapes, 4, 3)),
    "peft, rslora": lambda shapes: (loras.peft(shapes), loras.peft_metadata(shapes, 4, 3, use_rslora=True)),
    "processors": lambda shapes: (loras.processors(shapes), {}),
}
CASES = [("sd1", "kohya"), ("sd1", "LoCon"), ("sdxl", "kohya, numbered"), ("sdxl", "peft, alpha")]
MORE = [("sd1", name) for name in FORMATS if name != "kohya, numbered"] + [("sdxl", name) for name in FORMATS]
CASES += [pytest.param(*case, marks=pytest.mark.full) for case in MORE if case not in CASES]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_weights_equal_those_of_diffusers(
    kind: str, name: str, sd1_checkpoint: Path, sdxl_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = {"sd1": sd1_checkpoint, "sdxl": sdxl_checkpoint}[kind]
    before = weights(opened(checkpoint))
    shapes = {network: {key: array.shape for key, array in of.items()} for network, of in before.items()}
    path = loras.write(tmp_path / "a.safetensors", *FORMATS[name](shapes))
    ours = AdapterSet.of([(fit(AdapterFile.open(path), shapes, kind), 0.7, 0.7)])
    pipe = opened(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(path)
        pipe.fuse_lora(lora_scale=0.7)
        pipe.unload_lora_weights()
    for network, theirs in weights(pipe).items():
        changed = ours.weights(network)
        moved = {key for key, array in theirs.items() if not np.array_equal(array, before[network][key])}
        assert changed.keys() == moved
        assert moved
        for key in moved:
            merged = ours.merged(network, key, before[network][key])
            assert np.abs(merged - theirs[key]).max() <= 1e-5 * np.abs(theirs[key]).max()


def opened(checkpoint: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)


def weights(pipe: Any) -> dict[str, dict[str, np.ndarray]]:
    networks = {name: getattr(pipe, name, None) for name in NETWORKS}
    return {
        name: {key: tensor.numpy().copy() for key, tensor in network.state_dict().items()}
        for name, network in networks.items()
        if network is not None
    }
