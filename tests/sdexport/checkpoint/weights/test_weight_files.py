"""Which of the weights that lie side by side are read: those that diffusers opens."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.checkpoint.weights.files import choose_weight_file
from sdexport.errors import CheckpointError

UNET, TEXT = "diffusion_pytorch_model", "model"
INDEX = f"{UNET}.safetensors.index.json"


@pytest.mark.parametrize(
    ("part", "precision", "names", "expected"),
    [
        ("unet", "fp32", [f"{UNET}.bin", f"{UNET}.non_ema.bin", f"{UNET}.fp32.bin"], f"{UNET}.bin"),
        ("unet", "fp32", [f"{UNET}.bin", f"{UNET}.fp16.bin"], f"{UNET}.bin"),
        ("unet", "fp16", [f"{UNET}.bin", f"{UNET}.fp16.bin"], f"{UNET}.fp16.bin"),
        ("unet", "fp32", [f"{UNET}.fp16.bin"], f"{UNET}.fp16.bin"),
        ("unet", "fp32", [f"{UNET}.non_ema.safetensors", f"{UNET}.bin"], f"{UNET}.bin"),
        ("unet", "fp32", [f"{UNET}.bin", f"{UNET}.safetensors"], f"{UNET}.safetensors"),
        ("unet", "fp32", [f"{UNET}.safetensors", INDEX], INDEX),
        ("text_encoder", "fp32", [f"{TEXT}.safetensors", f"{TEXT}.safetensors.index.json"], f"{TEXT}.safetensors"),
        ("unet", "fp16", [INDEX, f"{UNET}.fp16.safetensors"], f"{UNET}.fp16.safetensors"),
        ("unet", "fp16", [f"{UNET}.safetensors.index.fp16.json", INDEX], f"{UNET}.safetensors.index.fp16.json"),
        ("vae", "fp32", [f"{UNET}.bin.index.json", f"{UNET}.bin"], f"{UNET}.bin"),
        ("vae", "fp32", [f"{UNET}.bin.index.json"], f"{UNET}.bin.index.json"),
        ("text_encoder_2", "fp32", ["pytorch_model.bin", "pytorch_model.fp16.bin", f"{UNET}.bin"], "pytorch_model.bin"),
        ("text_encoder", "fp32", [f"{UNET}.safetensors", "flax_model.msgpack", "model.ema.safetensors"], None),
    ],
)
def test_the_choice_is_that_of_the_library_that_opens_the_network(
    part: str, precision: Any, names: list[str], expected: str
) -> None:
    for order in (names, names[::-1]):
        found = choose_weight_file(part, order, precision)
        assert (found and found.name) == expected


def test_pickles_are_chosen_only_where_they_may_be() -> None:
    assert choose_weight_file("unet", [f"{UNET}.bin"], "fp32", pickles=False) is None


@pytest.fixture
def folder(sd1_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))


def faults(folder: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, name="tiny", **options)
    return caught.value.faults


def test_what_lies_there_instead_is_named(folder: Path) -> None:
    (folder / "unet" / f"{UNET}.safetensors").rename(folder / "unet" / f"{UNET}.non_ema.safetensors")
    (fault,) = faults(folder)
    assert fault.startswith(f"unet/{UNET}.safetensors is missing: {UNET}.non_ema.safetensors exist")


def test_shards_in_pickles_are_read_by_their_index(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    whole = folder / "unet" / f"{UNET}.safetensors"
    weights = load_file(whole)
    whole.unlink()
    index = {"metadata": {}, "weight_map": {"x": "b.bin", "y": "a.bin", "z": "b.bin"}}
    (folder / "unet" / f"{UNET}.bin.index.json").write_text(json.dumps(index))
    names = sorted(weights)
    torch.save({name: weights[name] for name in names[::2]}, folder / "unet" / "a.bin")
    torch.save({name: weights[name] for name in names[1::2]}, folder / "unet" / "b.bin", _use_new_zipfile_serialization=False)
    (folder / "unet" / "c.bin").touch()
    part = read_checkpoint(folder, name="tiny", allow_pickle=True).parts["unet"]
    assert [*part.files] == ["unet/a.bin", "unet/b.bin"]
    assert sorted(part.weights) == names
    assert all(np.array_equal(part.weights[name].read(), weights[name]) for name in names)
    assert faults(folder)[0].startswith(f"unet/{UNET}.bin.index.json is a pickle")
    shutil.copyfile(folder / "unet" / "a.bin", folder / "unet" / "b.bin")
    assert faults(folder, allow_pickle=True) == (f"unet: b.bin and a.bin both hold {names[0]}",)


def test_pickles_are_checked_like_other_weights(folder: Path) -> None:
    """Their depth before a module is made, as they too have names before their weights are read."""
    torch = pytest.importorskip("torch")
    path = folder / "vae" / f"{UNET}.bin"
    torch.save({"x": torch.ones(3)}, path)
    (folder / "vae" / f"{UNET}.safetensors").unlink()
    (fault,) = faults(folder, allow_pickle=True)
    assert "none of the 1 stored weights is in it" in fault
    torch.save({"x": [torch.ones(3)]}, path)
    (fault,) = faults(folder, allow_pickle=True)
    assert fault == f"vae/{UNET}.bin: 'x': a list, not a plain tensor; 0 of 1 entries are tensors by name"


def test_two_shards_that_hold_the_same_weight_are_refused(folder: Path) -> None:
    whole = folder / "unet" / f"{UNET}.safetensors"
    shutil.copyfile(whole, folder / "unet" / "a.safetensors")
    whole.rename(folder / "unet" / "b.safetensors")
    (folder / "unet" / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert faults(folder) == ("unet: b.safetensors and a.safetensors both hold conv_in.bias",)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_weights_that_are_a_pipe_are_not_opened(folder: Path) -> None:
    path = folder / "vae" / f"{UNET}.safetensors"
    path.unlink()
    os.mkfifo(path)
    assert faults(folder) == (f"vae/{UNET}.safetensors is not a regular file",)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert faults(folder) == (f"vae/{UNET}.safetensors is not a regular file",)
