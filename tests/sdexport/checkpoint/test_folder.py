"""A checkpoint is read as data; whatever is wrong with it is named, all of it at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.errors import CheckpointError


@pytest.fixture
def folder(sd1_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))


def faults(folder: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, name="tiny", **options)
    assert caught.value.exit_code == 2
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (document | changes).items() if value is not ...}))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "sd1",
            {"family": "sd1", "prediction_type": "epsilon", "vae_factor": 8, "size_multiple": 16, "pad_token": "<|endoftext|>"},
        ),
        ("sd2", {"family": "sd2", "prediction_type": "epsilon", "vae_factor": 4, "size_multiple": 8, "pad_token": "!"}),
        ("sd2_v", {"family": "sd2", "prediction_type": "v_prediction", "scaling_factor": 0.18215, "zero_empty_negative": False}),
        (
            "sdxl",
            {"family": "sdxl", "vae_factor": 2, "scaling_factor": 0.13025, "zero_empty_negative": True, "default_size": (16, 16)},
        ),
    ],
)
def test_what_the_pipeline_must_know(kind: str, expected: dict[str, Any], request: pytest.FixtureRequest) -> None:
    checkpoint = read_checkpoint(request.getfixturevalue(f"{kind}_checkpoint"), name="tiny")
    assert {name: getattr(checkpoint.model, name) for name in expected} == expected
    assert checkpoint.model.license == "cc0-1.0"
    assert tuple(checkpoint.tokenizers) == (("tokenizer", "tokenizer_2") if kind == "sdxl" else ("tokenizer",))


def spoil_class(folder: Path) -> None:
    edit(folder / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"])


def spoil_library(folder: Path) -> None:
    edit(folder / "model_index.json", text_encoder=["os", "system"])


def spoil_pipeline(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="StableDiffusion3Pipeline")


def spoil_scheduler(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "KarrasVeScheduler"])


def name_scheduler_unknown_to_the_runtime(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "IPNDMScheduler"])


def spoil_prediction(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="score")


def spoil_architecture(folder: Path) -> None:
    edit(folder / "text_encoder" / "config.json", architectures=["T5EncoderModel"])


def spoil_channels(folder: Path) -> None:
    edit(folder / "unet" / "config.json", in_channels=6)


def spoil_key(folder: Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=...)


def spoil_json(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text('{"latent_channels": NaN}')


def drop_config(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()


def drop_weights(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def drop_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def cut_weights(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_weights(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")


def drop_shard(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "a.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def stray_shard(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "../../secret.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_class, "model_index.json: unet is ['diffusers', 'FluxTransformer2DModel']"),
        (spoil_library, "model_index.json: text_encoder is ['os', 'system']"),
        (spoil_pipeline, "_class_name 'StableDiffusion3Pipeline'"),
        (spoil_scheduler, "scheduler is ['diffusers', 'KarrasVeScheduler']"),
        (name_scheduler_unknown_to_the_runtime, "'IPNDMScheduler'], not one of diffusers.DDIMScheduler"),
        (spoil_prediction, "prediction_type 'score'"),
        (spoil_architecture, "text_encoder/config.json is of a T5EncoderModel"),
        (
            spoil_channels,
            "in_channels 6 with 4 latent channels is not one of 4 (text to image), 9 (inpainting), 8 (",
        ),
        (spoil_key, "unet/config.json: sample_size is missing"),
        (spoil_json, "vae/config.json is not readable: NaN"),
        (drop_config, "unet/config.json is missing"),
        (drop_weights, "vae/diffusion_pytorch_model.safetensors is missing"),
        (drop_tokenizer, "tokenizer/: has neither"),
        (cut_weights, "unet/diffusion_pytorch_model.safetensors: "),
        (pickle_weights, "--allow-pickle"),
        (drop_shard, "unet/b.safetensors is missing"),
        (stray_shard, "the shard '../../secret.safetensors' is not a .safetensors file"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_by_name(folder: Path, spoil: Callable[[Path], None], named: str) -> None:
    spoil(folder)
    assert any(named in fault for fault in faults(folder)), faults(folder)


def test_every_fault_is_named_at_once(folder: Path) -> None:
    drop_weights(folder)
    spoil_class(folder)
    spoil_scheduler(folder)
    cut_weights(folder)
    assert len(faults(folder)) == 4


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert faults(tmp_path) == ("model_index.json is missing",)


def test_fp16_prefers_its_variant_and_fp32_the_full_weights(folder: Path) -> None:
    unet = folder / "unet"
    shutil.copyfile(unet / "diffusion_pytorch_model.safetensors", unet / "diffusion_pytorch_model.fp16.safetensors")
    chosen = {
        precision: [*read_checkpoint(folder, name="tiny", precision=precision).parts["unet"].files]
        for precision in ("fp32", "fp16", "bf16")
    }
    whole = ["unet/diffusion_pytorch_model.safetensors"]
    assert chosen == {"fp32": whole, "fp16": ["unet/diffusion_pytorch_model.fp16.safetensors"], "bf16": whole}


def test_the_example_prompts_of_the_card(folder: Path) -> None:
    examples = "- text: 'a fox: in snow'\n- text: two\n    words\n- src: image.png\n- text: ''\n- text: 5\n"
    (folder / "README.md").write_text(f"---\nlicense: mit\nwidget:\n{examples}---\n# A model\n")
    model = read_checkpoint(folder, name="tiny").model
    assert (model.prompts, model.license) == (("a fox: in snow", "two words"), "mit")


@pytest.mark.parametrize(
    "card",
    [
        "",
        "---",
        "---\n- a\n---\n",
        "---\nlicense: [\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "\n" * 3_000_000,
        "---\nwidget: 3\n---\n",
        "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
    ],
    ids=range(8),
)
def test_a_card_that_says_nothing_is_no_fault(folder: Path, card: str) -> None:
    (folder / "README.md").write_text(card)
    model = read_checkpoint(folder, name="tiny").model
    assert (model.prompts, model.license) == ((), "unknown")


def test_a_licence_of_its_own_name(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: stabilityai-community\n---\n")
    assert read_checkpoint(folder, name="tiny").model.license == "stabilityai-community"


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\n# license: no\ntags:\n- license: b\nlicense: 'cc0-1.0'\n--- \nlicense: mit\n", "cc0-1.0"),
        ("\n---\nlicense: mit\n---\n", "unknown"),
        ("---\nlicense: mit\n", "unknown"),
        ("---\n" + "\n" * 2_000_000 + "license: mit\n---\n", "unknown"),  # a regular expression took 25 s for a tenth of it
        ("---\nlicense:" + " " * 2_000_000 + "mit\n---\n", "unknown"),
    ],
    ids=range(6),
)
def test_the_licence_is_looked_for_in_the_head_of_the_card(folder: Path, card: str, found: str) -> None:
    (folder / "README.md").write_bytes(card.encode())
    assert read_checkpoint(folder, name="tiny").model.license == found


@pytest.mark.parametrize("name", ["README.md", "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("special", ["fifo", "device"])
def test_pipes_and_devices_of_a_checkpoint_are_not_opened(folder: Path, name: str, special: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if special == "fifo":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    signal.alarm(60)  # opening one waits for ever, reading the other never ends
    try:
        if name == "README.md":
            assert read_checkpoint(folder, name="tiny").model.license == "unknown"
        else:
            with pytest.raises(CheckpointError, match=f"{name} is not readable: a (FIFO|device), not a regular file"):
                read_checkpoint(folder, name="tiny")
    finally:
        signal.alarm(0)


def test_pad_tokens_are_read_as_each_tokenizer_writes_them(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    tiny.write_tokenizer(folder / "tokenizer", "!")
    (folder / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": {"content": "?", "lstrip": false}}')
    assert read_checkpoint(folder, name="tiny").model.pad_token == "?"
