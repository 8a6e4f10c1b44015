"""IP-Adapter files: their kinds, the names of their weights, and the files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdexport.checkpoint.weights.ip_adapter import attentions, read_ip_adapter
from sdexport.checkpoint.weights.safetensors import StoredTensor
from sdexport.errors import CheckpointError

PLACES = ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "mid_block.attentions.0")
ATTENTIONS = [f"{place}.transformer_blocks.0.attn2" for place in PLACES]
PLAIN = {"image_proj.proj.weight": (4 * 8, 6), "image_proj.proj.bias": (32,), "image_proj.norm.weight": (8,)}


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    random = np.random.default_rng(0)
    save_file({name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}, path)
    return path


def layers(*rows: int, width: int = 8) -> dict[str, tuple[int, ...]]:
    return {
        f"ip_adapter.{2 * number + 1}.{part}.weight": (count, width)
        for number, count in enumerate(rows)
        for part in ("to_k_ip", "to_v_ip")
    }


def unet(tmp_path: Path, *rows: int, width: int = 8) -> dict[str, StoredTensor]:
    shapes = {f"{place}.to_k.weight": (count, width) for place, count in zip(ATTENTIONS, rows, strict=True)}
    return {
        name: StoredTensor(file=tmp_path, dtype="F32", shape=shape, offset=0, size=0)
        for name, shape in sorted(shapes.items())  # another order than that of the layers
    }


def test_the_layers_are_numbered_down_then_up_then_the_middle(tmp_path: Path) -> None:
    adapter = read_ip_adapter(write(tmp_path / "a.safetensors", {**PLAIN, **layers(16, 24, 32)}))
    assert adapter.projection == {"kind": "plain", "tokens": 4, "input": 6, "width": 8}
    assert {*adapter.image} == {"projection.norm.weight", "projection.image_embeds.bias", "projection.image_embeds.weight"}
    stored = unet(tmp_path, 16, 24, 32)
    assert attentions(stored) == ATTENTIONS
    weights = adapter.weights(stored)
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        f"{place}.processor.to_{letter}_ip.0.weight": (rows, 8)
        for place, rows in zip(ATTENTIONS, (16, 24, 32), strict=True)
        for letter in "kv"
    }


def test_layers_of_ten_and_more_are_ordered_by_number() -> None:
    names = [f"down_blocks.{block}.attentions.0.transformer_blocks.{layer}.attn2" for block in (1, 2) for layer in range(12)]
    assert attentions(f"{name}.to_k.weight" for name in sorted(names)) == names


@pytest.mark.parametrize(
    ("rows", "width", "message"),
    [
        ((16, 24, 32), 12, "its tokens are 8 wide, those of the UNet 12: it is for another base model"),
        ((16, 24, 40), 8, "the adapter has layer 3 of another width: it is for another base model"),
    ],
)
def test_the_adapter_of_another_model_is_refused(tmp_path: Path, rows: tuple[int, ...], width: int, message: str) -> None:
    adapter = read_ip_adapter(write(tmp_path / "a.safetensors", {**PLAIN, **layers(16, 24, 32)}))
    with pytest.raises(CheckpointError, match=message):
        adapter.weights(unet(tmp_path, *rows, width=width))
    fewer = read_ip_adapter(write(tmp_path / "b.safetensors", {**PLAIN, **layers(16, 24)}))
    with pytest.raises(CheckpointError, match="2 layers, the UNet has 3"):
        fewer.weights(unet(tmp_path, 16, 24, 32))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (PLAIN, "not an IP-Adapter: it has no tensors image_proj"),
        (
            {
                "image_proj.proj.0.weight": (8, 8),
                "image_proj.proj.2.weight": (8, 8),
                "image_proj.norm.weight": (8,),
                **layers(16),
            },
            "FaceID: it takes the embedding of a face recogniser, which is not supported",
        ),
        ({"image_proj.perceiver_resampler.proj_in.weight": (8, 8), **layers(16)}, "FaceID"),
        (
            {**PLAIN, **layers(16), "ip_adapter.0.to_q_lora.down.weight": (4, 8)},
            "an IP-Adapter with a LoRA, which is not supported",
        ),
        ({"image_proj.other.weight": (8, 8), **layers(16)}, "not an IP-Adapter of a known kind"),
        ({**PLAIN, "ip_adapter.1.to_k_ip.weight": (16, 8)}, "not an IP-Adapter of a known kind"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_ip_adapter(write(tmp_path / "a.safetensors", shapes))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"image_proj": {}, "ip_adapter": {}}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a pickle, a format that can hold code: use the adapter's \.safetensors file"):
        read_ip_adapter(tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="no such file"):
        read_ip_adapter(tmp_path / "missing.safetensors")
