"""Which of the weights that lie side by side are read: those that diffusers opens."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

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
    (folder / "unet" / f"{UNET}.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"x": "b.bin", "y": "a.bin", "z": "b.bin"}}
    (folder / "unet" / f"{UNET}.bin.index.json").write_text(json.dumps(index))
    for name in ("a.bin", "b.bin", "c.bin"):
        (folder / "unet" / name).touch()
    part = read_checkpoint(folder, name="tiny", allow_pickle=True).parts["unet"]
    assert (part.pickled, [*part.files]) == (True, ["unet/a.bin", "unet/b.bin"])
    assert "is a pickle" in faults(folder)[0]


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


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickles(folder: Path) -> dict[str, bytes]:
    """Files that are no state dict, each in its own way."""
    import io
    import pickle

    import torch

    def saved(value: Any, **options: Any) -> bytes:
        file = io.BytesIO()
        torch.save(value, file, **options)
        return file.getvalue()

    whole = saved({"x": torch.ones(3)})
    return {
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "plain pickle": pickle.dumps({"x": [1.0]}),
        "cut": whole[: len(whole) // 2],
        "list": saved([torch.ones(3)]),
        "number": saved(7),
        "no tensors": saved({"epoch": 3}),
        "nested": saved({"state_dict": {"x": torch.ones(3)}}),
        "numbered": saved({1: torch.ones(3)}),
        "nothing": saved({}),
        "sparse": saved({"x": torch.eye(3).to_sparse()}),
        "complex": saved({"x": torch.ones(3, dtype=torch.complex128)}),
        "module": saved(torch.nn.Linear(2, 2)),
        "code": saved({"x": Planted(folder / "planted")}),
    }


def test_a_pickle_that_is_no_state_dict_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from sdexport.checkpoint.weights.unpickle import convert_pickles

    for name, data in pickles(tmp_path).items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            convert_pickles([path], tmp_path / "out.safetensors")
        assert str(caught.value).startswith(f"{name}.bin: "), name
        assert len(str(caught.value)) < 1000, name
    assert not (tmp_path / "planted").exists()


def test_the_former_format_of_torch_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from sdexport.checkpoint.weights.unpickle import convert_pickles

    for number, options in enumerate(({}, {"_use_new_zipfile_serialization": False})):
        torch.save({f"x{number}": torch.full((3,), 2.0 + number)}, tmp_path / f"{number}.bin", **options)
    found = convert_pickles([tmp_path / "0.bin", tmp_path / "1.bin"], tmp_path / "out.safetensors")
    assert {name: tensor.read().tolist() for name, tensor in found.items()} == {"x0": [2.0] * 3, "x1": [3.0] * 3}
