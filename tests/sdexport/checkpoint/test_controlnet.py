"""ControlNets that are added to a checkpoint: single files are as their folders, and what does not fit is one clear error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from once import once
from safetensors.numpy import save_file
from single_files import controlnet_tensors

from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.checkpoint.overrides import Overrides, named_controlnets
from sdexport.checkpoint.weights.names import match_weights
from sdexport.errors import CheckpointError
from sdexport.families.components import components
from sdexport.trace.cache import trace_key
from sdruntime.errors import SettingError

KINDS: tuple[tiny.Kind, ...] = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the folder of a ControlNet for it."""
    checkpoint: Path = request.getfixturevalue(f"{request.param}_checkpoint")
    written = once(
        tmp_path_factory, f"checkpoints/controlnet-{request.param}", lambda folder: tiny.write_controlnet(folder, checkpoint)
    )
    return checkpoint, written


def read(checkpoint: Path, net: Path, name: str = "controlnet") -> Checkpoint:
    return read_checkpoint(checkpoint, name="x", overrides=Overrides(controlnets={name: str(net)}))


def saved(tensors: Mapping[str, Any], path: Path) -> Path:
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def test_a_single_file_is_the_same_controlnet_as_its_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In the original layout, alone or in a file of the whole model, and in that of diffusers."""
    from safetensors.numpy import load_file

    checkpoint, folder = pair
    expected = read(checkpoint, folder)
    original = {name: tensor.numpy() for name, tensor in controlnet_tensors(folder).items()}
    prefixed = {f"control_model.{name}": tensor for name, tensor in original.items()}
    rest = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32)}
    files = {
        "prefixed": prefixed,
        "whole": prefixed | rest,
        "alone": original,
        "diffusers": load_file(folder / "diffusion_pytorch_model.safetensors"),
    }
    for layout, tensors in files.items():
        got = read(checkpoint, saved(tensors, tmp_path / f"{layout}.safetensors"))
        assert [trace_key(each) for each in components(got)] == [trace_key(each) for each in components(expected)], layout
        mine, theirs = (each.parts["controlnet"].weights for each in (got, expected))
        assert all(path.is_file() for path in got.source.inputs(got.parts).values())
        matched = match_weights({name: tensor.shape for name, tensor in theirs.items()}, mine, where=layout)
        assert len(matched) == len(mine) > 50
        assert all(np.array_equal(tensor.read(), theirs[name].read()) for name, tensor in matched.items()), layout


def test_a_pickle_needs_a_flag(sd1_checkpoint: Path, sd1_controlnets: Path, tmp_path: Path) -> None:
    import torch

    file = tmp_path / "control.pth"
    torch.save({f"control_model.{name}": tensor for name, tensor in controlnet_tensors(sd1_controlnets / "canny").items()}, file)
    overrides = Overrides(controlnets={"controlnet": str(file)})
    with pytest.raises(CheckpointError, match="allow-pickle"):
        read_checkpoint(sd1_checkpoint, name="x", overrides=overrides)
    assert read_checkpoint(sd1_checkpoint, name="x", overrides=overrides, allow_pickle=True).parts["controlnet"].weights


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["lora_controlnet", "input_hint_block.0.weight"], "controlnet: not supported: a ControlLoRA (lora_controlnet)"),
        (["lllite_unet_input_blocks_1_1.depth1.0.weight"], "controlnet: not supported: a ControlNet-LLLite"),
        (["task_embedding", "controlnet_cond_embedding.conv_in.weight"], "controlnet: not supported: a ControlNet-Union"),
        (["body.0.block1.weight"], "controlnet: not supported: a T2I-Adapter"),
        (["lora_unet_x.lora_down.weight"], "controlnet: not supported: a LoRA (--lora)"),
        (["model.diffusion_model.out.2.bias"], "controlnet: not a ControlNet: neither zero_convs.0.0.weight nor"),
    ],
)
def test_other_networks_are_refused_by_name(names: list[str], told: str, sd1_checkpoint: Path, tmp_path: Path) -> None:
    file = saved({name: np.zeros((2, 2), np.float32) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read(sd1_checkpoint, file)
    assert [fault[: len(told)] for fault in caught.value.faults] == [told]


def test_a_file_with_a_weight_less_names_it(sd1_checkpoint: Path, sd1_controlnets: Path, tmp_path: Path) -> None:
    tensors = {f"control_model.{name}": tensor for name, tensor in controlnet_tensors(sd1_controlnets / "canny").items()}
    del tensors["control_model.zero_convs.1.0.bias"]
    tensors["control_model.input_hint_block.2.weight"] = np.zeros((8, 8, 1, 1), np.float32)
    with pytest.raises(CheckpointError) as caught:
        read(sd1_checkpoint, saved(tensors, tmp_path / "less.safetensors"))
    missing, wrong = caught.value.faults
    assert missing == "controlnet: 1 missing name: zero_convs.1.0.bias"
    assert wrong.startswith("controlnet: 1 wrong shape: input_hint_block.2.weight [8, 8, 1, 1], where [8, 8, 3, 3] fits")


@pytest.mark.parametrize("as_file", [False, True])
def test_a_controlnet_of_another_family_or_width_is_refused_with_both(
    as_file: bool, sd1_checkpoint: Path, sd1_controlnets: Path, sdxl_checkpoint: Path, tmp_path: Path
) -> None:
    from diffusers import ControlNetModel

    def given(folder: Path) -> Path:
        return saved(controlnet_tensors(folder), tmp_path / f"{folder.name}.safetensors") if as_file else folder

    with pytest.raises(CheckpointError, match="is for another model family"):
        read(sdxl_checkpoint, given(sd1_controlnets / "canny"))
    wide = dict(ControlNetModel.load_config(sd1_controlnets / "canny")) | {"block_out_channels": (32, 96), "norm_num_groups": 8}
    ControlNetModel.from_config(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError) as caught:
        read(sd1_checkpoint, given(tmp_path / "wide"))
    [fault] = caught.value.faults
    assert "block_out_channels of the ControlNet and of the UNet are [32, 96] with" in fault
    assert fault.endswith("this ControlNet is for another model family")


def test_a_folder_of_another_network_is_refused_by_its_class(sd1_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "T2IAdapter"}')
    with pytest.raises(CheckpointError) as caught:
        read(sd1_checkpoint, tmp_path)
    [fault] = caught.value.faults
    assert fault.startswith(
        "controlnet/config.json: _class_name 'T2IAdapter', which is for --t2i-adapter, is not ControlNetModel"
    )
    (tmp_path / "config.json").write_text((sd1_checkpoint / "vae" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="_class_name 'AutoencoderKL' is not ControlNetModel"):
        read(sd1_checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match="--controlnet: no such folder or file"):
        read(sd1_checkpoint, tmp_path / "none")


def test_several_controlnets_have_names_of_their_own() -> None:
    assert named_controlnets(["a/b", "pose=c"]) == {"controlnet": "a/b", "controlnet_pose": "c"}
    with pytest.raises(SettingError, match="the second one pose: give each of several a name"):
        named_controlnets(["pose=a", "pose=b"])
    with pytest.raises(SettingError, match="the second one without a name: give each of several a name, as NAME=MODEL"):
        named_controlnets(["a", "b"])
    with pytest.raises(SettingError, match=r"expected MODEL or NAME=MODEL"):
        named_controlnets([""])


def test_networks_of_both_kinds_are_named_apart() -> None:
    assert named_controlnets(["canny=a", "b"], ["pose=c", "d"]) == {
        "controlnet_canny": "a",
        "controlnet": "b",
        "t2i_adapter_pose": "c",
        "t2i_adapter": "d",
    }
    with pytest.raises(SettingError, match="--t2i-adapter 'canny=b': the second one canny: give each of several a name"):
        named_controlnets(["canny=a"], ["canny=b"])
