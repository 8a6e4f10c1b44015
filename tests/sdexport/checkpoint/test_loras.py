"""LoRAs merged into a checkpoint's weights while they are read."""

from __future__ import annotations

from pathlib import Path

import loras
import numpy as np
import pytest

from sdexport.build.events import ExportOptions
from sdexport.build.provenance import digest_of_inputs, without_paths
from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.checkpoint.overrides import NO_OVERRIDES, Overrides
from sdexport.checkpoint.weights.loras import resolved
from sdexport.families.components import components
from sdexport.verification.golden import checkpoint_hash
from sdruntime.adapters.file import AdapterFile
from sdruntime.adapters.sets import AdapterSet, fit
from sdruntime.errors import SettingError


def read(path: Path, *texts: str) -> Checkpoint:
    overrides = Overrides(loras=resolved(texts)) if texts else NO_OVERRIDES
    return read_checkpoint(path, name="model", overrides=overrides)


def shapes_of(checkpoint: Checkpoint) -> dict[str, dict[str, tuple[int, ...]]]:
    parts = {name: part for name, part in checkpoint.parts.items() if name != "vae"}
    return {name: {key: tensor.shape for key, tensor in part.weights.items()} for name, part in parts.items()}


def test_weights_are_merged_when_they_are_read(sd1_checkpoint: Path, tmp_path: Path) -> None:
    plain = read(sd1_checkpoint)
    shapes = shapes_of(plain)
    path = loras.write(tmp_path / "style.safetensors", loras.kohya(shapes))
    changed = read(sd1_checkpoint, f"{path}:0.5:-1")
    expected = AdapterSet.of([(fit(AdapterFile.open(path), shapes, "model"), 0.5, -1.0)])
    for name, part in changed.parts.items():
        merged = expected.weights(name) if name != "vae" else {}
        for key, tensor in part.weights.items():
            before = plain.parts[name].weights[key].read()
            after = expected.merged(name, key, before) if key in merged else before
            assert np.array_equal(tensor.read(), after)
            assert np.array_equal(before, after) == (key not in merged)
    assert changed.changes[len(plain.changes) :] == (
        "LoRA style.safetensors at 0.5 (text -1): changes 8 of 36 weights of text_encoder, 32 of 208 weights of unet",
    )
    other = read(sd1_checkpoint, f"{path}:0.5")
    options = ExportOptions(loras=(f"{path}:0.5",))
    assert len({checkpoint_hash(each) for each in (plain, changed, other)}) == 3
    assert len({digest_of_inputs(each, components(each), options, []) for each in (plain, changed, other)}) == 3
    assert without_paths(options, None, None, {}).loras == ("style.safetensors:0.5:0.5",)


def test_a_lora_of_another_base(sd1_checkpoint: Path, sdxl_checkpoint: Path, tmp_path: Path) -> None:
    path = loras.write(tmp_path / "xl.safetensors", loras.kohya(shapes_of(read(sdxl_checkpoint))))
    with pytest.raises(SettingError, match=r"does not fit the model model: \d+ of its 252 keys match.* made for SDXL|width 64"):
        read(sd1_checkpoint, str(path))
