"""Adapter files over a model: the weights they change, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import loras
import numpy as np
import pytest

from sdruntime.adapters.describe import description
from sdruntime.adapters.file import AdapterFile
from sdruntime.adapters.lora import Lora, lora_from
from sdruntime.adapters.sets import AdapterSet, fit
from sdruntime.errors import SettingError

pytest.importorskip("safetensors")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {
    "conv_in.weight": (8, 4, 3, 3),
    "conv_in.bias": (8,),
    "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
    f"{BLOCK}.norm1.weight": (8,),
    f"{BLOCK}.norm1.bias": (8,),
    **{
        f"{BLOCK}.{attention}.{name}.weight": (8, 8 if attention == "attn1" else 768)
        for attention in ("attn1", "attn2")
        for name in ("to_k", "to_v")
    },
}
TEXT = {f"encoder.layers.0.self_attn.{name}.weight": (12, 12) for name in ("q_proj", "out_proj")}
SD1 = {"text_encoder": TEXT, "unet": UNET}
KEY = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_k"


def opened(folder: Path, tensors: loras.Tensors, metadata: dict[str, str] | None = None) -> AdapterFile:
    return AdapterFile.open(loras.write(folder / "some.safetensors", tensors, metadata))


def merged(
    file: AdapterFile, component: str, name: str, weight: np.ndarray, *, unet: float = 1.0, text: float = 1.0
) -> np.ndarray:
    return AdapterSet.of([(fit(file, SD1, "model"), unet, text)]).merged(component, name, weight)


def test_strengths_of_the_unet_and_of_the_text_encoders(tmp_path: Path) -> None:
    file = opened(tmp_path, loras.kohya(SD1))
    fitted = fit(file, SD1, "model")
    assert {component: set(layers) for component, layers in fitted.layers.items()} == {
        "text_encoder": set(TEXT),
        "unet": {name for name in UNET if ".attn" in name},
    }
    assert fitted.line(SD1) == "2 of 2 weights of text_encoder, 4 of 9 weights of unet"
    both, unet, text = (AdapterSet.of([(fitted, *strengths)]) for strengths in ((0.5, 0.5), (0.5, 0.0), (0.0, 0.5)))
    assert unet.digest_of("unet") == both.digest_of("unet") != ""
    assert text.digest_of("unet") == unet.digest_of("text_encoder") == AdapterSet.of([(fitted, 0.0, 0.0)]).digest == ""
    assert unet.weights("text_encoder") == {}
    assert len({both, unet, text, AdapterSet.of([(fitted, 0.5, 0.5)])}) == 3


def test_changes_of_several_files_are_added(tmp_path: Path) -> None:
    name, shape = f"{BLOCK}.attn1.to_k.weight", (8, 8)
    files = [fit(opened(tmp_path / str(k), {f"{KEY}.diff": np.full(shape, k, np.float32)}), SD1, "model") for k in (1, 2)]
    both = AdapterSet.of([(files[0], 0.5, 1.0), (files[1], -2.0, 1.0)])
    assert np.array_equal(both.merged("unet", name, np.ones(shape)), np.full(shape, 1 + 0.5 * 1 - 2.0 * 2, np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_stored_types(dtype: str, tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from safetensors.numpy import save_file

    numbers = np.random.default_rng(0).standard_normal((8, 8)).astype(getattr(ml_dtypes, dtype, dtype))
    save_file({f"{KEY}.diff": numbers}, tmp_path / "a.safetensors")
    file = AdapterFile.open(tmp_path / "a.safetensors")
    ours = merged(file, "unet", f"{BLOCK}.attn1.to_k.weight", np.zeros((8, 8)))
    assert np.array_equal(ours, numbers.astype(np.float32))


def test_norms_and_biases(tmp_path: Path) -> None:
    stem = f"lora_unet_{BLOCK.replace('.', '_')}_norm1"
    file = opened(
        tmp_path, {f"{stem}.w_norm": np.full(8, 2), f"{stem}.b_norm": np.full(8, 3), "lora_unet_conv_in.diff_b": np.ones(8)}
    )
    ones = np.ones(8, np.float32)
    assert list(merged(file, "unet", f"{BLOCK}.norm1.weight", ones)) == [3] * 8
    assert list(merged(file, "unet", f"{BLOCK}.norm1.bias", ones)) == [4] * 8
    assert list(merged(file, "unet", "conv_in.bias", ones)) == [2] * 8


def test_an_alpha_for_some_modules(tmp_path: Path) -> None:
    key, module = f"unet.{BLOCK}.attn1.to_k", f"{BLOCK}.attn1.to_k"
    down, up = loras.pair(np.random.default_rng(0), (8, 8), 2)
    settings = {"unet.lora_alpha": 1, "unet.alpha_pattern": {"attn1.to_k": 6}}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    file = opened(tmp_path, {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, metadata)
    assert np.allclose(merged(file, "unet", f"{module}.weight", np.zeros((8, 8))), 3 * up @ down, rtol=1e-6)


def test_another_base_model(tmp_path: Path) -> None:
    wide = {name: (shape[0], 2048) if ".attn2." in name else shape for name, shape in UNET.items()}
    tensors = loras.kohya({"unet": wide})
    with pytest.raises(SettingError, match=r"12 of its 12 keys match, but 2 layers .* made for SDXL") as caught:
        fit(opened(tmp_path, tensors), SD1, "my model")
    assert "does not fit the model my model: " in str(caught.value)
    assert "attn2_to_k: " in str(caught.value)
    tensors = {f"transformer.single_blocks.0.linear1.lora_{x}.weight": np.ones((4, 4)) for x in "AB"}
    file = opened(tmp_path, tensors)
    with pytest.raises(SettingError, match="0 of its 2 keys match; it looks made for Flux"):
        fit(file, SD1, "my model")


@pytest.mark.parametrize("key", ["lora_unet_nowhere.lora_up.weight", f"{KEY}.oft_blocks", "x"])
def test_unknown_keys(key: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="12 of its 13 keys match") as caught:
        fit(opened(tmp_path, loras.kohya({"unet": UNET}) | {key: np.ones((4, 4))}), SD1, "model")
    assert f"unknown key {key}" in str(caught.value)


def pickle(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(100))


def cut_off(path: Path) -> None:
    path.write_bytes(loras.write(path, loras.kohya(SD1)).read_bytes()[:-4])


def empty(path: Path) -> None:
    header = b'{"__metadata__": {}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def whole_numbers(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({f"{KEY}.diff": np.ones((8, 8), np.int8)}, path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (pickle, "a pickle, which can run code"),
    "old pickle": (lambda path: path.write_bytes(b"\x80\x02}q" + bytes(100)), "a pickle, which can run code"),
    "cut off": (cut_off, "cut off, or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    "no tensors": (empty, "no tensors"),
    "types": (whole_numbers, "I8 are not supported"),
    "missing": (lambda path: None, "no such file"),
    "folder": (Path.mkdir, "a folder, not a regular file"),
    "FIFO": (os.mkfifo, "a FIFO, not a regular file"),
    "header": (lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + bytes(50)), "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    BAD[name][0](path)
    with pytest.raises(SettingError, match=BAD[name][1]) as caught:
        AdapterFile.open(path)
    assert str(caught.value).startswith(f"LoRA {path}: ")


def test_a_file_that_changes(tmp_path: Path) -> None:
    file = opened(tmp_path, loras.kohya(SD1))
    opened(tmp_path, loras.kohya(SD1, alpha=1.0))
    with pytest.raises(SettingError, match="has changed since it was opened"):
        merged(file, "unet", f"{BLOCK}.attn1.to_k.weight", np.zeros((8, 8)))


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    file = opened(tmp_path, {f"{KEY}.diff": np.full((8, 8), np.nan)})
    with pytest.raises(SettingError, match="NaN or infinity"):
        merged(file, "unet", f"{BLOCK}.attn1.to_k.weight", np.zeros((8, 8)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, None)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8, None)),
        ("a:b.safetensors:0.8:-1", ("a:b.safetensors", 0.8, -1.0)),
        ("some:where", ("some:where", 1.0, None)),
    ],
)
def test_a_file_and_its_strengths(text: str, expected: tuple[str, float, float | None]) -> None:
    read = lora_from(text)
    assert (read.path, read.scale, read.text_scale) == expected


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 101, True, "1", None])
def test_strengths_out_of_range(scale: object) -> None:
    with pytest.raises(SettingError, match="lora a: scale"):
        Lora("a", scale)  # type: ignore[arg-type]


def test_what_a_file_says_about_itself(tmp_path: Path) -> None:
    tags = {"ss_tag_frequency": json.dumps({"10_x": {"watercolor": 10, "sks fox": 12}}), "ss_output_name": "foxes"}
    described = description(opened(tmp_path, loras.kohya(SD1, rank=2), tags))
    assert described["base"] == "SD 1.x"
    assert described["ranks"] == {"2": 6}
    assert described["kinds"] == {"lora": 6}
    assert described["keys"] == {"unet": 12, "text_encoder": 6}
    assert described["trigger_words"] == ["sks fox", "watercolor"]
    assert (described["title"], described["unknown_keys"]) == ("foxes", [])
