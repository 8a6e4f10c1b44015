"""Every key of a network's config.json is read, idle or refused by name; the tables are those of the libraries' own classes."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.checkpoint.configs.keys import REQUIRED
from sdexport.checkpoint.configs.tables import CONFIGS, IMAGE_PROJECTION, read_config
from sdexport.errors import CheckpointError


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (document | changes).items() if value is not ...}))


def faults(folder: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, name="tiny")
    return caught.value.faults


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(request.getfixturevalue(f"{kind}_checkpoint"), tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    "kind",
    [
        *("UNet2DConditionModel", "ControlNetModel", "ControlNetUnionModel"),
        *("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL"),
    ],
)
def test_the_table_has_every_setting_of_diffusers_class_with_its_default(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    parameters = dict(inspect.signature(getattr(diffusers, kind).__init__).parameters)
    defaults = {key: each.default for key, each in parameters.items() if key != "self"}
    table = CONFIGS[kind]
    assert set(table.read) | table.idle >= set(defaults)
    assert not set(table.read) - set(defaults), "a key that the class does not have"
    written = {key: entry.default for key, entry in table.read.items() if entry.default is not REQUIRED}
    assert written == {
        key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items() if key in written
    }


def test_the_table_of_text_encoders_has_every_setting_of_transformers_class_with_its_default() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.CLIPTextConfig()
    table = CONFIGS["CLIPTextModel"]
    own = set(config.to_dict()) - set(transformers.PreTrainedConfig().to_dict())
    assert set(table.read) | table.idle >= own
    assert {key: entry.default for key, entry in table.read.items() if key != "use_attention_mask"} == {
        key: getattr(config, key) for key in table.read if key != "use_attention_mask"
    }
    assert table.idle >= {key for key in transformers.PreTrainedConfig().to_dict() if not key.startswith("_")}


def test_the_table_of_image_encoders_has_every_setting_of_transformers_class_with_its_default() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config, table = transformers.CLIPVisionConfig(), CONFIGS["CLIPVisionModelWithProjection"]
    assert set(table.read) | table.idle >= set(config.to_dict()) - set(transformers.PreTrainedConfig().to_dict())
    assert {key: entry.default for key, entry in table.read.items() if key != IMAGE_PROJECTION} == {
        key: getattr(config, key) for key in table.read if key != IMAGE_PROJECTION
    }


def test_defaults_stand_in_for_what_an_old_file_lacks() -> None:
    found: list[str] = []
    settings = read_config("UNet2DConditionModel", {"sample_size": 64, "_class_name": "x"}, "unet/config.json", found)
    assert found == []
    assert settings["block_out_channels"] == [320, 640, 1280, 1280]
    assert settings["cross_attention_dim"] == 1280


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("unet", {"out_channels": 8}, "out_channels 8, but the VAE has latent_channels 4"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep', which is not supported; it must be null"),
        ("unet", {"num_class_embeds": 10}, "num_class_embeds is 10"),
        ("unet", {"time_cond_proj_dim": 0}, "time_cond_proj_dim is 0"),
        ("unet", {"encoder_hid_dim": 48}, "encoder_hid_dim 48, but the text's embedding is 32 wide"),
        ("unet", {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 32}, "encoder_hid_dim_type is 'image_proj'"),
        ("unet", {"encoder_hid_dim": 32, "cross_attention_dim": [32, 32]}, "is a list, but encoder_hid_dim"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim 64, but the text's embedding is 32 wide"),
        ("unet", {"cross_attention_dim": [32, 64]}, "cross_attention_dim 64, but"),
        ("unet", {"cross_attention_dim": [32]}, "cross_attention_dim has 1 entries for 2 block_out_channels"),
        ("unet", {"cross_attention_dim": "32"}, "cross_attention_dim is '32', which is not supported; it must be a whole number"),
        ("unet", {"conv_in_kernel": 4}, "conv_in_kernel is 4"),
        ("unet", {"attention_type": "gated"}, "attention_type is 'gated'"),
        ("unet", {"addition_embed_type": "text"}, "addition_embed_type is 'text'"),
        ("unet", {"down_block_types": ["CrossAttnDownBlock2D", "KDownBlock2D"]}, "down_block_types is"),
        ("unet", {"block_out_channels": [32, 10**9]}, "block_out_channels is"),
        ("unet", {"norm_num_groups": 24}, "block_out_channels 32 is not a multiple of norm_num_groups 24"),
        ("unet", {"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not a setting that sdexport knows"),
        ("unet", {"rope_theta": 10000.0}, "rope_theta 10000.0 is not a setting that sdexport knows of a UNet2DConditionModel"),
        ("vae", {"in_channels": 4}, "in_channels is 4"),
        ("vae", {"scaling_factor": "x"}, "scaling_factor is 'x'"),
        ("vae", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std is [1.0, 0.0, 1.0, 1.0]"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean has 1 numbers for 4 latent channels"),
        ("vae", {"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types has 3 entries for 4 block_out_channels"),
        ("text_encoder", {"use_attention_mask": True}, "use_attention_mask is True"),
        ("text_encoder", {"num_attention_heads": 5}, "hidden_size is not a multiple of num_attention_heads"),
        ("text_encoder", {"model_type": "t5"}, "model_type 't5' is not one of clip_text_model, clip"),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "text_encoder/config.json is of a T5EncoderModel"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(
    copy: Callable[[str], Path], part: str, changes: dict[str, Any], named: str
) -> None:
    folder = copy("sd1")
    edit(folder / part / "config.json", **changes)
    assert any(named in fault and fault.startswith(part) for fault in faults(folder)), faults(folder)


def test_a_flood_of_faults_is_cut_to_20_and_their_number(copy: Callable[[str], Path]) -> None:
    folder = copy("sd1")
    edit(folder / "unet" / "config.json", **{f"key_{number}": 1 for number in range(50_000)})
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, name="tiny")
    assert caught.value.faults[-1] == "… and 49,980 more"
    assert len(caught.value.faults) == 21
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("50,000 faults")
    assert lines[-1] == "  - … and 49,980 more"


def test_the_pooled_text_of_xl_must_fit(copy: Callable[[str], Path]) -> None:
    folder = copy("sdxl")
    edit(folder / "unet" / "config.json", addition_time_embed_dim=4)
    assert faults(folder) == (
        "unet/config.json: projection_class_embeddings_input_dim is 80, but 6 * addition_time_embed_dim 4 "
        "+ text_encoder_2's projection_dim 32 is 56",
    )


def test_the_pooled_text_of_xl_must_have_a_width(copy: Callable[[str], Path]) -> None:
    """Found by test_hostile.py: null ended in a TypeError."""
    folder = copy("sdxl")
    edit(folder / "text_encoder_2" / "config.json", projection_dim=None)
    assert faults(folder) == ("text_encoder_2/config.json: projection_dim is null: SDXL takes the projected text",)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_the_last_layer_but_one_must_exist(copy: Callable[[str], Path], part: str) -> None:
    """Found by test_hostile.py: one layer ended in a ValueError."""
    folder = copy("sdxl")
    edit(folder / part / "config.json", num_hidden_layers=1)
    assert f"{part}/config.json: num_hidden_layers is less than 2: SDXL takes the output of the last layer but one" in faults(
        folder
    )


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"decay": 0.9999, "optimization_step": 15000, "use_ema_warmup": False, "power": 0.75}),  # EMAModel's
        ("unet", {"_class_name": "MyUNet", "_name_or_path": "somewhere", "a_setting_of_tomorrow": None}),
        ("unet", {"in_channels": ..., "only_cross_attention": ..., "dual_cross_attention": ...}),
        ("vae", {"force_upcast": False, "shift_factor": 0.1159, "sample_size": 1024}),
        ("vae", {"_class_name": "AutoencoderKLTuned", "latents_mean": None, "latents_std": None}),
        ("text_encoder", {"architectures": ["CLIPTextModelWithProjection"]}),
        ("text_encoder", {"architectures": ["CLIPModel"], "top_k": 50, "return_dict": False, "torch_dtype": "float16"}),
    ],
)
def test_what_changes_no_image_is_let_pass(copy: Callable[[str], Path], part: str, changes: dict[str, Any]) -> None:
    folder = copy("sd1")
    before = read_checkpoint(folder, name="tiny")
    edit(folder / part / "config.json", **changes)
    after = read_checkpoint(folder, name="tiny")
    assert after.model == before.model
    assert {name: each.config for name, each in after.parts.items()} == {name: each.config for name, each in before.parts.items()}


def test_a_whole_clip_model_lends_its_text_encoder(copy: Callable[[str], Path]) -> None:
    folder = copy("sd1")
    path = folder / "text_encoder" / "config.json"
    before = read_checkpoint(folder, name="tiny").parts["text_encoder"].config
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 7, "logit_scale_init_value": 2.6592}
    path.write_text(json.dumps(whole | {"text_config": json.loads(path.read_text()), "vision_config": {"hidden_size": 8}}))
    assert read_checkpoint(folder, name="tiny").parts["text_encoder"].config == before
