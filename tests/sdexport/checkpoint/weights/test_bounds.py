"""A config cannot ask for more than its weights hold, nor for code that is not this project's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.errors import CheckpointError, ExportError
from sdexport.families.components import components


@pytest.fixture
def folder(sd1_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_whole_checkpoints_are_as_deep_as_their_weights(kind: str, request: pytest.FixtureRequest) -> None:
    assert read_checkpoint(request.getfixturevalue(f"{kind}_checkpoint"), name="tiny").parts


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("text_encoder", {"num_hidden_layers": 3}),
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"layers_per_block": [1, 10**9]}),
        ("unet", {"transformer_layers_per_block": 10**9}),
        ("unet", {"transformer_layers_per_block": [[1, 10**9], 1]}),
        ("unet", {"down_block_types": ["CrossAttnDownBlock2D"] * 100_000, "block_out_channels": [32] * 100_000}),
        ("vae", {"layers_per_block": 10**9}),
        ("vae", {"down_block_types": ["DownEncoderBlock2D"] * 5}),
    ],
)
def test_layers_without_weights_are_refused_before_anything_is_made(folder: Path, part: str, changes: dict[str, Any]) -> None:
    edit(folder / part / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"{part}/config.json: ") as caught:
        read_checkpoint(folder, name="tiny")
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("text_encoder", {"num_hidden_layers": 10**5}),
        ("unet", {"layers_per_block": 10**5}),
        ("vae_decoder", {"layers_per_block": 10**5}),
        ("vae_encoder", {"layers_per_block": 10**5}),
    ],
)
def test_a_module_is_not_made_beyond_its_weights(sd1_checkpoint: Path, name: str, changes: dict[str, Any]) -> None:
    """Whichever key of the config multiplies them."""
    import dataclasses

    from sdexport.checkpoint.weights.bounds import at_most
    from sdexport.trace.to_onnx import module_shapes

    component = next(each for each in components(read_checkpoint(sd1_checkpoint, name="tiny")) if each.name == name)
    with at_most(1000, where=name):
        assert 0 < len(module_shapes(component)) <= 1000
    hostile = dataclasses.replace(component, config={**component.config, **changes})
    with at_most(1000, where=name), pytest.raises(ExportError, match="requests more weights than the 1,000 that are stored"):
        module_shapes(hostile)


def test_keys_that_make_transformers_load_code_are_dropped(folder: Path) -> None:
    from sdexport.build.files import without_code_keys
    from sdexport.families.modules import TextEncoder

    keys = {"_attn_implementation": "someone/kernels", "attn_implementation": "someone/kernels", "return_dict": False}
    keys |= {"_attn_implementation_internal": "x", "auto_map": {"AutoModel": "evil.Model"}, "output_hidden_states": True}
    config = json.loads((folder / "text_encoder" / "config.json").read_text()) | keys
    module = TextEncoder(config)
    assert module.weights.config._attn_implementation == "eager"
    assert not hasattr(module.weights.config, "auto_map")
    assert not [key for key in without_code_keys(config) if key.startswith("_attn") or key == "auto_map"]
